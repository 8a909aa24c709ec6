"""Mixtral's gate."""

from .config import RouterConfig, register
from .token_choice import TokenChoiceRouter


@register("mixtral", "softmax over the best k, no noise (Jiang 2024)")
class MixtralRouter(TokenChoiceRouter):
    """Mixtral (Jiang 2024, section 2.1): softmax over the k largest logits, no noise."""

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> None:
        if config.top_k == 1 < num_experts:
            raise ValueError(
                "router.kind mixtral with router.top_k 1 gives every choice weight 1 and the gate no gradient: "
                "set router.top_k 2, or router.kind switch"
            )
        super().check(config, num_experts)
