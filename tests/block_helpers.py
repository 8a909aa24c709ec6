"""Tiny frozen ViTs with experts in their blocks, and their training on digits."""

import torch
from timm.layers import Mlp
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from trainer_helpers import CPU, IDENTITY

from config.config import Config
from config.optim import OptimConfig
from config.train import TrainConfig
from data.augment import AugmentConfig
from evaluation.validation import validate
from features.images import ImageBank
from model.backbone import Backbone
from model.classifier import NeckConfig
from model.experts import ExpertsConfig
from model.moe_vit import MoEViT
from model.routers import RouterConfig
from storage.checkpoint import load_checkpoint, seed_everything
from storage.folder import RunFolder
from tracking.tracker import open_tracker
from training.trainer import Trainer

SIZES = [[2], [4], [6]]


def tiny_vit(kind: str = "plain") -> nn.Module:
    """Three blocks of width 16 on 8 x 8 pixels, 16 patches. plain, no_class, registers, layer_scale, or eva (rope)."""
    options = {
        "plain": {},
        "no_class": {"class_token": False, "global_pool": "avg"},
        "registers": {"reg_tokens": 3},
        "layer_scale": {"init_values": 0.3, "drop_path_rate": 0.4},
        "eva": {"use_rot_pos_emb": True, "init_values": 0.3, "num_reg_tokens": 2},
    }[kind]
    torch.manual_seed(1)
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
    vit = (Eva if kind == "eva" else VisionTransformer)(**size, **options)
    for parameter in vit.parameters():  # biases and norms with an effect
        parameter.data += 0.2 * torch.randn_like(parameter)
    vit.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return vit


def moe_vit(
    vit: nn.Module | None = None,
    features: tuple[str, ...] = ("mean:1", "mean:2"),
    experts: dict | None = None,
    neck: dict | None = None,
    classes: int = 5,
    **router,
) -> MoEViT:
    """A MoEViT, by default of five classes with three unequal adapters in all blocks."""
    torch.manual_seed(2)
    backbone = Backbone(tiny_vit() if vit is None else vit, list(features))
    router = {"kind": "noisy_topk", "top_k": 2} | router
    experts = {"place": "blocks", "kind": "adapter", "sizes": SIZES} | (experts or {})
    return MoEViT(backbone, classes, NeckConfig(**(neck or {})), RouterConfig(**router), ExpertsConfig(**experts))


def spread(model: MoEViT) -> MoEViT:
    """The same with gates that have preferences and experts that have an effect, as after some training."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".up") or ".gate." in name or ".copies." in name:
            parameter.data += 0.5 * torch.randn_like(parameter)
    return model


def images(count: int = 6, seed: int = 0) -> torch.Tensor:
    """uint8 (B, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)


def plain_ffn(width: int = 3, hidden: int = 4) -> Mlp:
    """A timm FFN with separate random weights."""
    torch.manual_seed(4)
    return Mlp(width, hidden)


def digits_vit(**options) -> MoEViT:
    """Ten classes on the tiny ViT, whose 8 x 8 pixels are those of the digits."""
    return moe_vit(classes=10, **options)


def block_trainer(path, splits, resume=False, router=None, experts=None, **train) -> Trainer:
    """A small trainer on digits with experts in two blocks."""
    run = RunFolder(path) if resume else RunFolder.create(path, "test")
    checkpoint = load_checkpoint(run.last) if resume else None
    tracker = open_tracker("none", path, {}, name="test", resume_step=checkpoint and checkpoint["step"])
    train = TrainConfig(**{"epochs": 2, "batch_size": 64, "ema_decay": 0.9, "save_every": 1, **train})
    router = RouterConfig(warmup_steps=3, **(router or {}))
    experts = {"place": "blocks", "kind": "adapter", "blocks": [1, 2], "sizes": SIZES, "dropout": 0.1} | (experts or {})
    optim = OptimConfig(lr=0.02, warmup_steps=2)
    config = Config(train=train, optim=optim, router=router, experts=ExpertsConfig(**experts))
    seed_everything(train.seed)
    model = digits_vit(experts=experts, **vars(router))
    bank = ImageBank(splits, AugmentConfig(flip=True, crop=1), CPU, evaluation_batch=100)
    trainer = Trainer(config, model, bank, dict(IDENTITY), lambda evaluated: validate(evaluated, bank))
    trainer.record_in(run, tracker)
    if checkpoint:
        trainer.load_state_dict(checkpoint, run.last)
    return trainer
