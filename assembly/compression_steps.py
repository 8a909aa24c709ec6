"""The compression steps; each one works on the result of the previous one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from assembly.loading import OpenRun
from assembly.pipeline import build_model
from common.errors import UserError
from compression.merge import check_merge, choose_groups, fit, merge, similarity_of_gates
from compression.observe import HEAD
from compression.prune import check_prune, prune, prune_to_budget
from compression.quantise import (
    SPARED,
    Formats,
    Owner,
    Scales,
    calibrate,
    choose_scales,
    output_errors,
    owners_of,
    quantise,
    rounded,
)
from config.config import Config
from evaluation.validation import Validated, validate
from model.moe_vit import AnyMoE

AUTO = "auto"
CALIBRATIONS = ("equal", "as_they_come", "none")
IMAGES = 4096  # limit of training images that are used
ERROR_IMAGES = 512  # validation images for the error of each expert
BATCH = 64  # images per batch


@dataclass(frozen=True)
class Plan:
    """The steps to carry out, in this order.

    prune: experts, or AUTO. merge: the number of experts to merge to. distil: the kind of student, dense or sparse;
    epochs: of its training (None: those of the run); sizes: of its experts (None: half the units, or equal FLOPs);
    temperature and weight: of the distillation loss. quantise: a number format; protect: experts that stay in 16 bits,
    or AUTO; calibrate: one of CALIBRATIONS; rows: number of rows for the calibration of an expert. budget: points of
    validation macro-F1 that all AUTO steps together may lose. seconds: duration of each latency measurement.
    worth_images: as in `evaluate`.
    """

    prune: list[int] | str | None = None
    merge: int | None = None
    distil: str | None = None
    epochs: int | None = None
    sizes: list[Any] | None = None
    temperature: float = 2.0
    weight: float = 0.7
    quantise: str | None = None
    protect: list[int] | str = field(default_factory=list)
    calibrate: str = "equal"
    rows: int = 1024
    budget: float = 0.3
    seconds: float = 0.5
    worth_images: int | None = None


@dataclass
class Work:
    """The state of a compression: current configuration and model, their score, and the steps so far.

    whole, validated: validation scores of the original model and of the current one. experts, shared: what was done to
    each routed expert, and to the shared experts of the current model. spent: points of the budget that automatic steps
    have lost.
    """

    opened: OpenRun
    plan: Plan
    config: Config
    model: AnyMoE
    whole: Validated
    validated: Validated
    experts: list[dict[str, Any]]
    shared: list[dict[str, Any]]
    steps: list[dict[str, Any]] = field(default_factory=list)
    spent: float = 0.0

    @classmethod
    def begin(cls, opened: OpenRun, plan: Plan) -> "Work":
        """The state before the first step, with the validation score of the original model."""
        config, model = ungrown(opened.config), opened.model.eval()
        if config is not opened.config:
            model = as_one(opened, config)
        whole = validate(model, opened.bank)
        work = cls(opened, plan, config, model, whole, whole, [], shared_rows(config, "shared"))
        work.experts = work.new_rows()
        return work

    def build(self, config: Config) -> AnyMoE:
        """The model of a configuration, with new weights, on the CPU."""
        return _build(self.opened, config)

    def score(self, model: AnyMoE) -> float:
        """Validation macro-F1."""
        return validate(model, self.opened.bank).scores["macro_f1"]

    @property
    def least(self) -> float:
        """The lowest validation macro-F1 that the next automatic step may reach."""
        return self.validated.scores["macro_f1"] - max(0.0, self.plan.budget - self.spent) / 100

    def training(self) -> Iterator[torch.Tensor]:
        """Batches of training images or features, in the view of the first epoch and in a fixed random order."""
        count = len(self.opened.inputs.splits.train)
        order_N = torch.randperm(count, generator=torch.Generator().manual_seed(self.config.train.seed))[:IMAGES]
        return (inputs for inputs, _ in self.opened.bank.batches("train", BATCH, order_N, view=0))

    def validation(self) -> Iterator[torch.Tensor]:
        """Batches of some of the validation images or their features."""
        order_N = torch.arange(min(ERROR_IMAGES, len(self.opened.inputs.splits.validation)))
        return (inputs for inputs, _ in self.opened.bank.batches("validation", BATCH, order_N))

    def new_rows(self, name: str = "") -> list[dict[str, Any]]:
        """A row for each expert of the current model, with its load, to which nothing has been done."""
        load_E = self.validated.load_LE.mean(axis=0).tolist()
        return [
            {"expert": f"{name} {label}".lstrip(), "load": load, "done": [], "becomes": index}
            for index, (label, load) in enumerate(zip(self.config.experts.labels(), load_E, strict=True))
        ]

    def take(self, config: Config, model: AnyMoE, step: str, **values: Any) -> None:
        """Adopt the result of a step, and record the step with its score."""
        self.config, self.model, self.validated = config, model, validate(model, self.opened.bank)
        self.steps.append({"step": step, **values, "macro_f1_validation": self.validated.scores["macro_f1"]})


def shared_rows(config: Config, name: str) -> list[dict[str, Any]]:
    """A row for each shared expert, to which nothing has been done."""
    labels = config.experts.shared_labels()
    return [{"expert": f"{name} {units}", "load": None, "done": [], "becomes": None} for units in labels]


def _build(opened: OpenRun, config: Config) -> AnyMoE:
    inputs = opened.inputs
    return build_model(config, opened.bank.feature_shape, inputs.splits.test.num_classes, inputs.backbone)


def ungrown(config: Config) -> Config:
    """The configuration in which experts that were added later are ordinary experts."""
    if not config.experts.grown:
        return config
    return replace(config, experts=replace(config.experts, grown=[], add=[]))


def as_one(opened: OpenRun, config: Config) -> AnyMoE:
    """The run's model, with experts that were added at different times computed together.

    Raises UserError if the gate is still opening to the newest experts.
    """
    state, model = opened.model.state_dict(), _build(opened, config)
    if any(value.any() for name, value in state.items() if name.endswith(".margin_E")):
        raise UserError("the gate is still opening to the added experts: train the run further, then compress it")
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.to(next(opened.model.parameters()).device).eval()


def check_protect(plan: Plan, left: int) -> None:
    """Raise UserError if the plan protects an expert that does not remain. left: the number of experts that do."""
    for expert in plan.protect if isinstance(plan.protect, list) else ():
        if expert >= left:
            raise UserError(f"--quantise.protect names expert {expert}: only experts 0 to {left - 1} remain")


def _prune(work: Work, say: Callable[[str], None]) -> None:
    asked, before = work.plan.prune, work.validated.scores["macro_f1"]
    if isinstance(asked, list):
        kept = check_prune(work.config, asked)
    else:
        kept, removals = prune_to_budget(work.config, work.model, work.build, work.score, work.least)
        for removal in removals:
            names = ", ".join(work.experts[expert]["expert"] for expert in removal.experts)
            say(f"prune        without {names}: macro-F1 {100 * removal.macro_f1:.2f} %")
        if not removals:
            say(f"prune        removing any expert costs more than {work.plan.budget:g} points, or top-k needs it")
    gone = [expert for expert in range(len(work.experts)) if expert not in kept]
    check_protect(work.plan, min(len(kept), work.plan.merge or len(kept)))
    work.take(*prune(work.config, work.model, kept, work.build), "prune", removed=gone)
    if asked == AUTO:
        work.spent += max(0.0, 100 * (before - work.validated.scores["macro_f1"]))
    for expert, row in enumerate(work.experts):
        row["becomes"] = kept.index(expert) if expert in kept else None
        row["done"] += ["removed"] if expert in gone else []


def _merge(work: Work, say: Callable[[str], None]) -> None:
    number, left = int(work.plan.merge or 0), len(work.config.experts.sizes)
    if work.plan.prune == AUTO and left <= number:
        say(f"merge        --prune {AUTO} left {left} experts: nothing to merge")
        return
    check_merge(work.config, number)
    names = {row["becomes"]: row["expert"] for row in work.experts}  # those of the original run
    groups = choose_groups(work.config, work.model, similarity_of_gates(work.model, work.training()), number)
    config, smaller = merge(work.config, work.model, groups, work.build)
    averaged = work.score(smaller)
    fit(work.model, smaller, groups, work.training())
    work.take(config, smaller, "merge", groups=groups, macro_f1_before_fit=averaged)
    fitted = work.validated.scores["macro_f1"]
    say(f"merge        averaged: macro-F1 {100 * averaged:.2f} %; fitted: {100 * fitted:.2f} %")
    same = all(groups[0] == each for each in groups)
    for row in (row for row in work.experts if row["becomes"] is not None):
        into = next(index for index, members in enumerate(groups[0]) if row["becomes"] in members)
        others = [names[member] for member in groups[0][into] if member != row["becomes"]]
        if not same or others:
            row["done"].append(f"merged with {', '.join(others)}" if same else "merged, in each block with others")
        row["becomes"] = into if same else None
    work.experts += [] if same else work.new_rows("merged")


@dataclass(frozen=True)
class _Tried:
    """Scales, their score with everything quantised, and the error of each owner."""

    scales: Scales
    macro_f1: float
    errors: dict[int, float | None]
    fewest_rows: int | None

    def to_dict(self) -> dict[str, Any]:
        """For compression.json."""
        values = {"macro_f1_validation": self.macro_f1, "fewest_rows": self.fewest_rows}
        return values | {"errors": list(self.errors.values())}


def _quantise(work: Work, say: Callable[[str], None]) -> None:
    number_format, model, before = str(work.plan.quantise), work.model, work.validated.scores["macro_f1"]
    owners = owners_of(model)
    tried = {}
    for calibration in CALIBRATIONS:
        tried[calibration] = _try_calibration(work, owners, number_format, calibration)
        errors = [error for error in tried[calibration].errors.values() if error is not None]
        mean = f"mean error {100 * sum(errors) / len(errors):.2f} %"
        say(f"quantise     calibrated {calibration}: macro-F1 {100 * tried[calibration].macro_f1:.2f} %, {mean}")
    chosen = tried[work.plan.calibrate]
    alone = [work.score(rounded(model, owners, {owner.number: number_format}, chosen.scales)) for owner in owners]
    lost = {owner.number: 100 * (before - score) for owner, score in zip(owners, alone, strict=True)}
    formats = _formats(work, owners, number_format, chosen, lost)
    smaller = quantise(work.config, model, owners, formats, chosen.scales, work.build)
    work.take(
        *smaller,
        "quantise",
        format=number_format,
        calibrations={name: t.to_dict() for name, t in tried.items()},
    )
    _note_formats(work, formats, chosen.errors, lost)


def _try_calibration(work: Work, owners: list[Owner], number_format: str, calibration: str) -> _Tried:
    model = work.model
    found = (
        None
        if calibration == "none"
        else calibrate(model, owners, work.training(), work.plan.rows, calibration == "equal")
    )
    scales = choose_scales(model, owners, number_format, found)
    changed = rounded(model, owners, {owner.number: number_format for owner in owners}, scales)
    fewest = found and min(found.rows[place, owner.number] for owner in owners for place in owner.parts)
    return _Tried(scales, work.score(changed), output_errors(model, changed, owners, work.validation()), fewest)


def _formats(
    work: Work, owners: list[Owner], number_format: str, chosen: _Tried, lost: dict[int, float]
) -> dict[int, str]:
    """The format of each owner. The named or the most sensitive ones stay in 16 bits, as few as the budget needs."""
    formats = {owner.number: number_format for owner in owners}
    if isinstance(work.plan.protect, list):
        return formats | dict.fromkeys(work.plan.protect, SPARED)
    for number in sorted(formats, key=lambda number: (-lost[number], -(chosen.errors[number] or 0.0))):
        if work.score(rounded(work.model, owners, formats, chosen.scales)) >= work.least:
            break
        formats[number] = SPARED
    return formats


def _note_formats(work: Work, formats: Formats, errors: dict[int, float | None], lost: dict[int, float]) -> None:
    """Record what was done to each expert, to the shared experts and to the linear head."""
    rows = {row["becomes"]: row for row in work.experts if row["becomes"] is not None}
    rows |= dict(enumerate(work.shared, start=len(work.config.experts.sizes)))
    if HEAD in formats:
        rows[HEAD] = {"expert": "linear head", "load": None, "done": [], "becomes": None}
        work.shared.append(rows[HEAD])
    for number, row in rows.items():
        row["done"].append(formats[number])
        row.update(error=errors[number], points_lost=lost[number])


STEPS: dict[str, Callable[[Work, Callable[[str], None]], None]] = {
    "prune": _prune,
    "merge": _merge,
    "quantise": _quantise,
}
"""The steps that a plan can contain, by the names of its fields, in the order in which they run."""
