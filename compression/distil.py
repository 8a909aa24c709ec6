"""The configurations of students: smaller models distilled from a trained run or an ensemble."""

from dataclasses import replace
from typing import Any

from common.errors import UserError, one_line
from config.config import Config
from model.experts import EXPERTS, SIZES, ExpertsConfig


def sparse_student(config: Config, epochs: int | None, sizes: list[Any] | None, warm: bool) -> Config:
    """The training configuration of a sparse student. Raises UserError if no such student is possible.

    epochs: of the training (None: those of the run). sizes: of its experts (None: half the hidden units of each,
    including shared experts). warm: the student starts from trained weights, so its sizes stay and there is no random
    warm-up.
    """
    experts, router = config.experts, config.router
    if warm:
        return _trained_for(replace(config, router=replace(router, warmup_steps=0)), epochs)
    if sizes is None and EXPERTS[experts.kind].fixed_size:
        raise UserError(
            f"--distil sparse: experts of kind {experts.kind} have a fixed size: add --prune or --merge for a smaller "
            "student"
        )
    halves = {name: [_half(size) for size in getattr(experts, name)] for name in ("sizes", "shared", "head")}
    try:
        smaller = replace(
            experts, **halves if sizes is None else {"sizes": sizes, "head": sizes if experts.head else []}
        )
        return _trained_for(replace(config, experts=smaller), epochs)
    except ValueError as error:
        raise UserError(f"--distil sparse: {one_line(error)}") from error


def check_dense_sizes(experts: ExpertsConfig, sizes: list[Any] | None) -> None:
    """Raise UserError where the sizes of a dense student are impossible, or those of several experts.

    experts: those of the run, whose place and kind the student has.
    """
    if sizes is not None and len(sizes) != 1:
        raise UserError(f"--distil.sizes names {len(sizes)} experts: a dense student has one, such as [[256]]")
    try:
        one = ExpertsConfig(place=experts.place, kind=experts.kind, sizes=sizes or [[1]])
        EXPERTS[one.kind].check(one)
    except ValueError as error:
        raise UserError(f"--distil dense: {one_line(error)}") from error


def dense_student(twin: Config, epochs: int | None, sizes: list[Any] | None) -> Config:
    """The training configuration of a dense student. twin: that of the dense part with the cost of the mixture.

    Raises UserError as `check_dense_sizes`.
    """
    check_dense_sizes(twin.experts, sizes)
    experts = twin.experts if sizes is None else replace(twin.experts, sizes=sizes)
    # It is not a twin of the run, which would be trained like the run: it has a teacher.
    return _trained_for(replace(twin, experts=experts, dense_twin=False, twin_of=None), epochs)


def _trained_for(config: Config, epochs: int | None) -> Config:
    return config if epochs is None else replace(config, train=replace(config.train, epochs=epochs))


def _half(size: Any) -> list[int]:
    """The hidden layers of an expert with half the units, at least one."""
    return [max(1, units // 2) for units in (SIZES[size][0] if isinstance(size, str) else size)]
