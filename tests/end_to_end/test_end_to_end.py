"""train.py and evaluate.py from the user's view: on digits with the bundled ViT, and on real data with a real ViT."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import CLIP, ROOT, run_program
from PIL import Image

import evaluate
import train
from common.errors import exit_code_of
from data.datasets import DataConfig, load_splits
from model.backbone import BackboneConfig, load_backbone

WRITTEN = [
    "config.yaml",
    "metrics.jsonl",
    "checkpoints/last.pt",
    "checkpoints/best.pt",
    "model.safetensors",
    "model.json",
    "evaluation/metrics.json",
    "evaluation/report.html",
    "evaluation/figures/training_curves.png",
    "evaluation/figures/expert_load.png",
    "evaluation/figures/load_over_time.png",
    "evaluation/figures/expert_by_class.png",
    "evaluation/figures/samples.png",
    "evaluation/figures/expert_worth.png",
    "evaluation/figures/gate_map.png",
    "evaluation/figures/confused_pairs.png",
    "evaluation/figures/reliability.png",
]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """`python train.py --config configs/digits.yaml`, as in the README."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    cache = folder.parent / "clearml"
    result = run_program(
        "train.py", "--config", "configs/digits.yaml", "--run_dir", folder, CLEARML_CACHE_DIR=str(cache)
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.mark.slow
def test_train_writes_the_whole_run_folder(digits_run):
    folder, _ = digits_run
    assert [name for name in WRITTEN if not (folder / name).is_file()] == []
    for path in (folder / "evaluation" / "figures").glob("*.png"):
        with Image.open(path) as image:
            image.verify()
    assert not list(folder.rglob("*.partial"))


@pytest.mark.slow
def test_the_scores_are_good_and_complete(digits_run):
    folder, output = digits_run
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert metrics["macro_f1"] >= 0.97
    assert metrics["accuracy"] >= 0.97
    assert sorted(metrics["per_class"]) == [str(digit) for digit in range(10)]
    assert {"precision", "recall", "f1"} <= metrics["per_class"]["7"].keys()
    assert sum(metrics["expert_load"]) == pytest.approx(1.0)
    assert len(metrics["expert_load"]) == 4
    assert [sum(row) for row in metrics["expert_by_class"]] == pytest.approx([1.0] * 10)
    assert all(len(row) == 4 for row in metrics["expert_by_class"])
    for text in (
        "tracking: ClearML offline",
        "parameters",
        "FLOP in the frozen backbone",
        "macro-F1",
        "load",
        str(folder),
    ):
        assert text in output


@pytest.mark.slow
def test_the_configuration_is_resolved_and_the_backbone_named(digits_run):
    folder, _ = digits_run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["backbone"]["name"] == "bundled/vit_micro"
    assert config["optim"]["clip_norm"] == 1.0  # a default, written out
    described = json.loads((folder / "model.json").read_text())
    assert described["class_names"] == [str(digit) for digit in range(10)]
    assert (
        described["backbone"]["fingerprint"]
        == load_backbone(BackboneConfig(**config["backbone"]), torch.device("cpu")).fingerprint()
    )


@pytest.mark.slow
def test_evaluate_rebuilds_the_model_only_from_the_run(digits_run, tmp_path, monkeypatch, capsys, without_figures):
    folder, _ = digits_run
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    before = json.loads((moved / "evaluation" / "metrics.json").read_text())
    for name in ("evaluation", "checkpoints"):
        shutil.rmtree(moved / name)
    (moved / "config.yaml").unlink()
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(moved)])
    assert exit_code_of(evaluate.main) == 0
    after = json.loads((moved / "evaluation" / "metrics.json").read_text())
    assert after["accuracy"] == before["accuracy"]
    assert after["macro_f1"] == before["macro_f1"]
    assert after["expert_by_class"] == before["expert_by_class"]
    assert "macro-F1" in capsys.readouterr().out


def test_mistakes_of_evaluate_are_reported_in_one_line(tmp_path, monkeypatch, capsys):
    for arguments, code, words in (
        ([tmp_path / "none"], 2, "is not a folder"),
        ([tmp_path], 1, "neither model.json nor"),
        ([], 2, "name one RUN"),
    ):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        assert exit_code_of(evaluate.main) == code
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1


def test_missing_data_is_reported_in_one_line_and_leaves_no_run(tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    words = ["--data.root", tmp_path, "--data.download", "false", "--run_dir", run_dir, "--tracking", "none"]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, words)])
    assert exit_code_of(train.main) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "CIFAR-100 is incomplete" in error and "--data.root" in error
    assert not run_dir.exists()


@pytest.mark.slow
def test_ten_real_classes_on_a_real_vit(assets, tmp_path, monkeypatch, without_figures):
    splits = load_splits(DataConfig(root=assets, max_classes=10, max_per_class=45, validation=0.1))
    for name, folder, per_class in (("train", "train", 12), ("validation", "val", 2), ("test", "test", 6)):
        part, seen = splits[name], dict.fromkeys(splits.train.class_names, 0)
        for image, label in zip(part.images_NCHW, part.labels_N, strict=True):
            label_name = part.class_names[label]
            if seen[label_name] < per_class:
                place = tmp_path / "data" / folder / label_name
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{seen[label_name]}.png")
                seen[label_name] += 1
    arguments = [
        *("--config", ROOT / "configs" / "cifar100_head.yaml", "--data.name", "folder"),
        *("--data.root", tmp_path / "data", "--data.image_size", "32"),
        *("--backbone.weights", assets / f"{CLIP}.safetensors", "--backbone.image_size", "64"),
        *("--backbone.features", "[cls:8,cls:9,cls:10,cls:11,mean:10,mean:11]"),
        *("--augment.flip", "false", "--augment.crop", "0", "--augment.strong", "0", "--experts.shared", "[]"),
        *("--features.batch_size", "16", "--train.batch_size", "24", "--train.epochs", "25"),
        *("--experts.sizes", "[[32],[64],[128],[256]]", "--router.warmup_steps", "10"),
        *("--optim.warmup_steps", "10", "--optim.lr", "0.005", "--train.ema_decay", "0.9"),
        *("--tracking", "none", "--run_dir", tmp_path / "run"),
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    assert exit_code_of(train.main) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["images"] == 60
    assert metrics["macro_f1"] >= 0.4  # 0.1 by chance


@pytest.mark.slow
def test_an_unfinished_run_is_scored_by_its_best_epoch_so_far(
    digits_run, tmp_path, monkeypatch, capsys, without_figures
):
    folder, _ = digits_run
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "model.json").unlink()
    (moved / "model.safetensors").unlink()
    words = ["--device", "cpu", "--features.cache_dir", str(tmp_path / "features")]
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(moved), *words])
    assert exit_code_of(evaluate.main) == 0
    assert "the best epoch so far is" in capsys.readouterr().out
    assert [path.name.split("-")[0] for path in (tmp_path / "features").glob("*.safetensors")] == ["test"]
    assert (moved / "model.safetensors").is_file()
    before = json.loads((moved / "evaluation" / "metrics.json").read_text())
    more = ["--offload", "cpu", "--offload.memory", "1MB", "--latency"]  # of experts of 200 kB to 1.6 MB
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(moved), *words, *more])
    assert exit_code_of(evaluate.main) == 0
    assert "copied in" in capsys.readouterr().out
    after = json.loads((moved / "evaluation" / "metrics.json").read_text())
    assert after["cost"].pop("latency_cpu_1") > 0 < after["cost"].pop("latency_cpu_256")
    assert before["cost"].pop("latency_cpu_1") is before["cost"].pop("latency_cpu_256") is None
    for key in ("cost", "accuracy", "expert_load", "confused_pairs", "experts"):
        assert after[key] == before[key]
    assert after["loss"] == pytest.approx(before["loss"])
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(moved), "--device", "gpu"])
    assert exit_code_of(evaluate.main) == 2
    assert "device is 'gpu'" in capsys.readouterr().err
