"""The start of a training: tracking, and the lines that describe data, backbone and model; and its end: the export."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from assembly.pipeline import Inputs
from assembly.transfer import lines
from common.distributed import world
from common.text import printable
from config.config import Config, write_config
from evaluation.cost import cost
from evaluation.stale import mark_stale
from features.extraction import warn_of_hours
from storage.export import export_model
from storage.folder import RunFolder
from storage.resume import metrics_step
from tracking.tracker import Tracker, open_tracker, silent_tracker
from training.random_numbers import RandomNumbers
from training.trainer import Trainer


@contextmanager
def start_tracking(
    config: Config, run: RunFolder, checkpoint: dict[str, Any] | None, inputs: Inputs
) -> Iterator[Tracker]:
    """Open the tracker; a resumed run continues its own task and drops the lines that it will write again.

    If the run starts from another run, the task of that run becomes the parent task, and its model the input model.
    Of several processes only rank 0 tracks. Random numbers continue as if no tracker were opened: call this function
    when the run has been built, so that no mistake leaves a failed task.
    """
    if not world().first:
        with silent_tracker() as tracker:
            yield tracker
        return
    parent = inputs.origin and inputs.origin.task_id
    with RandomNumbers(inputs.device).all():  # ClearML sets its own seeds
        tracker = open_tracker(
            config.tracking,
            run.path,
            config.to_dict(),
            name=run.path.name,
            tags=tags_of(config),
            task_id=checkpoint and checkpoint["task_id"],
            resume_step=metrics_step(checkpoint),
            parent=parent,
        )
    if parent is not None and checkpoint is None:
        tracker.starts_from(parent)
    with tracker:
        write_config(config, run.config)
        yield tracker


def record(trainer: Trainer, run: RunFolder, tracker: Tracker) -> None:
    """Let a trainer write to its run folder and tracker; results from before a resumed run become stale."""
    trainer.record_in(run, tracker)
    if trainer.step == 0:
        return
    position = f"after {trainer.position} of {trainer.config.epochs}"
    if world().first:
        mark_stale(run, f"Results from before the run was resumed {position}")
    print(f"resuming     {printable(run.path)} {position}")


def tags_of(config: Config) -> list[str]:
    """The ClearML tags of the tasks of a run."""
    return [config.data.name, config.backbone.name, "dense twin" if config.twin_of else config.router.kind]


def announce(config: Config, inputs: Inputs, trainer: Trainer) -> None:
    """Print data, backbone and model, and the model's cost."""
    splits = inputs.splits
    sizes = ", ".join(f"{len(splits[name]):,} {name}" for name in ("train", "validation", "test"))
    print(f"data         {config.data.name}: {sizes} images, {splits.train.num_classes} classes")
    random_weights = "" if config.backbone.pretrained or config.backbone.weights else " with RANDOM weights"
    print(f"backbone     {config.backbone.name}{random_weights}, frozen; features {' '.join(config.backbone.features)}")
    model, unit = trainer.model, "sample"
    if config.experts.place == "blocks":
        top = " and on top" if config.experts.head else ""
        unit = f"{config.router.level}, in {len(model.blocks)} blocks{top},"
    seen = f"{model.mixtures[0].router.experts_per_sample:g} per {unit} by {config.router.kind}"
    print(f"experts      {', '.join(config.experts.labels())}; {seen}")
    if config.twin_of:
        of = json.loads(config.twin_of)
        print(
            f"dense twin   in place of experts {of.get('experts.sizes')} by {of.get('router.kind', config.router.kind)}"
        )
    if shared := config.experts.shared_labels():
        print(f"shared       {', '.join(shared)}; they process every sample")
    if taken := trainer.identity.get("init"):
        print("\n".join(lines(config, model, taken, splits.train.class_names, trainer.frozen)))
    costs = trainer.experts.costs if trainer.experts else None
    costs = costs or cost(trainer.model, inputs.backbone, trainer.bank.feature_shape)
    print("\n".join(costs.lines()))
    warn_of_hours(trainer.bank, costs.backbone_flops, config.train.epochs)
    print(f"run folder   {printable(trainer.run.path)}", flush=True)


def export_best(trainer: Trainer, best: dict[str, Any]) -> None:
    """Write the weights of the best epoch as the model of the run, upload them, and load them into the trainer's model.

    best: what `Trainer.fit` returns. Of several processes rank 0 writes.
    """
    run, names = trainer.run, trainer.bank.splits.train.class_names
    if world().first:
        export_model(run, best)
        trainer.tracker.model(run.weights, run.path.name, names)
    trainer.model.load_state_dict(best["model"])
