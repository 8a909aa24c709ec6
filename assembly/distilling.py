"""Distil one or several trained runs into a smaller model, on the images or features of the first run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from assembly.compression_steps import Plan, Work, shared_rows
from assembly.loading import OpenRun
from assembly.pipeline import build_model, build_trainer
from assembly.start import announce
from assembly.teachers import Teachers
from assembly.twin import twin_of
from common.errors import Interrupted, UserError
from common.errors import say as tell
from common.text import command, printable
from compression.distil import dense_student, sparse_student
from config.config import Config
from training.length import shorten_warmup
from training.trainer import Trainer


@dataclass(frozen=True)
class Student:
    """The student: a configuration, and its initial weights (None: random)."""

    config: Config
    weights: dict[str, Tensor] | None


def student_of(
    opened: OpenRun, config: Config, plan: Plan, out: Path, weights: dict[str, Tensor] | None = None
) -> Student:
    """The student of a plan for a run of this configuration. weights: of the previous steps, as its start.

    Raises UserError if its configuration does not fit.
    """
    splits, inputs = opened.inputs.splits, opened.inputs
    shape, classes = opened.bank.feature_shape, splits.train.num_classes
    if plan.distil == "dense":
        twin = twin_of(config, shape, classes, inputs.backbone if config.experts.place == "blocks" else None)
        config = dense_student(twin, plan.epochs, plan.sizes)
    else:
        config = sparse_student(config, plan.epochs, plan.sizes, warm=weights is not None)
    config = shorten_warmup(replace(config.alone(), run_dir=out.absolute()), len(splits.train))
    build_model(config, shape, classes, inputs.backbone)  # reports what cannot be built
    return Student(config, weights)


def check_places(places: dict[Path, str]) -> None:
    """Raise UserError for a teacher with experts in another place than the first run. places: that of each run."""
    first = next(iter(places))
    for run, place in places.items():
        if place != places[first]:
            raise UserError(f"{printable(run)} has experts.place {place}, unlike {printable(first)}")


def check_teachers(first: OpenRun, others: Sequence[OpenRun]) -> None:
    """Raise UserError for a teacher whose inputs or classes differ from those of the first run."""
    check_places({each.run.path: each.config.experts.place for each in (first, *others)})
    for other in others:
        name, one, splits = printable(other.run.path), printable(first.run.path), first.inputs.splits
        if any(other.inputs.splits[s].fingerprint() != splits[s].fingerprint() for s in ("train", "test")):
            raise UserError(
                f"{name} was trained on other images than {printable(first.run.path)}: an ensemble needs the same ones"
            )
        if first.config.experts.place == "head" and _read(other) != _read(first):
            raise UserError(
                f"{name} reads other features than {one}: behind the ViT, all runs of an ensemble need the same "
                "backbone and the same backbone.features"
            )


def _read(opened: OpenRun) -> tuple[Any, ...]:
    backbone = opened.inputs.backbone
    return backbone.fingerprint(), backbone.features, backbone.image_size, str(backbone.dtype)


def trainer_of(work: Work, student: Student, others: Sequence[OpenRun]) -> Trainer:
    """The trainer of the student, with its teachers; nothing is written. Raises as `build_trainer`."""
    opened, config = work.opened, student.config
    models = [each.model for each in (opened, *others)]
    teacher = _teachers(work, others).teach(models, config, opened.inputs.device)
    trainer = build_trainer(config, opened.inputs, bank=opened.bank, teacher=teacher)
    if student.weights is not None:
        trainer.start_from(student.weights)
    return trainer


def _teachers(work: Work, others: Sequence[OpenRun]) -> Teachers:
    plan, paths = work.plan, [str(each.run.path.absolute()) for each in (work.opened, *others)]
    return Teachers(paths, plan.temperature, plan.weight, plan.quantise)


def teach(
    work: Work, student: Student, others: Sequence[OpenRun], trainer: Trainer, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train the student in the folder of its trainer. Returns what `Trainer.fit` returns."""
    plan, opened, config, run = work.plan, work.opened, student.config, trainer.run
    _teachers(work, others).keep(run)
    announce(config, opened.inputs, trainer)
    say(f"teachers     {', '.join(printable(each.run.path) for each in (opened, *others))}")
    try:
        best = trainer.fit()
    except Interrupted:
        if run.last.exists():
            tell(f"{command('train.py', '--resume', run.path)} continues from the last checkpoint, with its teachers")
        raise
    run.teachers.unlink(missing_ok=True)  # from here on it is an ordinary run
    model = work.build(config)
    model.load_state_dict(best["model"])
    device = next(opened.model.parameters()).device
    figures = {"teachers": 1 + len(others), "epochs": best["epoch"], "temperature": plan.temperature}
    work.take(config, model.to(device).eval(), "distil", kind=plan.distil, weight=plan.weight, **figures)
    note(work, student)
    return best


def note(work: Work, student: Student) -> None:
    """Record what happened to the experts: trained further, or replaced by those of the student."""
    if student.weights is not None:
        for row in [row for row in work.experts if row["becomes"] is not None] + work.shared:
            row["done"].append("taught")
        return
    work.experts += work.shared
    for row in work.experts:
        row["done"].append("replaced by the student")
        row["becomes"] = None
    new, work.shared = work.new_rows("student"), shared_rows(student.config, "student shared")
    work.experts += new
    for row in new + work.shared:
        row["done"].append("taught")
