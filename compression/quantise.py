"""Store the matrices of experts in fewer bits: choose scales, measure errors, and find the sensitive experts."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common.errors import UserError, one_line
from compression.observe import HEAD, Observation, inputs_of, matrices_of, members, observe, output_of
from compression.state import Build
from config.config import Config
from model.moe_vit import AnyMoE
from model.quantised import LARGEST, fill, pack, stored_in, unpack, widest_scales

RATIOS = [1 - step / 40 for step in range(25)]  # candidate scales relative to the widest one, down to 0.4
SPARED = "float16"  # the number format of protected experts


@dataclass(frozen=True)
class Part:
    """The matrix of one expert: its module, and its part along an axis of the module's weight."""

    path: str
    name: str
    position: int
    sizes: tuple[int, ...]
    dim: int

    def weight(self, model: AnyMoE) -> Tensor:
        """The matrix (O, I), a view of the parameter."""
        whole = getattr(model.get_submodule(self.path), self.name)
        return whole.split(list(self.sizes), dim=self.dim)[self.position]


@dataclass(frozen=True)
class Owner:
    """A unit of quantisation: an expert at all places, a shared expert, or the linear head.

    number: routed experts first, then shared ones, or HEAD. parts: its matrices at each place.
    """

    number: int
    parts: dict[int, list[Part]]


Scales = dict[Part, Tensor]
Formats = Mapping[int, str]
"""The number format of each owner, by its number; float32 if an owner is missing."""


def check_format(number_format: str, device: torch.device) -> None:
    """Raise UserError if a device cannot convert a number format."""
    try:
        unpack(pack(torch.ones(1, 1, device=device), number_format), number_format)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = one_line(error, 80)
        other = "--device cpu" if number_format == "int8" else "int8"
        raise UserError(f"--quantise {number_format} does not work on {device} ({reason}): use {other}") from error


def owners_of(model: AnyMoE) -> list[Owner]:
    """All units of quantisation, the linear head last. Raises UserError for an unsuitable kind of expert."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[int, dict[int, list[Part]]] = defaultdict(dict)
    try:
        for place, number in members(model):
            found[number][place] = [
                Part(paths[id(m.module)], m.name, m.experts.index(number), m.sizes, m.dim)
                for m in matrices_of(model, place, number)
            ]
    except ValueError as error:
        raise UserError(f"this run cannot be quantised: {one_line(error)}") from error
    return [Owner(number, found[number]) for number in sorted(found, key=lambda number: (number == HEAD, number))]


@dataclass
class Calibration:
    """Sums of squares (I,) of the inputs of each matrix, and the rows of each expert, by place and number."""

    squares: dict[Part, Tensor] = field(default_factory=dict)
    rows: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, model: AnyMoE, owner: Owner, place: int, rows_ND: Tensor) -> None:
        """Add rows that an expert read at a place.

        Raises UserError for an expert whose inputs cannot be observed.
        """
        if not len(rows_ND):
            return
        self.rows[place, owner.number] += len(rows_ND)
        try:
            read = inputs_of(model, place, owner.number, rows_ND)
        except ValueError as error:
            raise UserError(f"this run cannot be quantised: {one_line(error)}") from error
        for part, read_NI in zip(owner.parts[place], read, strict=True):
            squares_I = read_NI.double().square().sum(dim=0)
            self.squares[part] = self.squares[part] + squares_I if part in self.squares else squares_I


@torch.no_grad()
def calibrate(model: AnyMoE, owners: list[Owner], batches: Iterable[Tensor], rows: int, equal: bool) -> Calibration:
    """The inputs of the experts for some batches.

    equal: `rows` rows per expert and place, if there are that many. Otherwise the same total number of rows,
    distributed as the gate sends them.
    """
    found = Calibration()
    for inputs in batches:
        full = True
        for place, seen in observe(model, inputs).items():
            here = {owner.number: (owner, rows_of(seen, owner.number)) for owner in owners if place in owner.parts}
            taken = {number: found.rows[place, number] for number in here}
            left, come = rows * len(here) - sum(taken.values()), sum(len(read_ND) for _, read_ND in here.values())
            for number, (owner, read_ND) in here.items():
                most = rows - taken[number] if equal else round(len(read_ND) * min(1.0, left / max(1, come)))
                found.add(model, owner, place, read_ND[: max(0, most)])
            full &= min(found.rows[place, number] for number in here) >= rows if equal else left <= come
        if full:
            break
    return found


def rows_of(seen: Observation | Tensor, number: int) -> Tensor:
    """The input rows of an expert, or of the head: (N, D)."""
    return seen.rows_of(number) if isinstance(seen, Observation) else seen


@torch.no_grad()
def best_scales(weight_OI: Tensor, number_format: str, squares_I: Tensor | None) -> Tensor:
    """The scale (O, 1) of each row with the smallest error, among 0.4 to 1 times the widest scale.

    squares_I: sums of squares of the inputs, which weight the squared errors of the columns. This is the expected
    squared error of an output if the inputs are uncorrelated (None: the widest scale, which clips nothing).
    """
    widest_O1 = widest_scales(weight_OI, number_format)
    if squares_I is None or not squares_I.any():
        return widest_O1
    best_O1, least_O1 = widest_O1.clone(), torch.full_like(widest_O1, torch.inf)
    weights_I = (squares_I / squares_I.sum()).to(weight_OI.dtype)
    for ratio in RATIOS:
        scales_O1 = widest_O1 * ratio
        error_OI = unpack(pack(weight_OI, number_format, scales_O1), number_format) - weight_OI
        error_O1 = (error_OI.square() @ weights_I)[:, None]
        best_O1 = torch.where(error_O1 < least_O1, scales_O1, best_O1)
        least_O1 = torch.minimum(error_O1, least_O1)
    return best_O1


def choose_scales(
    model: AnyMoE, owners: list[Owner], number_format: str, calibration: Calibration | None = None
) -> Scales:
    """The scales of every matrix, from a calibration (None: the widest, which clip nothing)."""
    squares = calibration.squares if calibration else {}
    return {
        part: best_scales(part.weight(model), number_format, squares.get(part))
        for owner in owners
        for parts in owner.parts.values()
        for part in parts
    }


@torch.no_grad()
def rounded(model: AnyMoE, owners: list[Owner], formats: Formats, scales: Scales) -> AnyMoE:
    """A float32 copy of the model with the rounded numbers of the formats: it gives the same outputs."""
    found = copy.deepcopy(model)
    for owner in owners:
        number_format = formats.get(owner.number, "float32")
        for part in (part for parts in owner.parts.values() for part in parts):
            weight_OI = part.weight(found)
            own = scales[part] if number_format in LARGEST else None
            weight_OI.copy_(unpack(pack(weight_OI, number_format, own), number_format))
    return found


@torch.no_grad()
def output_errors(
    model: AnyMoE, changed: AnyMoE, owners: list[Owner], batches: Iterable[Tensor]
) -> dict[int, float | None]:
    """The relative error of each owner's outputs: root mean square error over root mean square output, on its rows.

    None if an owner gets no rows.
    """
    sums = {owner.number: [0.0, 0.0] for owner in owners}
    for inputs in batches:
        seen = observe(model, inputs)
        for owner in owners:
            for place in owner.parts:
                rows_ND = rows_of(seen[place], owner.number)
                before_NC, after_NC = (output_of(each, place, owner.number, rows_ND) for each in (model, changed))
                sums[owner.number][0] += float((after_NC - before_NC).double().square().sum())
                sums[owner.number][1] += float(before_NC.double().square().sum())
    return {number: (off / size) ** 0.5 if size else None for number, (off, size) in sums.items()}


def quantised_config(config: Config, formats: Formats) -> Config:
    """The configuration of the run with its experts in these formats."""
    experts = config.experts
    each = [formats.get(number, "float32") for number in range(len(experts.sizes) + len(experts.shared))]
    weights = each[0] if len(set(each)) == 1 else each
    head = formats.get(HEAD, "float32")
    return replace(config, experts=replace(experts, weights=weights, head_weights=head))


@torch.no_grad()
def quantise(
    config: Config, model: AnyMoE, owners: list[Owner], formats: Formats, scales: Scales, build: Build
) -> tuple[Config, AnyMoE]:
    """The model with its experts stored in these formats, in evaluation mode on the same device."""
    small_config = quantised_config(config, formats)
    small, state = build(small_config), model.state_dict()
    kept = {name: state[name] for name in small.state_dict() if name in state}
    small.load_state_dict(kept, strict=False)
    by_matrix: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    for part, scales_O1 in scales.items():
        by_matrix[part.path, part.name][part.position] = scales_O1
    for (path, name), own in by_matrix.items():
        module = small.get_submodule(path)
        found = stored_in(module, name)
        if found is not None:
            each = [own[position].cpu() if f in LARGEST else None for position, f in enumerate(found[0].formats)]
            fill(module, name, state[f"{path}.{name}" if path else name].cpu(), each)
    return small_config, small.to(next(model.parameters()).device).eval()
