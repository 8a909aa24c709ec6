"""Train a vision mixture of experts on a frozen ViT, evaluate it once on the test set, and log both.

python train.py                                        CIFAR-100, the default recipe (configs/cifar100.yaml)
python train.py --config configs/digits.yaml           no download, half a minute on a CPU
python train.py --config configs/article.yaml          the reference recipe
python train.py --router.top_k 1 --train.epochs 20     any field of the configuration
python train.py --resume runs/cifar100-20260101-120000 go on with an interrupted run
"""

import sys

import torch

from data.datasets import Splits, load_splits
from engine.checkpoint import check_inputs, export_model, load_checkpoint, load_exported, seed_everything
from engine.config import Config, Invocation, config_from_dict, parse_command_line, write_config
from engine.evaluation import evaluate, table
from engine.pipeline import build_bank, build_model, identity, pick_device
from engine.run_folder import RunFolder
from engine.summary import cost
from engine.tracking import Tracker, open_tracker
from engine.trainer import Trainer
from errors import EnvironmentFault, UserError, exit_code_of
from model.backbone import Backbone, load_backbone

# What a resumed run may change: the rest would make it another experiment, or a torn one.
CHANGEABLE = {
    "run_dir",
    "tracking",
    "device",
    "data.root",
    "data.download",
    "backbone.weights",
    "features.batch_size",
    "features.cache_dir",
    "features.compile",
    "experts.dispatch",
    "train.epochs",
    "train.patience",
    "train.save_every",
}


def main() -> None:
    invocation = parse_command_line()
    config = invocation.config
    inputs = load_inputs(config)
    run, checkpoint = open_run(invocation)
    with start_tracking(run, config, checkpoint) as tracker:
        if tracker.config != config.to_dict():  # a ClearML agent may override values
            config = config_from_dict(tracker.config)
            inputs = load_inputs(config)
        write_config(config, run.config)
        try:
            train(run, config, *inputs, tracker, checkpoint)
        except KeyboardInterrupt:
            if run.last.exists():
                print(f"python train.py --resume {run.path} goes on from the last checkpoint", file=sys.stderr)
            raise
        except torch.OutOfMemoryError as error:
            raise EnvironmentFault(
                "the GPU is out of memory: lower --train.batch_size or --features.batch_size, or use --device cpu"
            ) from error


def load_inputs(config: Config) -> tuple[torch.device, Splits, Backbone]:
    """Device, data and backbone: what can be missing, before anything is written."""
    device = pick_device(config.device)
    return device, load_splits(config.data), load_backbone(config.backbone, device)


def train(
    run: RunFolder,
    config: Config,
    device: torch.device,
    splits: Splits,
    backbone: Backbone,
    tracker: Tracker,
    checkpoint: dict | None,
) -> None:
    """Features, model, fit, evaluate, report."""
    seed_everything(config.train.seed)
    bank = build_bank(config, splits, backbone, device)
    feature_shape = tuple(bank.example().shape[1:])
    model = build_model(config, feature_shape, splits.train.num_classes).to(device)
    stored = identity(config, splits, backbone, feature_shape)
    warmup_steps = config.router.warmup_steps
    trainer = Trainer(model, bank, run, tracker, config.train, config.optim, config.balance, warmup_steps, stored)
    if checkpoint is not None:
        check_inputs(checkpoint, stored, run.last)
        trainer.load_state_dict(checkpoint)
        print(f"resuming     {run.path} after epoch {trainer.epoch} of {config.train.epochs}")
    announce(run, config, splits, model, backbone, feature_shape)
    best = trainer.fit()
    print(f"best epoch   {best['epoch']}, validation macro-F1 {100 * best['macro_f1']:.2f} %")
    export_model(run)
    load_exported(run, model)
    tracker.model(run.weights, name=run.path.name)
    results = evaluate(run, config, model, bank, tracker)
    print(table(results))
    print(f"run folder   {run.path}")


def open_run(invocation: Invocation) -> tuple[RunFolder, dict | None]:
    """The folder of a new run, or that of a run to resume with its last checkpoint."""
    if invocation.resume is None:
        return RunFolder.create(invocation.config.run_dir, invocation.name), None
    run = RunFolder(invocation.resume)
    checkpoint = load_checkpoint(run.last)
    before, now = flatten(checkpoint["config"]), flatten(invocation.config.to_dict())
    for key, value in now.items():
        if key not in CHANGEABLE and before.get(key) != value:
            raise UserError(
                f"--resume {run.path} cannot change {key} from {before.get(key)} to {value}: "
                "leave it out, or start a new run"
            )
    return run, checkpoint


def flatten(config: dict) -> dict:
    """{"train": {"epochs": 3}} as {"train.epochs": 3}."""
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def start_tracking(run: RunFolder, config: Config, checkpoint: dict | None) -> Tracker:
    """ClearML and metrics.jsonl; a resumed run goes on with its own task and drops lines it will write again."""
    return open_tracker(
        config.tracking,
        run.path,
        config.to_dict(),
        name=run.path.name,
        tags=[config.data.name, config.backbone.name, config.router.kind],
        task_id=checkpoint and checkpoint["task_id"],
        resume_step=checkpoint and checkpoint["step"],
    )


def announce(run: RunFolder, config: Config, splits: Splits, model, backbone: Backbone, feature_shape) -> None:
    """What is about to be trained on what."""
    sizes = ", ".join(f"{len(splits[name]):,} {name}" for name in ("train", "validation", "test"))
    print(f"data         {config.data.name}: {sizes} images, {splits.train.num_classes} classes")
    random_weights = "" if config.backbone.pretrained or config.backbone.weights else " with RANDOM weights"
    print(f"backbone     {config.backbone.name}{random_weights}, frozen; features {' '.join(config.backbone.features)}")
    print(f"experts      {', '.join(config.experts.labels())}; top-{config.router.top_k} by {config.router.kind}")
    print("\n".join(cost(model, backbone, feature_shape).lines()))
    print(f"run folder   {run.path}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
