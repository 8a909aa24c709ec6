"""A small synthetic run to evaluate."""

import torch

from assembly.pipeline import build_model
from config.config import Config
from config.features import FeaturesConfig
from data.augment import AugmentConfig
from data.image_set import ImageSet, Splits
from features.bank import FeatureBank
from model.experts import ExpertsConfig
from model.routers import RouterConfig

CPU = torch.device("cpu")

NAMES = ("<script>alert(1)</script>", "a & b", '"quoted"', "$x^2$", "plain_name", "ünïcode")
TRAINING = ("training_curves", "load_over_time")

ROUTING = ("expert_by_class", "expert_load", "expert_worth", "gate_map", "samples")

FIGURES = (*TRAINING, *ROUTING, "superclass_confusion", "confused_pairs", "reliability")


class Counting:
    """Raw pixels as features; counts the requested images."""

    def __init__(self):
        self.images = 0

    def __call__(self, images_BCHW):
        self.images += len(images_BCHW)
        return images_BCHW.float().flatten(1) / 255


def image_set(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(count) % len(NAMES)
    images = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    images[:, 0, 0, 0] = (labels_N * 40).to(torch.uint8)
    return ImageSet(images, labels_N, NAMES, labels_N // 3, ("first three", "<b>last three</b>"))


def build(sizes=((4,), (8,), (16,)), top_k=2, mode="cached", test_images=120):
    """A model on synthetic images whose gate has a preference: (config, model, bank, extractor)."""
    torch.manual_seed(0)
    splits = Splits(image_set(30, 0), image_set(36, 1), image_set(test_images, 2))
    router = RouterConfig(top_k=top_k, norm="none", warmup_steps=3)
    config = Config(router=router, experts=ExpertsConfig(sizes=[list(size) for size in sizes]))
    model = build_model(config, (48,), len(NAMES))
    torch.nn.init.normal_(model.moe.router.gate.weight)
    extract = Counting()
    bank = FeatureBank(splits, extract, AugmentConfig(flip=False, crop=0), FeaturesConfig(mode=mode), CPU)
    return config, model.eval(), bank, extract
