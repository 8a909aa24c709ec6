"""Training steps as CUDA graphs: one launch instead of hundreds, each of which costs the host microseconds."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from common.distributed import world
from model.moe_vit import AnyMoE, MoEViT
from model.spread import is_spread
from training.step import StepResult, TrainingStep

# Above this number of parameters, or of parameters times samples, the kernels of a step take longer than their launches
# (estimates from benchmarks/scaling.py).
PARAMETERS, WORK = 500_000_000, 500_000_000_000
EAGER_STEPS = 3  # before a capture, so that kernels are loaded and the optimizer has its moments


def worth_capturing(choice: str, model: AnyMoE, batch_size: int) -> bool:
    """Whether steps are captured under train.graph (auto, off): on a GPU, with fixed shapes, for a small head or a ViT.

    Not if dispatch would wait for the device, or deterministic algorithms might.
    """
    parameters = list(model.parameters())
    number = sum(parameter.numel() for parameter in parameters)
    pays = isinstance(model, MoEViT) or (number <= PARAMETERS and number * batch_size <= WORK)
    possible = model.static_shapes and not is_spread(model) and not torch.are_deterministic_algorithms_enabled()
    return choice == "auto" and parameters[0].is_cuda and pays and possible


class Captured:
    """One CUDA graph for each argument of a function, captured after a few eager calls.

    The function must be the same in every call, and is not stored here. Its work must have static shapes, on tensors
    with fixed addresses. The next call overwrites the tensors of a result.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None = None):
        self.device, self.generator = device, generator
        self.stream = torch.cuda.Stream(device)
        self.seen: Counter[Hashable] = Counter()  # calls by argument
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def __call__(self, run: Callable[[Any], Any], argument: Hashable) -> Any:
        if argument not in self.graphs:
            self.seen[argument] += 1
            if self.seen[argument] <= EAGER_STEPS:
                return self.eagerly(run, argument)
            self._capture(run, argument)
        graph, result = self.graphs[argument]
        graph.replay()
        return result

    def eagerly(self, run: Callable, *arguments) -> Any:
        """Run a function on the capturing stream; otherwise autograd would bind its work to another stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = run(*arguments)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return result

    def release(self) -> None:
        """Release the graphs; a later call captures again. NCCL cannot shut down while a graph has its exchanges."""
        for graph, _ in self.graphs.values():
            graph.reset()
        self.graphs.clear()

    def _capture(self, run: Callable[[Any], Any], argument: Hashable) -> None:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        # With several processes, threads of NCCL make their own CUDA calls meanwhile.
        mode = {"capture_error_mode": "thread_local"} if world().several else {}
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, **mode):
            result = run(argument)
        self.graphs[argument] = graph, result


class GraphedStep:
    """A TrainingStep on a GPU whose batches of `batch_size` samples replay a CUDA graph.

    Smaller batches run eagerly. Captured or not, steps of one size use the same dispatch mode, so that a resumed run
    draws the same random numbers whichever of its steps are captured. The next step overwrites the tensors of a result:
    accumulate them first.
    """

    def __init__(self, step: TrainingStep, batch_size: int, generator: torch.Generator | None = None):
        self.step, self.batch_size = step, batch_size
        self.captured = Captured(step.device, generator)
        self.features: Tensor | None = None
        self.labels_B: Tensor | None = None

    def __call__(self, features: Tensor, labels_B: Tensor, warmup: bool, **options: Any) -> StepResult | None:
        """Train on one batch; options: as in TrainingStep, with a separate graph for each combination."""
        share = options.get("share")
        if len(labels_B) != self.batch_size or (share is not None and not share.split):
            return self.captured.eagerly(self._step, features, labels_B, warmup, options)
        if self.features is None:
            self.features, self.labels_B = torch.empty_like(features), torch.empty_like(labels_B)
        self.features.copy_(features)
        self.labels_B.copy_(labels_B)
        return self.captured(self._on_buffers, (warmup, *sorted(options.items())))

    def _on_buffers(self, kind: tuple) -> StepResult | None:
        warmup, *options = kind
        return self._step(self.features, self.labels_B, warmup, dict(options))

    def _step(self, features: Tensor, labels_B: Tensor, warmup: bool, options: dict[str, Any]) -> StepResult | None:
        return self.step(features, labels_B, warmup, static=True, **options)
