"""A routing rule, a kind of expert, a loss, a dataset and a figure from plug-ins, in a run."""

import json

import pytest
from conftest import ROOT, in_a_fork
from PIL import Image

import evaluate
import predict
import train

PLUGIN = '''
"""Toys, each of them in a few lines."""

import torch
from matplotlib.figure import Figure
from torch import nn

from data import datasets
from data.image_set import ImageSet
from evaluation import figures
from model import experts, losses, routers
from model.options import Option, count
from model.routers.token_choice import TokenChoiceRouter

SHIFT = Option("shift", int, 1, "toy_rule: how many places each choice moves on.", count)


@routers.register("toy_rule", "the experts next to the best ones", options=[SHIFT])
class ToyRouter(TokenChoiceRouter):
    """As top-k, but every choice moves on by `shift` experts."""

    def _build_gate(self, width, config):
        super()._build_gate(width, config)
        self.shift = config.shift

    def _choose(self, ranked_BE):
        return (super()._choose(ranked_BE) + self.shift) % self.num_experts


@experts.register("toy_expert", "hidden layers of Linear and Tanh")
class ToyExpert(experts.LayeredExpert):
    @staticmethod
    def hidden_layer(width, units, dropout):
        return [nn.Linear(width, units), nn.Tanh()]


@losses.register("toy_loss", "How large the logits are, on average.")
def toy_loss(routing):
    return routing.logits_BE.abs().mean()


@datasets.register("toy_images", about="three colours", side=8)
def toy_images(config):
    generator = torch.Generator().manual_seed(0)
    images_NCHW = torch.randint(0, 128, (150, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels_N = torch.arange(150) % 3
    images_NCHW[torch.arange(150), labels_N] += 127
    return ImageSet(images_NCHW, labels_N, ("red", "green", "blue")), None, None


@figures.register("toy_figure", "Every colour once.")
def toy_figure(evaluated):
    return Figure()
'''
OPTIONS = (
    "--config configs/digits.yaml --data.name toy_images --router.kind toy_rule --router.shift 2 "
    "--experts.kind toy_expert --balance.toy_loss 0.001 --neck.kind pooled --backbone.features [cls:1,mean:1] "
    "--router.hidden [] --train.epochs 2 --train.batch_size 16 --router.warmup_steps 2 --optim.lr 0.01 --tracking none"
)


@pytest.mark.slow
def test_a_run_with_a_rule_an_expert_a_loss_a_dataset_and_a_figure_from_plugins(tmp_path, monkeypatch, capfd, undrawn):
    monkeypatch.chdir(ROOT)
    plugin, run, picture = tmp_path / "toys.py", tmp_path / "run", tmp_path / "red.png"
    plugin.write_text(PLUGIN)
    Image.new("RGB", (8, 8), (250, 60, 60)).save(picture)

    def program(main, *words):
        monkeypatch.setattr("sys.argv", [main.__module__, *map(str, words)])
        return in_a_fork(main)

    named = ("--plugins", plugin)
    assert program(train.main, *OPTIONS.split(), *named, "--run_dir", run) == (0, "")
    results = json.loads((run / "evaluation/metrics.json").read_text())
    assert results["accuracy"] > 0.6  # chance is a third
    assert (run / "evaluation/figures/toy_figure.png").is_file()
    assert "Every colour once." in (run / "evaluation/report.html").read_text(encoding="utf-8")
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    assert "loss_auxiliary/toy_loss" in last

    asks = "needs the plug-in toys.py, and only the command line can load plug-ins: add --plugins PATH/to"
    for main, words in (
        (evaluate.main, [run]),
        (predict.main, [run, picture]),
        (train.main, ["--resume", run, "--train.epochs", 3]),
        (train.main, ["--config", run / "config.yaml"]),
    ):
        code, line = program(main, *words)
        assert code == 2 and line.startswith("error: plugins in ") and asks in line and line.count("\n") == 1
    capfd.readouterr()
    assert program(predict.main, run, picture, *named)[0] == 0
    assert "red" in capfd.readouterr().out.split("\n")[1]
    (run / "evaluation/figures/toy_figure.png").unlink()
    assert program(evaluate.main, run, *named, "--tracking", "none")[0] == 0
    assert (run / "evaluation/figures/toy_figure.png").is_file()
