"""Names on one line, commands that can be pasted, and written and stored paths."""

import ast
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.arguments import Parser, path_option
from common.errors import UserError, exit_code_of, say
from common.files import write_json
from common.paths import absolute, expanded
from common.text import as_json, command, printable, quoted
from config.command_line import parse_command_line
from config.config import Config, as_yaml

NASTY = "a\nb\x1b[31m\t\u202edc\x9b"
NO_ENCODING = os.fsdecode(b"caf\xe9 .png")


def test_a_name_is_shown_on_one_line_without_control_characters():
    assert printable(NASTY) == "a\\nb\\u001b[31m\\t\\u202edc\\u009b"
    assert printable(NO_ENCODING) == "caf\\udce9 .png"
    for plain in ("苹果.png", "naïve name\u3000.png", "👩\u200d🔬", Path("a b")):
        assert printable(plain) == str(plain)


def test_a_printed_command_survives_a_shell():
    words = ["train.py", "--resume", Path("my runs/it's $HOME"), NASTY, NO_ENCODING, "", "苹果"]
    line = command(*words)
    assert "\n" not in line and line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout == b"\0".join([b"python", *map(os.fsencode, words)]) + b"\0"
    assert shlex.split(command("evaluate.py", "/a b/c")) == ["python", "evaluate.py", "/a b/c"]
    assert quoted("/plain/path-1") == "/plain/path-1"


def test_a_stored_path_can_be_restored(tmp_path):
    write_json(tmp_path / "a.json", {"path": NASTY + NO_ENCODING})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": NASTY + NO_ENCODING}
    for unicode in (False, True):
        assert json.loads(as_json(["é苹", NO_ENCODING], unicode)) == ["é苹", NO_ENCODING]
        assert as_json("é苹", unicode).isascii() != unicode
        config = Config(run_dir=tmp_path / NO_ENCODING / "é苹")
        assert as_yaml(config, unicode).isascii() != unicode
        (tmp_path / "config.yaml").write_text(as_yaml(config, unicode), encoding="utf-8")
        assert parse_command_line(["--config", str(tmp_path / "config.yaml")]).config == config


def test_paths_are_expanded_and_stored_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert expanded("~/c") == tmp_path / "home" / "c"
    assert expanded("c") == Path("c") and absolute("c") == tmp_path / "c"
    assert absolute("~/c") == tmp_path / "home" / "c"
    assert expanded("~no-such-user/c") == Path("~no-such-user/c")
    for wrong in ("", "a\0b"):
        with pytest.raises(ValueError, match="is not a path"):
            absolute(wrong)
    parser = Parser(prog="program")
    parser.add_argument("--out", type=path_option)
    assert parser.parse_args(["--out=~/c"]).out == tmp_path / "home" / "c"
    with pytest.raises(UserError, match="argument --out: an empty text is not a path"):
        parser.parse_args(["--out", ""])


def test_output_continues_if_the_encoding_lacks_characters(monkeypatch, capsys):
    lines, said = io.BytesIO(), io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["train.py"])
        stream, errors = (io.TextIOWrapper(buffer, "ascii") for buffer in (lines, said))
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", errors)
        assert exit_code_of(lambda: print("experts 0 · 32", NO_ENCODING)) == 0
        say("· said")
    assert lines.getvalue() == b"experts 0 \\xb7 32 caf\\udce9 .png\n"
    assert said.getvalue() == b"\\xb7 said\n"


def test_an_error_is_one_line_whatever_names_are_in_it(monkeypatch, capsys):
    def fail():
        raise UserError(f"{NASTY} is not there")

    monkeypatch.setattr("sys.argv", ["train.py"])
    assert exit_code_of(fail) == 2
    assert capsys.readouterr().err == f"error: {printable(NASTY)} is not there\n"
    monkeypatch.setattr(sys, "stderr", None)
    say("no one hears it")


def opens_without_encoding(source):
    """The lines of a program that read or write text in the default encoding."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        opens = name == "open" or (name.endswith(".open") and name not in ("os.open", "Image.open", "tarfile.open"))
        binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args[0 if "." in name else 1 :])
        texts = name.endswith((".read_text", ".write_text")) or (opens and not binary)
        if texts and not any(keyword.arg == "encoding" for keyword in call.keywords):
            yield call.lineno


@pytest.mark.slow
def test_every_text_file_is_read_and_written_as_utf8():
    assert list(opens_without_encoding("open('a')\npath.open('w')\nopen('a', 'rb')\nx.read_text()\n")) == [1, 2, 4]
    files = [
        path
        for path in ROOT.rglob("*.py")
        if not any(part in ("tests", "site-packages") or part[0] == "." for part in path.relative_to(ROOT).parts)
    ]
    assert len(files) > 50
    found = [f"{path}:{line}" for path in files for line in opens_without_encoding(path.read_text(encoding="utf-8"))]
    assert found == []


def test_a_row_of_whole_numbers_is_one_line_of_json_and_strings_do_not_change():
    value = {"file": "[\n  1,\n  2\n]", "experts": [[0, -12, 3], []], "weights": [0.5, 1.0], "one": [7]}
    text = as_json(value)
    assert json.loads(text) == value
    assert "    [0, -12, 3],\n" in text and '"one": [7]' in text
