"""The runs of a study: kept in a file when they are done, trained by several processes on the same features."""

import json
import queue
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing

from benchmarks.study_heads import Features, Job, train_head


class Results:
    """Finished jobs in FOLDER/runs.jsonl, their routings included; what is there already is not done again."""

    def __init__(self, folder: Path):
        self.path = folder / "runs.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.scores: dict[str, dict[str, Any]] = {}
        self.routings: dict[str, np.ndarray] = {}
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:  # torn by a kill: that run is done again
                continue
            self.scores[found["key"]] = found["scores"]
            self.routings[found["key"]] = np.array(found["first"], dtype=np.int16)

    def add(self, job: Job, scores: dict[str, Any], first_M: np.ndarray) -> None:
        """Keep a run."""
        self.scores[job.key], self.routings[job.key] = scores, first_M
        with open(self.path, "a") as file:
            file.write("\n" + json.dumps({"key": job.key, "scores": scores, "first": first_M.tolist()}))


class Workers:
    """Processes that train heads on the same features in memory. features: what each stage of a job reads."""

    def __init__(self, number: int, features: dict[str, Features]):
        context = multiprocessing.get_context("spawn")
        self.todo, self.done = context.Queue(), context.Queue()
        arguments = (self.todo, self.done, features)
        self.processes = [context.Process(target=_work, args=arguments) for _ in range(number)]

    def __enter__(self) -> "Workers":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.terminate()
            process.join()

    def run(self, jobs: list[Job], results: Results, deadline: float) -> None:
        """Train the heads that are not there yet, until the deadline; one that fails is said and left out."""
        left = {job.key: job for job in jobs if job.key not in results.scores}
        for job in left.values():
            self.todo.put(job)
        while left and time.perf_counter() < deadline and any(p.is_alive() for p in self.processes):
            try:
                job, outcome = self.done.get(timeout=1)
            except queue.Empty:
                continue
            left.pop(job.key, None)
            if isinstance(outcome, str):
                print(f"{job.method}, seed {job.seed}: {outcome}", file=sys.stderr)
            else:
                results.add(job, *outcome)


def _work(todo, done, features: dict[str, Features]) -> None:
    torch.set_num_threads(1)
    while True:
        job = todo.get()
        try:
            done.put((job, train_head(job, features[job.stage])))
        except Exception as error:  # one head must not end the others
            done.put((job, " ".join(f"{type(error).__name__}: {error}".split())[:200]))
