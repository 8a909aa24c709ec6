"""Edge cases of evaluate(): one expert, one image, experts without samples, one pass of the backbone."""

import json

import pytest
import torch
from evaluation_helpers import FIGURES, TRAINING, build
from PIL import Image

from config.config import Config
from evaluation import figures
from evaluation.evaluation import evaluate, table
from evaluation.predict import predict
from evaluation.reporting import _report_classes, _report_experts
from evaluation.results import results_of
from storage.folder import RunFolder


def test_the_star_is_at_the_epoch_of_the_exported_weights(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    lines = [{"step": t, "epoch": t, "macro_f1/validation": 0.5 - 0.1 * t} for t in (1, 2, 3)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def label():
        figure = figures.FIGURES["training_curves"].draw(figures.Evaluated(run, Config(), None, None, None, {}))
        return figure.axes[1].get_legend_handles_labels()[1][-1]

    assert label() == "best epoch, 1: 0.4"
    run.model.write_text("{}")
    monkeypatch.setattr("evaluation.figures.training_curves.read_description", lambda run: {"epoch": 2})
    assert label() == "kept epoch, 2: 0.3"


def test_clearml_leaves_out_missing_values_of_experts_and_classes():
    class Recorder:
        def __getattr__(self, name):
            return lambda title, series, *values: shown.update({(title, series): values})

    config, model, bank, _ = build(test_images=5)  # none of the sixth class
    with torch.no_grad():
        model.moe.router.gate.bias.copy_(torch.tensor([0.0, 1000.0, 2000.0]))
    shown = {}
    results = results_of(predict(model, bank, "test", removals=True), bank.splits.test, config, model)
    _report_experts(results, Recorder())
    _report_classes(results, Recorder())
    assert shown["expert accuracy", "test"][1]["accuracy"][0] is None
    assert shown["expert load", "test"][1]["load"][0] == 0.0  # which is true
    assert shown["experts by class", "gate weight"][0][5] == [None, None, None]
    assert sum(shown["experts by class", "gate weight"][0][4]) == pytest.approx(1)


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures are drawn, but saved blank: laying out and compressing takes most of the time, and is tested above."""

    def save(_, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9)).save(path)
        return path

    monkeypatch.setattr("analysis.plots.save", save)


def test_one_expert_cannot_be_removed_and_has_no_figures_of_shares(tmp_path, blank_figures):
    config, model, bank, _ = build(sizes=((4,),), top_k=1)
    results = evaluate(RunFolder(tmp_path), config, model, bank)
    assert results["expert_worth"][0].keys() == {"parameters", "bytes", "flops"}
    assert results["gate"]["boundary_share"] is None
    assert figures.FIGURES["expert_worth"].draw(figures.Evaluated(None, config, model, bank, None, results)) is None
    drawn = {path.stem for path in (tmp_path / "evaluation" / "figures").iterdir()}
    assert "reliability" in drawn and not drawn & {"expert_by_class", "expert_load", "expert_worth"}
    assert "without expert" not in (tmp_path / "evaluation" / "report.html").read_text()
    assert "0 · 4" in table(results)


def test_a_test_set_of_one_image_has_a_page_too(tmp_path, blank_figures):
    config, model, bank, _ = build(test_images=1)
    results = evaluate(RunFolder(tmp_path), config, model, bank)
    assert results["images"] == 1
    drawn = {path.stem for path in (tmp_path / "evaluation" / "figures").iterdir()}
    assert drawn == {*FIGURES} - {*TRAINING}
    assert (tmp_path / "evaluation" / "report.html").is_file()


def test_with_as_many_choices_as_experts_a_removal_leaves_fewer_choices():
    _, model, bank, _ = build(sizes=((4,), (8,)), top_k=2)
    removals = predict(model, bank, "test", removals=True).removals
    assert removals.before_EE.tolist() == [[120, 120], [120, 120]]
    assert removals.after_EE.tolist() == [[0, 120], [120, 0]]


def test_the_backbone_runs_once_for_scores_and_removals():
    _, model, bank, extract = build(mode="live")
    predict(model, bank, "test", removals=True)
    assert extract.images == 120
