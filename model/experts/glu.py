"""Gated linear experts."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from .base import LayeredExpert
from .config import register


class SwiGLU(nn.Module):
    """SiLU of the first half of the features times the second half: (..., 2 H) -> (..., H)."""

    def forward(self, h: Tensor) -> Tensor:
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value


@register("glu", "hidden layers of Linear, LayerNorm, SwiGLU (Shazeer 2020), dropout (place head)")
class GLUExpert(LayeredExpert):
    """SwiGLU (Shazeer 2020, "GLU variants improve transformer"): (SiLU(x W) * x V) W2, with biases.

    Gate W and value V of a layer are one product with twice its units. As in MLP experts, a LayerNorm comes before the
    activation: it limits sums over many features, which SwiGLU would square. With two thirds of an MLP's units it has
    as many parameters as the MLP.
    """

    @staticmethod
    def hidden_layer(width: int, units: int, dropout: float) -> list[nn.Module]:
        return [nn.Linear(width, 2 * units), nn.LayerNorm(2 * units), SwiGLU(), nn.Dropout(dropout)]

    @classmethod
    def work(cls, widths: list[int]) -> int:
        """Multiply-adds of one expert; each hidden layer has two matrices."""
        return super().work(widths) + sum(fan_in * units for fan_in, units in pairwise(widths[:-1]))
