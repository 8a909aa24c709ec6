"""Experts inside a frozen ViT's blocks: copies of the block's own FFN."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import combine_logits, dispatch
from ..grouped import kernel_on
from ..quantised import Matrix, num_parameters
from ..routing import Assignments
from .base import ExpertKind, Experts, LayerStack
from .config import ExpertsConfig, register


@register(
    "ffn",
    "a copy of the block's own FFN (sparse upcycling, Komatsuzaki 2022), equal to the dense ViT at the start (place "
    "blocks)",
)
class UpcycledFFN(ExpertKind, nn.Module):
    """Sparse upcycling (Komatsuzaki 2022): every expert starts as a copy of the block's FFN, the gate is new.

    The frozen FFN gets the remaining weight: (1 - sum_e g_e) ffn(x) + sum_e g_e expert_e(x). So training starts from
    the dense ViT with every rule and any drops. If the weights of a token sum to 1, as in the paper, this equals the
    paper's layer. If they contain the gate's confidence (V-MoE, Switch), it avoids dividing by their sum, which would
    leave the gate without a gradient for one expert per token.
    """

    place = "blocks"
    fixed_size = True

    def __init__(self, width: int, config: ExpertsConfig, ffn: nn.Module):
        super().__init__()
        self.check(config)
        hidden = getattr(getattr(ffn, "fc2", None), "in_features", None)
        for size in config.sizes:
            if hidden is not None and size != [hidden]:
                raise ValueError(
                    f"experts.sizes has {size}, but copies of this ViT's FFN have {hidden} hidden units: give "
                    f"[{hidden}] once for each expert"
                )
        # float32 in any case, because they are trained; on the default device.
        device = torch.empty(0).device
        copies = (_copied(copy.deepcopy(ffn).float().to(device).requires_grad_(True)) for _ in config.sizes)
        self.copies = Experts(copies, config.grown)
        self.bounds = config.generation_bounds
        self.dispatch_mode = config.dispatch

    @classmethod
    def check(cls, config: ExpertsConfig) -> None:
        """Raise ValueError for options that copies of an FFN do not support."""
        if config.dropout is not None:
            raise ValueError(
                "experts.dropout has no effect on experts.kind ffn, which keeps the ViT's dropout: leave it out"
            )
        if config.norm != "ffn":
            raise ValueError(
                f"experts.norm {config.norm} does not work with experts.kind ffn: copies need the FFN's own norm"
            )

    @property
    def static_shapes(self) -> bool:
        """Whether a step never waits for the number of tokens of an expert."""
        first: Any = self.copies[0]
        grouped = isinstance(first, LayerStack) and kernel_on(first.linears[0].bias.device)
        return self.dispatch_mode in ("grouped", "dense") or (self.dispatch_mode == "auto" and grouped)

    def forward(self, x_BTD: Tensor, dense_BTD: Tensor, assignments: Assignments) -> Tensor:
        """(1 - sum_e weight_e) dense + sum_e weight_e expert_e(x), in the dtype of x.

        dense_BTD: the frozen FFN's output. assignments: of all tokens, or of the images for all their tokens.
        """
        x_ND = x_BTD.flatten(0, 1)
        each = assignments.repeated(x_ND.shape[0] // assignments.num_samples)
        dispatch_mode = "static" if self.dispatch_mode == "auto" and self.static_shapes else self.dispatch_mode
        if self.copies.dispatcher.local:
            mixed_ND = self._mixed(x_ND, each, dispatch_mode)
        else:
            from ..uncompiled import uncompiled

            mixed_ND = uncompiled(self._mixed, x_ND, each, dispatch_mode)
        weights_NE: Any = each.weights_BE
        rest_N: Any = 1 - sum(weights_NE[:, first:last].contiguous().sum(dim=1) for first, last in self.bounds)
        return (mixed_ND + rest_N[:, None] * dense_BTD.flatten(0, 1)).to(dense_BTD.dtype).view_as(dense_BTD)

    def output_of(self, expert: int, x_ND: Tensor) -> Tensor:
        """See ExpertKind."""
        return self.copies[expert](x_ND)

    def matrices(self) -> list[Matrix]:
        """See ExpertKind."""
        return self.copies.matrices()

    def _mixed(self, x_ND: Tensor, each: Assignments, dispatch_mode: str) -> Tensor:
        return combine_logits(*dispatch(x_ND, each, self.copies, dispatch_mode), each)

    def parameters_of(self, expert: int) -> int:
        """Number of weights and biases of one expert."""
        return num_parameters(self.copies[expert])

    def flops_of(self, expert: int) -> int:
        """Floating-point operations of one expert on one token; a multiply-add counts as two."""
        linears = (module for module in self.copies[expert].modules() if isinstance(module, nn.Linear))
        return sum(2 * linear.in_features * linear.out_features for linear in linears)


def _copied(ffn: nn.Module) -> nn.Module:
    """An FFN as an expert; a plain one by its layers, so that experts can be computed together."""
    from timm.layers import Mlp

    if type(ffn) is Mlp and isinstance(ffn.norm, nn.Identity):
        linears = ffn.fc1, ffn.fc2
        if all(isinstance(linear, nn.Linear) and linear.bias is not None for linear in linears):
            return CopiedMlp(ffn)
    return CopiedFFN(ffn)


class CopiedMlp(LayerStack):
    """fc1, activation, fc2 of timm's Mlp, and its dropout if it has any."""

    def __init__(self, ffn: Any):
        drops = [[drop] if drop.p else [] for drop in (ffn.drop1, ffn.drop2)]
        super().__init__(ffn.fc1, ffn.act, *drops[0], ffn.fc2, *drops[1])


class CopiedFFN(nn.Module):
    """Any other FFN, in the dtype of its input."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.ffn = ffn

    def forward(self, x_ND: Tensor) -> Tensor:
        half = x_ND.dtype != torch.float32
        with torch.autocast(x_ND.device.type, x_ND.dtype if half else torch.bfloat16, enabled=half):
            return self.ffn(x_ND)
