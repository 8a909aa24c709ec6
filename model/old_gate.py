"""The gates that a training starts from, as copies that it does not change: what the old_gate loss compares with."""

import copy

import torch
from torch import Tensor, nn

from .moe_vit import AnyMoE
from .routers.base import GatedRouter


class OldGate(nn.Module):
    """A router as it is now: features (B, D) -> its clean logits at its temperature, (B, E), without gradient.

    It normalises by its running statistics, as in evaluation. No state dict and no optimizer lists it. count: how many
    of its experts there were, which come first; logits are of those alone.
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
                part.track_running_stats = False  # in no state, and there to normalise by
        self.train(False)

    def train(self, mode: bool = True) -> "OldGate":
        """As in evaluation, whatever the mode of the rest."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x_BD: Tensor) -> Tensor:
        return self.router.clean_logits(x_BD)[:, : self.count]


def hold_old_gates(model: AnyMoE) -> None:
    """Have each gate of `model` compared with what it is now."""
    for mixture in model.mixtures:
        router = mixture.router
        if isinstance(router, GatedRouter):
            router.old = None  # or the copy would hold it too
            router.old = OldGate(router, model.first_new or router.num_experts)


def old_gates(model: AnyMoE) -> dict[str, Tensor]:
    """What `hold_old_gates` holds, by name; empty where it holds nothing."""
    return {name: value for name, value in model.named_buffers() if ".old." in name}


@torch.no_grad()
def load_old_gates(model: AnyMoE, stored: dict[str, Tensor]) -> None:
    """Hold the gates that `old_gates` gave in another process. Raises ValueError where they do not fit."""
    held = old_gates(model)
    if held.keys() != stored.keys() or any(held[name].shape != value.shape for name, value in stored.items()):
        raise ValueError("its old gates are not those of this model")
    for name, value in stored.items():
        held[name].copy_(value)
