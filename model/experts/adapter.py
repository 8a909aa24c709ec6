"""Experts inside a frozen ViT's blocks, in parallel to the FFN: bottleneck adapters of unequal widths."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..dispatch import combine_logits, send
from ..distributed import rand_like
from ..options import Option, share
from ..quantised import Matrix
from ..routing import Assignments
from .base import ExpertKind, ExpertSet, Part
from .config import ExpertsConfig, register

DROP_PATH = Option(
    "drop_path",
    float,
    0.0,
    "adapter: fraction of the training images that skip a block's experts, drawn for each block (stochastic depth, "
    "Huang 2016); the weights of the other images are scaled up accordingly.",
    share,
)

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
ACTIVATION = Option(
    "activation", Literal["gelu", "silu", "relu"], "gelu", "adapter: activation between down- and up-projection."
)
NORM = Option(
    "norm",
    Literal["ffn", "own"],
    "ffn",
    "adapter: normalisation of the input of gate and experts. ffn: that of the block's FFN; own: LayerNorm without "
    "weights, because the weights of the ViT's norm scale each feature for the FFN.",
)


@register(
    "adapter",
    "down-projection, activation, up-projection; outputs zero at the start (place blocks)",
    options=[DROP_PATH, ACTIVATION, NORM],
)
class Adapters(ExpertKind, ExpertSet, nn.Module):
    """E adapters up(activation(down(x))) (Houlsby 2019), parallel to the FFN as in AdaptFormer (Chen 2022).

    The hidden units of all experts, H in total, are concatenated: down is (H, D), up (D, H). Each unit is multiplied
    by the gate weight of its expert, which is 0 for an expert that is not chosen, so two matrix products compute and
    mix all experts. For widths far below that of the FFN this costs less than sending tokens to their experts, and the
    shapes never change. up is zero at the start, so that training starts exactly from the pretrained ViT.

    If the experts are distributed over processes, each process has the rows of down and the columns of up of its
    experts, and gets a row for each assignment to one of them.
    """

    place = "blocks"
    static_shapes = True
    units_EH: Tensor

    def __init__(self, width: int, config: ExpertsConfig, ffn: nn.Module):
        super().__init__()
        self.check(config)
        self.widths = [config.hidden(expert)[0] for expert in range(len(config.sizes))]
        total = sum(self.widths)
        self.generations = [slice(sum(self.widths[:a]), sum(self.widths[:b])) for a, b in config.generation_bounds]
        self.down = nn.Linear(width, total)
        self.up = nn.Parameter(torch.zeros(width, total))
        self.drop_path, self.activation = config.drop_path, ACTIVATIONS[config.activation]
        nn.init.normal_(self.down.weight, std=width**-0.5)  # for normalised tokens: hidden units with variance one
        nn.init.zeros_(self.down.bias)
        self.dropout = nn.Dropout(0.0 if isinstance(config.dropout, list) else config.dropout or 0.0)
        self.here = list(range(len(self.widths)))
        self._count()

    def _count(self) -> None:
        """Store the expert of each hidden unit, for the experts of this process."""
        units = [torch.ones(1, self.widths[expert]) for expert in self.here]
        self.register_buffer("units_EH", torch.block_diag(*units).to(self.up.device), persistent=False)

    @classmethod
    def check(cls, config: ExpertsConfig) -> None:
        """Raise ValueError for sizes that are not a single hidden layer."""
        for expert, size in enumerate(config.sizes):
            if len(config.hidden(expert)) != 1:
                raise ValueError(
                    f"experts.sizes has {size}: an adapter has one hidden layer, so give each expert a list with one "
                    "width, such as [[16], [32], [64], [128]]"
                )
        if isinstance(config.dropout, list):
            raise ValueError("experts.dropout is a list: all adapters use the same number")

    def forward(self, x_BTD: Tensor, dense_BTD: Tensor, assignments: Assignments) -> Tensor:
        """dense + sum_e weight_e adapter_e(x), in the number format of x.

        dense_BTD: the frozen FFN's output. assignments: of all tokens, or of the images for all their tokens.
        """
        if not self.dispatcher.local:
            from ..uncompiled import uncompiled

            return dense_BTD + uncompiled(self._exchanged, x_BTD, assignments)
        weights_BTE = assignments.weights_BE.view(x_BTD.shape[0], -1, assignments.num_experts)
        dtype = x_BTD.dtype
        down_HD, down_H = self.down.weight.to(dtype), self.down.bias.to(dtype)
        parts = [F.linear(x_BTD, down_HD[units], down_H[units]) for units in self.generations]
        hidden_BTH = self.activation(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))
        if self.training and self.drop_path:
            kept_B11 = rand_like(weights_BTE[:, :1, :1]) >= self.drop_path
            weights_BTE = weights_BTE * (kept_B11 / (1 - self.drop_path))
        weights_BTH = weights_BTE.to(hidden_BTH.dtype) @ self.units_EH.to(hidden_BTH.dtype)
        mixed_BTH, out_BTD = self.dropout(hidden_BTH) * weights_BTH, dense_BTD
        for units in self.generations:
            up_DH = self.up[:, units].contiguous() if len(self.generations) > 1 else self.up
            out_BTD = out_BTD + F.linear(mixed_BTH[..., units].contiguous(), up_DH.to(dtype))
        return out_BTD

    def _exchanged(self, x_BTD: Tensor, assignments: Assignments) -> Tensor:
        """The output of the experts if they are on several processes, (B, T, D)."""
        x_ND = x_BTD.flatten(0, 1)
        if self.training and self.drop_path:
            kept_B = rand_like(assignments.weight_A.new_empty(len(x_BTD))) >= self.drop_path
            assignments = assignments.scaled(kept_B / (1 - self.drop_path))
        each = assignments.repeated(len(x_ND) // assignments.num_samples)
        received = send(x_ND, each, self)
        x_RD, own, dtype = received.x_RD, received.assignments, x_BTD.dtype
        with torch.autocast(x_RD.device.type, enabled=False):
            hidden_RH = self.activation(F.linear(x_RD, self.down.weight.to(dtype), self.down.bias.to(dtype)))
            own_RH = self.units_EH.to(dtype).index_select(0, own.expert_A)
            outputs_RD = F.linear(self.dropout(hidden_RH) * own_RH, self.up.to(dtype))
        outputs_AD, order_A = self.dispatcher.combine(received, outputs_RD, own.sample_A)
        return combine_logits(outputs_AD, order_A, each).to(dtype).view_as(x_BTD)

    def parts(self) -> dict[str, Part]:
        widths_E = tuple(self.widths)
        return {
            "down.weight": Part(widths_E=widths_E),
            "down.bias": Part(widths_E=widths_E),
            "up": Part(widths_E=widths_E, dim=1),
        }

    def keep(self, numbers: Sequence[int]) -> None:
        sizes = [self.widths[expert] for expert in self.here]
        for module, name, dim in ((self.down, "weight", 0), (self.down, "bias", 0), (self, "up", 1)):
            old = getattr(module, name)
            found = dict(zip(self.here, old.detach().split(sizes, dim), strict=True))
            for expert in numbers:
                if expert not in found:
                    shape = list(old.shape)
                    shape[dim] = self.widths[expert]
                    found[expert] = old.new_empty(shape)
            setattr(module, name, nn.Parameter(torch.cat([found[e] for e in numbers], dim), old.requires_grad))
        self.here = list(numbers)
        self.down.out_features = len(self.down.bias)
        self._count()

    def hidden_of(self, expert: int, x_ND: Tensor) -> Tensor:
        """The hidden units of one expert for tokens (N, D): (N, units), without dropout."""
        units = slice(self.units_of(expert).start, self.units_of(expert).stop)
        return self.activation(
            F.linear(x_ND, self.down.weight[units].to(x_ND.dtype), self.down.bias[units].to(x_ND.dtype))
        )

    def output_of(self, expert: int, x_ND: Tensor) -> Tensor:
        """See ExpertKind."""
        units = slice(self.units_of(expert).start, self.units_of(expert).stop)
        return F.linear(self.hidden_of(expert, x_ND), self.up[:, units].to(x_ND.dtype))

    def matrices(self) -> list[Matrix]:
        """See ExpertKind; a row of an expert's part is one of its output channels."""
        parts = tuple(range(len(self.widths))), tuple(self.widths)
        return [Matrix(self.down, "weight", *parts, dim=0), Matrix(self, "up", *parts, dim=1)]

    def units_of(self, expert: int) -> range:
        """The position of one expert's hidden units among those of all experts."""
        first = sum(self.widths[:expert])
        return range(first, first + self.widths[expert])

    def parameters_of(self, expert: int) -> int:
        """Number of weights and biases of one expert."""
        return self.widths[expert] * (self.down.in_features + 1 + self.up.shape[0])

    def flops_of(self, expert: int) -> int:
        """Floating-point operations of one expert on one token; a multiply-add counts as two."""
        return 2 * self.widths[expert] * (self.down.in_features + self.up.shape[0])
