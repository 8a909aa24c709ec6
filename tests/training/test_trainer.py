"""The training loop on small models: checkpoints, exact resuming, early stopping and schedules."""

import json
import math
from pathlib import Path

import pytest
import torch
from block_helpers import block_trainer
from trainer_helpers import equal_states, make_trainer

from common.errors import EnvironmentFault, UserError
from common.files import write_json
from config.optim import OptimConfig
from evaluation.cost import flops
from evaluation.predict import predict
from model.classifier import AttentionNeck, NeckConfig
from storage.checkpoint import check_inputs, load_checkpoint, save_checkpoint
from storage.export import export_model, load_exported, read_description
from storage.folder import RunFolder
from training.health import OUTPUT, not_finite
from training.optim import lr_factor
from training.progress import EpochSums, epoch_line


def test_training_learns_and_keeps_the_reported_weights(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits, epochs=20)
    best = trainer.fit()
    history = trainer.run.history()
    assert [line["epoch"] for line in history] == list(range(1, 21))
    assert history[-1]["loss/train"] < 0.7 * history[0]["loss/train"]
    assert best["macro_f1"] == max(line["macro_f1/validation"] for line in history) > 0.8
    kept = load_checkpoint(trainer.run.best)
    assert (kept["epoch"], kept["macro_f1"]) == (best["epoch"], best["macro_f1"])
    assert equal_states(best["model"], kept["model"])
    export_model(trainer.run, best)
    described = read_description(trainer.run)
    assert described["epoch"] == best["epoch"]
    load_exported(trainer.run, trainer.model)
    assert equal_states(trainer.model.state_dict(), kept["model"])


def test_every_epoch_logs_loads_that_sum_to_one_with_warm_up_separate(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits)  # 5 steps an epoch, 6 of them warm-up
    trainer.fit()
    first, *others = trainer.run.history()
    assert "expert_load/expert_0" not in first and "balance/entropy" not in first
    for line in others:
        for kind in ("expert_load", "expert_importance", "expert_load_validation"):
            assert sum(line[f"{kind}/expert_{e}"] for e in range(3)) == pytest.approx(1.0)
        assert 0 < line["balance/entropy"] <= 1
        assert line["balance/drop_rate"] == 0
        assert 0.95 < line["loss_auxiliary/switch"] < 1.5  # 1 at perfect balance
    assert "loss_auxiliary/switch" not in first
    images = len(splits.train)
    warm, learned = trainer.model.moe.warmup_usage_E.sum().item(), trainer.model.moe.usage_E.sum().item()
    assert warm + learned == 2 * 4 * images
    assert warm == 2 * (images + 64)


def test_the_running_balance_is_that_of_the_load():
    sums = EpochSums.zeros(2, 4, torch.device("cpu"))
    sums.samples, sums.importance_LE = 10, torch.tensor([[9.0, 1.0, 0.0, 0.0]] * 2)
    assert sums.running(torch.full((2, 4), 5)).endswith("balance 1.00")
    assert sums.running(torch.tensor([[10, 10, 0, 0]] * 2)).endswith("balance 0.50")
    assert sums.running(torch.zeros(2, 4, dtype=torch.int64)).endswith("random routing")
    assert sums.running(torch.full((2, 1), 5)).endswith("accuracy 0.000")  # a single expert has no balance


@pytest.mark.parametrize("shares, shown", [([0.5, 0.5], "  balance 1.00"), ([1.0], ""), ([], "  random routing")])
def test_an_epoch_line_shows_the_balance_of_several_experts(shares, shown):
    names = ("loss/train", "accuracy/train", "loss/validation", "accuracy/validation", "macro_f1/validation")
    values = dict.fromkeys((*names, "speed/epoch_seconds"), 0.5)
    values |= {f"expert_load/expert_{expert}": share for expert, share in enumerate(shares)}
    values |= {"balance/entropy": 1.0} if shares else {}
    assert epoch_line(values, 1, 2, False).endswith(f"macro-F1 0.500{shown}  0.5 s")


def test_resumed_training_equals_uninterrupted_training(tmp_path, splits):
    whole = make_trainer(tmp_path / "whole", splits)
    whole.fit()
    part = make_trainer(tmp_path / "part", splits)
    save = part._keep_weights

    def save_then_die(better):
        save(better)
        if part.epoch == 2:
            raise KeyboardInterrupt

    part._keep_weights = save_then_die
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    part.tracker.close()
    resumed = make_trainer(tmp_path / "part", splits, resume=True)
    assert resumed.epoch == 2
    resumed.fit()
    assert equal_states(whole.model.state_dict(), resumed.model.state_dict())
    assert equal_states(whole.ema.module.state_dict(), resumed.ema.module.state_dict())
    timeless = [
        [{k: v for k, v in line.items() if "speed" not in k} for line in run.run.history()] for run in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    assert whole.best == resumed.best


def test_a_checkpoint_round_trip_keeps_everything(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits, epochs=2)
    trainer.fit()
    state = load_checkpoint(trainer.run.last)
    assert state["epoch"] == 2 and state["step"] == trainer.step
    other = make_trainer(tmp_path, splits, resume=True)
    assert equal_states(other.model.state_dict(), trainer.model.state_dict())
    assert other.optimizer.state_dict()["state"][0]["step"] == trainer.optimizer.state_dict()["state"][0]["step"]
    assert torch.equal(torch.rand(3), (trainer.load_state_dict(state, tmp_path), torch.rand(3))[1])


def test_patience_stops_training(tmp_path, splits):
    optim = OptimConfig(lr=1e-12, warmup_steps=0, schedule="constant")
    trainer = make_trainer(tmp_path, splits, epochs=50, patience=2, ema_decay=0.0, optim=optim)
    plateau = {"loss/validation": 1.0, "accuracy/validation": 0.5, "macro_f1/validation": 0.5}
    trainer._validate = lambda: dict(plateau)
    trainer.fit()
    assert trainer.epoch == 3  # two epochs that were as good as the first, but not better
    assert trainer.best["epoch"] == 3


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits)
    with torch.no_grad():
        trainer.model.moe.experts[0][0].weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"task loss is not finite at step 1, in epoch 1: no weight has changed yet"):
        trainer.fit()


@pytest.mark.parametrize(
    ("term", "step", "words"),
    [
        ("gradient", 9, "lower --optim.lr, or set --optim.clip_norm"),
        ("gradient", 1, "lower the weights of --balance, or set --router.temperature"),
        ("auxiliary loss z_loss", 9, "lower --optim.lr or --balance.z_loss"),
        ("auxiliary loss z_loss", 1, "set --balance.z_loss to 0 or set --router.temperature"),
        (OUTPUT, 1, "use float32"),
    ],
)
def test_the_advice_for_a_non_finite_number_fits_the_step(term, step, words):
    message = str(not_finite(term, step, 1, "none"))
    assert words in message
    assert ("optim.lr" in message) == (step > 1 and term != OUTPUT)  # it has done nothing before the first step


def test_a_batch_larger_than_the_split_is_rejected(tmp_path, splits):
    with pytest.raises(UserError, match=r"train\.batch_size 5000 is larger than the"):
        make_trainer(tmp_path, splits, batch_size=5000)


@pytest.mark.parametrize("make", [make_trainer, pytest.param(block_trainer, marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_model_and_another_seed_another(tmp_path, splits, make):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = make(tmp_path / name, splits, epochs=2, seed=seed)
        trainer.fit()
        states.append(trainer.model.state_dict())
    assert equal_states(states[0], states[1])
    assert not equal_states(states[0], states[2])


def test_learning_rate_schedule_by_hand():
    config = OptimConfig(warmup_steps=4, schedule="cosine")
    # Linear: 1/4, 2/4, 3/4, 4/4. Then half a cosine over the 8 steps left: 1 at its start, 0.5 in its middle.
    assert [lr_factor(step, 12, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(4, 12, config) == pytest.approx(1.0)
    assert lr_factor(8, 12, config) == pytest.approx(0.5)
    assert lr_factor(12, 12, config) == pytest.approx(0.0)
    assert lr_factor(500, 12, OptimConfig(warmup_steps=0, schedule="constant")) == 1.0


def test_predictions_do_not_change_the_model(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits)
    trainer.model.train()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    predictions = predict(trainer.model, trainer.bank, "test")
    assert trainer.model.training
    assert equal_states(before, trainer.model.state_dict())
    assert len(predictions.labels_N) == len(splits.test)
    assert predictions.sample_A.tolist() == [n for n in range(len(splits.test)) for _ in range(2)]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_an_unreadable_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "last.pt"
    if content is None:
        torch.save({"format_version": 99}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt"):
        load_checkpoint(path)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(EnvironmentFault, match="could not be written"):
        save_checkpoint(tmp_path / "value.json" / "last.pt", {})


def test_a_run_folder_is_not_overwritten(tmp_path):
    run = RunFolder.create(tmp_path / "run", "test")
    run.config.write_text("{}")
    run = RunFolder.create(tmp_path / "run", "test")  # a run that ended before its first checkpoint is no run
    write_json(run.model, {})
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.create(tmp_path / "run", "test")


def test_the_moving_average_is_validated_and_kept(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits, epochs=2, ema_decay=0.9)
    trainer.fit()
    kept = load_checkpoint(trainer.run.best)["model"]
    last = load_checkpoint(trainer.run.last)
    assert trainer.best["epoch"] == 2
    assert equal_states(kept, last["ema"])
    assert not equal_states(kept, last["model"])


def test_bfloat16_training_learns_and_keeps_float32_weights(tmp_path, splits):
    trainer = make_trainer(tmp_path, splits, precision="bfloat16", epochs=8)
    trainer.fit()
    history = trainer.run.history()
    assert history[-1]["loss/train"] < 0.8 * history[0]["loss/train"]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_warm_up_that_never_ends_is_rejected(tmp_path, splits):
    with pytest.raises(UserError, match=r"router\.warmup_steps 6 routes all 5 steps at random"):
        make_trainer(tmp_path, splits, epochs=1)


def test_a_truncated_line_of_metrics_is_skipped(tmp_path):
    run = RunFolder.create(tmp_path, "test")
    run.metrics.write_text('{"step": 5, "epoch": 1}\n[1]\n{"step": 1')
    assert run.history() == [{"step": 5, "epoch": 1}]


@pytest.mark.parametrize("text", ["[]", "{}", '{"format_version": 99}', "no JSON"])
def test_an_altered_description_is_named(tmp_path, text):
    run = RunFolder.create(tmp_path, "test")
    run.model.write_text(text)
    with pytest.raises(UserError, match=r"model\.json is not"):
        read_description(run)


def test_other_data_and_another_backbone_are_rejected():
    stored = {"backbone": {"name": "a", "fingerprint": "1"}, "data": {"train": "x", "test": "y"}}
    check_inputs(stored, stored, Path("best.pt"))
    with pytest.raises(UserError, match=r"its test images differ"):
        check_inputs(stored, {**stored, "data": {"train": "x", "test": "z"}}, Path("best.pt"))
    with pytest.raises(UserError, match=r"trained on backbone a with fingerprint 1, but b here has 2"):
        check_inputs(stored, {**stored, "backbone": {"name": "b", "fingerprint": "2"}}, Path("best.pt"))


def test_flops_by_hand():
    attention = AttentionNeck((65, 192), NeckConfig(kind="attention", heads=4))
    # Projections of 4 matrices: 2 * 65 * 192 * 768. Scores and their sum: 2 * (2 * 65 * 65 * 192).
    assert flops(attention, torch.zeros(1, 65, 192)) == 2 * 65 * 192 * 768 + 4 * 65 * 65 * 192
    assert flops(torch.nn.Linear(10, 7), torch.zeros(1, 10)) == 140
