"""Train a vision mixture of experts on a frozen ViT, evaluate it once on the test set, and log both.

python train.py                                        CIFAR-100, the default recipe (configs/cifar100.yaml)
python train.py --config configs/digits.yaml           no download, half a minute on a CPU
python train.py --config configs/article.yaml          the reference recipe
python train.py --router.top_k 1 --train.epochs 20     any field of the configuration
python train.py --resume runs/cifar100-20260101-120000 go on with an interrupted run
"""

from common.errors import leave_on_signal
from common.network import reachable

if __name__ == "__main__":
    leave_on_signal()  # before the imports, which take seconds

from pathlib import Path

import torch

from assembly.pipeline import build_trainer, pick_device
from common.errors import Interrupted, exit_code_of, leave, say, warn
from common.signals import stoppable
from common.text import command, printable
from config.config import Config, Invocation, config_from_dict, parse_command_line, write_config
from data.datasets import load_splits
from data.image_set import Splits
from evaluation.cost import cost
from evaluation.evaluation import evaluate, table
from features.extraction import warn_of_hours
from model.backbone import Backbone, load_backbone
from storage.checkpoint import check_inputs
from storage.export import export_model, load_exported
from storage.folder import RunFolder
from storage.resume import best_kept, finished, load_resumable, metrics_step
from tracking.tracker import Tracker, open_tracker
from training.trainer import Trainer, steps_an_epoch

Inputs = tuple[torch.device, Splits, Backbone]


def main() -> None:
    with stoppable():
        invocation = parse_command_line()
        checkpoint = None
        if invocation.resume is None:
            refuse_taken(invocation.config.run_dir)
        else:
            run = RunFolder(invocation.resume)
            run.refuse_busy()
            checkpoint = load_resumable(run, invocation)
            if checkpoint and finished(run, invocation.config, checkpoint):
                done = checkpoint["epoch"]
                again = command("evaluate.py", run.path)
                print(f"{printable(run.path)} is finished: raise --train.epochs above {done}, or {again}")
                return
        for line in invocation.config.router.idle:
            warn(line)
        inputs = load_inputs(invocation.config)
        run = open_run(invocation)
        with run.claimed():
            go(run, invocation.config, inputs, checkpoint)


def go(run: RunFolder, config: Config, inputs: Inputs, checkpoint: dict | None) -> None:
    """Train under a tracker, in a folder that is this process's own."""
    with start_tracking(run, config, checkpoint) as tracker:
        if tracker.config != config.to_dict():  # a ClearML agent may override values
            config = config_from_dict(tracker.config)
            inputs = load_inputs(config)
        write_config(config, run.config)
        try:
            train(run, config, inputs, tracker, checkpoint)
        except Interrupted:
            if run.last.exists():
                say(f"{command('train.py', '--resume', run.path)} goes on from the last checkpoint")
            raise


def refuse_taken(run_dir: Path | None) -> None:
    """Say before the seconds that data and backbone take what `open_run` and `RunFolder.claimed` would say after."""
    if run_dir is not None:
        RunFolder(run_dir).refuse_busy()
        RunFolder(run_dir).refuse_run()


def load_inputs(config: Config) -> Inputs:
    """Device, data and backbone: what can be missing, before anything is written."""
    device, splits = pick_device(config.device), load_splits(config.data)
    steps_an_epoch(config.train, config.router.random_steps, len(splits.train))  # raises for what cannot be trained
    return device, splits, load_backbone(config.backbone, device, reachable)


def train(run: RunFolder, config: Config, inputs: Inputs, tracker: Tracker, checkpoint: dict | None) -> None:
    """Features, model, fit, evaluate, report."""
    trainer = build_trainer(config, *inputs, run, tracker)
    if checkpoint is not None:
        check_inputs(checkpoint, trainer.identity, run.last)
        trainer.load_state_dict(checkpoint)
        trainer.best = best_kept(run, config, checkpoint)
        run.results.unlink(missing_ok=True)  # of weights that are about to change
        print(f"resuming     {printable(run.path)} after {trainer.position} of {config.train.epochs}")
    announce(config, inputs[-1], trainer)
    kept = trainer.fit()
    print(f"{config.train.keep} epoch   {kept['epoch']}, validation macro-F1 {100 * kept['macro_f1']:.2f} %")
    export_model(run)
    load_exported(run, trainer.model)
    tracker.model(run.weights, name=run.path.name)
    print(table(evaluate(run, config, trainer.model, trainer.bank, tracker)))
    print(f"run folder   {printable(run.path)}")


def open_run(invocation: Invocation) -> RunFolder:
    """The folder of a new run, or that of the run to resume."""
    if invocation.resume is None:
        return RunFolder.create(invocation.config.run_dir, invocation.name)
    return RunFolder(invocation.resume)


def start_tracking(run: RunFolder, config: Config, checkpoint: dict | None) -> Tracker:
    """ClearML and metrics.jsonl; a resumed run goes on with its own task and drops lines it will write again."""
    return open_tracker(
        config.tracking,
        run.path,
        config.to_dict(),
        name=run.path.name,
        tags=[config.data.name, config.backbone.name, config.router.kind],
        task_id=checkpoint and checkpoint["task_id"],
        resume_step=metrics_step(checkpoint),
    )


def announce(config: Config, backbone: Backbone, trainer: Trainer) -> None:
    """What is about to be trained on what."""
    splits = trainer.bank.splits
    sizes = ", ".join(f"{len(splits[name]):,} {name}" for name in ("train", "validation", "test"))
    print(f"data         {config.data.name}: {sizes} images, {splits.train.num_classes} classes")
    random_weights = "" if config.backbone.pretrained or config.backbone.weights else " with RANDOM weights"
    print(f"backbone     {config.backbone.name}{random_weights}, frozen; features {' '.join(config.backbone.features)}")
    seen = f"{trainer.model.moe.router.experts_per_sample:g} a sample by {config.router.kind}"
    print(f"experts      {', '.join(config.experts.labels())}; {seen}")
    if shared := config.experts.shared_labels():
        print(f"shared       {', '.join(shared)}; every sample passes all of them")
    costs = cost(trainer.model, backbone, trainer.bank.feature_shape)
    print("\n".join(costs.lines()))
    warn_of_hours(trainer.bank, costs.backbone_flops, config.train.epochs)
    print(f"run folder   {printable(trainer.run.path)}", flush=True)


if __name__ == "__main__":
    leave(exit_code_of(main, lasting=True))
