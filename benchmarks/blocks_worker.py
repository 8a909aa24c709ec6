"""A process of the study inside the ViT: it claims methods and trains them, or estimates how long that would take."""

import argparse
import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from assembly.pipeline import load_inputs
from benchmarks.blocks_methods import DENSE, Method
from benchmarks.blocks_store import Store
from benchmarks.blocks_training import CaptureFailed, MethodRuns
from benchmarks.blocks_vit import FrozenEnd, stored_inputs
from benchmarks.common import environment, synchronise, table
from common.errors import one_line
from common.locks import try_lock
from config.config import Config
from features.images import ImageBank

AGAIN = 75  # exit code of a worker that must be restarted
CHECKED = 4096  # images of each split in a check
CHECK_STEPS = 30
WIDE = 32  # above this width a check assumes that a method is as slow as the widest one


class Worker:
    """Claims one method after another, and trains its remaining runs, until the time is over.

    A claim is a lock on a file next to the runs, which ends with the process: no two workers train the same method at
    the same time, however many processes use the folder.
    """

    def __init__(self, config: Config, store: Store, options: argparse.Namespace):
        self.config, self.store, self.until, self.spent = config, store, options.until, 0.0
        self.side_by_side = 1 if store.separate_graphs else options.side_by_side
        began = time.time()
        inputs = load_inputs(config)
        self.device, self.splits, backbone = inputs.device, inputs.splits, inputs.backbone
        bank = ImageBank(inputs.splits, config.augment, self.device)
        loaded = time.time()
        first, views = store.setting.first, 1 if options.check else store.setting.epochs
        self.read = stored_inputs(backbone, bank, first, views, CHECKED if options.check else None)
        synchronise(self.device)
        images = views * len(self.read["test"].labels_N) + sum(len(part.held_labels_M) for part in self.read.values())
        self.load_seconds, self.image_seconds = loaded - began, (time.time() - loaded) / images
        patches = self.read["test"].held_MF.shape[1] - backbone.vit.num_prefix_tokens
        self.backbone = FrozenEnd(backbone, first, patches, self.device)

    def run(self) -> None:
        """Train methods that no other worker has claimed, the most important ones first."""
        self.store.add(where=environment(self.device))
        for method in self.store.methods:
            if time.time() + self.spent >= self.until:
                break
            with self._claim(method) as ours:
                self.store.read()
                if ours and self.store.next_runs(method):
                    self._train(method)
                    self.release()

    @contextlib.contextmanager
    def _claim(self, method: Method) -> Iterator[bool]:
        folder = self.store.path.parent / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{method.label}.lock", "wb") as file:
            yield try_lock(file)

    def _train(self, method: Method) -> None:
        runs = self.runs_of(method)
        while (left := self.store.next_runs(method)) and time.time() + self.spent < self.until:
            began, left = time.time(), left[: self.side_by_side]
            try:
                results = runs.train(left)
            except CaptureFailed as error:
                self.give_up(method, error)
            self.spent = time.time() - began
            for (rate, seed), result in zip(left, results, strict=True):
                self.store.keep(method, rate, seed, result)
                shown = result if isinstance(result, str) else f"{100 * result['test']['macro_f1']:.2f}"
                seconds = self.spent / len(left)
                print(f"{method.label}: rate {rate:g}, seed {seed}: {shown}, {seconds:.1f} s", flush=True)

    def runs_of(self, method: Method) -> MethodRuns:
        """A method that is ready for training."""
        # If a second kind cannot be captured either, the cause is not a single missing kernel.
        eager = method.kind in self.store.eager or len(self.store.eager) > 1
        return MethodRuns(method, self.backbone, self.config, self.read, self.store.setting, eager)

    def release(self) -> None:
        """Release the memory of the last method."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def give_up(self, method: Method, error: CaptureFailed) -> None:
        """Exit, because the state of CUDA is unknown now; the worker restarts and captures less.

        First each run gets a graph of its own; if that fails too, methods of this kind get none.
        """
        several = self.side_by_side > 1
        then = "continuing with one graph for each run" if several else "continuing without one"
        print(f"{one_line(error)}: {then}", file=sys.stderr, flush=True)
        self.store.add(**({"separate_graphs": True} if several else {"eager": method.kind}))
        sys.stdout.flush()
        os._exit(AGAIN)


def check(worker: Worker) -> None:
    """Time a few steps of each kind of method, and of the widest ones; print this and an estimate for the study."""
    chosen: dict[tuple[str, bool], dict[str, Any]] = {}
    widest = max(method.width for method in worker.store.methods)
    for method in worker.store.methods:
        key = method.kind, method.width == widest > WIDE
        if key in chosen or (key[1] and not method.name.startswith((DENSE, "equal, k 1"))):
            continue
        runs = worker.runs_of(method)
        try:
            chosen[key] = runs.timed(CHECK_STEPS, worker.side_by_side) | {"graph": runs.captured is not None}
        except CaptureFailed as error:
            worker.give_up(method, error)
        del runs
        worker.release()
    cells = [
        [
            kind,
            "widest" if wide else "middle",
            f"{1e3 * found['step']:.2f}",
            f"{found['setup']:.2f}",
            "graph" if found["graph"] else "eager",
        ]
        for (kind, wide), found in chosen.items()
    ]
    print(table(["kind", "width", "ms per step", "setup (s)", "step"], cells))
    _predict(worker, chosen)


def _predict(worker: Worker, chosen: dict[tuple[str, bool], dict[str, Any]]) -> None:
    """Print the estimated seconds of all remaining runs."""
    splits, setting = worker.splits, worker.store.setting
    held = len(splits.validation) + len(splits.test)
    steps = setting.epochs * (len(splits.train) // setting.batch)
    slowest = max([found["step"] for (_, wide), found in chosen.items() if wide], default=0.0)
    total, count, each = 0.0, 0, len(worker.store.rates) + worker.store.seeds - 1
    for method in worker.store.methods:
        found = chosen[method.kind, False]
        step = max(found["step"], slowest) if method.width > WIDE else found["step"]
        left = each - len(worker.store.runs.get(method.label, {}))
        total += found["setup"] + left * (steps * step + held * found["evaluation"])
        count += left
        print(f"up to {method.label}: {count} runs, {total:.0f} GPU seconds")
    begin = worker.load_seconds + worker.image_seconds * (setting.epochs * len(splits.train) + held)
    print(
        f"all {count} runs of {setting.epochs} epochs, {steps} steps: {total:.0f} GPU seconds, plus the start of each "
        f"process, {begin:.0f} s without its imports"
    )
