"""train.py --seeds: one run per seed, on inputs that are loaded once."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

import train
from assembly import seeds as module
from common.errors import UserError, exit_code_of
from config.command_line import parse_command_line
from features.bank import FeatureBank
from storage.described import describe
from storage.folder import RunFolder
from training.length import steps_per_epoch

SMALL = ["--config", "configs/digits.yaml", "--tracking", "none", "--data.max_per_class", "20", "--train.epochs", "1"]
SMALL += ["--train.batch_size", "64", "--features.cache_dir", "null"]


@pytest.mark.slow
def test_seeds_share_their_inputs_and_an_interrupted_command_continues(tmp_path, monkeypatch, capsys, without_figures):
    words = [*SMALL, "--run_dir", str(tmp_path / "few"), "--seeds"]
    loaded = []
    monkeypatch.setattr(module, "load_inputs", lambda config, load=module.load_inputs: loaded.append(1) or load(config))

    def call(*rest):
        monkeypatch.setattr("sys.argv", ["train.py", *words, *rest])
        return exit_code_of(train.main), *capsys.readouterr()

    assert call("1")[0] == 0
    code, out, _ = call("2")
    assert code == 0 and len(loaded) == 2
    assert f"{tmp_path / 'few-seed0'} is finished" in out and re.search(r"\nfew +0, 1 +\d", out)
    scores = {}
    for seed in range(2):
        results = json.loads((tmp_path / f"few-seed{seed}" / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
        scores[seed] = results["loss"]
    assert scores[0] != scores[1]
    assert (tmp_path / "few-comparison" / "comparison.md").is_file()
    code, _, err = call("2", "--train.batch_size", "32")
    assert code == 2 and "--seeds cannot continue" in err and "choose another --run_dir" in err

    # Its twin, whose report begins with what the two say together.
    words[words.index("--run_dir") + 1] = str(tmp_path / "twin")
    code, out, err = call("1", "--dense_twin", "true")
    assert (
        code == 0
        and "One seed cannot show whether the mixture is better than its dense twin: its macro-F1 minus that of" in out
    )
    page = (tmp_path / "twin-seed0" / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert page.index('class="remark"') < page.index('class="cards"')
    assert "digits, bundled/vit_micro, dense twin" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "none"], "--seeds is 'none': give a number of seeds"),
        (["--seeds", "0"], "--seeds is '0': give a number of seeds"),
        (["--seeds"], "--seeds is '': give a number of seeds"),
    ],
)
def test_a_wrong_number_of_seeds_is_reported_in_one_line(words, said):
    with pytest.raises(UserError, match=said):
        parse_command_line(words)


def test_seeds_are_new_runs(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="--seeds starts new runs"):
        parse_command_line(["--resume", str(tmp_path), "--seeds", "2"])


@pytest.mark.parametrize("together", [False, True])
def test_new_seeds_train_together_and_an_unfinished_one_alone(tmp_path, monkeypatch, capsys, together):
    invocation = parse_command_line([*SMALL, "--run_dir", str(tmp_path / "few"), "--seeds", "3"])
    start_of, calls = module._start, []

    def start(given, config):
        found, finished = start_of(given, config)
        return replace(found, checkpoint={"epoch": 1, "improved": 1}) if config.train.seed == 1 else found, finished

    for name, value in {
        "load_inputs": lambda config: SimpleNamespace(splits=None, backbone=None, device=None),
        "planned": lambda config, inputs: config,
        "build_bank": lambda *_: None,
        "worth_joining": lambda *_: together,
        "_start": start,
    }.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("evaluation.compare.compare", lambda runs, out: f"compared {len(runs)}")
    module.train_seeds(invocation, lambda starts, inputs, bank: calls.append([s.config.train.seed for s in starts]))
    assert calls == ([[1], [0, 2]] if together else [[0], [1], [2]])
    out = capsys.readouterr().out
    assert ("seeds        0, 2, side by side" in out) == together and "compared 3" in out


@pytest.mark.parametrize("message", ["it is finished", ""])
def test_only_the_checkpoints_of_unfinished_seeds_stay_in_memory(tmp_path, monkeypatch, message):
    invocation = parse_command_line([*SMALL, "--run_dir", str(tmp_path / "one"), "--seeds", "1"])
    RunFolder.create(tmp_path / "one", "one").last.write_bytes(b"")
    monkeypatch.setattr(module, "load_resumable", lambda *_: {"epoch": 1, "improved": 1})
    monkeypatch.setattr("assembly.seeds.Start.finished", message)
    start, finished = module._start(invocation, invocation.config)
    assert finished == message and (start.checkpoint is None) == bool(message)


@pytest.mark.parametrize(
    ("words", "device", "size", "free", "expected"),
    [
        ([], "cuda", 3_000_000, 1_000_000_000, True),
        (["--train.epochs", "99"], "cuda", 3_000_000, 1_000_000_000, False),  # 990 steps do not repay the start
        ([], "cpu", 3_000_000, 1_000_000_000, False),
        (["--tracking", "auto"], "cuda", 3_000_000, 1_000_000_000, False),
        (["--features.mode", "live"], "cuda", 3_000_000, 1_000_000_000, False),
        (["--data.shots", "2"], "cuda", 3_000_000, 1_000_000_000, False),
        (["--train.deterministic", "true"], "cuda", 3_000_000, 1_000_000_000, False),  # nothing is captured
        ([], "cuda", 250_000_000, 1_000_000_000_000, False),  # 750 M parameters
        ([], "cuda", 3_000_000, 800_000_000, False),  # they need 216 MB
    ],
)
def test_long_trainings_of_small_heads_go_side_by_side_on_a_gpu(monkeypatch, words, device, size, free, expected):
    config = parse_command_line([*SMALL, "--train.epochs", "100", *words]).config
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: size)], to=lambda device: model)
    monkeypatch.setattr(module, "build_model", lambda *_: model)
    monkeypatch.setattr(module, "DeviceMemory", lambda device: SimpleNamespace(free=lambda: free))
    seen = []
    monkeypatch.setattr(module, "worth_capturing", lambda choice, model, batch: seen.append(batch) or True)
    bank = object.__new__(FeatureBank)
    bank.feature_shape = (4,)
    train = type("Train", (list,), {"num_classes": 10})(range(630))  # ten batches of 64
    splits = SimpleNamespace(train=train)
    inputs = SimpleNamespace(device=SimpleNamespace(type=device), splits=splits, backbone=None)
    assert module.worth_joining(config, inputs, bank, 3) is expected
    assert seen == ([3 * 64] if expected else [])


@pytest.mark.parametrize(
    ("recipe", "images", "expected"),
    [("digits", 1_293, False), ("cifar100_cpu", 45_000, True), ("cifar100_head", 49_000, True)],
)
def test_the_measured_recipes(recipe, images, expected):
    config = parse_command_line(["--config", f"configs/{recipe}.yaml"]).config
    assert (config.train.epochs * steps_per_epoch(config.train, images) >= module.STEPS) == expected


@pytest.mark.slow
def test_with_few_images_each_seed_draws_different_ones(tmp_path, monkeypatch, without_figures):
    words = [*SMALL, "--data.shots", "2", "--train.batch_size", "20", "--router.warmup_steps", "0", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", ["train.py", *words, "--run_dir", str(tmp_path / "few")])
    assert exit_code_of(train.main) == 0
    first, second = (describe(RunFolder(tmp_path / f"few-seed{seed}")) for seed in range(2))
    assert (first["config"]["data"]["split_seed"], second["config"]["data"]["split_seed"]) == (0, 1)
    assert first["data"]["train"] != second["data"]["train"]
    assert "few" in (tmp_path / "few-comparison" / "comparison.md").read_text()
