"""Configuration: YAML, command line, and one clear line with exit code 2 for whatever is impossible."""

import re

import pytest
import yaml
from conftest import ROOT, run_program

from common.errors import UserError
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


def test_a_config_file_stands_alone_and_the_command_line_wins():
    arguments = ["--config", "configs/article.yaml", "--train.epochs", "3", "--experts.sizes", "[small,[7,5]]"]
    config = parse_command_line(arguments).config
    assert config.router.kind == "article"
    assert config.train.epochs == 3
    assert config.experts.sizes == ["small", [7, 5]]
    assert config.features.views == Config().features.views  # not that of cifar100.yaml


def test_an_option_wins_over_the_file_wherever_it_stands():
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
        (["--balance.switch", "1e300"], "balance.switch is 1e+300: a loss weight is from 0 to 1e+06"),
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
        (["--router.top_k", "1", "--experts.combine", "probabilities"], "gives the gate no gradient"),
        (["--router.kind", "switch"], "set router.top_k 1, not 2"),
        (["--router.capacity_factor", "0"], "router.capacity_factor is 0.0"),
        (["--router.kind", "soft_moe", "--router.hidden", "[]"], "soft_moe mixes patch tokens, which neck.kind pooled"),
        (["--neck.kind", "tokens", "--backbone.features", "[tokens:-1]"], "keeps patch tokens, but router.kind noisy"),
        (["--router.kind", "hierarchical", "--experts.sizes", "[[4],[4],[4]]"], "does not divide the 3 experts"),
        (["--router.inputs", "[16]"], "router.inputs names feature 16, but backbone.features has 16"),
        (["--experts.shared", "[]", "--experts.inputs", "[[0],[1],[2],[-1]]"], "experts.inputs names feature -1"),
        (["--neck.kind", "flatten", "--backbone.features", "[tokens:-1]", "--router.inputs", "[0]"], "pooled features"),
        (["--router.kind", "mixtral", "--balance.load", "1"], "balance.load needs noise"),
        (["--router.kind", "hash", "--router.hidden", "[]", "--balance.z_loss", "1"], "no logits to act on"),
        (["--router.target_load", "[1,2]"], "router.target_load names 2 shares, but there are 4 experts"),
        (["--router.target_load", "big"], "give one of even, size, inverse_size, or a list in brackets of numbers"),
        (["--router.overflow", "residual"], "does nothing without router.capacity_factor"),
    ],
)
def test_mistakes_end_in_one_line_that_names_them(arguments, words):
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
def test_a_wrong_value_in_a_file_is_told_with_the_file(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse_command_line(["--config", str(path), "--device", "cpu"])
    assert str(caught.value).startswith(words.replace("FILE", str(path)))


def test_a_wrong_value_in_a_stored_configuration_is_told_as_such():
    with pytest.raises(UserError, match=r"router\.top_k in the stored configuration is 'two': give a whole number"):
        config_from_dict({"router": {"top_k": "two"}})


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
    """On the command line, in a file and in a task of ClearML, which keeps all values as text."""
    section, _, name = option.partition(".")
    given = [*HEAD, "--experts.shared", "[]", f"--{option}", text]
    configs = [parse_command_line(given).config]
    configs.append(parse_command_line([*HEAD, "--experts.shared", "[]"], {option: text}, "task").config)
    (tmp_path / "a.yaml").write_text(f"{section}: {{{name}: {text or 'null'}}}")
    if option != "backbone.name":  # which would have to be quoted
        configs.append(parse_command_line(["--config", str(tmp_path / "a.yaml"), "--experts.shared", "[]"]).config)
    for config in configs:
        found = getattr(getattr(config, section), name)
        assert found == value and type(found) is type(value)


def test_a_section_may_be_given_as_a_table_and_what_comes_later_counts_more(tmp_path):
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


def printed_by(arguments, capsys):
    """What train.py prints for --help and --print_config before it ends well."""
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
    assert "default: 10, 40 if the file leaves it out" in shown["train.epochs"]  # configs/cifar100.yaml has 10
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


@pytest.mark.slow
def test_exit_code_and_single_line_of_a_wrong_command_line(tmp_path):
    run_dir = tmp_path / "run"
    result = run_program("train.py", "--config", "configs/digits.yaml", "--router.top_k", "9", "--run_dir", run_dir)
    assert result.returncode == 2
    assert result.stderr.strip().startswith("error: router.top_k is 9")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not run_dir.exists()
