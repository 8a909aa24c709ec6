"""Experts inside the ViT from the user's view: train, evaluate, predict, resume, and rejected options."""

import json

import pytest
from conftest import ROOT
from PIL import Image

import evaluate
import predict
import train
from assembly.loading import load_trained
from common.errors import UserError
from config.command_line import parse_command_line

BLOCKS = [
    "--config",
    "configs/digits_blocks.yaml",
    "--tracking",
    "none",
    "--data.max_per_class",
    "12",
    "--train.epochs",
    "2",
    "--train.batch_size",
    "16",
    "--experts.blocks",
    "[1,2]",
    "--backbone.features",
    "[cls:2,mean:2]",
    "--router.warmup_steps",
    "2",
]


@pytest.fixture
def call(monkeypatch, capsys, without_figures):
    """Run a program's `main` with arguments; returns its output."""

    def run(program, *arguments) -> str:
        monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
        program.main()
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_a_run_is_trained_evaluated_compared_used_for_prediction_and_continued(tmp_path, call, monkeypatch):
    run, picture = tmp_path / "run", tmp_path / "picture.png"
    assert "2 per token, in 2 blocks, by noisy_topk" in call(train, *BLOCKS, "--run_dir", run)
    results = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert [row["block"] for row in results["blocks"]] == [1, 2]
    assert all(sum(row["expert_load"]) == pytest.approx(1) for row in results["blocks"])
    assert all("macro_f1_change" in row for row in results["expert_worth"])
    assert (run / "evaluation" / "report.html").is_file()

    call(evaluate, run, "--tracking", "none")
    again = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert again["macro_f1"] == results["macro_f1"] and again["blocks"] == results["blocks"]

    with monkeypatch.context() as elsewhere:  # the comparison is written to the current folder
        elsewhere.chdir(tmp_path)
        table = call(evaluate, "--compare", run, ROOT / "tests/storage/data/digits_run")
    assert f"{100 * results['macro_f1']:.2f} %" in table and "experts.place" in table and "experts.blocks" in table

    Image.new("L", (8, 8), 100).save(picture)
    (image,) = json.loads(call(predict, run, picture, "--json", "--explain", tmp_path / "out.png"))["images"]
    assert sum(vote["weight"] for vote in image["experts"]) == pytest.approx(1, abs=1e-4)
    assert [patches["block"] for patches in image["patches"]] == [1, 2]
    assert all(len(row) == 8 and set(row) <= {0, 1, 2, 3} for patches in image["patches"] for row in patches["experts"])
    assert (tmp_path / "out.png").is_file()
    assert (
        predict.answerer(load_trained(run, "auto"), 5)(picture)[0]["patches"] == image["patches"]
    )  # as the page shows it

    assert "epoch   3/3" in call(train, "--resume", run, "--train.epochs", "3")


@pytest.mark.parametrize(
    "options, message",
    [
        ("--router.kind expert_choice", "router.kind expert_choice does not work with experts.place blocks"),
        ("--experts.shared [[4]]", "the frozen FFN is the shared expert"),
        ("--backbone.features [tokens:2]", "backbone.features tokens:BLOCK need experts.place head"),
        ("--experts.kind mlp", "experts.kind mlp is a class head"),
        ("--experts.place head", "is an expert inside the ViT"),
        ("--balance.load 0.1 --router.kind switch --router.top_k 1", "balance.load needs noise"),
    ],
)
def test_unsuitable_options_are_reported_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_command_line(["--config", "configs/digits_blocks.yaml", *options.split()])
    assert "\n" not in str(raised.value)


def test_options_that_need_blocks_are_reported():
    for option in (["--router.level", "image"], ["--experts.blocks", "[1]"]):
        with pytest.raises(UserError, match=r"experts\.place blocks"):
            parse_command_line(["--config", "configs/digits.yaml", *option])
