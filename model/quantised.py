"""Matrices stored in fewer bits, and multiplied in the number format of their inputs.

| format | a number of the matrix | for each row, an output channel |
|---|---|---|
| float32, float16 | itself | |
| int8 | round(w / scale), -127 to 127, in a byte | scale, float32 |
| fp8 | w / scale as float8 e4m3, -448 to 448, in a byte | scale, float32 |

They have no gradient: further training changes only the other parameters.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Format = Literal["float32", "float16", "int8", "fp8"]
FORMATS: tuple[str, ...] = get_args(Format)
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest number of a format with scales."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of one expert, or of several concatenated experts.

    module, name: the module and its parameter. experts: the expert of each part. sizes: of the parts along axis `dim`.
    """

    module: nn.Module
    name: str
    experts: tuple[int, ...]
    sizes: tuple[int, ...]
    dim: int = 0


def linear_matrices(module: nn.Module, expert: int) -> list[Matrix]:
    """The matrices of the linear layers in a module that is one expert."""
    linears = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return [Matrix(layer, "weight", (expert,), (layer.out_features,)) for layer in linears]


class Stored(nn.Module):
    """A parametrization (torch.nn.utils.parametrize): a matrix from its parts along axis `dim`, each in its format.

    table: `fp8_numbers`, for an exporter that cannot reinterpret bytes as float8.
    """

    table: Tensor | None = None

    def __init__(self, formats: Sequence[str], sizes: Sequence[int], dim: int):
        super().__init__()
        self.formats, self.sizes, self.dim = tuple(formats), list(sizes), dim

    def forward(self, *stored: Tensor) -> Tensor:
        """The matrix, float32."""
        parts = [unpack(tensors, number_format, self.table) for number_format, tensors in self.parts(stored)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)

    def right_inverse(self, weight: Tensor, scales: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """The stored tensors of a matrix. scales: of each part (None: the scales at which the rows just fit)."""
        scales = scales or [None] * len(self.sizes)
        pieces = zip(weight.split(self.sizes, dim=self.dim), self.formats, scales, strict=True)
        return [tensor for piece in pieces for tensor in pack(*piece)]

    def parts(self, stored: Sequence[Tensor]) -> list[tuple[str, list[Tensor]]]:
        """(format, tensors) of each part."""
        waiting = list(stored)
        return [(f, [waiting.pop(0) for _ in range(2 if f in LARGEST else 1)]) for f in self.formats]


def widest_scales(weight_OI: Tensor, number_format: str) -> Tensor:
    """The scale (O, 1) of each row with which its largest number is the largest of the format; 1 for a row of zeros."""
    scales_O1 = weight_OI.abs().amax(dim=1, keepdim=True).float() / LARGEST[number_format]
    return torch.where(scales_O1 > 0, scales_O1, 1.0)


def pack(weight_OI: Tensor, number_format: str, scales_O1: Tensor | None = None) -> list[Tensor]:
    """The stored tensors of a matrix: the matrix in a floating-point format, or bytes and scales."""
    if number_format not in LARGEST:
        return [weight_OI.to(getattr(torch, number_format)).contiguous()]
    scales_O1 = widest_scales(weight_OI, number_format) if scales_O1 is None else scales_O1
    largest = LARGEST[number_format]
    scaled_OI = (weight_OI.float() / scales_O1).clamp(-largest, largest)
    if number_format == "int8":
        return [scaled_OI.round().to(torch.int8).contiguous(), scales_O1]
    # As bytes, because moving averages, copies and files support these everywhere, but not float8.
    return [scaled_OI.to(torch.float8_e4m3fn).contiguous().view(torch.uint8), scales_O1]


def fp8_numbers() -> Tensor:
    """The number that each byte represents in fp8, float32 (256,)."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def unpack(stored: Sequence[Tensor], number_format: str, table: Tensor | None = None) -> Tensor:
    """The matrix that `pack` stored, float32. table: `fp8_numbers`, to look the bytes up in it."""
    if number_format not in LARGEST:
        return stored[0].float()
    if number_format == "int8":
        return stored[0].float() * stored[1]
    numbers = stored[0].view(torch.float8_e4m3fn).float() if table is None else table[stored[0].long()]
    return numbers * stored[1]


def store(matrices: Iterable[Matrix], formats: Sequence[str]) -> None:
    """Store matrices in the formats of their experts; matrices with only float32 stay unchanged."""
    for matrix in matrices:
        each = [formats[expert] for expert in matrix.experts]
        if set(each) != {"float32"}:
            getattr(matrix.module, matrix.name).requires_grad_(False)
            parametrize.register_parametrization(
                matrix.module, matrix.name, Stored(each, matrix.sizes, matrix.dim), unsafe=True
            )


def stored_in(module: nn.Module, name: str) -> tuple[Stored, list[nn.Parameter]] | None:
    """How a parameter is stored, and its tensors; None if it is an ordinary parameter."""
    if not parametrize.is_parametrized(module, name):
        return None
    held: Any = cast(Any, module).parametrizations[name]
    return held[0], [getattr(held, f"original{index}") for index in range(held.ntensors)]


@torch.no_grad()
def fill(module: nn.Module, name: str, weight: Tensor, scales: Sequence[Tensor | None] | None = None) -> None:
    """Replace a stored matrix. scales: of each part (None: the scales at which the rows just fit)."""
    found = stored_in(module, name)
    assert found is not None
    for place, value in zip(found[1], found[0].right_inverse(weight, scales), strict=True):
        place.copy_(value)


def part_bytes(matrix: Matrix, expert: int) -> int:
    """Bytes of one expert's part of a matrix."""
    found = stored_in(matrix.module, matrix.name)
    if found is None:
        weight = getattr(matrix.module, matrix.name)
        others = weight.shape[1 - matrix.dim]
        return sum(
            size * others * weight.element_size()
            for owner, size in zip(matrix.experts, matrix.sizes, strict=True)
            if owner == expert
        )
    each = zip(matrix.experts, found[0].parts(found[1]), strict=True)
    return sum(t.numel() * t.element_size() for owner, (_, tensors) in each if owner == expert for t in tensors)


def part_numbers(matrix: Matrix, expert: int) -> int:
    """Number of elements of one expert's part of a matrix, without scales."""
    others = getattr(matrix.module, matrix.name).shape[1 - matrix.dim]
    return sum(size * others for owner, size in zip(matrix.experts, matrix.sizes, strict=True) if owner == expert)


def num_parameters(module: nn.Module) -> int:
    """Number of parameters of a module; for stored matrices, their elements without scales."""
    scales = 0
    for part in module.modules():
        for name in getattr(part, "parametrizations", ()):
            if found := stored_in(part, name):
                scales += sum(t.numel() for _, tensors in found[0].parts(found[1]) for t in tensors[1:])
    return sum(parameter.numel() for parameter in module.parameters()) - scales
