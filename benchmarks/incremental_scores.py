"""The protocol of benchmarks/incremental.py: the order of the classes, and the scores of the predictions."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import synchronise
from common.errors import say
from data.image_set import Splits

ORDER_SEED = 1993  # seed of the class order, as in iCaRL (Rebuffi 2017)


@dataclass(frozen=True)
class Stream:
    """Classes in steps. classes: of each step. rows: the training images of each step. kept: images of old classes that
    are kept before each step."""

    classes: list[list[int]]
    rows: list[Tensor]
    kept: list[Tensor]
    labels: dict[str, Tensor]

    @classmethod
    def of(cls, splits: Splits, steps: int, memory: int) -> "Stream":
        """The classes of a dataset in a fixed shuffled order; memory: kept old images per class."""
        labels_N, count = splits.train.labels_N, splits.train.num_classes
        order = np.random.RandomState(ORDER_SEED).permutation(count).tolist()
        classes = [order[step * count // steps : (step + 1) * count // steps] for step in range(steps)]
        generator = torch.Generator().manual_seed(ORDER_SEED)
        of_class = [torch.nonzero(labels_N == label).flatten() for label in range(count)]
        few = [rows[torch.randperm(len(rows), generator=generator)[:memory]] for rows in of_class]
        rows = [torch.cat([of_class[label] for label in step]) for step in classes]
        none = torch.zeros(0, dtype=torch.int64)
        kept = [torch.cat([none, *(few[label] for old in classes[:step] for label in old)]) for step in range(steps)]
        return cls(classes, rows, kept, {name: splits[name].labels_N for name in ("train", "validation", "test")})

    def seen(self, step: int) -> list[int]:
        """The classes up to a step, in their order of arrival."""
        return [label for classes in self.classes[: step + 1] for label in classes]

    def among(self, split: str, classes: list[int]) -> Tensor:
        """The rows of a split with these classes."""
        return torch.nonzero(torch.isin(self.labels[split], torch.tensor(classes))).flatten()


Answer = Callable[[str, Tensor], Tensor]
"""The classes that a method predicts for rows of a split, on the CPU."""


class Scores:
    """The scores of one method, step by step."""

    def __init__(self, stream: Stream):
        self.stream, self.began = stream, time.perf_counter()
        self.test_TT: list[list[float]] = []
        self.validation_TT: list[list[float]] = []

    def add(self, answer: Answer) -> None:
        """Score the predictions after the next step, on the images of all classes so far."""
        step = len(self.test_TT)
        for split, found in (("test", self.test_TT), ("validation", self.validation_TT)):
            rows = self.stream.among(split, self.stream.seen(step))
            found.append(by_step(self.stream, step, answer(split, rows), rows, split))
        after = [100 * float(np.mean(part[-1])) for part in (self.test_TT, self.validation_TT)]
        say(f"  step {step + 1} of {len(self.stream.classes)}: {after[0]:.2f} %, on validation images {after[1]:.2f} %")

    def result(self, device: torch.device, **more: Any) -> dict[str, Any]:
        """The scores as plain values, and the time since the start."""
        synchronise(device)
        seconds = time.perf_counter() - self.began
        validation = statistics.fmean(_after(self.stream, self.validation_TT))
        return scored(self.stream, self.test_TT, seconds, validation=validation, **more)


def _after(stream: Stream, accuracy_TT: list[list[float]]) -> list[float]:
    """The accuracy on all classes so far after each step."""
    sizes = [len(classes) for classes in stream.classes]
    return [float(np.average(row, weights=sizes[: len(row)])) for row in accuracy_TT]


def scored(stream: Stream, accuracy_TT: list[list[float]], seconds: float, **more: Any) -> dict[str, Any]:
    """The results of one method. accuracy_TT: after step t, the accuracy on the classes of each step up to t.

    mean: average over the steps of the accuracy on all classes so far. forgetting (Chaudhry 2018): for each step except
    the last, the best accuracy on its classes minus the final one, averaged.
    """
    after = _after(stream, accuracy_TT)
    last = accuracy_TT[-1]
    lost = [max(row[step] for row in accuracy_TT[step:-1]) - last[step] for step in range(len(last) - 1)]
    return {
        "mean": statistics.fmean(after),
        "last": after[-1],
        "forgetting": statistics.fmean(lost) if lost else 0.0,
        "after": after,
        "accuracy": accuracy_TT,
        "seconds": seconds,
        **more,
    }


def by_step(stream: Stream, step: int, predicted_M: Tensor, rows_M: Tensor, split: str) -> list[float]:
    """The accuracy on each step's classes. predicted_M: predicted classes for the images rows_M of the split."""
    labels_M = stream.labels[split][rows_M]
    right_M = predicted_M.cpu() == labels_M
    found = []
    for classes in stream.classes[: step + 1]:
        found.append(float(right_M[torch.isin(labels_M, torch.tensor(classes))].float().mean()))
    return found


def summary(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names and cells of the table: a row per method and memory, means over seeds, the best first."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["memory"]), []).append(row)

    def cell(found: list[dict[str, Any]], name: str) -> str:
        values = [100 * row[name] for row in found]
        return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")

    order = sorted(groups, key=lambda group: -statistics.fmean(row["mean"] for row in groups[group]))
    cells = []
    for group in order:
        found = groups[group]
        seconds = f"{statistics.fmean(row['seconds'] for row in found):.1f}"
        scores = [cell(found, part) for part in ("mean", "last", "forgetting", "validation")]
        cells.append([group[0], str(group[1]), str(len(found)), *scores, seconds])
    columns = ["method", "old images per class", "seeds", "mean accuracy", "last accuracy", "forgetting"]
    return [*columns, "mean on validation images", "seconds"], cells
