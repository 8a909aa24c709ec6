"""Compression of a trained run: the steps that compress.py asks for, written to a new run folder."""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from assembly.compression_steps import STEPS, Plan, Work, check_protect, ungrown
from assembly.distilling import check_places, check_teachers, student_of, teach, trainer_of
from assembly.loading import OpenRun, configure, open_run
from assembly.pipeline import build_trainer, pick_device
from assembly.start import export_best, start_tracking
from common.errors import UserError
from common.files import write_json
from compression.distil import check_dense_sizes, sparse_student
from compression.merge import check_merge
from compression.prune import check_prune
from compression.quantise import check_format, owners_of
from config.config import Config, write_config
from config.parallel import ParallelConfig
from evaluation.cost import cost, expert_costs, parameters, trained_cost
from evaluation.evaluation import evaluate
from evaluation.latency import latency
from model.moe_vit import MoEViT
from storage.described import describe
from storage.folder import RunFolder
from tracking.tracker import require_server


def open_runs(options: argparse.Namespace, plan: Plan) -> list[OpenRun]:
    """Open the runs that the options of compress.py name, once the first of them is known to fit the plan.

    Raises UserError and EnvironmentFault as `check_plan` and `open_run`.
    """
    described = [describe(RunFolder(path))["config"] for path in options.runs]
    configs = [configure(values, options.device, options.root, options.weights) for values in described]
    check_plan(configs[0], plan)
    check_places({run: config.experts.place for run, config in zip(options.runs, configs, strict=True)})
    tracking = options.tracking or configs[0].tracking
    require_server(tracking)
    places = (options.device, options.root, options.weights, options.cache_dir)
    opened = [open_run(path, *places) for path in options.runs]
    opened[0].config.tracking = tracking
    return opened


def check_plan(config: Config, plan: Plan) -> None:
    """Raise UserError for steps that are impossible for a run of this configuration; reads no data."""
    config = ungrown(config)
    if config.experts.quantised:
        raise UserError("the run is already quantised: compress the run that it was made from")
    left = len(check_prune(config, plan.prune)) if isinstance(plan.prune, list) else len(config.experts.sizes)
    if plan.merge is not None:
        check_merge(config, plan.merge, left)
        left = plan.merge
    if plan.distil == "dense" and (plan.prune is not None or plan.merge is not None):
        raise UserError("--distil dense replaces all experts by one part: leave out --prune and --merge")
    if plan.distil is not None and plan.sizes is not None and (plan.prune is not None or plan.merge is not None):
        raise UserError("--distil.sizes are for a new student: leave them out, or leave out --prune and --merge")
    if plan.distil == "dense":
        check_dense_sizes(config.experts, plan.sizes)
    elif plan.distil == "sparse" and plan.prune is None and plan.merge is None:
        sparse_student(config, plan.epochs, plan.sizes, warm=False)
    if plan.distil == "dense" or plan.sizes is not None:
        left = len(plan.sizes or [[]])
    check_protect(plan, left)
    if plan.quantise is not None:
        check_format(plan.quantise, pick_device(config.device))


def compress(
    opened: OpenRun,
    plan: Plan,
    out: Path,
    others: Sequence[OpenRun] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Carry out the plan and write the smaller run to `out`, scored on its test set. Returns its metrics.json.

    others: further teachers for the student, if the plan has one. Raises UserError if the plan does not fit the run,
    before anything is written.
    """
    check_plan(opened.config, plan)
    check_teachers(opened, others)
    if plan.quantise is not None:
        owners_of(opened.model)  # a kind of experts without matrices
    warm = plan.distil == "sparse" and (plan.prune is not None or plan.merge is not None)
    student = None if plan.distil is None or warm else student_of(opened, ungrown(opened.config), plan, out)
    work = Work.begin(opened, plan)
    say(f"validation   macro-F1 {100 * work.whole.scores['macro_f1']:.2f} % of {opened.run.path}")
    before = figures(work, opened.run) | {"macro_f1_test": scored(opened.run)}
    before_taught = [name for name in STEPS if plan.distil is None or name != "quantise"]
    for name in before_taught:
        if getattr(plan, name) is not None:
            STEPS[name](work, say)
    if warm:
        student = student_of(opened, work.config, plan, out, work.model.state_dict())
    config = student.config if student else replace(work.config.alone(), run_dir=out.absolute())
    config = replace(config, parallel=ParallelConfig())  # in one process, however the run was trained
    if student:
        student = replace(student, config=config)
        trainer = trainer_of(work, student, others)
    else:
        trainer = build_trainer(config, opened.inputs, bank=opened.bank)
    with ExitStack() as stack:
        run = RunFolder.create(out, out.name)
        stack.enter_context(run.claimed())
        tracker = stack.enter_context(start_tracking(config, run, None, opened.inputs))
        trainer.record_in(run, tracker)
        best = teach(work, student, others, trainer, say) if student else {}
        if student and plan.quantise is not None:
            STEPS["quantise"](work, say)
            config = work.config
            write_config(config, run.config)
            trainer = build_trainer(config, opened.inputs, bank=opened.bank)
            trainer.record_in(run, tracker)
        if not student or plan.quantise is not None:
            best = trainer.adopt(work.model.state_dict(), work.validated)
            if isinstance(trainer.model, MoEViT):  # compiling does not pay off for scoring once
                trainer.model.compile(set())
        export_best(trainer, best)
        after = figures(work, run) | {"macro_f1_test": None}
        found = {"from": [str(each.run.path.absolute()) for each in (opened, *others)], "steps": work.steps}
        found |= {"experts": [*work.experts, *work.shared], "budget": plan.budget, "before": before, "after": after}
        write_json(run.compression, found)
        return evaluate(run, config, trainer.model, opened.bank, tracker, opened.inputs.backbone, plan.worth_images)


def scored(run: RunFolder) -> float | None:
    """The test macro-F1 of the run; None if it was not evaluated, or if training has continued since."""
    return json.loads(run.results.read_text(encoding="utf-8")).get("macro_f1") if run.scored else None


def figures(work: Work, run: RunFolder) -> dict[str, Any]:
    """The values of evaluation.compression.FIGURES for the current model in `run`, except the test score."""
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
