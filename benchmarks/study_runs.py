"""The runs of a study: trained by several processes on the same features, and stored in a file when finished."""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing

from benchmarks.study_heads import Features, Job
from benchmarks.study_training import Outcome, side_by_side, train_heads
from common.errors import EnvironmentFault, one_line


class Results:
    """Finished jobs in FOLDER/runs.jsonl, with their routings; finished jobs are not repeated.

    failed: the reason why a job has no scores, such as a loss that was not finite. Unexpected errors are not stored,
    and the job is repeated next time.
    """

    def __init__(self, folder: Path):
        self.path = folder / "runs.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.scores: dict[str, dict[str, Any]] = {}
        self.routings: dict[str, np.ndarray] = {}
        self.failed: dict[str, str] = {}
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:  # truncated by a kill: that run is repeated
                continue
            self._take(**found)

    def add(self, job: Job, outcome: Outcome | Exception) -> None:
        """Store a run: its scores and the first expert of each image, or the reason of its failure."""
        if isinstance(outcome, Exception):
            self.failed[job.key] = one_line(f"{type(outcome).__name__}: {outcome}")
            return
        if isinstance(outcome, str):
            found = {"key": job.key, "failed": outcome}
        else:
            found = {"key": job.key, "scores": outcome[0], "first": outcome[1].tolist()}
        self._take(**found)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(found))

    def _take(self, key: str, scores: dict | None = None, first: list | None = None, failed: str = "") -> None:
        if scores is None:
            self.failed[key] = failed
        else:
            self.scores[key], self.routings[key] = scores, np.array(first, dtype=np.int16)

    def knows(self, job: Job) -> bool:
        """Whether the job is finished, successfully or not."""
        return job.key in self.scores or job.key in self.failed


def passes(jobs: list[Job], heads: int, side_by_side: Callable[[Job], bool]) -> list[list[Job]]:
    """The jobs as passes: several heads of a method together, or single heads if they cannot be combined.

    Methods take turns, so that a lack of time affects all of them equally.
    """
    of_method: dict[str, list[Job]] = {}
    for job in jobs:
        of_method.setdefault(job.method, []).append(job)
    turns = []
    for found in of_method.values():
        cut = [found[i : i + heads] for i in range(0, len(found), heads)]
        turns.append([[turn] if side_by_side(turn[0]) else [[job] for job in turn] for turn in cut])
    return [part for turn in zip_longest(*turns, fillvalue=[]) for parts in turn for part in parts]


class Workers:
    """Processes that each train several heads, in passes, on the same features in memory.

    features: the inputs of each stage of a job.
    """

    def __init__(self, number: int, heads: int, features: dict[str, Features]):
        context = multiprocessing.get_context("spawn")
        self.heads, self.features = heads, features
        self.pool = ProcessPoolExecutor(number, mp_context=context, initializer=_read, initargs=(features,))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        # They end by themselves, after the current heads, so that shared memory is released properly.
        self.pool.shutdown(cancel_futures=True)

    def run(self, jobs: list[Job], results: Results, deadline: float) -> None:
        """Train the missing heads, until the deadline.

        Raises EnvironmentFault if a process ends unexpectedly.
        """
        left = [job for job in jobs if not results.knows(job)]
        seconds = deadline - time.perf_counter()
        if seconds <= 0 or not left:
            return

        def captured(job: Job) -> bool:
            return side_by_side(job.head, self.features[job.stage])

        futures = {self.pool.submit(_train, part): part for part in passes(left, self.heads, captured)}
        try:
            self._collect(futures, results, seconds)
        except TimeoutError:  # current heads are finished first
            self._collect({f: part for f, part in futures.items() if not f.cancel()}, results, None)
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "a training process ended unexpectedly, perhaps out of memory: try fewer --workers; "
                f"finished runs are kept in {results.path}, and the same command continues from there"
            ) from error

    @staticmethod
    def _collect(futures: dict[Future, list[Job]], results: Results, seconds: float | None) -> None:
        for future in as_completed(futures, timeout=seconds):
            for job, outcome in zip(futures[future], future.result(), strict=True):
                if not results.knows(job):
                    results.add(job, outcome)


_features: dict[str, Features] = {}  # of a worker


def _read(features: dict[str, Features]) -> None:
    torch.set_num_threads(1)
    _features.update(features)


def _train(jobs: list[Job]) -> list[Outcome | Exception]:
    try:
        return train_heads(jobs, _features[jobs[0].stage])
    except torch.OutOfMemoryError as error:
        failure: str | Exception = one_line(error)
    except Exception as error:
        failure = RuntimeError(one_line(f"{type(error).__name__}: {error}"))  # an error that can be pickled
        print(f"{jobs[0].method}: {failure}", file=sys.stderr, flush=True)
    if not _works():  # after some errors a GPU no longer works in this process
        os._exit(1)
    # In a pass, a head may have failed because of the others, for example when memory ran out.
    return [_train([job])[0] for job in jobs] if len(jobs) > 1 else [failure]


def _works() -> bool:
    try:
        device = next(iter(_features.values())).labels_N.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return bool(torch.ones(1, device=device) == 1)
    except RuntimeError:
        return False
