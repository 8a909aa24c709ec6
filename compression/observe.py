"""Observe the experts of a model: their input rows, the inputs of their matrices, and their outputs."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.blocks import BlockMixture
from model.experts.adapter import Adapters
from model.moe import MixtureOfExperts
from model.moe_vit import AnyMoE, MoEViT
from model.quantised import Matrix, linear_matrices
from model.routing import Assignments, Routing

HEAD = -1
"""The place and the number that stand for the linear head behind experts inside the ViT."""


@dataclass(frozen=True)
class Observation:
    """The inputs of the experts at one place for one batch.

    rows_ND: their inputs, float32, one row per token or image. assignments: of these rows. pooled_BD: the inputs of
    the shared experts (None: there are none). logits_BE: the gate's logits without noise, per routed token or image.
    """

    mixture: Any
    rows_ND: Tensor
    assignments: Assignments
    pooled_BD: Tensor | None
    logits_BE: Tensor

    def rows_of(self, expert: int) -> Tensor:
        """The rows that go to an expert; all rows for a shared expert. Shared experts are numbered after the routed
        ones.
        """
        chosen = self.assignments
        if expert >= chosen.num_experts:
            assert self.pooled_BD is not None
            return self.pooled_BD
        return self.rows_ND[chosen.sample_A[(chosen.expert_A == expert) & (chosen.weight_A > 0)]]


@torch.no_grad()
def observe(model: AnyMoE, inputs: Tensor) -> dict[int, Observation | Tensor]:
    """The inputs at each place, by its number, for one batch; at HEAD the features of the head.

    model: in evaluation mode, not compiled.
    """
    found: dict[int, Observation | Tensor] = {}
    with ExitStack() as hooks:
        for place, mixture in enumerate(model.mixtures):

            def keep(module: nn.Module, given: tuple, made: tuple, place: int = place) -> None:
                found[place] = _observation(module, given[0], made[1])

            hooks.enter_context(_hooked(mixture.register_forward_hook(keep)))
        if isinstance(model, MoEViT) and model.head is not None:

            def keep_features(module: nn.Module, given: tuple) -> None:
                found[HEAD] = given[0].float()

            hooks.enter_context(_hooked(model.head.register_forward_pre_hook(keep_features)))
        model(inputs)
    return found


def _hooked(handle: Any) -> ExitStack:
    stack = ExitStack()
    stack.callback(handle.remove)
    return stack


def _observation(mixture: Any, x: Tensor, routing: Routing) -> Observation:
    chosen, logits_BE = routing.assignments, routing.logits_BE
    if isinstance(mixture, BlockMixture):
        rows_ND = x.flatten(0, 1).float()
        return Observation(mixture, rows_ND, chosen.repeated(len(rows_ND) // chosen.num_samples), None, logits_BE)
    pooled_BD = (x if x.ndim == 2 else x.mean(dim=1)).float() if len(mixture.shared) else None
    if chosen.rows_AD is not None:
        return Observation(mixture, chosen.rows_AD.float(), chosen.by_row(), pooled_BD, logits_BE)
    return Observation(mixture, x.float(), chosen, pooled_BD, logits_BE)


def members(model: AnyMoE) -> Iterator[tuple[int, int]]:
    """(place, number) of each expert: the routed ones, then the shared ones, at each place; then the linear head."""
    for place, mixture in enumerate(model.mixtures):
        shared = len(mixture.shared) if isinstance(mixture, MixtureOfExperts) else 0
        yield from ((place, number) for number in range(mixture.router.num_experts + shared))
    if isinstance(model, MoEViT) and model.head is not None:
        yield HEAD, HEAD


def module_of(model: AnyMoE, place: int, number: int) -> nn.Module | None:
    """The module of an expert, or the linear head; None if the experts share one module."""
    if place == HEAD:
        assert isinstance(model, MoEViT)
        return model.head
    mixture: Any = model.mixtures[place]
    if isinstance(mixture, MixtureOfExperts):
        count = mixture.router.num_experts
        return mixture.experts[number] if number < count else mixture.shared[number - count]
    return mixture.experts.copies[number] if hasattr(mixture.experts, "copies") else None


def matrices_of(model: AnyMoE, place: int, number: int) -> list[Matrix]:
    """The matrices of an expert, which it may share with other experts. Raises ValueError as ExpertKind does."""
    module = module_of(model, place, number)
    if module is not None:
        return linear_matrices(module, number)
    mixture: Any = model.mixtures[place]
    return mixture.experts.matrices()


def output_of(model: AnyMoE, place: int, number: int, rows_ND: Tensor) -> Tensor:
    """The output of an expert for rows, float32, without gate weights. Raises ValueError as ExpertKind does."""
    module = module_of(model, place, number)
    mixture: Any = model.mixtures[place]
    return mixture.experts.output_of(number, rows_ND) if module is None else module(rows_ND)


def inputs_of(model: AnyMoE, place: int, number: int, rows_ND: Tensor) -> list[Tensor]:
    """The inputs of each of `matrices_of` when the expert computes rows (N, D): (N, inputs) each.

    Raises ValueError for a kind of a plug-in whose inputs cannot be observed.
    """
    module = module_of(model, place, number)
    if module is None:
        experts: Any = model.mixtures[place].experts
        if not isinstance(experts, Adapters):
            raise ValueError(f"{type(experts).__name__} does not say what its matrices read")
        return [rows_ND, experts.hidden_of(number, rows_ND)]
    found: dict[int, Tensor] = {}
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    with ExitStack() as hooks:
        for layer in linears:

            def keep(layer: nn.Module, given: tuple) -> None:
                found[id(layer)] = given[0].flatten(0, -2).float()

            hooks.enter_context(_hooked(layer.register_forward_pre_hook(keep)))
        module(rows_ND)
    if len(found) < len(linears):
        kind = type(module).__name__
        raise ValueError(f"{kind} has linear layers that it does not call, so their inputs cannot be observed")
    return [found[id(layer)] for layer in linears]
