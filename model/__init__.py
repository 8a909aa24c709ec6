"""Vision MoE: mixtures of unequal experts, with many kinds of gates, for your own PyTorch models.

`MixtureOfExperts` turns features (B, D) into class logits; `MoEFFN` is the FFN of a transformer, tokens (B, T, D) to
(B, T, D). Both also return a `Routing`, the assignments of samples to experts, for the auxiliary losses and analysis.
"""

from .backbone import Backbone, BackboneConfig, load_backbone
from .balance import BalanceConfig, balance_losses, floors, weighted_sum
from .classifier import NeckConfig, VisionMoE
from .errors import InputError, UnavailableError
from .experts import EXPERTS, ExpertsConfig, LayeredExpert
from .ffn import MoEFFN
from .losses import LOSSES
from .moe import MixtureOfExperts
from .moe_vit import MoEViT
from .options import Option
from .routers import ROUTERS, Router, RouterConfig, build_router
from .routing import Assignments, Drops, Gate, Routing

__all__ = [
    "EXPERTS",
    "LOSSES",
    "ROUTERS",
    "Assignments",
    "Backbone",
    "BackboneConfig",
    "BalanceConfig",
    "Drops",
    "ExpertsConfig",
    "Gate",
    "InputError",
    "LayeredExpert",
    "MixtureOfExperts",
    "MoEFFN",
    "MoEViT",
    "NeckConfig",
    "Option",
    "Router",
    "RouterConfig",
    "Routing",
    "UnavailableError",
    "VisionMoE",
    "balance_losses",
    "build_router",
    "floors",
    "load_backbone",
    "weighted_sum",
]
