"""The configuration that a run takes from the run of --init."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.text import printable
from config.config import Config, Values, flatten
from config.yaml_file import read_yaml
from model.backbone import BackboneConfig
from model.experts import ExpertsConfig
from model.experts.config import LIST_DROPOUT

OWN = (
    "run_dir",
    "tracking",
    "device",
    "plugins",
    "init",
    "freeze",
    "replay",
    "parallel.",
    "optim.lr_of",
    "experts.add",
)
"""Options that are not copied: its folder, its machine, and its own start."""
OF_THE_DATA = ("data.root", "data.download", "data.max_classes", "data.max_per_class", "data.shots")
"""Options that are not copied if data.name is given: they belong to the old dataset."""

GROWING = ("experts.sizes", "experts.grown", "experts.head", "experts.inputs")
"""Options that get longer with new experts."""
SHAPING = (
    "experts.grown",
    *("experts.place", "experts.kind", "experts.blocks", "experts.sizes", "experts.shared", "experts.inputs"),
    *(
        "experts.head",
        "experts.activation",
        "experts.norm",
        "router.kind",
        "router.level",
        "router.hidden",
        "router.inputs",
        "router.norm",
    ),
    *("neck.kind", "neck.norm", "neck.heads"),
)
"""Options that determine the weights of a model; they must equal those of the run that it starts from."""


def values_of_run(run: Path, given: dict[str, Any]) -> Values:
    """The options of the run in this folder, as the defaults of a new run.

    given: the options that are set for the new run. By default there is no random warm-up, because the gate is already
    trained; with new experts the warm-up is the time in which the gate opens to them. Raises UserError for a folder
    that is not a run.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"--init {printable(run)} is not a run: it has no config.yaml; name a run folder of train.py")
    values = Values()
    values.add_all(read_yaml(file), lambda key: f"{key} in {file}")
    left_out = OWN + (OF_THE_DATA if "data.name" in given else ())
    values.given = {name: value for name, value in values.given.items() if not name.startswith(left_out)}
    adds = given.get("experts.add")
    if not adds:
        values.given["router.warmup_steps"] = 0
    elif not values.given.get("router.warmup_steps"):
        values.given.pop("router.warmup_steps", None)
    return values


def require_fit(given: Values, of_run: dict[str, Any], run: Path) -> None:
    """Raise UserError where an option that is given makes a model that cannot have the weights of the run.

    of_run: the options of the run. Where experts are added, what has an entry for each is left to a later check.
    """
    theirs, adds = flatten(Config().to_dict()) | of_run, given.given.get("experts.add")
    keys = [key for key in SHAPING if key in given.given and not (adds and key in GROWING)]
    if differing := [key for key in keys if given.given[key] != theirs[key]]:
        key, *others = differing
        more = f", and {', '.join(others)} too" if others else ""
        raise UserError(
            f"--init {printable(run)} has {key} {theirs[key]}, but {given.places[key]} is {given.given[key]}: leave "
            f"it out{more}"
        )


def add_experts(given: dict[str, Any], of_run: dict[str, Any]) -> None:
    """Append the experts of experts.add to those of the run, in the options `given` for a run that starts from it.

    Lists with one entry per expert get an entry for each new expert. A configuration that already has the new experts
    is not changed.
    """
    add, before, plain = given.get("experts.add"), of_run["experts.sizes"], ExpertsConfig()
    if not add or given["experts.sizes"] != before:
        return
    given["experts.sizes"] = [*before, *add]
    given["experts.grown"] = [*of_run.get("experts.grown", []), len(before)]
    if given.get("experts.head"):
        given["experts.head"] = [*given["experts.head"], *add]
    for name, entry in (("dropout", LIST_DROPOUT), ("weights", "float32"), ("inputs", None)):
        key = f"experts.{name}"
        value = given.get(key, getattr(plain, name))
        if isinstance(value, list):
            every = list(range(len(given.get("backbone.features", BackboneConfig().features))))
            new = [every if name == "inputs" else entry for _ in add]
            given[key] = [*value[: len(before)], *new, *value[len(before) :]]
