"""One run of a recipe as in train.py, but without figures, and on features that several runs can share."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
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
from training.trainer import Trainer


@contextlib.contextmanager
def trained_run(config: Config, inputs: Inputs, bank: FeatureBank | None = None) -> Iterator[tuple[Trainer, float]]:
    """A trainer after training, with the model of the epoch selected by train.keep, and the training seconds.

    bank: features to read (None: extracted in the run). The run's folder exists as long as the context.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = RunFolder.create(Path(folder) / "run", "benchmark")
        began = time.perf_counter()
        with open_tracker("none", run.path, config.to_dict(), name="benchmark", tags=[]) as tracker:
            trainer = build_trainer(config, inputs, bank=bank)
            trainer.record_in(run, tracker)
            best = trainer.fit()
            trainer.model.load_state_dict(best["model"])
            yield trainer, time.perf_counter() - began


def train_once(
    config: Config,
    splits: Splits,
    backbone: Backbone,
    device: torch.device,
    seed: int,
    bank: FeatureBank | None = None,
) -> dict:
    """Train with a seed, keep the epoch selected by train.keep, evaluate on the test images.

    bank: features to read (None: extracted in the run). `seconds` is the time of the whole run to its predictions on
    the test images, from images in memory, or from the features of a bank.
    """
    config = config_from_dict(config.to_dict())
    config.train.seed = seed
    with trained_run(config, Inputs(device, splits, backbone), bank) as (trainer, trained_in):
        began, model = time.perf_counter(), trainer.model
        answers = predict(model, trainer.bank, "test")
        found = scores(answers.labels_N, answers.predicted_N, splits.test.num_classes)
        seconds = trained_in + time.perf_counter() - began
        history = trainer.run.history()
    load_E = expert_load(answers.expert_A, len(model.moe.experts))
    return {
        **found,
        "loss": answers.loss(),
        "ece": float(calibration(answers.probs_NC, answers.labels_N)["error"]),
        "entropy": load_entropy(load_E) if len(load_E) > 1 else None,
        "experts": len(load_E),
        "flops": head_cost(model, trainer.bank.feature_shape, load_E).flops,
        "best_epoch": trainer.best["epoch"],
        "seconds": seconds,
        "epoch_seconds": [line["speed/epoch_seconds"] for line in history],
    }
