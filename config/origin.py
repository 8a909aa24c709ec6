"""The configuration that a run takes from the one that --init names."""

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
"""What a run does not take: its folder, its machine, and what it took itself."""
OF_THE_DATA = ("data.root", "data.download", "data.max_classes", "data.max_per_class", "data.shots")
"""What is not taken where data.name is given: it says which images, and where they are."""

GROWING = ("experts.sizes", "experts.grown", "experts.head", "experts.inputs")
"""What new experts make longer."""
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
"""What decides which weights a model has: of the run and of those that start from it these are equal."""


def values_of_run(run: Path, given: dict[str, Any]) -> Values:
    """The options of the run in this folder, as what a new one has where nothing else is given.

    given: what is. No step routes at random where nothing says so: the gate has been trained; with new experts the
    warm-up is the time in which it opens to them. Raises UserError for a folder that is no run.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"--init {printable(run)} is not a run: it has no config.yaml; name one that train.py wrote")
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
    """Put the experts of experts.add behind those of the run, in the options `given` for a run that starts from it.

    What has an entry for each expert gets one for each new one. Nothing is done to a configuration that has them.
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
