"""A small trainer on digits, and when two states are equal."""

import torch

from config.config import Config
from config.features import FeaturesConfig
from config.optim import OptimConfig
from config.train import TrainConfig
from data.augment import AugmentConfig
from evaluation.validation import validate
from features.bank import FeatureBank
from model.backbone import BackboneConfig
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.routers import ROUTERS, RouterConfig
from storage.checkpoint import load_checkpoint, seed_everything
from storage.folder import RunFolder
from tracking.tracker import open_tracker
from training.trainer import Trainer

CPU = torch.device("cpu")


IDENTITY = {
    "config": {},
    "backbone": {"name": "none", "fingerprint": ""},
    "data": {"train": "", "validation": "", "test": ""},
    "class_names": [],
    "feature_shape": [192],
}


def make_trainer(path, splits, *, resume=False, optim=None, balance=None, router=None, device=CPU, **train):
    """A trainer on raw pixels as features: small enough to run whole epochs in milliseconds.

    router: options of the rule. One that reads tokens gets the rows of the image.
    """
    train = TrainConfig(**{"epochs": 4, "batch_size": 64, "ema_decay": 0.9, "save_every": 1, **train})
    run = RunFolder(path) if resume else RunFolder.create(path, "test")
    checkpoint = load_checkpoint(run.last) if resume else None
    tracker = open_tracker("none", path, {}, name="test", resume_step=checkpoint and checkpoint["step"])
    seed_everything(train.seed)
    router = RouterConfig(**{"warmup_steps": 6, **(router or {})})
    tokens = ROUTERS[router.kind].reads_tokens
    shape, neck = ((8, 24), NeckConfig(kind="tokens")) if tokens else ((192,), NeckConfig())
    backbone = BackboneConfig(features=["tokens:-1" if tokens else "cls:-1"])
    bank = FeatureBank(
        splits,
        lambda images: images.float().view(len(images), *shape) / 255,
        AugmentConfig(flip=False, crop=0),
        FeaturesConfig(views=2),
        device,
    )
    experts = ExpertsConfig(sizes=[[8], [16], [32]], dropout=0.1)
    model = VisionMoE(shape, 10, neck, router, experts).to(device)
    config = Config(
        backbone=backbone,
        neck=neck,
        router=router,
        experts=experts,
        balance=balance or BalanceConfig(),
        optim=optim or OptimConfig(lr=0.01, warmup_steps=4),
        train=train,
    )
    trainer = Trainer(config, model, bank, dict(IDENTITY), lambda model: validate(model, bank))
    trainer.record_in(run, tracker)
    if checkpoint:
        trainer.load_state_dict(checkpoint, run.last)
    return trainer


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
