"""Experts as lists of matrices: matching the hidden units of two experts, and averaging experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from model.experts import LayerStack
from model.experts.adapter import Adapters

SWEEPS = 20  # limit of sweeps over the hidden layers


@dataclass(eq=False)
class Layers:
    """The weights of one expert.

    matrices: of each layer, (outputs, inputs). vectors: of each hidden layer, biases and the weights of its norm,
    (outputs,). out: the bias of the last layer (None: it has none). halves: of each hidden layer, the outputs of its
    matrix per unit: 2 for gated linear units, which have a gate and a value. there: which units the expert has.
    """

    matrices: list[Tensor]
    vectors: list[list[Tensor]]
    out: Tensor | None
    halves: list[int]
    there: list[Tensor]

    @property
    def hidden(self) -> list[int]:
        """Units of each hidden layer."""
        return [len(matrix) // halves for matrix, halves in zip(self.matrices, self.halves, strict=False)]

    def reorder(self, layer: int, order: Tensor) -> None:
        """Permute the units of a hidden layer; the expert computes the same function."""
        units = self.hidden[layer]
        rows = torch.cat([order + half * units for half in range(self.halves[layer])])
        self.matrices[layer] = self.matrices[layer][rows]
        self.vectors[layer] = [vector[rows] for vector in self.vectors[layer]]
        self.matrices[layer + 1] = self.matrices[layer + 1][:, order]
        self.there[layer] = self.there[layer][order]

    def widened(self, hidden: Sequence[int]) -> "Layers":
        """The expert padded to these numbers of units per hidden layer with zeros, which are not `there`."""
        matrices, vectors, there = list(self.matrices), [list(group) for group in self.vectors], list(self.there)
        for layer, (units, wanted) in enumerate(zip(self.hidden, hidden, strict=True)):
            matrices[layer] = _padded(matrices[layer], units, wanted, self.halves[layer])
            vectors[layer] = [_padded(vector, units, wanted, self.halves[layer]) for vector in vectors[layer]]
            matrices[layer + 1] = nn.functional.pad(matrices[layer + 1], (0, wanted - units))
            there[layer] = nn.functional.pad(there[layer], (0, wanted - units), value=False)
        return Layers(matrices, vectors, self.out, self.halves, there)


def _padded(tensor: Tensor, units: int, wanted: int, halves: int) -> Tensor:
    """The tensor padded with zeros for new units in each half of the first axis."""
    lacking = tensor.new_zeros(halves, wanted - units, *tensor.shape[1:])
    return torch.cat([tensor.unflatten(0, (halves, units)), lacking], dim=1).flatten(0, 1)


def layers_of(experts: Any, number: int) -> Layers | None:
    """The weights of an expert of a mixture; None for an expert that is not a sequence of layers."""
    if isinstance(experts, Adapters):
        units = list(experts.units_of(number))
        down_UD, up_DU = experts.down.weight.detach()[units], experts.up.detach()[:, units]
        return _layers([down_UD, up_DU], [[experts.down.bias.detach()[units]]], None)
    module = (experts.copies if hasattr(experts, "copies") else experts)[number]
    if not isinstance(module, LayerStack):
        return None
    matrices, vectors = [], []
    for layer in module:
        if isinstance(layer, nn.Linear):
            matrices.append(layer.weight.detach().clone())
            vectors.append([layer.bias.detach().clone()])
        elif isinstance(layer, nn.LayerNorm):
            vectors[-1] += [layer.weight.detach().clone(), layer.bias.detach().clone()]
    return _layers(matrices, vectors[:-1], vectors[-1][0])


def _layers(matrices: list[Tensor], vectors: list[list[Tensor]], out: Tensor | None) -> Layers:
    pairs = list(pairwise(matrices))
    halves = [len(matrix) // after.shape[1] for matrix, after in pairs]
    there = [torch.ones(after.shape[1], dtype=torch.bool, device=after.device) for _, after in pairs]
    return Layers(list(matrices), [list(group) for group in vectors], out, halves, there)


@torch.no_grad()
def write_layers(layers: Layers, experts: Any, number: int) -> None:
    """Copy the weights into an expert of a mixture with the same shape."""
    if isinstance(experts, Adapters):
        units = list(experts.units_of(number))
        experts.down.weight[units], experts.up[:, units] = layers.matrices
        experts.down.bias[units] = layers.vectors[0][0]
        return
    module = (experts.copies if hasattr(experts, "copies") else experts)[number]
    matrices = iter(layers.matrices)
    vectors = iter([*(vector for group in layers.vectors for vector in group), layers.out])
    for layer in module:
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(next(matrices))
            layer.bias.copy_(next(vectors))
        elif isinstance(layer, nn.LayerNorm):
            layer.weight.copy_(next(vectors))
            layer.bias.copy_(next(vectors))


def align(layers: Layers, reference: Layers) -> Layers:
    """The expert with its hidden units permuted to be closest to another expert of the same shape.

    Each permutation solves a linear assignment problem, given the permutations of the neighbouring layers, until none
    changes (weight matching of Ainsworth 2022, "Git Re-Basin"). For one hidden layer this is the optimal permutation.
    """
    from scipy.optimize import linear_sum_assignment  # here, because it takes a moment

    found = Layers(list(layers.matrices), [list(v) for v in layers.vectors], layers.out, layers.halves, layers.there[:])
    for _ in range(SWEEPS):
        changed = False
        for layer in range(len(found.halves)):
            similarity_UU = _similarity(reference, found, layer)
            _, order = linear_sum_assignment(similarity_UU.cpu().numpy(), maximize=True)
            order = torch.as_tensor(order, device=similarity_UU.device)
            gain = similarity_UU.gather(1, order[:, None]).sum() - similarity_UU.trace()
            if gain > 1e-6 * similarity_UU.abs().sum():
                found.reorder(layer, order)
                changed = True
        if not changed:
            break
    return found


def _similarity(a: Layers, b: Layers, layer: int) -> Tensor:
    """Inner products of the input and output weights of each unit of a with those of each unit of b, (units, units)."""
    total = a.matrices[layer + 1].double().T @ b.matrices[layer + 1].double()
    for name in ("matrices", "vectors"):
        pairs = zip(*(_columns(getattr(each, name)[layer]) for each in (a, b)), strict=True)
        for one, other in pairs:
            halves = a.halves[layer]
            for first, second in zip(one.double().chunk(halves), other.double().chunk(halves), strict=True):
                total = total + first @ second.T
    return total


def _columns(value: Tensor | list[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [vector[:, None] for vector in value]


def average(each: Sequence[Layers], shares: Sequence[float]) -> Layers:
    """The weighted mean of experts of the same shape with matched units. shares: sum to 1.

    The input weights of a unit are the mean over the experts that have it; its output weights are weighted by the
    share of those experts, so an expert without the unit adds nothing.
    """
    first = each[0]
    matrices, vectors = [], []
    for layer, halves in enumerate(first.halves):
        weights_EU = torch.stack(
            [share * member.there[layer].float() for member, share in zip(each, shares, strict=True)]
        )
        weights_EU = weights_EU / weights_EU.sum(dim=0).clamp_min(1e-30)
        rows_ER = weights_EU.repeat(1, halves)
        matrices.append(sum(w[:, None] * m.matrices[layer] for w, m in zip(rows_ER, each, strict=True)))
        vectors.append(
            [
                sum(w * m.vectors[layer][index] for w, m in zip(rows_ER, each, strict=True))
                for index in range(len(first.vectors[layer]))
            ]
        )
    # If an expert lacks a unit, its next matrix has a column of zeros there.
    matrices.append(sum(share * member.matrices[-1] for share, member in zip(shares, each, strict=True)))
    out = None if first.out is None else sum(share * m.out for share, m in zip(shares, each, strict=True))
    return Layers(matrices, vectors, out, first.halves, [torch.ones_like(there) for there in first.there])
