"""Training steps as CUDA graphs: one launch in place of some hundreds, each of which costs the host microseconds."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from common.distributed import world
from model.moe_vit import AnyMoE, MoEViT
from model.spread import is_spread
from training.step import StepResult, TrainingStep

# Above so many parameters, or parameters times samples, the kernels of a step take longer than its launches (estimates
# from benchmarks/scaling.py).
PARAMETERS, WORK = 500_000_000, 500_000_000_000
EAGER_STEPS = 3  # before a capture, so that kernels are loaded and the optimizer has its moments


def worth_capturing(choice: str, model: AnyMoE, batch_size: int) -> bool:
    """Whether train.graph (auto, off) asks for captured steps: on a GPU, with shapes that stay, a small head or a ViT.

    Not where dispatch would wait for the device, or deterministic algorithms may.
    """
    parameters = list(model.parameters())
    number = sum(parameter.numel() for parameter in parameters)
    pays = isinstance(model, MoEViT) or (number <= PARAMETERS and number * batch_size <= WORK)
    possible = model.static_shapes and not is_spread(model) and not torch.are_deterministic_algorithms_enabled()
    return choice == "auto" and parameters[0].is_cuda and pays and possible


class Captured:
    """A function of one argument, as a CUDA graph for each of its values: captured after a few calls as it is.

    The function is the same one in every call, and not held here. Its work must have static shapes, on tensors that
    stay where they are. The tensors of a result are overwritten by the next call.
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
        """Run something on the stream that captures, or autograd would tie its work to another one."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = run(*arguments)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return result

    def release(self) -> None:
        """Let go of the graphs; a later call captures again. NCCL does not end while a graph has its exchanges."""
        for graph, _ in self.graphs.values():
            graph.reset()
        self.graphs.clear()

    def _capture(self, run: Callable[[Any], Any], argument: Hashable) -> None:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        # Of several processes, threads of NCCL make CUDA calls of their own meanwhile.
        mode = {"capture_error_mode": "thread_local"} if world().several else {}
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, **mode):
            result = run(argument)
        self.graphs[argument] = graph, result


class GraphedStep:
    """A TrainingStep on a GPU whose batches of `batch_size` samples replay a CUDA graph.

    Smaller batches run as they are. Captured or not, steps of one size dispatch in the same way, so that a run that is
    resumed draws the same random numbers whichever of its steps are captured. The tensors of a result are overwritten
    by the next step: add them up first.
    """

    def __init__(self, step: TrainingStep, batch_size: int, generator: torch.Generator | None = None):
        self.step, self.batch_size = step, batch_size
        self.captured = Captured(step.device, generator)
        self.features: Tensor | None = None
        self.labels_B: Tensor | None = None

    def __call__(self, features: Tensor, labels_B: Tensor, warmup: bool, **options: Any) -> StepResult | None:
        """Train on one batch; options: as of TrainingStep, each combination a graph of its own."""
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
