"""Wrong options, files and stored configurations: one line that names what is wrong."""

import pytest
from conftest import ROOT, run_program

from common.errors import UserError
from config.command_line import parse_command_line
from config.config import config_from_dict

HEAD = ["--config", str(ROOT / "configs" / "cifar100_head.yaml")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.epochz", "3"], "unknown option train.epochz: did you mean train.epochs?"),
        (["--epochs", "3"], "unknown option epochs"),
        (["--train.epoch", "3"], "did you mean train.epochs?"),
        (["--train.epochs", "many"], "--train.epochs is 'many': give a whole number"),
        (["--train.epochs=3.5"], "--train.epochs is '3.5': give a whole number"),
        (["--optim.lr", "fast"], "--optim.lr is 'fast': give a number"),
        (["--train.deterministic", "maybe"], "--train.deterministic is 'maybe': give true or false"),
        (["--features.mode", "foo"], "--features.mode is 'foo': give one of cached, live"),
        (["--router.capacity_factor", "x"], "--router.capacity_factor is 'x': give a number, or null"),
        (["--router.hidden", "[a]"], "--router.hidden is '[a]': give a list in brackets of whole numbers"),
        (
            ["--experts.inputs", "[1]"],
            "--experts.inputs is '[1]': give a list in brackets of lists of whole numbers, or",
        ),
        (
            ["--experts.sizes", "5"],
            "is '5': give a list in brackets of any of small, medium, large, very_large, or lists",
        ),
        (["--experts.sizes.a", "5"], "unknown option experts.sizes.a: did you mean experts.sizes?"),
        (["--train", "abc"], "--train is 'abc': give a table of options such as epochs"),
        (["--train", "{epochs: x}"], "--train.epochs is 'x': give a whole number"),
        (["--train.epochs", "true"], "--train.epochs is 'true': give a whole number"),
        (["--train.epochs", ".inf"], "--train.epochs is '.inf': give a whole number"),
        (["--optim.lr", "1" + 400 * "0"], "give a number"),
        (["--train.epochs", "--debug"], "--train.epochs has no value: give a whole number"),
        (["--print_config", "--optim.lr", "1,5"], "--optim.lr is '1,5': give a number"),
        (["--optim.lr", "1,5", "--print_config"], "--optim.lr is '1,5': give a number"),
        (["--print_config", "--router.top_k", "9"], "router.top_k is 9 but experts.sizes names 4"),
        (["--print_config", "--train.epochz", "3"], "unknown option train.epochz"),
        (["--print_config", "--train.epochs"], "--train.epochs has no value"),
        (["--print_config", "--config", "nowhere.yaml"], "no such file"),
        (["--optim.lr", "1,5", "--optim.lr", "0.1"], "--optim.lr is '1,5'"),
        (["--config", "configs/digits.yaml", "--train.epochs", "x"], "--train.epochs is 'x': give a whole number"),
        (["--train.epochs", "0"], "train.epochs is 0"),
        (["--router.top_k", "9"], "router.top_k is 9 but experts.sizes names 4"),
        (["--router.kind", "magic"], "--router.kind is 'magic': give one of article, deepseek"),
        (["--experts.sizes", "[small,giant]"], "--experts.sizes is '[small,giant]'"),
        (["--experts.sizes", "[[0]]"], "experts.sizes has [0]"),
        (["--experts.dropout", "-0.1"], "experts.dropout is -0.1"),
        (["--balance.switch", "-1"], "balance.switch is -1"),
        (["--balance.switch", "1e300"], "balance.switch is 1e+300: a loss weight must be from 0 to 1e+06"),
        (["--optim.lr", "1e39"], "optim.lr is 1e+39: it must be above 0, and at most 1e+06"),
        (["--optim.weight_decay", "1e39"], "optim.weight_decay is 1e+39"),
        (["--optim.clip_norm", "1e-300"], "too small to train with"),
        (["--data.validation", "1.5"], "data.validation is 1.5"),
        (["--neck.kind", "attention"], "neck.kind attention reads tokens"),
        (["--backbone.features", "[max:-1]"], "backbone.features has 'max:-1'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--config"], "--config has no value"),
        (["configs/digits.yaml"], "configs/digits.yaml is a configuration file: write --config configs/digits.yaml"),
        (["--device", "cpu", "configs/digits.yaml", "--train.epochs=3"], "write --config configs/digits.yaml"),
        (["configs/nowhere.yaml"], "unknown option configs"),
        (["--resume", "nowhere"], "nowhere is not a run"),
        (["--resume", "nowhere", "--run_dir", "x"], "leave out --run_dir"),
        (["--train.epochs"], "--train.epochs has no value: give a whole number"),
        (["--train.seed", "100000000000000"], "train.seed is 100000000000000"),
        (["--router.temperature", ".nan"], "router.temperature is nan"),
        (["--router.top_k", "1", "--experts.combine", "probabilities"], "the gate no gradient"),
        (["--router.kind", "switch"], "set router.top_k 1, not 2"),
        (["--router.capacity_factor", "0"], "router.capacity_factor is 0.0"),
        (["--router.kind", "soft_moe", "--router.hidden", "[]"], "soft_moe mixes patch tokens, which neck.kind pooled"),
        (["--neck.kind", "tokens", "--backbone.features", "[tokens:-1]"], "keeps patch tokens, but router.kind noisy"),
        (["--router.kind", "hierarchical", "--experts.sizes", "[[4],[4],[4]]"], "does not divide the 3 experts"),
        (["--router.inputs", "[16]"], "router.inputs names feature 16, but backbone.features has 16"),
        (["--experts.shared", "[]", "--experts.inputs", "[[0],[1],[2],[-1]]"], "experts.inputs names feature -1"),
        (["--neck.kind", "flatten", "--backbone.features", "[tokens:-1]", "--router.inputs", "[0]"], "pooled features"),
        (["--router.kind", "mixtral", "--balance.load", "1"], "balance.load needs noise"),
        (["--router.kind", "hash", "--router.hidden", "[]", "--balance.z_loss", "1"], "needs logits"),
        (["--router.target_load", "[1,2]"], "router.target_load names 2 shares, but there are 4 experts"),
        (["--router.target_load", "big"], "give one of even, size, inverse_size, or a list in brackets of numbers"),
        (["--router.overflow", "residual"], "has no effect without router.capacity_factor"),
    ],
)
def test_mistakes_are_reported_in_one_line_that_names_them(arguments, words):
    recipe = [] if any(word.startswith(("--config", "--resume")) for word in arguments) else HEAD
    with pytest.raises(UserError) as caught:
        parse_command_line([*recipe, *arguments])
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert not [
        word for word in ("class '", "Parser key", "typing", "Literal", "Subtypes", "Expected") if word in message
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("router: {top_k: two}", "router.top_k in FILE is 'two': give a whole number"),
        ("router.top_k: two", "router.top_k in FILE is 'two': give a whole number"),
        ("experts: {sizes: [[a]]}", "experts.sizes in FILE is '[['a']]': give a list in brackets"),
        ("tracking: 3", "tracking in FILE is '3': give one of auto, clearml"),
        ("train: 3", "train in FILE is '3': give a table of options such as epochs"),
        ("train:", "train in FILE is null: give a table of options such as epochs"),
        ("train: {epochs: null}", "train.epochs in FILE is null: give a whole number"),
        ("train: {epochs: {a: 1}}", "train.epochs in FILE is '{'a': 1}': give a whole number"),
        ("train: {epochs: yes}", "train.epochs in FILE is 'yes': give a whole number"),
        ("1: 2", "unknown option 1 in FILE: --help lists all options"),
        ("train: {1: 2}", "unknown option train.1 in FILE: --help lists all options"),
    ],
)
def test_a_wrong_value_in_a_file_is_reported_with_the_file(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse_command_line(["--config", str(path), "--device", "cpu"])
    assert str(caught.value).startswith(words.replace("FILE", str(path)))


def test_a_wrong_value_in_a_stored_configuration_is_reported_as_such():
    with pytest.raises(UserError, match=r"router\.top_k in the stored configuration is 'two': give a whole number"):
        config_from_dict({"router": {"top_k": "two"}})


def test_an_unknown_key_in_a_file_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epochz: 3}\n")
    with pytest.raises(UserError, match=r"train\.epochz in \S+mine\.yaml: did you mean train\.epochs\?"):
        parse_command_line(["--config", str(path)])
    path.write_text("trian: {epochs: 3}\n")
    with pytest.raises(UserError, match="unknown option trian"):
        parse_command_line(["--config", str(path)])
    for text in ("train: {epochs: [}\n", "train:\n", "train: 3\n", "data: {name: null}\n", "a: &a [*a]\n", ""):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            parse_command_line(["--config", str(path)])
        assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.slow
def test_exit_code_and_single_line_of_a_wrong_command_line(tmp_path):
    run_dir = tmp_path / "run"
    result = run_program("train.py", "--config", "configs/digits.yaml", "--router.top_k", "9", "--run_dir", run_dir)
    assert result.returncode == 2
    assert result.stderr.strip().startswith("error: router.top_k is 9")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not run_dir.exists()


def test_options_without_effect_inside_the_vit_are_named():
    base = ["--config", "configs/digits_blocks.yaml"]
    assert parse_command_line(base).config.idle == []
    chosen = parse_command_line([*base, "--features.views", "3", "--features.mode", "live"]).config
    assert [line.split(" has no")[0] for line in chosen.idle] == ["features.mode live", "features.views 3"]
    assert parse_command_line([*HEAD, "--features.views", "3"]).config.idle == []


def test_options_without_effect_behind_the_vit_are_named():
    chosen = {"train.recompute": "on", "train.compile": "always", "train.all_patches": "0.5"}
    chosen |= {"experts.drop_path": "0.1", "experts.norm": "own", "experts.activation": "silu"}
    words = [word for name, value in chosen.items() for word in (f"--{name}", value)]
    idle = parse_command_line([*HEAD, *words]).config.idle
    assert sorted(line.split(" ")[0] for line in idle) == sorted(chosen)
    assert "experts.norm own has no effect with experts.kind mlp: only adapter reads it" in idle
    assert "train.recompute on has no effect with experts.place head, because no step trains inside the ViT" in idle
    blocks = ["--config", "configs/digits_blocks.yaml", *words]
    assert parse_command_line(blocks).config.idle == ["train.all_patches 0.5 has no effect without train.patch_dropout"]
    assert parse_command_line([*blocks, "--train.patch_dropout", "0.3"]).config.idle == []
