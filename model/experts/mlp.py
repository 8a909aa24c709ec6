"""MLP experts."""

from torch import nn

from .base import LayeredExpert
from .config import register


@register("mlp", "hidden layers of Linear, LayerNorm, ReLU, dropout (place head)")
class MLPExpert(LayeredExpert):
    """The reference recipe's expert: each hidden layer is Linear, LayerNorm, ReLU, Dropout."""

    @staticmethod
    def hidden_layer(width: int, units: int, dropout: float) -> list[nn.Module]:
        return [nn.Linear(width, units), nn.LayerNorm(units), nn.ReLU(), nn.Dropout(dropout)]
