"""Plug-ins that cannot be loaded are reported in one line, and only a command line loads plug-ins."""

from types import SimpleNamespace

import pytest
from conftest import in_a_fork

from common import plugins
from common.errors import CommandError, UserError, exit_code
from common.plugins import load_plugins, loaded_plugins, require_plugins
from config.command_line import parse_command_line
from config.config import config_from_dict
from data.registry import DATASETS
from evaluation.figures import FIGURES
from model.experts import EXPERTS
from model.losses import LOSSES
from model.routers import ROUTERS


@pytest.fixture(autouse=True)
def none_loaded(monkeypatch):
    """A process without plug-ins."""
    monkeypatch.setattr(plugins, "_loaded", {})


BROKEN = {
    "x = 1\ny = 1 / 0\n": r"line 2: ZeroDivisionError: division by zero",
    "def f(:\n": r"line 1: SyntaxError: invalid syntax",
    "import nosuchpackage\n": r"line 1: ModuleNotFoundError: No module named 'nosuchpackage'",
    "import sys\nsys.exit(0)\n": r"line 2: SystemExit",
    "raise ValueError('two\\nlines')\n": r"line 1: ValueError: two lines",
    "from model.routers import register\n@register('switch', 'mine')\nclass Mine: pass\n": (
        r"line 2: routing rule 'switch' is registered twice, by model\.routers\.switch and by plugin_mine"
    ),
    "from model.experts import register\n@register('mlp', 'mine')\nclass Mine: pass\n": "'mlp' is registered",
    "from model.losses import register\n@register('z_loss', 'mine')\ndef mine(r): pass\n": "auxiliary loss 'z_loss' is",
    "from model.routers import register\n@register('my rule', 'mine')\nclass Mine: pass\n": "use letters, digits and _",
    "from data.datasets import register\n@register('digits', about='x')\ndef mine(c): pass\n": "'digits' is al",
    "from evaluation.figures import register\n@register('samples', 'A')\ndef mine(e): pass\n": "'samples' is regist",
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_plugin_that_cannot_be_loaded_is_reported_in_one_line(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registries = (ROUTERS, EXPERTS, LOSSES, DATASETS, FIGURES)
    before = [dict(registry) for registry in registries]
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(UserError, match=rf"^--plugins mine\.py cannot be loaded.*{BROKEN[content]}") as caught:
        parse_command_line(["--plugins", "mine.py"])
    assert "\n" not in str(caught.value) and exit_code(caught.value) == 2
    assert loaded_plugins() == [] and before == [dict(registry) for registry in registries]


def test_a_missing_plugin_or_a_duplicate_name_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "mine.py", tmp_path / "other/mine.py", tmp_path / "notes.txt"):
        path.write_text("")
    for word, words in (
        ("nowhere.py", "there is no such file"),
        ("other", "neither a Python file nor an entry point"),
        ("notes.txt", "neither a Python file nor an entry point"),
    ):
        with pytest.raises(UserError, match=words):
            load_plugins([word])
    load_plugins(["mine.py", "./mine.py", str(tmp_path / "mine.py")])
    assert loaded_plugins() == ["mine.py"]
    with pytest.raises(UserError, match=r"--plugins other/mine\.py has the same name as .*mine\.py: rename one"):
        load_plugins(["other/mine.py"])


def test_an_entry_point_is_loaded_by_its_name_and_only_if_named(monkeypatch):
    ran = []
    point = SimpleNamespace(name="theirs", value="theirs.rules", load=lambda: ran.append("theirs"))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == "vision_moe.plugins" else [])
    assert parse_command_line([]).config.plugins == ran == []
    assert parse_command_line(["--plugins", "theirs"]).config.plugins == ran == ["theirs"]


def test_no_file_and_no_stored_configuration_loads_a_plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemError('code ran')\n")
    # The named plug-in is reported first, although other names may be unknown without it.
    (tmp_path / "recipe.yaml").write_text("balance: {my_loss: 0.1}\nplugins: [mine.py]\n")
    words = r"needs the plug-in mine\.py, and only the command line can load plug-ins: add --plugins PATH"
    with pytest.raises(CommandError, match=rf"^plugins in .*recipe\.yaml {words}"):
        parse_command_line(["--config", "recipe.yaml"])
    with pytest.raises(CommandError, match=rf"^plugins in the stored configuration {words}"):
        config_from_dict({"router": {"kind": "mine"}, "plugins": ["mine.py"]})
    with pytest.raises(CommandError, match=rf"^plugins in ClearML task 1 {words}"):
        parse_command_line([], {"router.kind": "mine", "plugins": "[mine.py]"}, "ClearML task 1")
    with pytest.raises(UserError, match=r"plugins in the stored configuration is '3'"):
        config_from_dict({"plugins": 3})
    require_plugins([], "nothing")


def test_additions_of_a_plugin_are_in_help_and_options(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(
        "from model.options import Option\nfrom model.routers import register\n"
        "from model.routers.mixtral import MixtralRouter\n"
        "@register('my_rule', 'mine alone', options=[Option('my_option', int, 3, 'What my rule reads.')])\n"
        "class Mine(MixtralRouter): pass\n"
    )

    def use():  # in a separate process, because a registered rule stays for the whole process
        words = ["--plugins", str(tmp_path / "mine.py"), "--router.kind", "my_rule", "--router.my_option", "5"]
        config = parse_command_line(words).config
        assert (config.router.my_option, config.plugins) == (5, ["mine.py"])
        assert config_from_dict(config.to_dict()) == config
        parse_command_line([*words, "--help"])

    assert in_a_fork(use) == (0, "")
    printed = " ".join(capfd.readouterr().out.split())
    assert "my_rule: mine alone" in printed and "--router.my_option What my rule reads." in printed
    assert "my_rule" not in ROUTERS
