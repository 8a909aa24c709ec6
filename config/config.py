"""Config: the dataclasses of all parts combined, and how it is built from options."""

import difflib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from common.errors import UserError, one_line
from common.files import write_text
from common.paths import absolute
from common.plugins import HELP, loaded_plugins, require_plugins
from common.text import printable
from config.features import FeaturesConfig
from config.optim import OptimConfig
from config.parallel import ParallelConfig
from config.train import TrainConfig
from config.values import convert, expected, option_types, plain
from config.yaml_file import spelled
from data.augment import AugmentConfig
from data.datasets import DataConfig
from model.backbone import BackboneConfig
from model.balance import BalanceConfig
from model.blocks import check_block_parts
from model.classifier import NeckConfig, check_parts
from model.experts import ExpertsConfig
from model.losses import LOSSES
from model.options import suggestion
from model.parts import PARTS
from model.routers import ROUTERS, RouterConfig

DEVICES = r"auto|cpu|cuda(:\d+)?"
PART = Literal[PARTS]
RENAMED = {"train.dense_twin": "dense_twin", "train.twin_of": "twin_of"}
"""Options that runs of earlier versions store under other names."""
IDLE = {
    "blocks": ("features", ("mode", "views", "storage", "cache_dir", "compile"), "because the ViT runs in every step"),
    "head": ("train", ("compile", "recompute"), "because no step trains inside the ViT"),
}
"""By experts.place: a section, its options without effect, and why they have none."""


@dataclass
class Config:
    """Run: output folder, tracking, device."""

    run_dir: Path | None = None
    """Folder of this run; null: runs/<config>-<time>."""
    tracking: Literal["auto", "clearml", "offline", "none"] = "auto"
    """ClearML: auto uses the configured server if it answers, else offline; none writes only metrics.jsonl."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, or cuda:1."""
    plugins: list[str] = field(default_factory=list, metadata={"help": HELP})
    init: Path | None = None
    """Folder of a trained run to start from: its experts, gates and neck, and the class rows whose class names match.
    Its configuration provides the defaults. null: start from random weights."""
    freeze: list[str] | str = field(default_factory=list)
    """With init: parts that stay frozen, such as router,experts. The parts are neck, router, experts, shared, and head
    (the class rows). New experts, gate columns and class rows are trained in any case."""
    replay: int = 0
    """With init: also train on this many training images per class of that run's dataset; its validation and test
    images are scored too. 0: train only on the new images."""
    dense_twin: bool = False
    """Train the run's dense twin: one dense part, in the same place and with the same training, replaces the mixture.
    It has as many FLOPs per sample as gate and experts. The comparison shows whether the mixture pays off."""
    twin_of: str | None = None
    """Set by dense_twin, not by you: the replaced options as JSON, by which a comparison finds the runs that belong
    together."""
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        self.run_dir = None if self.run_dir is None else absolute(self.run_dir)
        if self.twin_of is not None and not self.dense_twin:
            raise ValueError("twin_of is set by dense_twin: leave it out, or set dense_twin true")
        self._check_init()
        self.data.root = self.data.place  # stored paths stay valid if the cache folder differs
        if not re.fullmatch(DEVICES, self.device):
            raise ValueError(f"device is '{self.device}': use auto, cpu, cuda or cuda:N")
        num_experts = len(self.experts.sizes)
        if self.router.top_k > num_experts:
            raise ValueError(
                f"router.top_k is {self.router.top_k} but experts.sizes names {num_experts}: lower top_k or add sizes"
            )
        if self.experts.place == "blocks":
            check_block_parts(self.neck, self.router, self.experts)
            if self.backbone.gives_tokens:
                raise ValueError(
                    "backbone.features tokens:BLOCK need experts.place head: with blocks the head reads cls and mean"
                )
            self._check_balance()
            return
        if self.train.patch_dropout:
            raise ValueError("train.patch_dropout needs experts.place blocks: set that, or leave patch_dropout out")
        if self.router.level != "token":
            raise ValueError(
                f"router.level {self.router.level} needs experts.place blocks: set that, or router.level token"
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

    @property
    def random_steps(self) -> int:
        """Training steps with random routing: none if the warm-up opens a trained gate to new experts."""
        return 0 if self.experts.add else self.router.random_steps

    def _check_init(self) -> None:
        """Check the options for runs that start from another run."""
        self.init = None if self.init is None else absolute(self.init)
        words = self.freeze.strip("[]").split(",") if isinstance(self.freeze, str) else self.freeze
        self.freeze = [word.strip() for word in words if word.strip()]
        for part in self.freeze:
            if part not in PARTS:
                raise ValueError(f"freeze names '{part}': the parts are {', '.join(PARTS)}{suggestion(part, PART)}")
        if self.replay < 0:
            raise ValueError(f"replay is {self.replay}: it must be a number of images per class, or 0 for none")
        if self.init is None and self.replay:
            raise ValueError(f"replay {self.replay} needs the dataset of a run: name the run with --init")
        if self.experts.grown and self.parallel.experts > 1:
            raise ValueError("parallel.experts does not work with experts that were added to a run: set it to 1")
        if self.experts.grown:
            ROUTERS[self.router.kind].check_growth(self.router)
        if self.init is not None and self.dense_twin and self.twin_of is None:
            raise ValueError("dense_twin has other weights than the run that init names: leave out one of them")
        if self.init is None and self.experts.add:
            raise ValueError("experts.add adds experts to those of a run: name the run with --init")
        if self.init is None and self.freeze:
            raise ValueError(f"freeze {','.join(self.freeze)} needs a run to start from: name it with --init")

    def _check_inputs(self) -> None:
        """Raise ValueError if router.inputs or experts.inputs names a feature that does not exist."""
        count = len(self.backbone.features)
        chosen = {"router.inputs": [self.router.inputs or []], "experts.inputs": self.experts.inputs or []}
        for name, lists in chosen.items():
            for group in (group for groups in lists for group in groups):
                if not 0 <= group < count:
                    raise ValueError(
                        f"{name} names feature {group}, but backbone.features has {count}: they count from 0"
                    )

    def _check_balance(self) -> None:
        """Raise ValueError for losses that have no effect under the routing rule."""
        for name, loss in LOSSES.items():
            if getattr(self.balance, name) > 0:
                loss.check(ROUTERS[self.router.kind], self.router)
                if loss.of_init and self.init is None:
                    raise ValueError(f"balance.{name} compares with the gate of a trained run: name it with --init")

    def alone(self) -> "Config":
        """The same without the options that need the run named by init, except for the replay of its images."""
        balance = replace(self.balance, **{name: 0.0 for name, loss in LOSSES.items() if loss.of_init})
        return replace(self, init=self.init if self.replay else None, freeze=[], balance=balance)

    @property
    def idle(self) -> list[str]:
        """One line for each option that is set but has no effect."""
        found = [*self.router.idle, *self.experts.idle, *self.train.idle]
        for name, loss in LOSSES.items():
            if loss.of_init and getattr(self.balance, name) > 0 and "router" in self.freeze:
                found.append(f"balance.{name} has no effect with --freeze router, which keeps the gate unchanged")
        section, names, why = IDLE[self.experts.place]
        part = getattr(self, section)
        defaults = type(part)()
        found += [
            f"{section}.{name} {value} has no effect with experts.place {self.experts.place}, {why}"
            for name in names
            if (value := getattr(part, name)) not in (None, getattr(defaults, name))
        ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as stored in config.yaml, checkpoints and ClearML."""
        return plain(asdict(self))


class Values:
    """Options from files, the command line and servers, converted to their types; later ones override earlier ones."""

    def __init__(self):
        self.given: dict[str, Any] = {}
        self.places: dict[str, str] = {}  # where each was given, for messages
        self.types = option_types(Config)

    def add(self, name: str, value: Any, place: Callable[[str], str]) -> None:
        """Add an option, "train.epochs", or a whole section, "train". place: where it is given, for the messages.

        Raises UserError for an unknown name or a value of the wrong type.
        """
        name = RENAMED.get(name, name)
        kind = self.types.get(name)
        if kind is None:
            raise unknown_option(place(name), name)
        if value is None and place(name) == f"--{name}":
            raise UserError(f"--{name} has no value: give {expected(kind)}")
        if name == "plugins":  # which only the command line can load
            require_plugins(self._converted(name, value, place), place(name))
            return
        if is_dataclass(kind):
            table = spelled(value) if isinstance(value, str) else value
            if not isinstance(table, dict):
                raise wrong_type(place(name), value, kind)
            for inner, item in table.items():
                self.add(f"{name}.{inner}", item, place)
            return
        self.given[name], self.places[name] = self._converted(name, value, place), printable(place(name))

    def add_all(self, values: dict[str, Any], place: Callable[[str], str]) -> None:
        """Add the options of one source, plug-ins first, because the others may depend on them."""
        for name, value in sorted(values.items(), key=lambda item: item[0] != "plugins"):
            self.add(str(name), value, place)

    def _converted(self, name: str, value: Any, place: Callable[[str], str]) -> Any:
        try:
            return convert(self.types[name], value)
        except (ValueError, RecursionError) as error:
            raise wrong_type(place(name), value, self.types[name]) from error

    def build(self) -> Config:
        """The configuration: the given options, and defaults for the others.

        Raises UserError for a value out of range and for values that contradict each other.
        """
        parts: dict[str, Any] = {}
        try:
            for item in fields(Config):
                if is_dataclass(item.type):
                    names = {option.name for option in fields(item.type)}
                    options = {name: self.given[key] for name in names if (key := f"{item.name}.{name}") in self.given}
                    parts[item.name] = item.type(**options)
                elif item.name in self.given:
                    parts[item.name] = self.given[item.name]
            return Config(**parts, plugins=loaded_plugins())
        except (ValueError, OverflowError) as error:
            raise UserError(one_line(error)) from error


def unknown_option(place: str, name: str) -> UserError:
    """The error for a name that is not an option. place: the name and where it is written."""
    options = [key for key, kind in option_types(Config).items() if not is_dataclass(kind)]
    same_word = [key for key in options if key.split(".")[-1] == name.split(".")[-1]]
    close = same_word or difflib.get_close_matches(name, options, 1, 0.75)
    hint = f"did you mean {close[0]}?" if close else "--help lists all options"
    return UserError(f"unknown option {printable(place).removeprefix('--')}: {hint}")


def wrong_type(place: str, value: Any, kind: Any) -> UserError:
    """The error for a value of the wrong type."""
    found = "null" if value is None else f"'{one_line(value, 80)}'"
    return UserError(f"{printable(place)} is {printable(found)}: give {expected(kind)}{suggestion(value, kind)}")


def config_from_dict(stored: dict[str, Any]) -> Config:
    """The Config of a dict that `Config.to_dict` made. Raises UserError for values that are not valid."""
    values = Values()
    values.add_all(stored, lambda key: f"{key} in the stored configuration")
    return values.build()


def as_yaml(config: Config, unicode: bool = True) -> str:
    """The configuration as YAML that --config reads. unicode: write characters beyond ASCII as they are."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=unicode)


def write_config(config: Config, path: Path) -> None:
    """Write the configuration as YAML."""
    write_text(path, as_yaml(config))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 3}} as {"train.epochs": 3}, with the names of this version."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if nested else {RENAMED.get(name, name): value}
    return flat
