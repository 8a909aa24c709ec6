"""Which epoch's weights a run keeps, and when they are written."""

import signal

import pytest
import torch
from trainer_helpers import equal_states, make_trainer

from common.errors import Interrupted, UserError
from config.train import TrainConfig
from data.datasets import DataConfig, load_splits
from storage.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def splits():
    return load_splits(DataConfig(name="digits", max_per_class=40))


@pytest.fixture
def make(tmp_path, splits):
    """Trainers whose trackers are closed."""
    made = []

    def trainer(**options):
        made.append(make_trainer(tmp_path, splits, **options))
        return made[-1]

    yield trainer
    for one in made:
        one.tracker.close()


def scripted(trainer, scores):
    """Validation macro-F1 as listed, one per epoch, regardless of the model."""
    left = iter(scores)
    zeros = {"loss/validation": 1.0, "accuracy/validation": 0.5}
    trainer._validate = lambda: {**zeros, "macro_f1/validation": next(left)}
    return trainer


@pytest.mark.parametrize(("keep", "epoch", "score"), [("best", 2, 0.7), ("last", 4, 0.6)])
def test_the_best_epoch_is_kept_or_the_last(make, capsys, keep, epoch, score):
    trainer = scripted(make(keep=keep, save_every=1), [0.5, 0.7, 0.4, 0.6])
    kept = trainer.fit()
    assert (kept["epoch"], kept["macro_f1"]) == (epoch, score)
    kept, last = load_checkpoint(trainer.run.best), load_checkpoint(trainer.run.last)
    assert (kept["epoch"], kept["macro_f1"]) == (epoch, score)
    assert equal_states(kept["model"], last["ema"]) == (keep == "last")
    starred = [line.endswith("*") for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert starred == ([True, True, False, False] if keep == "best" else [False] * 4)


def test_the_last_epoch_cannot_be_kept_with_patience():
    with pytest.raises(ValueError, match=r"train\.patience 3 .* train\.keep last"):
        TrainConfig(keep="last", patience=3)


def test_the_best_weights_are_written_with_the_checkpoint(make):
    trainer = scripted(make(epochs=5, save_every=3), [0.1, 0.4, 0.3, 0.5, 0.2])
    held, seen = {}, []
    save = trainer._keep_weights

    def watched(keep):
        if keep:  # a copy: later steps must not change it
            held[trainer.epoch] = {name: value.clone() for name, value in trainer.evaluated.state_dict().items()}
        save(keep)
        kept = load_checkpoint(trainer.run.best)
        assert equal_states(kept["model"], held[kept["epoch"]])
        seen.append((kept["epoch"], load_checkpoint(trainer.run.last)["epoch"]))

    trainer._keep_weights = watched
    trainer.fit()
    assert seen == [(1, 1), (1, 1), (2, 3), (2, 3), (4, 5)]
    assert not torch.equal(*(next(iter(held[epoch].values())) for epoch in (2, 4)))


@pytest.mark.parametrize("error", [Interrupted(signal.SIGTERM), UserError("the task loss is not finite")], ids=str)
def test_ending_training_early_does_not_lose_the_best_weights(make, error):
    trainer = scripted(make(epochs=9, save_every=9), [0.1, 0.4, 0.6, 0.5])
    train_epoch = trainer._train_epoch

    def ended(progress):
        if trainer.epoch == 5:
            raise error
        return train_epoch(progress)

    trainer._train_epoch = ended
    with pytest.raises(type(error)):
        trainer.fit()
    kept = load_checkpoint(trainer.run.best)
    assert (kept["epoch"], kept["macro_f1"]) == (3, 0.6)
    assert load_checkpoint(trainer.run.last)["epoch"] == (5 if isinstance(error, Interrupted) else 1)
