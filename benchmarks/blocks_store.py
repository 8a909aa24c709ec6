"""The finished runs of the study inside the ViT, in a file that several processes append to."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.blocks_methods import Method
from benchmarks.blocks_training import Setting


class Store:
    """The runs in FOLDER/runs.jsonl, one per line, of a single setting, and the remaining work.

    runs: method's label -> (rate, seed) -> result. separate_graphs: whether each run needs a graph of its own, because
    several did not fit into one. eager: kinds of methods whose steps cannot be captured at all. where: the environment
    of the runs. held: total GPU seconds of the starts that ended. unfinished: the number of other starts.
    """

    def __init__(self, folder: Path, setting: Setting, methods: list[Method], rates: Sequence[float], seeds: int):
        self.path, self.setting = folder / "runs.jsonl", setting
        self.methods, self.rates, self.seeds = methods, list(rates), seeds
        self.read()

    def read(self) -> None:
        """Read the file again."""
        self.runs: dict[str, dict[tuple[float, int], dict]] = {}
        self.eager: set[str] = set()
        self.separate_graphs = False
        self.where: dict[str, Any] = {}
        self.held, self.unfinished = 0.0, 0
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:  # empty, or truncated by a kill: that run is repeated
                continue
            if found["setting"] == asdict(self.setting):
                self._take(found)

    def _take(self, found: dict[str, Any]) -> None:
        if "begin" in found:  # a new start retries steps that could not be captured
            self.eager.clear()
            self.separate_graphs = False
        self.unfinished += ("begin" in found) - ("held" in found)
        if "eager" in found:
            self.eager.add(found["eager"])
        self.separate_graphs = self.separate_graphs or "separate_graphs" in found
        if "result" in found:
            self.runs.setdefault(found["label"], {})[found["rate"], found["seed"]] = found["result"]
        self.where = found.get("where", self.where)
        self.held += found.get("held", 0.0)

    def add(self, **values: Any) -> None:
        """Append a line in one write, because several processes append."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = "\n" + json.dumps({"setting": asdict(self.setting), **values})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)

    def begin(self) -> None:
        """Mark the start of a study, or of its continuation."""
        self.add(begin=f"{time.strftime('%Y-%m-%d %H:%M')}")

    def keep(self, method: Method, rate: float, seed: int, result: dict[str, Any] | str) -> None:
        """Store a finished run; a text is the reason why it has no scores."""
        found = {"failed": result} if isinstance(result, str) else result
        self.runs.setdefault(method.label, {})[rate, seed] = found
        self.add(label=method.label, rate=rate, seed=seed, result=found)

    def best_rate(self, method: Method) -> float | None:
        """The rate with the best validation macro-F1 for seed 0 (None: some are missing, or all have failed)."""
        runs = self.runs.get(method.label, {})
        tried = {rate: runs.get((rate, 0)) for rate in self.rates}
        scored = {rate: run["validation"]["macro_f1"] for rate, run in tried.items() if run and "failed" not in run}
        if not scored or None in tried.values():  # with fewer rates its search budget would differ from the others
            return None
        return max(scored, key=lambda rate: scored[rate])

    def next_runs(self, method: Method) -> list[tuple[float, int]]:
        """Rate and seed of the runs that can start now: first all rates with seed 0, then the other seeds."""
        runs = self.runs.get(method.label, {})
        left = [(rate, 0) for rate in self.rates if (rate, 0) not in runs]
        if not left and (best := self.best_rate(method)) is not None:
            left = [(best, seed) for seed in range(self.seeds) if (best, seed) not in runs]
        return left
