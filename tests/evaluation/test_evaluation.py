"""evaluate() on a small synthetic run: the numbers, the files, the page, and the contribution of each expert."""

import copy
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from evaluation_helpers import FIGURES, NAMES, build
from PIL import Image
from sklearn.metrics import f1_score

from evaluation.evaluation import evaluate, table
from evaluation.predict import predict
from evaluation.report_tables import _expert_table, _spread
from storage.folder import RunFolder

# Read by other programs; names may be added, but not changed.
KEYS = {"accuracy", "macro_f1", "loss", "images", "entropy", "cv", "specialisation", "class_names", "per_class"}

KEYS |= {"experts", "expert_load", "expert_importance", "expert_accuracy", "expert_samples", "expert_by_class"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run folder with history, evaluated: (run, results, model, bank)."""
    run = RunFolder(tmp_path_factory.mktemp("run <b> & co"))
    lines = [
        {"step": 5 * t, "epoch": t, "loss/train": 2 / t, "accuracy/validation": 0.3 * t, "macro_f1/validation": 0.2 * t}
        | {f"expert_load_validation/expert_{e}": 1 / 3 for e in range(3)}
        for t in (1, 2)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config, model, bank, _ = build()

    def scored(results):
        assert json.loads(run.results.read_text()) == results and not run.report.exists()

    return run, evaluate(run, config, model, bank, scored=scored), model, bank


def test_the_numbers_are_complete_and_valid_json(evaluated):
    run, results, _, _ = evaluated

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((run.evaluation / "metrics.json").read_text(), parse_constant=refuse) == results
    assert results.keys() >= KEYS
    assert np.sum(results["expert_by_superclass_weight"], axis=1) == pytest.approx([1, 1])
    assert sum(results["calibration"]["count"]) == results["images"] == 120
    assert [results["co_activation"][e][e] for e in range(3)] == results["expert_samples"]
    assert np.trace(results["superclass_confusion"]) / 120 == pytest.approx(results["superclass_accuracy"])
    errors = sum(row["as_other"] + row["other_as_class"] for row in results["confused_pairs"])
    assert errors == round(120 * (1 - results["accuracy"]))
    assert results["environment"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_every_figure_is_written_completely(evaluated):
    run, *_ = evaluated
    assert sorted(path.stem for path in run.figures.iterdir()) == sorted(FIGURES)
    for path in run.figures.iterdir():
        with Image.open(path) as image:
            image.verify()


def test_ablation_equals_the_model_sample_by_sample(evaluated):
    _, results, model, bank = evaluated
    predictions = predict(model, bank, "test", removals=True)
    features, labels = next(bank.batches("test", 120))
    with torch.no_grad():
        for expert in range(3):
            allowed_E = torch.arange(3) != expert
            answers = torch.stack([model(row[None], allowed_E=allowed_E)[0].argmax() for row in features])
            assert answers.tolist() == predictions.removals.predicted_EN[expert].tolist()
            scores = [f1_score(labels, given, average="macro") for given in (answers, predictions.predicted_N)]
            row = results["expert_worth"][expert]
            assert row["macro_f1_change"] == pytest.approx(scores[0] - scores[1])
            assert row["accuracy_change"] == pytest.approx(
                (answers == labels).double().mean().item() - results["accuracy"]
            )
    assert len({tuple(row) for row in predictions.removals.predicted_EN.tolist()}) > 1  # it makes a difference


def test_reassigned_samples_and_saved_cost(evaluated):
    _, results, *_ = evaluated
    # Of three experts a sample has two, so without one of them it has the other two.
    for expert, row in enumerate(results["expert_worth"]):
        served = results["co_activation"][expert]
        successors = [0 if other == expert else served[expert] - served[other] for other in range(3)]
        assert row["taken_over_by"] == pytest.approx([count / sum(successors) for count in successors])
        costs = [other["flops"] for other in results["expert_worth"]]
        before = sum(count * cost for count, cost in zip(served, costs, strict=True))
        after = served[expert] * (sum(costs) - costs[expert])
        assert row["flops_saved"] == pytest.approx((before - after) / 120)
    # 48 x 4 + 4 weights and biases, LayerNorm 2 x 4, 4 x 6 + 6; a multiply-add is two operations.
    first = results["expert_worth"][0]
    assert (first["parameters"], first["bytes"], first["flops"]) == (196 + 8 + 30, 4 * 234, 2 * (48 * 4 + 4 * 6))


def test_the_final_table_shows_the_sign_of_a_change_and_separates_scores_from_names(evaluated):
    run, results = evaluated[0], copy.deepcopy(evaluated[1])
    for expert, row in enumerate(results["expert_worth"]):
        row |= {"macro_f1_change": -0.01 * expert, "macro_f1_deviation": 0.005}
    scores = {"8": (0.97, 9), "3": (0.99, 9), "1": (1.0, 9), "none": (0.0, 0)}  # of the last there is no test image
    results["per_class"] = {
        name: {"f1": f1, "precision": f1, "recall": f1, "support": count} for name, (f1, count) in scores.items()
    }
    lines = table(results).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[5].endswith("  macro-F1 change without it") and lines[8].endswith(" -2.00 ± 0.50")
    assert lines[-1] == "lowest F1    8: 97 %, 3: 99 %"
    assert "<th>macro-F1 change</th>" in run.report.read_text()


def test_an_expert_that_is_hardly_used_is_marked_in_the_final_table_and_the_report(evaluated, tmp_path, monkeypatch):
    results, run = copy.deepcopy(evaluated[1]), RunFolder(tmp_path)
    assert results["expert_underused"] == [False, False, False] and "!" not in table(results)
    config, model, bank, _ = build()
    with torch.no_grad():
        model.moe.router.gate.bias.copy_(torch.tensor([0.0, 1000.0, 2000.0]))
    monkeypatch.setattr("evaluation.figures.draw", lambda *_: [])  # drawn above
    results = evaluate(run, config, model, bank)
    assert (results["expert_underused"], results["expert_accuracy"][0]) == ([True, False, False], None)
    lines = table(results).splitlines()
    assert lines[6].split()[:4] == ["0", "·", "4", "!"] and " ! " not in lines[7]
    assert "! expert 0 is below 1 % of the load: hardly used" in lines
    assert "0 · 4, hardly used: below 1 % of the load" in run.report.read_text(encoding="utf-8")


def test_an_experts_main_classes_are_those_with_its_largest_share_of_weight(evaluated):
    results = copy.deepcopy(evaluated[1])
    results["class_names"], results["experts"] = ["a", "b"], ["0", "1"]
    results["expert_by_class"], results["expert_by_class_weight"] = [[0.5, 0.5]] * 2, [[0.001, 0.999], [0.25, 0.75]]
    rows = _expert_table(results).rows
    assert [row[5] for row in rows] == ["b: 25\u00a0%", "a: 100\u00a0%, b: 75\u00a0%"]
    assert _spread(["a", "b"], results, "class")[1] == ["b", "25 / 50\u00a0%", "75 / 50\u00a0%"]


VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, references and text, and checks that every opened tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_and_escaped(evaluated):
    run, results, *_ = evaluated
    source = run.report.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "b"} & set(page.tags)
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert "url(" not in source and "@import" not in source and "http" not in source.replace("http-equiv", "")
    assert page.tags.count("img") == len(FIGURES)
    assert page.tags.count("h1") == 1 and run.path.name in page.text
    for words in (*NAMES, "<b>last three</b>", "warmup_steps", "macro-F1", results["environment"]["date"], "0 · 4"):
        assert words in page.text, words


def browser():
    """A headless browser, or None. BROWSER names one that is not on the PATH."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next(filter(None, map(shutil.which, [os.environ.get("BROWSER", ""), *names])), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium or Chrome on the PATH to open report.html with")
def test_the_page_opens_in_a_real_browser(evaluated, tmp_path):
    run, *_ = evaluated
    # Only a browser can check whether the images decode and the page fits its window.
    probe = """<script>addEventListener("load", () => { document.title = JSON.stringify({
        pictures: [...document.images].filter(image => image.naturalWidth > 100).length,
        tables: document.querySelectorAll("td").length, errors: window.errors,
        overflow: document.documentElement.scrollWidth - innerWidth }); });
        window.errors = 0; addEventListener("error", () => window.errors++);
        window.alert = () => window.errors++;</script></head>"""
    copy = tmp_path / "report.html"
    copy.write_text(run.report.read_text(encoding="utf-8").replace("</head>", probe), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--window-size=1000,800", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    result = subprocess.run([browser(), *options, copy.as_uri()], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    title = result.stdout.split("<title>", 1)[1].split("</title>", 1)[0]
    seen = json.loads(title.replace("&quot;", '"'))
    assert seen["pictures"] == len(FIGURES)
    assert seen["tables"] > 100
    assert (seen["errors"], max(0, seen["overflow"])) == (0, 0)
