"""Small mixtures behind and inside a ViT: a configuration, a model and a function that builds more of them."""

import torch
from block_helpers import tiny_vit

from compression.state import Build
from config.config import Config
from model.backbone import Backbone, BackboneConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.moe_vit import AnyMoE, MoEViT
from model.routers import ROUTERS, RouterConfig

SIZES = [[3], [5], [4], [6]]
Mixture = tuple[Config, AnyMoE, Build]


def scrambled(model: AnyMoE) -> AnyMoE:
    """The same in evaluation mode, with gates, experts, statistics and counters as after some training."""
    generator = torch.Generator().manual_seed(5)
    for name, value in model.state_dict().items():
        if "usage" in name:
            value.add_(torch.randint(1, 50, value.shape, generator=generator))
        elif "running_var" in name:
            value.add_(torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            std = 0.05 if name.endswith("bias_E") else 0.4  # the bias is added to scores from 0 to 1
            value.add_(std * torch.randn(value.shape, generator=generator))
    return model.eval()


def behind(router: dict | None = None, experts: dict | None = None, features: int = 8) -> Mixture:
    """A mixture behind the ViT, of five classes."""
    router = RouterConfig(**({"kind": "mixtral", "top_k": 2} | (router or {})))
    tokens = ROUTERS[router.kind].reads_tokens
    config = Config(
        backbone=BackboneConfig(features=["tokens:-1"] if tokens else ["cls:-1", "mean:-1"]),
        neck=NeckConfig(kind="tokens" if tokens else "pooled"),
        router=router,
        experts=ExpertsConfig(**({"sizes": SIZES, "dropout": 0.1} | (experts or {}))),
    )
    shape = (3, features) if tokens else (features,)

    def build(config: Config) -> VisionMoE:
        torch.manual_seed(0)
        return VisionMoE(shape, 5, config.neck, config.router, config.experts, 1 if tokens else 2)

    return config, scrambled(build(config)), build


def inside(router: dict | None = None, experts: dict | None = None) -> Mixture:
    """Mixtures in two of the three blocks of a tiny ViT, and five classes."""
    config = Config(
        backbone=BackboneConfig(features=["mean:1", "mean:2"]),
        router=RouterConfig(**({"kind": "mixtral", "top_k": 2} | (router or {}))),
        experts=ExpertsConfig(
            **({"place": "blocks", "kind": "adapter", "blocks": [0, 2], "sizes": SIZES} | (experts or {}))
        ),
    )
    backbone = Backbone(tiny_vit(), list(config.backbone.features))

    def build(config: Config) -> MoEViT:
        torch.manual_seed(0)
        return MoEViT(backbone, 5, config.neck, config.router, config.experts)

    return config, scrambled(build(config)), build


def inputs_of(model: AnyMoE, count: int = 40) -> torch.Tensor:
    """Random images, features or tokens that the model reads."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, MoEViT):
        return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return torch.randn(count, *((3,) if model.moe.router.reads_tokens else ()), 8, generator=generator)
