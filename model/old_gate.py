"""Frozen copies of the gates at the start of training, for the old_gate loss."""

import copy

import torch
from torch import Tensor, nn

from .moe_vit import AnyMoE
from .routers.base import GatedRouter


class OldGate(nn.Module):
    """A frozen copy of a router: features (B, D) -> its noise-free logits at its temperature, (B, E), without gradient.

    It normalises with its running statistics, as in evaluation. It is in no state dict and no optimizer. count: the
    number of old experts, which come first; the logits cover only these.
    """

    def __init__(self, router: GatedRouter, count: int):
        super().__init__()
        self.count = count
        self.router = copy.deepcopy(router)
        self.router.old = None
        for part in self.router.modules():
            for name, value in [*part._parameters.items(), *part._buffers.items()]:
                part._parameters.pop(name, None)
                part.register_buffer(name, None if value is None else value.detach(), persistent=False)
            if isinstance(part, nn.BatchNorm1d):
                part.track_running_stats = False  # not in the state, but used for normalisation
        self.train(False)

    def train(self, mode: bool = True) -> "OldGate":
        """Stays in evaluation mode, regardless of the mode of the model."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x_BD: Tensor) -> Tensor:
        return self.router.clean_logits(x_BD)[:, : self.count]


def hold_old_gates(model: AnyMoE) -> None:
    """Store a copy of each gate of `model`, to compare it with later."""
    for mixture in model.mixtures:
        router = mixture.router
        if isinstance(router, GatedRouter):
            router.old = None  # otherwise the copy would contain it too
            router.old = OldGate(router, model.first_new or router.num_experts)


def old_gates(model: AnyMoE) -> dict[str, Tensor]:
    """The tensors stored by `hold_old_gates`, by name; empty if there are none."""
    return {name: value for name, value in model.named_buffers() if ".old." in name}


@torch.no_grad()
def load_old_gates(model: AnyMoE, stored: dict[str, Tensor]) -> None:
    """Load the gates that `old_gates` returned in another process. Raises ValueError if they do not fit."""
    held = old_gates(model)
    if held.keys() != stored.keys() or any(held[name].shape != value.shape for name, value in stored.items()):
        raise ValueError("its old gates are not those of this model")
    for name, value in stored.items():
        held[name].copy_(value)
