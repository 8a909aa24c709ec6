"""From a trained run to a smaller one: what compress.py asks for, step by step, into a run folder of its own."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from assembly.loading import OpenRun
from assembly.pipeline import build_model, build_trainer
from assembly.start import start_tracking
from common.files import write_json
from compression.prune import check_prune, prune, prune_to_budget
from config.config import Config, write_config
from evaluation.cost import cost, expert_costs, parameters, trained_cost
from evaluation.evaluation import evaluate
from evaluation.latency import latency
from evaluation.validation import Validated, validate
from model.moe_vit import AnyMoE
from storage.export import export_model
from storage.folder import RunFolder

AUTO = "auto"


@dataclass(frozen=True)
class Plan:
    """What is to be done, in this order. prune: experts, or AUTO. budget: points of validation macro-F1."""

    prune: list[int] | str | None = None
    budget: float = 0.3
    seconds: float = 0.5  # for each measurement of latency


@dataclass
class Work:
    """A run on its way to a smaller one: configuration and model so far, their score, and what has been done.

    whole, validated: what the run's own model scores on the validation images, and the one so far.
    """

    opened: OpenRun
    plan: Plan
    config: Config
    model: AnyMoE
    whole: Validated
    validated: Validated
    experts: list[dict[str, Any]]
    steps: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, opened: OpenRun, plan: Plan) -> "Work":
        """Nothing is done yet but to score the whole model on the validation images."""
        model = opened.model.eval()
        whole = validate(model, opened.bank)
        load_E = whole.load_LE.mean(axis=0).tolist()
        labels = opened.config.experts.labels()
        experts = [
            {"expert": label, "load": load, "done": [], "becomes": index}
            for index, (label, load) in enumerate(zip(labels, load_E, strict=True))
        ]
        return cls(opened, plan, opened.config, model, whole, whole, experts)

    def build(self, config: Config) -> AnyMoE:
        """The model of a configuration, with new weights, on the CPU."""
        inputs = self.opened.inputs
        return build_model(config, self.opened.bank.feature_shape, inputs.splits.test.num_classes, inputs.backbone)

    def score(self, model: AnyMoE) -> float:
        """Validation macro-F1."""
        return validate(model, self.opened.bank).scores["macro_f1"]

    @property
    def least(self) -> float:
        """The validation macro-F1 down to which what is automatic may go."""
        return self.whole.scores["macro_f1"] - self.plan.budget / 100

    def take(self, config: Config, model: AnyMoE, step: str, **values: Any) -> None:
        """Go on with what a step has made; remember the step, with the score after it."""
        self.config, self.model, self.validated = config, model, validate(model, self.opened.bank)
        self.steps.append({"step": step, **values, "macro_f1_validation": self.validated.scores["macro_f1"]})


def check_plan(config: Config, plan: Plan) -> None:
    """Raise UserError for what cannot be done to a run of this configuration; reads no data."""
    if isinstance(plan.prune, list):
        check_prune(config, plan.prune)


def compress(opened: OpenRun, plan: Plan, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Carry out the plan and write the smaller run to `out`, scored on its test set. Returns its compression.json.

    Raises UserError where the plan does not fit the run, before anything is written.
    """
    check_plan(opened.config, plan)
    work = Work.begin(opened, plan)
    say(f"validation   macro-F1 {100 * work.whole.scores['macro_f1']:.2f} % of {opened.run.path}")
    before = figures(work, opened.run) | {"macro_f1_test": scored(opened.run)}
    if plan.prune is not None:
        _prune(work, say)
    config = replace(work.config, run_dir=out.absolute())
    with ExitStack() as stack:
        run = RunFolder.create(out, out.name)
        stack.enter_context(run.claimed())
        tracker = stack.enter_context(start_tracking(config, run, None))
        write_config(config, run.config)
        trainer = build_trainer(config, opened.inputs, run, tracker, bank=opened.bank)
        best = trainer.adopt(work.model.state_dict(), work.validated)
        export_model(run, best)
        after = figures(work, run) | {"macro_f1_test": None}
        found = {"from": [str(opened.run.path.absolute())], "steps": work.steps, "experts": work.experts}
        write_json(run.compression, found | {"budget": plan.budget, "before": before, "after": after})
        tracker.model(run.weights, name=run.path.name)
        return evaluate(run, config, trainer.model, opened.bank, tracker, opened.inputs.backbone)


def _prune(work: Work, say: Callable[[str], None]) -> None:
    asked = work.plan.prune
    if isinstance(asked, list):
        kept = check_prune(work.config, asked)
    else:
        kept, removals = prune_to_budget(work.config, work.model, work.build, work.score, work.least)
        for removal in removals:
            names = ", ".join(work.experts[expert]["expert"] for expert in removal.experts)
            say(f"prune        without {names}: macro-F1 {100 * removal.macro_f1:.2f} %")
        if not removals:
            say(f"prune        every expert is missed by more than {work.plan.budget:g} points, or needed for top-k")
    gone = [expert for expert in range(len(work.experts)) if expert not in kept]
    work.take(*prune(work.config, work.model, kept, work.build), "prune", removed=gone)
    for expert, row in enumerate(work.experts):
        row["becomes"] = kept.index(expert) if expert in kept else None
        row["done"] += ["removed"] if expert in gone else []


def scored(run: RunFolder) -> float | None:
    """The macro-F1 on the test set that the run was scored with; None where it was not, or has gone on since."""
    return json.loads(run.results.read_text(encoding="utf-8")).get("macro_f1") if run.scored else None


def figures(work: Work, run: RunFolder) -> dict[str, Any]:
    """What evaluation.compression.FIGURES names of the model so far, which `run` has, but the score on the test set."""
    model, bank, backbone = work.model, work.opened.bank, work.opened.inputs.backbone
    active = trained_cost(model, bank.feature_shape, work.validated.load_LE.mean(axis=0))
    whole = cost(model, backbone, bank.feature_shape)
    images = work.opened.bank.splits.validation.images_NCHW
    batches = {count: images[torch.arange(count) % len(images)].to(bank.device) for count in (1, 256)}
    return {
        "file_bytes": run.weights.stat().st_size,
        "memory_bytes": memory(model),
        "expert_bytes": sum(row.bytes for row in expert_costs(model)),
        "total_parameters": whole.total_parameters,
        "trained_parameters": parameters(model),
        "active_parameters": active.active_parameters,
        "flops": whole.backbone_flops + active.flops,
        **{f"latency_{n}": latency(model, backbone, batch, work.plan.seconds) for n, batch in batches.items()},
        "macro_f1_validation": work.validated.scores["macro_f1"],
    }


def memory(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that are saved."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())
