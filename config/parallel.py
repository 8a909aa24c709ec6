"""ParallelConfig: how a run on several processes distributes its work."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ParallelConfig:
    """Parallel: how several processes, started by torchrun, share the work. The images of a step are split evenly."""

    experts: int = 1
    """Number of processes over which the routed experts are distributed; samples are sent to their experts and back.
    It must divide the number of processes and be at most the number of experts. 1: every process has all experts."""
    placement: Literal["even", "work", "lp"] = "even"
    """With parallel.experts: which experts share a process. even: equal counts; work: by measured load times cost, the
    largest first; lp: by an integer program on the same numbers, with copies of experts that are too much work for one
    process. work and lp are recomputed after each epoch."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before it ends the run."""

    def __post_init__(self):
        if self.experts < 1:
            raise ValueError(f"parallel.experts is {self.experts}: it must be at least 1")
        if not 0 < self.timeout <= 86_400:
            raise ValueError(f"parallel.timeout is {self.timeout}: it must be a number of seconds, up to 86400")
