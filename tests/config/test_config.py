"""Configuration: YAML, command line, and one clear line with exit code 2 for invalid values."""

import re

import pytest
import yaml
from conftest import ROOT

from config.command_line import parse_command_line
from config.config import Config, config_from_dict, flatten, write_config
from model.routers import ROUTERS

HEAD = ["--config", str(ROOT / "configs" / "cifar100_head.yaml")]


def test_the_default_is_cifar100():
    invocation = parse_command_line([])
    assert invocation.name == "cifar100"
    assert invocation.config.data.name == "cifar100"
    assert invocation.resume is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_documented(path):
    invocation = parse_command_line(["--config", str(path)])
    assert invocation.name == path.stem
    assert path.read_text().startswith("#")
    assert invocation.config.router.idle == []


def test_a_config_file_is_complete_and_the_command_line_overrides_it():
    arguments = ["--config", "configs/article.yaml", "--train.epochs", "3", "--experts.sizes", "[small,[7,5]]"]
    config = parse_command_line(arguments).config
    assert config.router.kind == "article"
    assert config.train.epochs == 3
    assert config.experts.sizes == ["small", [7, 5]]
    assert config.features.views == Config().features.views  # not that of cifar100.yaml


def test_an_option_overrides_the_file_at_any_position():
    for arguments in (
        ["--train.epochs", "3", "--config", "configs/digits.yaml"],
        ["--train.epochs=3", "--config=configs/digits.yaml"],
    ):
        config = parse_command_line(arguments).config
        assert (config.train.epochs, config.data.name) == (3, "digits")


def test_the_article_is_the_reference_recipe():
    config = parse_command_line(["--config", "configs/article.yaml"]).config
    assert config.neck.kind == "attention" and config.neck.heads == 8
    assert config.router.kind == "article" and config.router.top_k == 2
    assert config.router.hidden == [512, 256] and config.router.dropout == 0.2
    assert (config.router.noise_std, config.router.temperature, config.router.warmup_steps) == (0.5, 1.0, 500)
    assert config.experts.sizes == ["small", "medium", "large", "very_large"]
    assert config.balance.usage_variance == 0.01 and config.balance.switch == 0
    assert config.features.mode == "live" and config.backbone.features == ["tokens:-1"]
    assert (config.optim.kind, config.optim.lr, config.optim.schedule) == ("adam", 1e-4, "constant")
    assert (config.optim.weight_decay, config.optim.clip_norm, config.train.batch_size) == (0, 0, 128)
    assert (config.train.ema_decay, config.train.label_smoothing) == (0, 0)


def test_a_configuration_survives_writing_and_reading(tmp_path):
    arguments = ["--router.top_k", "3", "--data.root", str(tmp_path), "--run_dir", str(tmp_path / "run")]
    config = parse_command_line(arguments).config
    write_config(config, tmp_path / "config.yaml")
    assert parse_command_line(["--config", str(tmp_path / "config.yaml")]).config == config
    assert config_from_dict(config.to_dict()) == config


def test_options_stored_under_their_earlier_names_are_read():
    values = Config(dense_twin=True, twin_of="{}").to_dict()
    values["train"] |= {name: values.pop(name) for name in ("dense_twin", "twin_of")}
    assert config_from_dict(values) == Config(dense_twin=True, twin_of="{}")
    assert flatten(values) == flatten(Config(dense_twin=True, twin_of="{}").to_dict())


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("train.epochs", "2.0", 2),
        ("train.epochs", "1e1", 10),
        ("train.epochs", "+3", 3),
        ("optim.lr", "1e-3", 0.001),
        ("optim.lr", "1", 1.0),
        ("optim.lr", ".5", 0.5),
        ("train.graph", "off", "off"),
        ("train.deterministic", "yes", True),
        ("train.deterministic", "False", False),
        ("router.noise_std", "null", None),
        ("router.noise_std", "", None),
        ("router.target_load", "size", "size"),
        ("router.target_load", "[1, 2, 3, 4]", [1.0, 2.0, 3.0, 4.0]),
        ("experts.dropout", "[0.1, 0.1, 0, .2]", [0.1, 0.1, 0.0, 0.2]),
        ("experts.sizes", '[[16], "small", [4.0], []]', [[16], "small", [4], []]),
        ("backbone.name", "007", "007"),
        ("backbone.weights", "null", None),
    ],
)
def test_a_value_means_the_same_wherever_it_is_written(option, text, value, tmp_path):
    """On the command line, in a file and in a ClearML task, which stores all values as text."""
    section, _, name = option.partition(".")
    given = [*HEAD, "--experts.shared", "[]", f"--{option}", text]
    configs = [parse_command_line(given).config]
    configs.append(parse_command_line([*HEAD, "--experts.shared", "[]"], {option: text}, "task").config)
    (tmp_path / "a.yaml").write_text(f"{section}: {{{name}: {text or 'null'}}}")
    if option != "backbone.name":  # this value would need quotes
        configs.append(parse_command_line(["--config", str(tmp_path / "a.yaml"), "--experts.shared", "[]"]).config)
    for config in configs:
        found = getattr(getattr(config, section), name)
        assert found == value and type(found) is type(value)


def test_a_section_can_be_a_table_and_later_values_override_earlier_ones(tmp_path):
    words = ["--train", "{epochs: 3, seed: 4}", "--train.seed", "5"]
    config = parse_command_line(words).config
    assert (config.train.epochs, config.train.seed, config.train.batch_size) == (3, 5, 250)
    for name, text in (("a", "train: {epochs: 7, seed: 1}"), ("b", "train.seed: 2")):
        (tmp_path / f"{name}.yaml").write_text(text)
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    invocation = parse_command_line(files)
    assert (invocation.name, invocation.config.train.epochs, invocation.config.train.seed) == ("b", 7, 2)


def test_the_options_of_every_rule_survive_the_command_line(tmp_path):
    words = "--router.target_load [1,2,3,4] --experts.shared [small,[7]] --experts.dropout [0,0.1,0.2,0.3,0.4,0.5]"
    words += " --router.kind deepseek --router.inputs [0,2] --experts.inputs [[0],[1],[2],[3],[4,5],[0]]"
    words += " --router.capacity_factor 1.25 --router.overflow next_best --router.noise_std 0.1"
    config = parse_command_line([*HEAD, *words.split()]).config
    assert config.router.target_load == [1, 2, 3, 4] and config.router.inputs == [0, 2]
    assert config.experts.shared == ["small", [7]] and config.experts.dropout_of(5) == 0.5
    write_config(config, tmp_path / "config.yaml")
    assert parse_command_line(["--config", str(tmp_path / "config.yaml")]).config == config
    tokens = ["--router.kind", "soft_moe", "--neck.kind", "tokens", "--backbone.features", "[tokens:-1]"]
    assert parse_command_line([*HEAD, *tokens, "--router.hidden", "[]"]).config.router.slots == 1


def printed_by(arguments, capsys):
    """The output of train.py for --help and --print_config with exit code 0."""
    with pytest.raises(SystemExit) as ended:
        parse_command_line(arguments)
    assert not ended.value.code
    return capsys.readouterr().out


def test_help_explains_every_field_and_print_config_round_trips(tmp_path, capsys):
    text = printed_by(["--help"], capsys)
    options = list(re.finditer(r"^  --([a-z_]+\.[a-z_0-9]+)(.*(?:\n    .*)*)", text, re.MULTILINE))
    assert len(options) > 40
    for match in options:
        explanation = match[2].rpartition("(")[0].replace(match[1], "")
        assert len(explanation.split()) > 3, f"{match[1]} has no explanation"
    assert {match[1] for match in options} == {key for key in flatten(Config().to_dict()) if "." in key}
    assert all(f"{kind}: " in " ".join(text.split()) for kind in ROUTERS)
    shown = {match[1]: " ".join(match[2].split()) for match in options}
    assert all("default: " in explanation for explanation in shown.values())
    assert "default: 10, or 40 if not in the file" in shown["train.epochs"]  # configs/cifar100.yaml has 10
    examples = re.findall(r"^  python (train\.py .*?)(?:   |$)", text.partition("examples:")[2], re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        parse_command_line(example.split()[1:])
    printed = printed_by(["--config", "configs/digits.yaml", "--train.seed", "7", "--print_config"], capsys)
    values = yaml.safe_load(printed)
    assert values["train"]["seed"] == 7
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert parse_command_line(["--config", str(path)]).config.train.seed == 7
