"""README and docs: their commands parse, their links resolve, and nothing that is registered is left out."""

import ast
import importlib
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import yaml
from conftest import ROOT, in_a_fork
from torch.distributed.run import get_args_parser

import compress
import evaluate
import export
import predict
import tune
from common.errors import UserError
from config.command_line import DEFAULT_CONFIG, parse_command_line
from config.config import Config, write_config
from config.values import option_types
from data.datasets import DATASETS
from distillation import train_vit_micro
from features import cache
from model.balance import BalanceConfig
from model.classifier import NeckConfig
from model.experts import EXPERTS
from model.routers import ROUTERS
from tracking import send

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
SECTIONS = (
    *("data", "augment", "backbone", "features", "neck", "router", "experts", "balance", "optim", "train"),
    "parallel",
)
TOOLS = {"clearml-agent", "clearml-init", "pre-commit"}  # of other projects
PARSERS = {
    "compress.py": compress.parse,
    "evaluate.py": evaluate.parse,
    "predict.py": predict.parse,
    "tune.py": tune.parse,
    "export.py": export.parse,
    "features.cache": cache._options,
    "tracking.send": send.parse,
    "distillation.train_vit_micro": train_vit_micro.parse,
}


class Parsed(Exception):
    """Raised when a benchmark has read its command line and would start to work."""


def commands(path: Path) -> list[str]:
    """Every command of a page: the lines of its shell blocks, and code in backquotes that starts like a command."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    quoted = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    lines += [code for code in quoted if re.match(r"(python|pip|sh|bash|pytest) ", code)]
    lines += [f"python -m {code}" for code in quoted if re.match(r"benchmarks\.\w+( |$)", code)]
    lines += [
        f"python {code}" for code in quoted if re.match(r"(train|evaluate|predict|compress|export|tune)\.py ", code)
    ]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return list(dict.fromkeys(part for part in parts if shlex.split(part, comments=True)))


def options(words: list[str], sections: tuple[str, ...]) -> list[str]:
    """The options of these sections, with their values."""
    kept, keep = [], False
    for word in words:
        keep = word.startswith(tuple(f"--{section}." for section in sections)) if word.startswith("--") else keep
        kept += [word] if keep else []
    return kept


def parse_train(words: list[str], folder: Path) -> None:
    if "--resume" in words:  # reads the run's configuration
        run = words.index("--resume") + 1
        assert re.fullmatch(r"RUN2?|runs/\w+-[\d-]+", words[run])
        words[run] = str(folder)
    if "--init" in words:  # starts from the run's configuration
        run = words.index("--init") + 1
        assert words[run] == "RUN"
        words[run] = str(folder)
    if "--help" in words or "--print_config" in words:
        with pytest.raises(SystemExit) as left:
            parse_command_line(words)
        assert not left.value.code
    else:
        config = parse_command_line(words).config
        assert config.parallel.experts <= len(config.experts.sizes), words


def parse_benchmark(name: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)

    def stop(read):
        raise Parsed

    patch.setattr(module, "start", stop)
    with pytest.raises(Parsed):
        module.main(words)
    parse_command_line(options(words, SECTIONS))


def parse_python(words: list[str], folder: Path, patch: pytest.MonkeyPatch) -> None:
    if words[0] == "-c":
        ast.parse(words[1])
        return
    words = [
        str(folder / "config.yaml") if word == "FILE" else word for word in words
    ]  # some programs check that it exists
    if "--plugins" in words:  # in a separate process, because its registrations stay
        words = [str(plugin(folder)) if word == "my_rules.py" else word for word in words]
        assert in_a_fork(lambda: parse_program(words, folder, patch)) == (0, "")
    else:
        parse_program(words, folder, patch)


def plugin(folder: Path) -> Path:
    """The plug-in of the page on extending, as a file."""
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "# my_rules.py" in block]
    (folder / "my_rules.py").write_text(code, encoding="utf-8")
    return folder / "my_rules.py"


def parse_program(words: list[str], folder: Path, patch: pytest.MonkeyPatch) -> None:
    name, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if name == "train.py":
        parse_train(rest, folder)
    elif name.startswith("benchmarks."):
        parse_benchmark(name, rest, patch)
    else:
        PARSERS[name](rest)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with the configuration of a run, for --resume."""
    folder = tmp_path_factory.mktemp("run")
    write_config(parse_command_line([]).config, folder / "config.yaml")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_command_is_parsed_by_the_program_that_it_names(page, run, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        words = shlex.split(command, comments=True)
        if words[0] == "srun":
            words = words[1:]
        program, rest = words[0], words[1:]
        if program == "python":
            parse_python(rest, run, monkeypatch)
        elif program == "torchrun":
            own = get_args_parser().parse_args(rest)  # torchrun's options and its script
            parse_python([own.training_script, *own.training_script_args], run, monkeypatch)
        elif program in ("sh", "bash"):
            assert subprocess.run([program, "-n", rest[0]], check=False).returncode == 0, command
        elif program == "pip":
            assert rest[0] in ("install", "wheel"), command
            assert all((ROOT / name).is_file() for option, name in pairwise(rest) if option == "-r")
        elif program == "export" or "=" in program:
            pass  # a variable of the shell
        elif program == "pytest":
            assert rest in ([], ["-m", "not slow"]), command
        else:
            assert program in TOOLS, command


def test_commands_are_found_and_wrong_ones_are_rejected(tmp_path, run, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `python train.py --router.kind nosy`, or\n```bash\npip install x && pytest   # all\n\n# a note\n```\n"
    )
    assert commands(page) == ["pip install x", "pytest   # all", "python train.py --router.kind nosy"]
    for command in ("train.py --router.kind nosy", "evaluate.py", "-m benchmarks.step --bach 3", "-c 'import'"):
        with pytest.raises((UserError, SystemExit, SyntaxError)):
            parse_python(shlex.split(command), run, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_options_in_the_text_exist(page):
    known = {f"--{name}" for name in option_types(Config)}
    code = re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8"))
    section = f"(?:{'|'.join(SECTIONS)})"
    named = {word for text in code for word in re.findall(rf"--{section}\.[a-z]\w+", text)}
    fields = {f"--{text.split()[0]}" for text in code if re.match(rf"{section}\.[a-z]\w+( \S+)?$", text)}
    fields = {field for field in fields if not (ROOT / f"{field[2:].replace('.', '/')}.py").is_file()}  # a module
    assert named | fields <= known


def slugs(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: path.stem)
def test_every_link_inside_the_repository_resolves(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists() and found.is_relative_to(ROOT), target
        assert not anchor or anchor in slugs(found), target


def test_the_readme_is_short_and_every_page_is_in_the_table_of_contents():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    contents = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for page in DOCS:
        assert page.name == "README.md" or f"({page.name})" in contents, page.name
    figures = set(
        re.findall(r"\]\((?:docs/)?(\w+\.png)\)", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    )
    assert figures == {figure.name for figure in (ROOT / "docs").glob("*.png")}


def test_the_tree_of_the_readme_is_that_of_the_repository():
    named = set(re.findall(r"^(\w+)/ ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: which folders belong to the project is not known")
    assert named == {line.split("/")[0] for line in listed.stdout.splitlines() if re.match(r"\w+/", line)}


@pytest.mark.parametrize(
    "page, names",
    [
        ("routing.md", set(ROUTERS)),
        ("routing.md", set(EXPERTS)),
        ("routing.md", set(BalanceConfig.__dataclass_fields__)),
        ("options.md", set(DATASETS)),
        ("options.md", {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}),
    ],
    ids=["routing rules", "kinds of experts", "auxiliary losses", "datasets", "recipes"],
)
def test_what_is_registered_has_a_row(page, names):
    tables = [block for block in (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n\n") if block[0] == "|"]
    rows = [set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)) for table in tables]
    best = max(rows, key=lambda found: len(found & names))
    assert best == names  # one row for each, and none for removed ones


def test_sections_are_those_of_the_configuration_and_necks_are_named():
    assert set(SECTIONS) == {name for name, field in Config.__dataclass_fields__.items() if name in SECTIONS}
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    assert "\\|".join(get_args(NeckConfig.__annotations__["kind"])) in text
    assert DEFAULT_CONFIG.name in text


def test_one_version_everywhere():
    version = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == version
    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert project is None or project[1] == version


def test_the_library_needs_what_the_requirements_say():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*)\]$", project, re.MULTILINE)[1])
    assert wanted and set(wanted) <= set((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())


def test_one_ruff_everywhere():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    [wanted] = re.findall(r"^ruff.*$", (ROOT / "requirements-dev.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert all(hook["additional_dependencies"] == [wanted] for hook in hooks)


def test_the_workflow_runs_what_ci_runs():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    matrix, steps = jobs["check"]["strategy"]["matrix"], jobs["check"]["steps"]
    assert steps[-1]["run"].startswith("bash .ci/run ")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert all(f"  {packages}) (check_{packages}) ;;" in script for packages in matrix["packages"])
