"""Training, resuming and scoring a ViT with experts in its blocks, on digits."""

import copy
import json

import numpy as np
import pytest
import torch
from block_helpers import block_trainer, digits_vit, spread
from torch.nn import functional as F
from trainer_helpers import CPU, equal_states

from data.augment import AugmentConfig
from evaluation.cost import cost, expert_costs, inside_cost
from evaluation.predict import predict
from features.images import ImageBank
from model.balance import BalanceConfig, balance_losses, losses_by_place, weighted_sum
from storage.checkpoint import load_checkpoint


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_training_learns_and_does_not_change_the_vit(tmp_path, splits):
    trainer = block_trainer(tmp_path / "run", splits, epochs=5)
    before = copy.deepcopy(trainer.model.backbone.vit.state_dict())
    trainer.fit()
    first, *_, last = lines_of(tmp_path / "run")
    assert last["loss/train"] < first["loss/train"] - 0.1
    assert equal_states(trainer.model.backbone.vit.state_dict(), before)
    assert trainer.ema.module.backbone is trainer.model.backbone
    stored = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")["model"]
    assert {name.split(".")[0] for name in stored} == {"mixtures", "neck", "head"}


def test_an_unused_expert_of_a_block_is_reported_once_with_its_block(tmp_path, splits, capsys):
    router = {"kind": "switch", "top_k": 1, "norm": "none"}
    trainer = block_trainer(tmp_path / "run", splits, epochs=3, router=router)
    for model in (trainer.model, trainer.ema.module):
        model.mixtures[1].router.gate.bias.data[0] = -100.0
    trainer.fit()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: expert")]
    assert line.startswith("warning: expert 0 received 0.0 % of the ") and " assignments of epoch " in line
    assert " in block 2; " in line


def test_each_block_is_logged_in_addition_to_the_mean(tmp_path, splits):
    block_trainer(tmp_path / "run", splits).fit()
    line = lines_of(tmp_path / "run")[-1]
    each = [[line[f"expert_load_block_{block}/expert_{e}"] for e in range(3)] for block in (1, 2)]
    assert [sum(shares) for shares in each] == pytest.approx([1, 1])
    assert [line[f"expert_load/expert_{e}"] for e in range(3)] == pytest.approx(np.mean(each, axis=0).tolist())
    losses = [line[f"loss_auxiliary_block_{block}/switch"] for block in (1, 2)]
    assert line["loss_auxiliary/switch"] == pytest.approx(sum(losses) / 2)
    assert losses[0] != losses[1]


def test_a_resumed_run_equals_an_uninterrupted_run(tmp_path, splits):
    options = {"epochs": 3, "router": {"kind": "deepseek", "capacity_factor": 1.0}, "patch_dropout": 0.3}
    whole = block_trainer(tmp_path / "whole", splits, **options)
    whole.fit()
    part = block_trainer(tmp_path / "part", splits, **options)
    part.config.epochs = 1
    part.fit()
    again = block_trainer(tmp_path / "part", splits, resume=True, **options)
    assert again.epoch == 1
    again.fit()
    assert equal_states(again.model.state_dict(), whole.model.state_dict())
    assert equal_states(again.ema.module.state_dict(), whole.ema.module.state_dict())
    assert any(mixture.router.bias_E.any() for mixture in whole.model.mixtures)


def test_the_last_steps_use_all_patches(tmp_path, splits, monkeypatch):
    trainer = block_trainer(tmp_path / "run", splits, epochs=2, patch_dropout=0.5, all_patches=0.25)
    seen, step = [], trainer.train_step
    monkeypatch.setattr(
        trainer,
        "train_step",
        lambda *batch, **options: seen.append(options.get("patch_dropout", 0)) or step(*batch, **options),
    )
    trainer.fit()
    assert len(seen) == trainer.total_steps
    assert seen == [0.5 if number < 0.75 * len(seen) else 0 for number in range(len(seen))]


def test_the_auxiliary_loss_is_the_mean_over_blocks():
    model, balance = spread(digits_vit(kind="vmoe")), BalanceConfig(switch=0.3, importance=0.2, z_loss=0.1)
    _, routings = model.train()(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    each = [weighted_sum(balance_losses(routing, balance), balance).item() for routing in routings]
    assert weighted_sum(losses_by_place(routings, balance), balance).item() == pytest.approx(sum(each) / 3)


@pytest.mark.parametrize("level", ["token", "image"])
def test_predictions_sum_the_choices_of_tokens(splits, level, monkeypatch):
    monkeypatch.setattr("evaluation.block_routing.KEPT_TOKENS", 40 * 3 * (17 if level == "token" else 1))
    model, bank = spread(digits_vit(level=level)), ImageBank(splits, AugmentConfig(), CPU, evaluation_batch=30)
    predictions = predict(model, bank, "test", removals=True)
    images_NCHW, blocks = splits.test.images_NCHW, predictions.blocks
    with torch.no_grad():
        logits_NC, routings = model.eval()(images_NCHW)
        without_NC, _ = model(images_NCHW, allowed_E=torch.tensor([True, False, True]))
    np.testing.assert_allclose(predictions.logits_NC, logits_NC, atol=1e-4)
    assert (predictions.removals.predicted_EN[1] == without_NC.argmax(1).numpy()).mean() > 0.99
    tokens = 17 if level == "token" else 1
    assert blocks.first_MLT.shape == (40, 3, tokens)
    for index, routing in enumerate(routings):
        weights_NTE = routing.assignments.weights_BE.view(len(images_NCHW), tokens, 3)
        np.testing.assert_allclose(blocks.weight_NLE[:, index], weights_NTE.sum(1), atol=1e-4)
        assert (blocks.count_NLE[:, index].sum(1) == 2 * tokens).all()
        assert (blocks.first_MLT[:, index] == weights_NTE.argmax(2)[:40].numpy()).mean() > 0.99
        assert predictions.load_LE[index] == pytest.approx(
            (routing.counts_E / routing.counts_E.sum()).numpy(), abs=0.01
        )
    labels_N = splits.test.labels_N.numpy()
    of_three = blocks.weight_NLE[labels_N == 3].sum(axis=0)
    np.testing.assert_allclose(blocks.by_class(labels_N, 10)[:, 3], of_three, rtol=1e-5)
    gate_NE = torch.stack([r.probs_BE.view(len(images_NCHW), tokens, 3).mean(1) for r in routings]).mean(0)
    np.testing.assert_allclose(F.softmax(torch.from_numpy(predictions.gate_NE), dim=1), gate_NE, atol=1e-4)


def test_parameters_and_flops_by_hand():
    model = digits_vit()
    adapters = [(2 * units * 16 + units) * 3 for units in (2, 4, 6)]
    assert [row.parameters for row in expert_costs(model)] == adapters
    assert [row.flops for row in expert_costs(model)] == [2 * units * 32 for units in (2, 4, 6)]
    everything = sum(parameter.numel() for parameter in model.parameters())
    load_E = np.array([0.5, 0.5, 0.0])
    found = inside_cost(model, load_E)
    assert found.active_parameters == everything - adapters[2]
    gate, head = 3 * 17 * 2 * 16 * 3, 2 * 32 * 10
    assert found.flops == gate + head + 3 * 17 * (2 * 2 * 32 + 2 * 4 * 32)
    whole = cost(model, model.backbone, (3, 8, 8))
    assert whole.trainable_parameters == everything
    assert whole.backbone_parameters == sum(parameter.numel() for parameter in model.backbone.parameters())


def test_a_mixture_on_top_is_logged_and_left_out_of_the_blocks(tmp_path, splits):
    trainer = block_trainer(tmp_path / "run", splits, experts={"head": [[4], [8], [16]]}, epochs=1)
    trainer.fit()
    line = lines_of(tmp_path / "run")[-1]
    assert sum(line[f"expert_load_head/expert_{e}"] for e in range(3)) == pytest.approx(1)
    assert "loss_auxiliary_head/switch" in line
    predictions = predict(trainer.model, trainer.bank, "validation", removals=True)
    assert predictions.blocks.places == ("block_1", "block_2")
    costs = cost(trainer.model, trainer.model.backbone, (3, 8, 8))
    assert costs.head_flops > 0
