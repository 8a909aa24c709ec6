"""Switch Transformers' gate."""

from typing import ClassVar

from torch import Tensor

from ..distributed import rand_like
from ..options import Option, share
from .config import RouterConfig, register
from .token_choice import SoftmaxFirstRouter

JITTER = Option(
    "jitter",
    float,
    0.01,
    "switch: in training, each input of the gate is multiplied by a random number from 1 - jitter to 1 + jitter.",
    share,
)


@register("switch", "only the best expert, jittered input (Fedus 2021)", options=[JITTER])
class SwitchRouter(SoftmaxFirstRouter):
    """Switch Transformers (Fedus 2021): only the best expert, weighted by its probability (eq. 1-2).

    In training each input of the gate is multiplied by a uniform random number from 1 - jitter to 1 + jitter.
    """

    only_top_k = 1
    paper: ClassVar = {"router.capacity_factor": 1.25}

    def _build_gate(self, width: int, config: RouterConfig) -> None:
        super()._build_gate(width, config)
        self.jitter = config.jitter

    def _perturb(self, x_BD: Tensor) -> Tensor:
        if not self.training or self.jitter == 0:
            return x_BD
        return x_BD * (1 - self.jitter + 2 * self.jitter * rand_like(x_BD))
