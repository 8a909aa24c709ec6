"""Runs that start from another run: through the programs, resumed, and impossible ones."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY

import evaluate
import train
from assembly.replay import joined
from assembly.scoring import score
from assembly.start import start_tracking
from assembly.transfer import read_origin
from common.errors import UserError
from config.command_line import parse_command_line
from config.config import flatten
from data.image_set import ImageSet
from evaluation.compare import compare
from storage.checkpoint import load_checkpoint
from storage.described import describe
from storage.export import load_weights_of
from storage.folder import RunFolder


def options(run, *words) -> list[str]:
    return ["--init", str(run), "--tracking", "none", *words]


@pytest.fixture
def start(monkeypatch, without_figures):
    """Run train.py in this process, without figures."""
    monkeypatch.chdir(ROOT)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, words)])
        train.main()

    return run


def test_the_configuration_is_that_of_the_run_except_for_its_own_options(tiny_run):
    config = parse_command_line(options(tiny_run, "--train.epochs", "3", "--freeze", "router,experts")).config
    theirs = parse_command_line(["--config", str(tiny_run / "config.yaml")]).config
    ours, before = flatten(config.to_dict()), flatten(theirs.to_dict())
    changed = {key for key in ours if ours[key] != before[key]}
    assert changed == {"init", "freeze", "train.epochs", "router.warmup_steps"} | ({"run_dir"} & changed)
    assert config.run_dir is None and config.freeze == ["router", "experts"] and config.router.warmup_steps == 0
    moved = parse_command_line(options(tiny_run, "--data.name", "cifar100")).config
    assert moved.data.max_per_class is None and moved.experts.sizes == theirs.experts.sizes


@pytest.mark.slow
def test_a_run_starts_from_another_one(tiny_run, tmp_path, start, capsys):
    words = ["--freeze", "router,experts", "--optim.lr_of", "[head:0.5]", "--data.max_classes", "7"]
    words += ["--balance.old_gate", "1"]
    start(*options(tiny_run, *words, "--train.epochs", "2", "--run_dir", tmp_path / "run"))
    said = capsys.readouterr()
    assert "balance.old_gate has no effect with --freeze router" in said.err
    said = said.out
    assert "neck, router, experts, 7 of 7 class rows" in said and "left out     3 classes" in said
    assert "frozen       router, experts" in said and "rates        head 0.005, all others 0.01" in said
    old, new = (load_weights_of(RunFolder(path)) for path in (tiny_run, tmp_path / "run"))
    frozen = [name for name in new if ".router." in name or (".experts." in name and ".4." not in name)]
    assert len(frozen) > 8 and all(torch.equal(new[name], old[name]) for name in frozen)
    taken = describe(RunFolder(tmp_path / "run"))["init"]
    assert taken["run"] == str(tiny_run) and taken["classes"] == [str(digit) for digit in range(7)]
    # After resuming, the frozen parts are still frozen, whether the first run exists or not.
    start("--resume", tmp_path / "run", "--train.epochs", "3", "--tracking", "none")
    again = load_weights_of(RunFolder(tmp_path / "run"))
    assert all(torch.equal(again[name], old[name]) for name in frozen)
    last = load_checkpoint(tmp_path / "run/checkpoints/last.pt")
    assert last["init"] == taken
    assert last["old_gates"]["moe.router.old.router.gate.weight"].equal(old["moe.router.gate.weight"])
    assert "init" in compare([str(tiny_run), str(tmp_path / "run")], tmp_path / "compared")
    report = (tmp_path / "run/evaluation/report.html").read_text()
    assert "Starts from" in report and str(tiny_run) in report
    assert json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["init"]["run"] == str(tiny_run)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--backbone.features", "[cls:2,mean:2]"], "features"),
        (["--experts.sizes", "[[16],[32]]"], "has experts.sizes .*, but --experts.sizes is .*: leave it out"),
        (["--router.hidden", "[8]"], "router.hidden"),
        (
            ["--config", "configs/cifar100_head.yaml"],
            "experts.sizes in configs/cifar100_head.yaml is .*, and .* too",
        ),
        (["--freeze", "router,heads"], "freeze names 'heads'.*did you mean head"),
        (["--freeze", "neck,router,experts,shared,head"], "leaves nothing to train"),
        (["--optim.lr_of", "[gate:2]"], "optim.lr_of has 'gate:2'"),
        (["--resume", "RUN"], "leave out --init"),
        (["--dense_twin", "true"], "other weights than the run that init names"),
    ],
)
def test_unsuitable_options_are_reported_in_one_line(tiny_run, words, message, start, tmp_path):
    words = [str(tiny_run) if word == "RUN" else word for word in words]
    with pytest.raises(UserError, match=message) as raised:
        start(*options(tiny_run, *words, "--run_dir", tmp_path / "run"))
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_an_initialised_run_needs_no_other_run_except_for_old_images(tiny_run):
    config = parse_command_line(options(tiny_run, "--balance.old_gate", "2", "--freeze", "experts")).config
    alone = config.alone()
    assert (alone.init, alone.freeze, alone.balance.old_gate) == (None, [], 0.0) and alone.balance.switch > 0
    replaying = parse_command_line(options(tiny_run, "--replay", "3")).config.alone()
    assert (replaying.init, replaying.replay) == (tiny_run, 3)


def test_a_folder_that_is_not_a_run_and_frozen_parts_without_a_run(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        parse_command_line(options(tmp_path))
    with pytest.raises(UserError, match="name it with --init"):
        parse_command_line([*TINY.split(), "--freeze", "router"])
    with pytest.raises(UserError, match="gate of a trained run: name it with --init"):
        parse_command_line([*TINY.split(), "--balance.old_gate", "1"])


@pytest.mark.slow
def test_new_experts_are_added_to_those_of_a_run(tiny_run, tmp_path, start, capsys):
    words = ["--experts.add", "[[8],[4]]", "--freeze", "router,experts", "--router.warmup_steps", "3"]
    start(*options(tiny_run, *words, "--train.epochs", "3", "--run_dir", tmp_path / "run"))
    said = capsys.readouterr().out
    assert "new          2 experts: 4 · 8, 5 · 4, with gate columns" in said
    config = parse_command_line(["--config", str(tmp_path / "run/config.yaml")]).config
    assert config.experts.sizes[4:] == config.experts.add == [[8], [4]] and config.experts.grown == [4]
    old, new = (load_weights_of(RunFolder(path)) for path in (tiny_run, tmp_path / "run"))
    assert torch.equal(new["moe.router.gate.weight"][:4], old["moe.router.gate.weight"])
    assert new["moe.router.gate.weight"][4:].any()
    assert not new["moe.router.margin_E"].any()  # open, in the moving average too: the run can be compressed
    # A run that starts from that one, with more new experts; its configuration, read back, adds none again.
    again = parse_command_line(options(tmp_path / "run", "--experts.add", "[[2]]")).config
    assert again.experts.grown == [4, 6] and len(again.experts.sizes) == 7
    same = parse_command_line(["--config", str(tmp_path / "run/config.yaml"), "--init", str(tiny_run)]).config
    assert same.experts == config.experts
    results = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert len(results["expert_load"]) == 6


def test_the_task_of_the_run_is_the_parent(tiny_run, tmp_path, monkeypatch):
    config = parse_command_line(options(tiny_run)).config
    assert read_origin(config).task_id is None
    listed = [{"mode": "clearml", "task_id": "a" * 32}, {"mode": "offline", "task_id": "offline-1"}]
    monkeypatch.setattr("assembly.transfer.tasks_of", lambda path: listed)
    origin, asked = read_origin(config), []
    monkeypatch.setattr("tracking.tracker._first_task", lambda *given: asked.append(given) or (None, []))
    inputs = SimpleNamespace(origin=origin, device=torch.device("cpu"))
    with start_tracking(config, RunFolder(tmp_path), None, inputs):
        pass
    assert asked[0][-1] == "a" * 32


def test_new_experts_need_a_run_and_come_after_its_own(tiny_run, tmp_path):
    with pytest.raises(UserError, match="adds experts to those of a run"):
        parse_command_line([*TINY.split(), "--experts.add", "[[8]]"])
    with pytest.raises(UserError, match=r"leave experts.sizes out"):
        parse_command_line(options(tiny_run, "--experts.add", "[[8]]", "--experts.sizes", "[[8]]"))
    with pytest.raises(UserError, match=r"experts.add has \[0\]"):
        parse_command_line(options(tiny_run, "--experts.add", "[[0]]"))
    changed = tmp_path / "config.yaml"
    changed.write_text((tiny_run / "config.yaml").read_text().replace("noisy_topk", "hierarchical"))
    with pytest.raises(UserError, match=r"router.kind hierarchical cannot get new experts"):
        parse_command_line(options(tmp_path, "--experts.add", "[[8]]"))


@pytest.mark.slow
def test_old_images_are_replayed_with_new_ones(tiny_run, tmp_path, start, capsys):
    from PIL import Image

    for name, grey in (("white", 230), ("black", 20), ("3", 120)):  # a class of the run among them
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            image = Image.new("RGB", (10, 10), (grey, grey, min(255, grey + number)))
            image.save(tmp_path / "images" / name / f"{number}.png")
    words = ["--data.name", "folder", "--data.root", tmp_path / "images", "--data.image_size", "10", "--replay", "4"]
    words += ["--train.epochs", "2", "--data.test", "0.25", "--data.validation", "0.25", "--run_dir", tmp_path / "run"]
    start(*options(tiny_run, *words))
    said = capsys.readouterr()
    assert "replay: 40 training images of 10 classes" in said.err
    assert "neck, router, experts, 10 of 12 class rows" in said.out and "new          2 class rows: " in said.out
    assert "on the old classes" in said.out and "on the new classes" in said.out
    run = RunFolder(tmp_path / "run")
    assert describe(run)["class_names"] == [*map(str, range(10)), "black", "white"]
    results = json.loads(run.results.read_text())
    assert results["images"] > 80 and 0 <= results["init"]["macro_f1_new_classes"] <= 1
    score(evaluate.parse([str(run.path), "--device", "cpu", "--tracking", "none"]))  # the images are found again
    assert json.loads(run.results.read_text())["accuracy"] == results["accuracy"]


def test_joined_images_keep_their_classes_and_equal_ones_count_once():
    def images(values, labels, names, side=4):
        pixels = torch.stack([torch.full((3, side, side), value, dtype=torch.uint8) for value in values])
        return ImageSet(pixels, torch.tensor(labels), names)

    new, old = images([10, 20], [0, 1], ("b", "c")), images([10, 30, 40], [0, 1, 1], ("a", "b"), side=8)
    found = joined(new, old, ("a", "b", "c"))
    assert found.images_NCHW[:, 0, 0, 0].tolist() == [10, 20, 30, 40] and found.labels_N.tolist() == [1, 2, 1, 1]


def test_replay_needs_a_run():
    with pytest.raises(UserError, match="name the run with --init"):
        parse_command_line([*TINY.split(), "--replay", "3"])
