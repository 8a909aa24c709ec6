"""Experts whose weights are in host memory and are copied to the device when a batch chooses them.

This does not use accelerate's hooks, because they copy a module whenever it is called, and a dispatch calls every
expert, chosen or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .errors import InputError
from .experts import Experts
from .experts.adapter import Adapters
from .experts.ffn import UpcycledFFN
from .moe_vit import AnyMoE, MoEViT
from .quantised import Matrix
from .routing import Assignments


@dataclass
class Traffic:
    """Statistics of an offloaded model: numbers of experts, counted in every place, and bytes of their weights.

    kept: permanently on the device. offloaded: in host memory. copied: total copies to the device so far.
    """

    kept: int = 0
    kept_bytes: int = 0
    offloaded: int = 0
    offloaded_bytes: int = 0
    copies: int = 0
    copied_bytes: int = 0

    def copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of the host on the device, ordered before what uses it there.

        Copy and use are on the current stream, and the host's tensor is never written to: nothing needs an event.
        """
        self.copied_bytes += tensor.nbytes
        return tensor.to(device, non_blocking=True)


class Stays(nn.Module):
    """A part whose parameters stay in host memory wherever the model goes; page-locked if `device` is a GPU.

    They remain part of the model's parameters and state.
    """

    def __init__(self, part: nn.Module, device: torch.device, traffic: Traffic):
        super().__init__()
        self.part, self.device, self.traffic = part, device, traffic
        if device.type == "cuda":
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.data = tensor.data.pin_memory()

    def _apply(self, fn, recurse: bool = True):
        return self


class Offloaded(Stays):
    """An expert (B, D) -> (B, C) that is copied to the device for each batch that has rows for it."""

    def forward(self, x_BD: Tensor) -> Tensor:
        traffic, part = self.traffic, self.part
        if not x_BD.shape[0]:
            return part(x_BD.cpu()).to(self.device)
        traffic.copies += 1
        tensors = (*part.named_parameters(), *part.named_buffers())
        return functional_call(part, {name: traffic.copy(tensor, self.device) for name, tensor in tensors}, (x_BD,))


class OffloadedAdapters(Stays):
    """The adapters of one block; each batch copies those that it chooses and that are not kept.

    kept: the experts that stay on the device. Same as `Adapters` in evaluation mode, without the hidden units of
    experts that have no token, which would have weight 0.
    """

    part: Any

    def __init__(self, part: Any, device: torch.device, traffic: Traffic, kept: Sequence[int]):
        super().__init__(part, device, traffic)
        # An expert's columns of up are stored as rows, which are contiguous and are copied at once.
        up_HD = part.up.detach().T.contiguous()
        up_HD = up_HD.pin_memory() if device.type == "cuda" else up_HD
        part.up.data = up_HD.T
        together = (part.down.weight.detach(), part.down.bias.detach(), up_HD)
        self._host = list(zip(*(tensor.split(part.widths) for tensor in together), strict=True))
        self._kept = {expert: [tensor.to(device) for tensor in self._host[expert]] for expert in kept}

    def forward(self, x_BTD: Tensor, dense_BTD: Tensor, assignments: Assignments) -> Tensor:
        """dense + sum_e weight_e adapter_e(x), in the number format of x."""
        chosen = [expert for expert, count in enumerate(assignments.counts_E.tolist()) if count]
        if not chosen:
            return dense_BTD
        parts = [self._kept.get(expert) or self._brought(expert) for expert in chosen]
        dtype = x_BTD.dtype
        down_HD, bias_H, up_HD = (torch.cat(column).to(dtype) for column in zip(*parts, strict=True))
        weights_BTE = assignments.weights_BE.view(x_BTD.shape[0], -1, assignments.num_experts)
        units_H = torch.tensor([expert for expert in chosen for _ in range(self.part.widths[expert])])
        weights_BTH = weights_BTE.to(dtype).index_select(-1, units_H.to(x_BTD.device))
        hidden_BTH = self.part.activation(F.linear(x_BTD, down_HD, bias_H))
        return dense_BTD + (hidden_BTH * weights_BTH) @ up_HD

    def _brought(self, expert: int) -> list[Tensor]:
        self.traffic.copies += 1
        return [self.traffic.copy(tensor, self.device) for tensor in self._host[expert]]

    def matrices(self) -> list[Matrix]:
        """The matrices of all experts of the block."""
        return self.part.matrices()

    def parameters_of(self, expert: int) -> int:
        """Number of weights and biases of one expert."""
        return self.part.parameters_of(expert)

    def flops_of(self, expert: int) -> int:
        """Floating-point operations of one expert on one token; a multiply-add counts as two."""
        return self.part.flops_of(expert)


def offload(model: AnyMoE, device: torch.device, memory: int = 0) -> Traffic:
    """Leave the routed experts of a model on the CPU in host memory, and move everything else to `device`.

    memory: bytes of device memory for the experts that training used most. The outputs of the model stay the same; it
    is only for evaluation. A mixture on top of a ViT with experts inside is moved completely. Raises InputError for
    experts inside a ViT of a kind from outside this library, and for adapters in fewer bits.
    """
    traffic = Traffic()
    mixtures: Any = model.mixtures[: len(model.blocks)] if isinstance(model, MoEViT) else model.mixtures
    for mixture in mixtures:
        _check(mixture)
    kept = _most_used(mixtures, memory)
    for place, mixture in enumerate(mixtures):
        here = [expert for expert in range(len(mixture.usage_E)) if (place, expert) in kept]
        for expert, size in enumerate(_sizes(mixture)):
            if expert in here:
                traffic.kept, traffic.kept_bytes = traffic.kept + 1, traffic.kept_bytes + size
            else:
                traffic.offloaded, traffic.offloaded_bytes = traffic.offloaded + 1, traffic.offloaded_bytes + size
        _offload_mixture(mixture, device, traffic, here)
    model.to(device)
    return traffic


def _check(mixture: Any) -> None:
    """Raise InputError for experts that cannot be offloaded."""
    experts: Any = mixture.experts
    if not isinstance(mixture.experts, Experts | Adapters | UpcycledFFN):
        raise InputError(f"experts of kind {type(experts).__name__} cannot be offloaded: leave out --offload")
    if isinstance(mixture.experts, Adapters) and any(map(parametrize.is_parametrized, experts.modules())):
        raise InputError("adapters stored in fewer bits cannot be offloaded: leave out --offload")


def _offload_mixture(mixture: Any, device: torch.device, traffic: Traffic, kept: Sequence[int]) -> None:
    experts: Any = mixture.experts
    if isinstance(mixture.experts, Adapters):
        mixture.experts = OffloadedAdapters(experts, device, traffic, kept)
        return
    inside = isinstance(mixture.experts, UpcycledFFN)
    # The only dispatch mode that gives an expert just its own rows, and skips experts without rows.
    (experts if inside else mixture).dispatch_mode = "sorted"
    members: Any = experts.copies if inside else experts
    for expert in range(len(members)):
        if expert not in kept:
            members[expert] = Offloaded(members[expert], device, traffic)


def _sizes(mixture: Any) -> list[int]:
    """Bytes of the weights of each expert of a mixture."""
    experts: Any = mixture.experts
    if isinstance(mixture.experts, Adapters):
        return [4 * experts.parameters_of(expert) for expert in range(len(mixture.usage_E))]
    experts = experts.copies if isinstance(mixture.experts, UpcycledFFN) else experts
    return [sum(tensor.nbytes for tensor in expert.parameters()) for expert in experts]


def _most_used(mixtures: Sequence[Any], memory: int) -> set[tuple[int, int]]:
    """The (place, expert) pairs in order of training usage that fit into `memory` bytes; too large ones are skipped."""
    usage = [(-int(count), place, e) for place, m in enumerate(mixtures) for e, count in enumerate(m.usage_E.tolist())]
    sizes, chosen = [_sizes(mixture) for mixture in mixtures], set()
    for _, place, expert in sorted(usage):
        if sizes[place][expert] <= memory:
            memory -= sizes[place][expert]
            chosen.add((place, expert))
    return chosen
