"""One run of a recipe as train.py makes it, but without figures, and on features that runs may share."""

import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch

from analysis.answers import calibration
from analysis.routing import expert_load, load_entropy
from assembly.pipeline import Inputs, build_trainer
from config.config import Config, config_from_dict
from data.image_set import Splits
from evaluation.cost import head_cost
from evaluation.metrics import scores
from evaluation.predict import predict
from features.bank import FeatureBank
from model.backbone import Backbone
from storage.folder import RunFolder
from tracking.tracker import open_tracker


def train_once(
    config: Config,
    splits: Splits,
    backbone: Backbone,
    device: torch.device,
    seed: int,
    bank: FeatureBank | None = None,
) -> dict:
    """Train with a seed, keep the epoch by train.keep, evaluate on the test images.

    bank: features to read (None: extracted in the run). `seconds` is the whole run to its answers on the test
    images, from images in memory, or from features where a bank has them.
    """
    config = config_from_dict(config.to_dict())
    config.train.seed = seed
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = RunFolder.create(Path(folder) / "run", "benchmark")
        began = time.perf_counter()
        with open_tracker("none", run.path, config.to_dict(), name="benchmark", tags=[]) as tracker:
            trainer = build_trainer(config, Inputs(device, splits, backbone), run, tracker, bank=bank)
            best = trainer.fit()
            model = trainer.model
            model.load_state_dict(best["model"])
            answers = predict(model, trainer.bank, "test")
            found = scores(answers.labels_N, answers.predicted_N, splits.test.num_classes)
            seconds = time.perf_counter() - began
        epochs = [line["speed/epoch_seconds"] for line in run.history()]
    load_E = expert_load(answers.expert_A, len(model.moe.experts))
    return {
        **found,
        "loss": answers.loss(),
        "ece": float(calibration(answers.probs_NC, answers.labels_N)["error"]),
        "entropy": load_entropy(load_E) if len(load_E) > 1 else None,
        "experts": len(load_E),
        "flops": head_cost(model, trainer.bank.feature_shape, load_E).flops,
        "best_epoch": best["epoch"],
        "seconds": seconds,
        "epoch_seconds": epochs,
    }
