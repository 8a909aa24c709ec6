"""Config: the components' own dataclasses put together, read from YAML and the command line."""

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from common.errors import UserError, one_line
from common.files import write_atomically
from common.paths import absolute, expanded
from config.config_errors import explain, misfit, option_types
from config.features import FeaturesConfig
from config.optim import OptimConfig
from config.train import TrainConfig
from data.augment import AugmentConfig
from data.datasets import DataConfig
from model.backbone import BackboneConfig
from model.balance import BalanceConfig
from model.classifier import NeckConfig, check_parts
from model.experts import ExpertsConfig
from model.losses import LOSSES
from model.routers import ROUTERS, RouterConfig

DEVICES = r"auto|cpu|cuda(:\d+)?"
MAX_CONFIG = 1_000_000  # bytes of a file, and values in it
DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "cifar100.yaml"


@dataclass
class Config:
    """Run: where it writes, what it runs on, where its numbers go."""

    run_dir: Path | None = None
    """Folder of this run; null: runs/<config>-<time>."""
    tracking: Literal["auto", "clearml", "offline", "none"] = "auto"
    """ClearML: auto uses the configured server if it answers, else offline; none writes metrics.jsonl only."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, or cuda:1."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    neck: NeckConfig = field(default_factory=NeckConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        self.run_dir = None if self.run_dir is None else absolute(self.run_dir)
        self.data.root = self.data.place  # what is stored holds where the caches lie elsewhere, too
        if not re.fullmatch(DEVICES, self.device):
            raise ValueError(f"device is '{self.device}': use auto, cpu, cuda or cuda:N")
        num_experts = len(self.experts.sizes)
        if self.router.top_k > num_experts:
            raise ValueError(
                f"router.top_k is {self.router.top_k} but experts.sizes names {num_experts}: "
                "lower the one or lengthen the other"
            )
        if self.neck.needs_tokens and not self.backbone.gives_tokens:
            raise ValueError(
                f"neck.kind {self.neck.kind} reads tokens, but backbone.features are pooled: use [tokens:-1]"
            )
        check_parts(self.neck, self.router, self.experts)
        if self.backbone.gives_tokens and not self.neck.needs_tokens:
            raise ValueError(
                "backbone.features gives tokens, but neck.kind pooled reads vectors: use attention or flatten"
            )
        self._check_inputs()
        self._check_balance()

    def _check_inputs(self) -> None:
        """Features that router.inputs and experts.inputs name must be there."""
        count = len(self.backbone.features)
        chosen = {"router.inputs": [self.router.inputs or []], "experts.inputs": self.experts.inputs or []}
        for name, lists in chosen.items():
            for group in (group for groups in lists for group in groups):
                if not 0 <= group < count:
                    raise ValueError(
                        f"{name} names feature {group}, but backbone.features has {count}: they count from 0"
                    )

    def _check_balance(self) -> None:
        """Losses that the rule gives nothing to act on."""
        for name, loss in LOSSES.items():
            if getattr(self.balance, name) > 0:
                loss.check(ROUTERS[self.router.kind], self.router)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as config.yaml, checkpoints and ClearML hold them."""
        return _plain(asdict(self))


@dataclass
class Invocation:
    """What a command line asked for."""

    config: Config
    name: str
    """Stem of the configuration file, for the run's name."""
    resume: Path | None
    words: list[str] = field(default_factory=list)
    """The command line itself."""


def parse_command_line(argv: list[str] | None = None, values: dict[str, str] | None = None) -> Invocation:
    """Read `--config FILE`, `--section.field VALUE` and `--resume RUN`; print and exit for --help, --print_config.

    values: texts of options that count more than those of the command line, {"train.epochs": "3"}. Raises UserError
    for an unknown key, a wrong type or an impossible value.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    argv = [*words, *(f"--{key}={text}" for key, text in (values or {}).items())]
    options = {word.split("=")[0] for word in argv}
    resume = _value_of("--resume", argv)
    if resume is not None:
        for option in ("--config", "--run_dir"):
            if option in options:
                raise UserError(
                    f"--resume takes configuration and folder from the run that it names: leave out {option}"
                )
        argv = ["--config", str(_run_config(expanded(resume))), *argv]
    elif "--config" not in options:
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    argv = _files_first(argv)
    parser, source = _parser(), _value_of("--config", argv)
    if not source or not expanded(source).exists():
        raise UserError(f"--config {source or 'names nothing'}: no such file; name one with options in YAML")

    def given(key: str) -> tuple[str, Any]:
        return _given(parser, argv, key)

    _parse(lambda: _check_size(expanded(source)), source, given)
    values = _parse(lambda: parser.parse_args(argv), source, given)
    config = _build(parser, values)
    if resume is not None:
        config.run_dir = absolute(resume)
        return Invocation(config, config.run_dir.name, config.run_dir, words)
    return Invocation(config, Path(source).stem, None, words)


def config_from_dict(values: dict[str, Any]) -> Config:
    """The Config that `Config.to_dict` described. Raises UserError where it does not fit."""
    parser, source = _parser(), "the stored configuration"

    def given(key: str) -> tuple[str, Any]:
        return f"{key} in {source}", _at(values, key)

    return _build(parser, _parse(lambda: parser.parse_object(values), source, given))


def write_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that --config reads back."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _run_config(run_dir: Path) -> Path:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run: it has no config.yaml; name a folder that train.py wrote")
    return path


@cache
def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train.py",
        usage="python train.py [--config FILE] [--section.field VALUE ...] [--resume RUN]",
        description="Train a vision mixture of experts on the features of a frozen ViT, then evaluate it.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of the options below; configs/cifar100.yaml if none is named. The defaults below hold "
        "where neither the file nor the command line sets an option: --print_config shows what does.",
    )
    parser.add_argument(
        "--resume", type=str, default=None, metavar="RUN", help="Go on with a run that was interrupted."
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    parser.add_class_arguments(Config)
    sections = {item.name: item.type for item in fields(Config) if is_dataclass(item.type)}
    for action in parser._actions:
        section, _, name = action.dest.partition(".")
        for option in fields(sections[section]) if section in sections else ():
            if option.name == name:  # what registered parts say of themselves
                about = option.metadata.get("help", action.help)
                action.help = about() if callable(about) else about
    return parser


def _build(parser: ArgumentParser, values: Namespace) -> Config:
    _refuse_misfits(values)
    try:
        built = parser.instantiate(values)
        return Config(**{item.name: built[item.name] for item in fields(Config)})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(one_line(error)) from error


def _refuse_misfits(values: Namespace) -> None:
    """Raise UserError for what the parser lets pass: a null where the type has none, a section that is none."""
    for name, kind in option_types(Config).items():
        if (found := values.get(name, "")) is None and NoneType not in get_args(kind):
            raise UserError(f"{name} is null: give it a value, or leave it out")
        if is_dataclass(kind) and not isinstance(found, Namespace):
            raise misfit(name, found, kind)


def _files_first(argv: list[str]) -> list[str]:
    """The words with every --config before all else: a file must not undo an option that stands before it."""
    files, others, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            files += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            (files if word.startswith("--config=") else others).append(word)
    return files + others


def _check_size(path: Path) -> None:
    """Raise ValueError for a file of which a few lines of aliases make more values than fit into memory."""
    if not path.is_file():  # the parser will say so
        return
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            inner = node.value if isinstance(node.value, list) else ()
            parts = (part for item in inner for part in (item if isinstance(item, tuple) else (item,)))
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    try:
        text = path.read_text(encoding="utf-8") if path.stat().st_size < MAX_CONFIG else ""
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"Unable to load: {error}") from error
    if path.stat().st_size >= MAX_CONFIG or (root and size(root) >= MAX_CONFIG):
        raise ValueError(f"Unable to load: it is larger than any configuration, {MAX_CONFIG:,} bytes or values")


def _parse(parse: Callable[[], Any], source: str | None, given: Callable[[str], tuple[str, Any]]) -> Any:
    """What `parse` returns, its errors in the user's words; source, given: as `config.config_errors.explain`."""
    try:
        return parse()
    except RecursionError as error:
        raise UserError(f"{source} refers to itself, or is nested without end: remove the YAML alias") from error
    except (ArgumentError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise explain(error, option_types(Config), source, given) from error


def _given(parser: ArgumentParser, argv: list[str], key: str) -> tuple[str, Any]:
    """Where the parser took the value of a refused option from: a file that it refuses by itself, or the words."""
    for file in _values_of("--config", argv):
        try:
            parser.parse_args(["--config", file])
        except ArgumentError:
            return f"{key} in {file}", _at(yaml.safe_load(expanded(file).read_text(encoding="utf-8")), key)
    return f"--{key}", _value_of(f"--{key}", argv)


def _at(values: Any, key: str) -> Any:
    """values["train"]["epochs"], or values["train.epochs"], for train.epochs; None where there is neither."""
    for name in [key] if isinstance(values, dict) and key in values else key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _value_of(option: str, argv: list[str]) -> str | None:
    """The value of the last `--option VALUE` or `--option=VALUE` in argv."""
    return next(reversed(_values_of(option, argv)), None)


def _values_of(option: str, argv: list[str]) -> list[str]:
    values = [argv[i + 1 : i + 2] if word == option else [] for i, word in enumerate(argv)]
    joined = [[word.partition("=")[2]] if word.startswith(f"{option}=") else [] for word in argv]
    return [value for pair in zip(values, joined, strict=True) for found in pair for value in found]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 3}} as {"train.epochs": 3}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
