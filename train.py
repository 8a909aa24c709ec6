"""Train a vision mixture of experts on a frozen ViT, evaluate it once on the test set, and log both.

python train.py                                        CIFAR-100, the default recipe (configs/cifar100.yaml)
python train.py --config configs/digits.yaml           no download, two minutes on a CPU
python train.py --config configs/article.yaml          the reference recipe
python train.py --router.top_k 1 --train.epochs 20     any field of the configuration
python train.py --resume runs/cifar100-20260101-120000 go on with an interrupted run
"""

import sys

from data.datasets import load_splits
from engine.checkpoint import check_backbone, export_model, load_checkpoint, load_exported, seed_everything
from engine.config import Config, Invocation, config_from_dict, parse_command_line, write_config
from engine.evaluation import evaluate, table
from engine.pipeline import build_bank, build_model, pick_device
from engine.run_folder import RunFolder
from engine.summary import cost
from engine.tracking import Tracker, open_tracker
from engine.trainer import Trainer
from errors import UserError, exit_code_of
from model.backbone import load_backbone


def main() -> None:
    invocation = parse_command_line()
    config = invocation.config
    device = pick_device(config.device)
    splits, backbone = load_splits(config.data), load_backbone(config.backbone, device)
    run, checkpoint = open_run(invocation)
    tracker = start_tracking(run, invocation, checkpoint)
    if tracker.config != config.to_dict():  # a ClearML agent may override values
        config = config_from_dict(tracker.config)
        splits, backbone = load_splits(config.data), load_backbone(config.backbone, device)
    try:
        train(run, config, splits, backbone, device, tracker, checkpoint)
    except BaseException as error:
        tracker.close(failed=str(error) or type(error).__name__)
        raise
    tracker.close()


def train(run, config: Config, splits, backbone, device, tracker: Tracker, checkpoint: dict | None) -> None:
    """Features, model, fit, evaluate, report."""
    seed_everything(config.train.seed)
    bank = build_bank(config, splits, backbone, device)
    feature_shape = tuple(bank.example().shape[1:])
    model = build_model(config, feature_shape, splits.train.num_classes).to(device)
    identity = {
        "config": config.to_dict(),
        "backbone": {"name": config.backbone.name, "fingerprint": backbone.fingerprint()},
        "class_names": list(splits.train.class_names),
        "feature_shape": list(feature_shape),
    }
    trainer = Trainer(
        model, bank, run, tracker, config.train, config.optim, config.balance, config.router.warmup_steps, identity
    )
    if checkpoint is not None:
        check_backbone(checkpoint["backbone"], config.backbone.name, backbone.fingerprint(), run.last)
        trainer.load_state_dict(checkpoint)
        print(f"resuming     {run.path} after epoch {trainer.epoch} of {config.train.epochs}")
    announce(run, config, splits, model, backbone, feature_shape)
    best = trainer.fit()
    print(f"best epoch   {best['epoch']}, validation macro-F1 {100 * best['macro_f1']:.2f} %")
    export_model(run, identity)
    load_exported(run, model)
    tracker.model(run.weights, name=run.path.name)
    results = evaluate(run, config, model, bank, tracker)
    print(table(results))
    print(f"run folder   {run.path}")


def open_run(invocation: Invocation) -> tuple[RunFolder, dict | None]:
    """The folder of a new run with its configuration, or that of a run to resume with its last checkpoint."""
    if invocation.resume is None:
        run = RunFolder.create(invocation.config.run_dir, invocation.name)
        write_config(invocation.config, run.config)
        return run, None
    run = RunFolder(invocation.resume)
    checkpoint = load_checkpoint(run.last)
    before, now = checkpoint["config"], invocation.config.to_dict()
    for section in ("data", "augment", "backbone", "neck", "router", "experts"):
        for key, value in now[section].items():
            # Files may have moved; what they hold is checked by content.
            if (section, key) not in (("data", "root"), ("backbone", "weights")) and before[section].get(key) != value:
                raise UserError(
                    f"--resume {run.path} cannot change {section}.{key} from {before[section].get(key)} to {value}: "
                    "leave it out, or start a new run"
                )
    return run, checkpoint


def start_tracking(run: RunFolder, invocation: Invocation, checkpoint: dict | None) -> Tracker:
    """ClearML and metrics.jsonl; a resumed run goes on with its own task and drops lines it will write again."""
    config = invocation.config
    return open_tracker(
        config.tracking,
        run.path,
        config.to_dict(),
        name=run.path.name,
        tags=[config.data.name, config.backbone.name, config.router.kind],
        task_id=checkpoint and checkpoint["task_id"],
        resume_step=checkpoint and checkpoint["step"],
    )


def announce(run: RunFolder, config: Config, splits, model, backbone, feature_shape) -> None:
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
