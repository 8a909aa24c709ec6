"""Training steps as CUDA graphs: one launch instead of hundreds, each of which costs the host microseconds."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.distributed import world
from model.moe_vit import AnyMoE, MoEViT
from model.spread import is_spread
from training.random_numbers import RandomNumbers
from training.step import Batch, StepResult, TrainingStep

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
    with fixed addresses. The next call overwrites the tensors of a result. generators: sources of its random numbers,
    besides the default one.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()):
        self.device, self.generators = device, generators
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
        for generator in self.generators:
            graph.register_generator_state(generator)
        # With several processes, threads of NCCL make their own CUDA calls meanwhile.
        mode = {"capture_error_mode": "thread_local"} if world().several else {}
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, **mode):
            result = run(argument)
        self.graphs[argument] = graph, result


def concurrently(device: torch.device, runs: Sequence[tuple[torch.cuda.Stream, Callable[[], Any]]]) -> list[Any]:
    """Call functions at once, each on its own stream, and return their results. In a capture they become branches.

    Many kernels of a step are too small to fill a GPU, so several steps at once take less time than one after another.
    """
    current = torch.cuda.current_stream(device)
    results = []
    for stream, run in runs:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(run())
    for stream, _ in runs:
        current.wait_stream(stream)
    return results


class GraphedStep:
    """A TrainingStep on a GPU whose batches of `batch_size` samples replay a CUDA graph.

    Smaller batches run eagerly. Captured or not, steps of one size use the same dispatch mode, so that a resumed run
    draws the same random numbers whichever of its steps are captured. The next step overwrites the tensors of a result:
    accumulate them first.
    """

    def __init__(self, step: TrainingStep, batch_size: int, generator: torch.Generator | None = None):
        self.step, self.batch_size = step, batch_size
        self.captured = Captured(step.device, () if generator is None else (generator,))
        self.ready: StepResult | None = None  # the result of the next call, if a JointStep has taken that step
        self.features: Tensor | None = None
        self.labels_B: Tensor | None = None

    def __call__(self, features: Tensor, labels_B: Tensor, warmup: bool, **options: Any) -> StepResult | None:
        """Train on one batch; options: as in TrainingStep, with a separate graph for each combination."""
        if self.ready is not None:
            result, self.ready = self.ready, None
            return result
        share = options.get("share")
        if len(labels_B) != self.batch_size or (share is not None and not share.split):
            return self.captured.eagerly(self._step, features, labels_B, warmup, options)
        return self.captured(self.on_buffers, self.buffered(Batch(features, labels_B, warmup, options)))

    def buffered(self, batch: Batch) -> Hashable:
        """Copy a batch to the fixed addresses that `on_buffers` reads, and return the argument for it."""
        if self.features is None:
            self.features, self.labels_B = torch.empty_like(batch.features), torch.empty_like(batch.labels_B)
        self.features.copy_(batch.features)
        self.labels_B.copy_(batch.labels_B)
        return batch.warmup, *sorted(batch.options.items())

    def on_buffers(self, kind: tuple) -> StepResult | None:
        """Train on the copied batch; kind: what `buffered` returned for it."""
        warmup, *options = kind
        return self._step(self.features, self.labels_B, warmup, dict(options))

    def _step(self, features: Tensor, labels_B: Tensor, warmup: bool, options: dict[str, Any]) -> StepResult | None:
        return self.step(features, labels_B, warmup, static=True, **options)


class JointStep:
    """The steps of several runs as one CUDA graph, with a branch for each run; every run keeps its random numbers."""

    def __init__(self, steps: Sequence[GraphedStep], numbers: Sequence[RandomNumbers]):
        self.steps, self.numbers = steps, numbers
        generators = [each.generator for each in numbers if each.generator is not None]
        self.captured = Captured(steps[0].step.device, generators)
        self.complete = True  # False after a call that failed: some runs may have taken its step, others not

    def __call__(self, batches: Sequence[Batch | None]) -> None:
        """Train each run on its batch (None: not this run). The next call of its GraphedStep returns the result.

        Does nothing if a batch is smaller than others: then the GraphedSteps train on their batches themselves.
        """
        present = {index: batch for index, batch in enumerate(batches) if batch is not None}
        if not present or any(len(each.labels_B) != self.steps[index].batch_size for index, each in present.items()):
            return
        kinds = tuple((index, self.steps[index].buffered(batch)) for index, batch in present.items())
        self.complete = False
        for index, result in zip(present, self.captured(self._branches, kinds), strict=True):
            self.steps[index].ready = result
        self.complete = True

    def _branches(self, kinds: tuple) -> list[StepResult | None]:
        branches = [(self.steps[index].captured.stream, partial(self._branch, index, kind)) for index, kind in kinds]
        return concurrently(self.captured.device, branches)

    def _branch(self, index: int, kind: tuple) -> StepResult | None:
        with self.numbers[index].of_steps():
            return self.steps[index].on_buffers(kind)
