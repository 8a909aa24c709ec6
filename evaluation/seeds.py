"""Runs that differ only in the seed, and mixtures with their dense twins: means, and differences paired by seed."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from analysis.seeds import mean_and_deviation, paired_interval
from config.config import Config, flatten
from evaluation.compared import Compared
from storage.folder import INCIDENTAL

APART = {"train.seed", "data.split_seed", "dense_twin", "twin_of"}
"""Options in which a run, those of other seeds, and its dense twins differ."""
FIGURES = {"macro_f1": "macro-F1", "accuracy": "accuracy"}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed. by_seed: the run of each seed. key: the same for a mixture and its twin."""

    name: str
    key: str
    twin: bool
    by_seed: dict[int, Compared]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for comparison.json."""
        found: dict[str, Any] = {"name": self.name, "dense_twin": self.twin, "seeds": list(self.by_seed)}
        for key in FIGURES:
            if values := [run.figures[key] for run in self.by_seed.values() if key in run.figures]:
                found[key], found[f"{key}_deviation"] = mean_and_deviation(values)
        return found


@dataclass(frozen=True)
class Difference:
    """One group minus another, paired by seed: the mean of each score, and its 95 % interval (None: one pair)."""

    first: Group
    second: Group
    seeds: list[int]
    figures: dict[str, tuple[float, float | None, float | None]]

    @property
    def name(self) -> str:
        """The name of the difference."""
        if self.second.twin and not self.first.twin:
            return f"{self.first.name} minus its dense twin"
        return f"{self.first.name} minus {self.second.name}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for comparison.json."""
        names = {"first": self.first.name, "second": self.second.name, "seeds": self.seeds}
        return names | {
            key: dict(zip(("mean", "low", "high"), ends, strict=True)) for key, ends in self.figures.items()
        }


def groups(runs: Sequence[Compared]) -> tuple[list[Group], list[str]]:
    """The runs grouped by everything except the seed, in order, and what is left out of the groups, in words.

    Unfinished and stale runs are left out, and a second run with the same seed.
    """
    found: dict[tuple[str, bool], dict[int, Compared]] = {}
    said = []
    for run in runs:
        if run.state:
            said.append(f"{run.name} is left out of the means ({run.state})")
            continue
        seed, key = run.config.get("train.seed", 0), recipe_key(run.config)
        by_seed = found.setdefault((key, run.config.get("twin_of") is not None), {})
        if seed in by_seed:
            said.append(f"{run.name} repeats {by_seed[seed].name} with seed {seed}: left out of the means")
        else:
            by_seed[seed] = run
    return [
        Group(_name(list(of.values()), twin), key, twin, dict(sorted(of.items()))) for (key, twin), of in found.items()
    ], said


def recipe_key(config: dict[str, Any]) -> str:
    """A flat configuration without its seed; for a dense twin, that of the mixture that it replaces."""
    flat = _defaults() | config
    flat |= _replaced(flat.get("twin_of"))
    return json.dumps({key: flat[key] for key in sorted(flat) if key not in APART | INCIDENTAL}, default=repr)


def differences_of(found: Sequence[Group]) -> tuple[list[Difference], list[str]]:
    """The differences to compute, paired by seed, and the seeds without a partner, in words.

    Mixtures minus their twins; and each other group of two seeds or more minus the first such group.
    """
    twins, mixtures = [group for group in found if group.twin], [group for group in found if not group.twin]
    pairs = [(mixture, twin) for mixture in mixtures for twin in twins if twin.key == mixture.key]
    rest = [group for group in found if not any(group in pair for pair in pairs) and len(group.by_seed) > 1]
    pairs += [(group, rest[0]) for group in rest[1:]]
    minus = [difference for pair in pairs if (difference := _difference(*pair)) is not None]
    return minus, [line for pair in pairs if (line := _unpaired(*pair))]


def _difference(first: Group, second: Group) -> Difference | None:
    shared = [seed for seed in first.by_seed if seed in second.by_seed]
    if not shared:
        return None
    figures = {}
    for key in FIGURES:
        columns = [[group.by_seed[seed].figures.get(key) for seed in shared] for group in (first, second)]
        if not any(value is None for column in columns for value in column):
            figures[key] = paired_interval(*columns)
    return Difference(first, second, shared, figures)


def _unpaired(first: Group, second: Group) -> str:
    """The seeds that only one of two groups has; empty if there are none."""
    alone = sorted(first.by_seed.keys() ^ second.by_seed.keys())
    if not alone:
        return ""
    mine, theirs = (_listed(list(group.by_seed)) for group in (first, second))
    shared = first.by_seed.keys() & second.by_seed.keys()
    what = f"{_listed(alone)} {'is' if len(alone) == 1 else 'are'} left out of the difference"
    if not shared:
        what = f"no seed is in both, so train both with the same seeds, such as --train.seed {alone[0]}"
    return f"the seeds of {first.name} ({mine}) and of {second.name} ({theirs}) differ: {what}"


def seed_rows(found: Sequence[Group], differences: Sequence[Difference]) -> list[list[str]]:
    """Header and rows of the table of means and differences; empty if no two runs belong together."""
    if not differences and all(len(group.by_seed) < 2 for group in found):
        return []
    rows = [["seeds together", "seeds", *FIGURES.values()]]
    for group in found:
        values = group.to_dict()
        cells = [_mean(values.get(key), values.get(f"{key}_deviation")) for key in FIGURES]
        rows.append([group.name, _listed(list(group.by_seed)), *cells])
    for difference in differences:
        cells = [_points(difference.figures.get(key)) for key in FIGURES]
        rows.append([difference.name, _listed(difference.seeds), *cells])
    return rows


NOTE = (
    "Mean ± standard deviation over seeds; differences in points, paired by seed, with their 95 % interval "
    "(Student's t)."
)


def _mean(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if deviation is None else f"{100 * value:.2f} ± {100 * deviation:.2f} %"


def _points(ends: tuple[float, float | None, float | None] | None) -> str:
    if ends is None:
        return "–"
    mean, low, high = ends
    interval = "one pair" if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}"
    return f"{100 * mean:+.2f} ({interval})"


def _listed(seeds: Sequence[int]) -> str:
    """[0, 1, 2] as "0 to 2", [0, 2] as "0, 2"."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _name(runs: list[Compared], twin: bool) -> str:
    """The common prefix of the run names, or the first name."""
    shared = os.path.commonprefix([run.name for run in runs])
    if len(runs) > 1:
        shared = shared.rstrip("0123456789").removesuffix("seed").rstrip("-_ .")
    name = shared or runs[0].name
    return f"{name}, dense twin" if twin and "twin" not in name else name


@cache
def _defaults() -> dict[str, Any]:
    return flatten(Config().to_dict())


def _replaced(text: Any) -> dict[str, Any]:
    """The options of the mixture that a dense twin replaces, from twin_of."""
    try:
        values = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
