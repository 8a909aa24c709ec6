"""ParallelConfig: how a run on several processes shares its work."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ParallelConfig:
    """Several processes, which torchrun starts: how they share the work. The images of a step are split evenly."""

    experts: int = 1
    """Processes that share the routed experts, each of which then lives on one of them; samples go there and back.
    It divides the number of processes, and is at most that of experts. 1: every process has all experts."""
    placement: Literal["even", "work", "lp"] = "even"
    """parallel.experts: which experts live together. even: equal counts; work: by measured load times cost, the
    heaviest first; lp: by an integer program on the same numbers, with copies of experts that get too much for one
    process. work and lp are solved anew after each epoch."""
    timeout: float = 600.0
    """Seconds after which a process that waits for the others ends the run."""

    def __post_init__(self):
        if self.experts < 1:
            raise ValueError(f"parallel.experts is {self.experts}: it must be at least 1")
        if not 0 < self.timeout <= 86_400:
            raise ValueError(f"parallel.timeout is {self.timeout}: it is a number of seconds, up to 86400")
