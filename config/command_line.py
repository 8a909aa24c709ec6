"""The command line of train.py: options as `--section.name VALUE`, files with --config, runs with --resume."""

import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from common.errors import UserError
from common.paths import absolute, expanded
from common.plugins import load_plugins
from common.text import is_unicode, printable, quoted
from config.config import Config, Values, as_yaml
from config.help import help_text
from config.origin import add_experts, require_fit, values_of_run
from config.yaml_file import read_yaml

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "cifar100.yaml"
FLAGS = ("print_config", "debug")
MOST_SEEDS = 1000
NAMED = {"config": "a YAML file with options", "resume": "the folder of a run", "plugins": "a Python file"}


@dataclass
class Invocation:
    """A parsed command line."""

    config: Config
    name: str
    """Stem of the configuration file, for the run's name."""
    resume: Path | None
    seeds: int | None = None
    """Number of seeds to train, starting from train.seed; None: only that seed."""
    words: list[str] = field(default_factory=list)
    """The command line itself."""


def parse_command_line(
    argv: list[str] | None = None, above: dict[str, str] | None = None, source: str = ""
) -> Invocation:
    """Read the command line; print and exit for --help and, after all checks, for --print_config.

    above: options that override the command line, {"train.epochs": "3"}; source: where they come from. An option
    overrides a file, and the later of two overrides the earlier. Raises UserError for an unknown name, a wrong type
    or an invalid value.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    load_plugins(_named_plugins(words))
    flags, pairs = _split(words)
    seeds, pairs = _seeds(pairs)
    resume, files = _sources(pairs)
    if seeds is not None and resume is not None:
        raise UserError("--seeds starts new runs: leave out --seeds or --resume")

    def gathered(values: Values) -> Values:
        for file in files:
            values.add_all(read_yaml(file), lambda key, file=file: f"{key} in {file}")
        for name, text in pairs:
            if name not in NAMED:
                values.add(name, text, lambda key: f"--{key}")
        values.add_all(above or {}, lambda key: f"{key} in {source}")
        return values

    values = gathered(Values())
    if resume is None and (init := values.given.get("init")) is not None:
        base = values_of_run(init, values.given)
        of_run = dict(base.given)
        require_fit(values, of_run, init)
        values = gathered(base)
        add_experts(values.given, of_run)
    config = values.build()
    if resume is not None:
        config.run_dir = resume
    if "print_config" in flags:
        print(as_yaml(config, is_unicode(sys.stdout)), end="")
        sys.exit()
    name = resume.name if resume is not None else files[-1].stem if files else config.data.name
    return Invocation(config, name, resume, seeds, words)


def _named_plugins(words: list[str]) -> list[str]:
    """The values of --plugins. Plug-ins load first, because they may change everything else, including --help."""
    after = (word for option, word in pairwise(words) if option == "--plugins")
    return [*after, *(word.partition("=")[2] for word in words if word.startswith("--plugins="))]


def _split(words: list[str]) -> tuple[set[str], list[tuple[str, str | None]]]:
    """The flags, and the options with their texts (None if missing); --help prints and exits."""
    flags, pairs = set(), []
    waiting = list(reversed(words))
    while waiting:
        word = waiting.pop()
        name, joined, text = word.removeprefix("--").partition("=")
        if word in ("--help", "-h"):
            print(help_text(parse_command_line([]).config), end="")
            sys.exit()
        if not word.startswith("--"):
            raise _unexpected_word(word)
        if name in FLAGS and not joined:
            flags.add(name)
        elif joined:
            pairs.append((name, text))
        else:
            pairs.append((name, waiting.pop() if waiting and not waiting[-1].startswith("--") else None))
    return flags, pairs


def _unexpected_word(word: str) -> UserError:
    """The error for a word that belongs to no option."""
    if word.endswith((".yaml", ".yml")) and expanded(word).is_file():
        return UserError(f"{printable(word)} is a configuration file: write --config {quoted(word)}")
    return UserError(f"unknown option {printable(word)}: write --section.option VALUE; --help lists all options")


def _seeds(pairs: list[tuple[str, str | None]]) -> tuple[int | None, list[tuple[str, str | None]]]:
    """The number of seeds, if any, and the other options."""
    texts = [text or "" for name, text in pairs if name == "seeds"]
    if texts and not (texts[-1].isdecimal() and 1 <= int(texts[-1]) <= MOST_SEEDS):
        raise UserError(f"--seeds is '{texts[-1]}': give a number of seeds, 1 to {MOST_SEEDS}")
    return int(texts[-1]) if texts else None, [pair for pair in pairs if pair[0] != "seeds"]


def _sources(pairs: list[tuple[str, str | None]]) -> tuple[Path | None, list[Path]]:
    """The run to resume, if any, and the configuration files."""
    named: dict[str, list[Path]] = {name: [] for name in NAMED}
    for name, text in pairs:
        if name in NAMED:
            if not text:
                raise UserError(f"--{name} has no value: give {NAMED[name]}")
            named[name].append(expanded(text))
    if not named["resume"]:
        starts = any(name == "init" for name, _ in pairs)  # from the configuration of another run
        return None, named["config"] or ([] if starts else [DEFAULT_CONFIG])
    if lost := next((name for name, _ in pairs if name in ("config", "run_dir", "init")), None):
        raise UserError(f"--resume uses the configuration and folder of its run: leave out --{lost}")
    run = absolute(named["resume"][-1])
    if not (run / "config.yaml").is_file():
        raise UserError(f"{printable(run)} is not a run folder: it has no config.yaml; name a run folder of train.py")
    return run, [run / "config.yaml"]
