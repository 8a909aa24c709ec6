"""evaluate() with experts inside the ViT: single blocks, the contribution of each expert there, and patch maps."""

import json

import numpy as np
import pytest
import torch
from block_helpers import moe_vit, spread
from conftest import without_drawing
from sklearn.metrics import f1_score

from config.config import Config
from data.augment import AugmentConfig
from data.image_set import ImageSet, Splits
from evaluation.blocks import hardly_used, patch_grid, without_each_in_one_block
from evaluation.evaluation import evaluate
from evaluation.figures import FIGURES, Evaluated
from evaluation.predict import predict
from evaluation.report import _headline
from evaluation.report_tables import _block_table
from evaluation.reporting import _report_blocks
from features.images import ImageBank
from model.experts import ExpertsConfig
from model.routers import RouterConfig
from storage.folder import RunFolder


def _cards(results):
    return [(what, value) for what, value, _ in _headline(results)]


CPU = torch.device("cpu")
SIZES = [[2], [4], [6]]


def image_set(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(count) % 5
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[:, 0] = (50 * labels_N[:, None, None]).to(torch.uint8)
    return ImageSet(images, labels_N, tuple("abcde"), labels_N // 3, ("first three", "last two"))


def bank(test_images=30):
    splits = Splits(image_set(10, 0), image_set(10, 1), image_set(test_images, 2))
    return ImageBank(splits, AugmentConfig(flip=False, crop=0), CPU, evaluation_batch=8)


def config(**router):
    return Config(router=RouterConfig(**router), experts=ExpertsConfig(place="blocks", kind="adapter", sizes=SIZES))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run folder, evaluated: (run, results, model, bank)."""
    run = RunFolder(tmp_path_factory.mktemp("blocks"))
    shares = {f"expert_load_block_{b}/expert_{e}": 1 / 3 for b in range(3) for e in range(3)}
    lines = [{"step": 5 * t, "epoch": t, **shares} for t in (1, 2)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    model, images = spread(moe_vit()).eval(), bank()
    with pytest.MonkeyPatch.context() as patch:  # layout and compression take most of the time
        without_drawing(patch)
        early: list[str] = []
        scored = lambda found: early.append(json.dumps(found) * run.results.exists())  # noqa: E731
        results = evaluate(run, config(), model, images, worth_images=12, scored=scored)
        (first,) = map(json.loads, early)
        assert first["macro_f1"] == results["macro_f1"] and "macro_f1_change" not in first["expert_worth"][0]
        return run, results, model, images


def test_each_block_has_its_shares_and_the_most_specialised_one_is_named(evaluated):
    run, results, _, _ = evaluated
    assert json.loads(run.results.read_text(encoding="utf-8")) == results
    rows = results["blocks"]
    assert [row["block"] for row in rows] == [0, 1, 2]
    for row in rows:
        for key in ("expert_load", "expert_importance", *("expert_by_class_weight", "expert_by_superclass_weight")):
            assert np.sum(row[key], axis=-1) == pytest.approx(1.0)
    gains = [row["specialisation"]["mutual_information"] - row["specialisation"]["null_mean"] for row in rows]
    assert results["most_specialised_block"] == int(np.argmax(gains))
    assert results["specialisation"] == rows[int(np.argmax(gains))]["specialisation"]


def test_the_certainty_of_the_gate_is_the_mean_over_tokens(evaluated):
    _, results, model, images = evaluated
    with torch.no_grad():
        _, routings = model(images.splits.test.images_NCHW)
    gates = torch.stack([routing.probs_BE for routing in routings]).double()
    assert results["gate"]["entropy_mean"] == pytest.approx(float(-(gates * gates.log()).sum(2).mean()) / np.log(3))
    assert results["gate"]["boundary_share"] is None and "near the boundary" not in dict(_cards(results))


def test_ablation_in_one_block_equals_the_model_without_the_expert(evaluated):
    _, results, model, images = evaluated
    pixels, labels = images.splits.test.images_NCHW[:16], images.splits.test.labels_N[:16].numpy()  # whole batches
    with torch.no_grad():
        before = f1_score(labels, model(pixels)[0].argmax(dim=1), average="macro")
        for block, expert in np.ndindex(3, 3):
            allowed_LE = torch.ones(3, 3, dtype=torch.bool)
            allowed_LE[block, expert] = False
            logits, routings = model(pixels, allowed_E=allowed_LE)
            assert not (routings[block].expert_A == expert).any()
            after = f1_score(labels, logits.argmax(dim=1), average="macro")
            worth = results["blocks"][block]["expert_worth"]
            assert worth["macro_f1_change"][expert] == pytest.approx(after - before) and worth["images"] == 16
    changes = [row["expert_worth"]["answers_changed"] for row in results["blocks"]]
    assert np.max(changes) > 0  # it makes a difference


def test_too_many_requested_images_mean_all_images():
    assert without_each_in_one_block(spread(moe_vit()).eval(), bank(test_images=10), "test", 999).shape == (3, 3, 10)


def test_figures_of_blocks_are_drawn_and_name_the_block(evaluated):
    run, results, model, images = evaluated
    drawn = {path.stem for path in run.figures.iterdir()}
    assert {
        "block_load",
        "block_load_over_time",
        "block_by_class",
        "block_worth",
        "patch_maps",
        "patch_positions",
    } <= drawn
    assert "gate_map" not in drawn
    material = Evaluated(run, config(), model, images, predict(model, images, "test"), results)
    title = FIGURES["block_by_class"].draw(material).get_suptitle()
    assert title == f"Which expert processes which class in block {results['most_specialised_block']}"
    maps = FIGURES["patch_maps"].draw(material)
    assert [ax.get_title() for ax in maps.axes[1:4]] == ["block 0", "block 1", "block 2"]
    assert len(maps.axes) == 5 * 4  # an image of each class


def test_a_patch_map_shows_what_the_gate_chose(evaluated):
    *_, model, images = evaluated
    found = predict(model, images, "test").blocks
    rows, columns = patch_grid(model)
    with torch.no_grad():
        _, routings = model(images.splits.test.images_NCHW[:1])
    for place, routing in enumerate(routings):
        weights_TE = torch.zeros(routing.num_samples, 3).index_put_(
            (routing.sample_A, routing.expert_A), routing.weight_A, accumulate=True
        )
        expected = weights_TE.argmax(dim=1)[-rows * columns :].tolist()
        assert found.first_MLT[0, place, -rows * columns :].tolist() == expected


def test_routing_by_image_has_no_patch_map(tmp_path):
    model, images = spread(moe_vit(level="image")).eval(), bank()
    material = Evaluated(RunFolder(tmp_path), config(), model, images, predict(model, images, "test"), {})
    assert FIGURES["patch_maps"].draw(material) is None and FIGURES["patch_positions"].draw(material) is None


def test_the_page_and_clearml_have_a_row_for_each_block(evaluated):
    run, results, *_ = evaluated
    page = run.report.read_text(encoding="utf-8")
    assert "Blocks" in page and "patch maps" in page
    assert [row[0] for row in _block_table(results).rows] == ["0", "1", "2"]
    shown = {}

    class Recorder:
        def __getattr__(self, name):
            return lambda title, *values: shown.update({title: values})

    _report_blocks(results, Recorder())
    assert shown["expert load by block"][1:] == (
        [row["expert_load"] for row in results["blocks"]],
        ("block", ["0", "1", "2"]),
        ("expert", ["0", "1", "2"]),
    )
    assert "macro-F1 without the expert, by block" in shown and "specialisation by block" in shown


def test_an_expert_hardly_used_in_single_blocks_is_reported_with_the_blocks():
    rows = [{"block": block, "expert_underused": [False, block > 2, block == 5]} for block in (1, 3, 5)]
    results = {"expert_underused": [False, True, False], "blocks": rows}
    below = "below 1 % of the load in block"
    assert hardly_used(results) == ["", f"{below}s 3, 5", f"{below} 5"]
    assert hardly_used({"expert_underused": [False, True]}) == ["", "below 1 % of the load"]


def test_on_a_cpu_single_blocks_are_ablated_only_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.figures.draw", lambda *_: [])  # drawn above
    results = evaluate(RunFolder(tmp_path), config(), spread(moe_vit()).eval(), bank(test_images=10))
    assert "expert_worth" not in results["blocks"][0] and "macro_f1_change" in results["expert_worth"][0]
