"""The configuration that a run takes from the run of --init."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.text import printable
from config.config import Values
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
