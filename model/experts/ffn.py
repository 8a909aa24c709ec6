"""Experts inside a frozen ViT's blocks: copies of the block's own FFN."""

import copy

import torch
from torch import Tensor, nn

from .base import ExpertKind
from .config import ExpertsConfig, register


@register(
    "ffn",
    "a copy of the block's own FFN (sparse upcycling, Komatsuzaki 2022), which starts as the dense ViT (place blocks)",
)
class UpcycledFFN(ExpertKind, nn.Module):
    """Sparse upcycling (Komatsuzaki 2022): every expert starts as a copy of the block's FFN, the gate is new.

    The frozen FFN has the weight that the experts leave: (1 - sum_e g_e) ffn(x) + sum_e g_e expert_e(x). So the start
    equals the dense ViT whatever the rule and whatever finds no place. Where the weights of a token sum to 1, as the
    paper makes them, this is its layer. Where they carry the gate's confidence (V-MoE, Switch) it spares dividing by
    their sum, which for one expert a token would leave the gate without a gradient.
    """

    place = "blocks"
    static_shapes = False  # where it is not compiled

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
        # float32, whatever the ViT computes in, since these are trained; on the device that new tensors are on.
        device = torch.empty(0).device
        copies = (copy.deepcopy(ffn).float().to(device).requires_grad_(True) for _ in config.sizes)
        self.copies = nn.ModuleList(copies)

    @classmethod
    def check(cls, config: ExpertsConfig) -> None:
        """Raise ValueError for options that copies of an FFN do not have."""
        if config.dropout is not None:
            raise ValueError("experts.dropout is not for experts.kind ffn, which has the ViT's own: leave it out")

    def forward(self, x_BTD: Tensor, dense_BTD: Tensor, weights_BTE: Tensor) -> Tensor:
        """(1 - sum_e weight_e) dense + sum_e weight_e expert_e(x), in the number format of x.

        dense_BTD: the frozen FFN's output. weights_BTE: float32, 0 where an expert is not chosen; (B, 1, E) where all
        tokens of an image share them.
        """
        x_ND, weights_NE = x_BTD.flatten(0, 1), weights_BTE.expand(*x_BTD.shape[:2], -1).flatten(0, 1)
        half = x_ND.dtype != torch.float32 or torch.is_autocast_enabled(x_ND.device.type)
        dtype = torch.bfloat16 if x_ND.dtype == torch.float32 else x_ND.dtype
        out_ND = ((1 - weights_NE.sum(dim=1, keepdim=True)) * dense_BTD.flatten(0, 1)).float()
        with torch.autocast(x_ND.device.type, dtype, enabled=half):
            run = self._all_tokens if torch.compiler.is_compiling() else self._chosen_tokens
            out_ND = run(x_ND, out_ND, weights_NE)
        return out_ND.to(dense_BTD.dtype).view_as(dense_BTD)

    def _chosen_tokens(self, x_ND: Tensor, out_ND: Tensor, weights_NE: Tensor) -> Tensor:
        """Each expert on the tokens that chose it; waits for the device, which has to say how many these are."""
        for expert, copied in enumerate(self.copies):
            (token_M,) = (weights_NE[:, expert] > 0).nonzero(as_tuple=True)
            weight_M1 = weights_NE[token_M, expert, None]
            out_ND = out_ND.index_add(0, token_M, weight_M1 * copied(x_ND[token_M]).float())
        return out_ND

    def _all_tokens(self, x_ND: Tensor, out_ND: Tensor, weights_NE: Tensor) -> Tensor:
        """Each expert on every token: more arithmetic, in shapes that never change."""
        for expert, copied in enumerate(self.copies):
            out_ND = out_ND + weights_NE[:, expert, None] * copied(x_ND).float()
        return out_ND

    def parameters_of(self, expert: int) -> int:
        """Weights and biases of one expert."""
        return sum(parameter.numel() for parameter in self.copies[expert].parameters())

    def flops_of(self, expert: int) -> int:
        """Floating-point operations of one expert on one token; a multiply-add counts as two."""
        linears = (module for module in self.copies[expert].modules() if isinstance(module, nn.Linear))
        return sum(2 * linear.in_features * linear.out_features for linear in linears)
