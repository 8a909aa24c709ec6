"""Whether a mixture is better than its dense twin, over all seeds in the same folder."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.text import printable
from config.config import Config, flatten
from evaluation.compared import Compared, load
from evaluation.seeds import Difference, differences_of, groups, recipe_key
from storage.folder import RunFolder


def verdict(run: RunFolder, config: Config, macro_f1: float) -> dict[str, Any] | None:
    """Compare mixture and dense twin over this run and those in the same folder; None unless there are both.

    macro_f1: the test score of `run`, whose results may not be written yet. Returns {"text", "seeds", "mean", "low",
    "high", "beside"}: a sentence, the paired seeds, mixture minus twin in macro-F1 with its 95 % interval (None: one
    pair), and {"name", "cost"} of the run to compare the cost with.
    """
    flat = flatten(config.to_dict())
    key, path = recipe_key(flat), run.path.resolve()
    twins = list(_neighbours(path, "twin_of: '{"))
    if run.compression.is_file() or (not twins and config.twin_of is None):
        return None
    mixtures = _neighbours(path, "twin_of: null")
    own = Compared(printable(path.name), str(path), flat, {"macro_f1": macro_f1})
    same = [other for other in (*mixtures, *twins) if recipe_key(other.config) == key]
    found, _ = groups([own, *same])
    minus = [difference for difference in differences_of(found)[0] if difference.second.twin]
    if not minus or "macro_f1" not in minus[0].figures:
        return None
    return _summary(minus[0]) | {"beside": _beside(minus[0], own)}


def _neighbours(path: Path, words: str) -> Iterator[Compared]:
    """The scored runs in the folder of `path` whose config.yaml contains these words, checked before parsing."""
    for folder in sorted(path.parent.iterdir()):
        other = RunFolder(folder)
        if folder == path or not (other.scored and other.config.is_file()):
            continue
        with suppress(OSError, UserError):
            if words in other.config.read_text(encoding="utf-8", errors="replace"):
                yield load(str(folder))


def _beside(difference: Difference, own: Compared) -> dict[str, Any]:
    """The run on the other side of the difference, with the same seed if possible: its name and its cost."""
    other = difference.second if own.config.get("twin_of") is None else difference.first
    run = other.by_seed.get(own.config.get("train.seed", 0), other.by_seed[difference.seeds[0]])
    costs = {key.removeprefix("cost."): value for key, value in run.figures.items() if key.startswith("cost.")}
    return {"name": run.name, "cost": costs}


def _summary(difference: Difference) -> dict[str, Any]:
    mean, low, high = difference.figures["macro_f1"]
    seeds = difference.seeds
    points = f"its macro-F1 minus that of a dense twin of equal FLOPs is {100 * mean:+.2f} points"
    if low is None or high is None:
        text = f"One seed cannot show whether the mixture is better than its dense twin: {points} (seed {seeds[0]})"
    else:
        told = "These seeds do not show whether the mixture is better than its dense twin"
        if low > 0 or high < 0:
            told = f"The mixture is {'better' if low > 0 else 'worse'} than its dense twin"
        text = f"{told}: {points} (95 % interval {100 * low:+.2f} to {100 * high:+.2f}, {len(seeds)} seeds)"
    return {"text": text, "seeds": seeds, "mean": mean, "low": low, "high": high}
