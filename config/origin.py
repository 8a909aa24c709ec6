"""The configuration that a run takes from the one that --init names."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.text import printable
from config.config import Values
from config.yaml_file import read_yaml

OWN = ("run_dir", "tracking", "device", "plugins", "init", "freeze", "parallel.", "optim.lr_of")
"""What a run does not take: its folder, its machine, and what it took itself."""
OF_THE_DATA = ("data.root", "data.download", "data.max_classes", "data.max_per_class")
"""What is not taken where data.name is given: it says which images, and where they are."""


def values_of_run(run: Path, given: dict[str, Any]) -> Values:
    """The options of the run in this folder, as what a new one has where nothing else is given.

    given: what is. No step routes at random where nothing says so: the gate has been trained. Raises UserError for a
    folder that is no run.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"--init {printable(run)} is not a run: it has no config.yaml; name one that train.py wrote")
    values = Values()
    values.add_all(read_yaml(file), lambda key: f"{key} in {file}")
    left_out = OWN + (OF_THE_DATA if "data.name" in given else ())
    values.given = {name: value for name, value in values.given.items() if not name.startswith(left_out)}
    values.given["router.warmup_steps"] = 0
    return values
