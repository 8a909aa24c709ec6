"""A trained run, put together again from its folder: configuration, backbone, model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from assembly.pipeline import build_model, pick_device
from common.errors import EnvironmentFault, UserError, blaming_files, warn
from common.network import reachable
from common.paths import absolute
from common.text import command, counted
from config.config import Config, config_from_dict
from evaluation.trained import TrainedRun
from features.file import gigabytes
from model.backbone import load_backbone
from model.moe_vit import AnyMoE
from model.offload import Traffic, offload
from storage.checkpoint import check_inputs, load_checkpoint
from storage.export import export_model, load_exported, read_description
from storage.folder import RunFolder


def load_trained(
    path: Path,
    device: str = "auto",
    weights: Path | None = None,
    say: Callable[[str], None] = print,
    offload_memory: int | None = None,
) -> TrainedRun:
    """Rebuild the model of the run in `path`; its data set need not be there.

    weights: the backbone's file, if it has moved. say: gets a line where the weights are written first.
    offload_memory: experts stay in host memory, but for so many bytes of them (None: all are on the device).
    Raises UserError for what is no folder, and a GPU that is not there; EnvironmentFault for a run of
    another version, a file that is missing or does not fit, or a backbone other than that of training.
    """
    run = RunFolder(path)
    described = describe(run, say)
    config = configure(described["config"], device, weights=weights)
    device = pick_device(config.device)
    with blaming_files():
        backbone = load_backbone(config.backbone, device, reachable)
        here = {"name": config.backbone.name, "fingerprint": backbone.fingerprint()}
        check_inputs(described, {**described, "backbone": here}, run.weights)
        class_names = tuple(described["class_names"])
        model = build_model(config, tuple(described["feature_shape"]), len(class_names), backbone)
        load_exported(run, model, described.get("weights_sha256"))
    traffic = place(model, device, offload_memory)
    return TrainedRun(run, config, device, backbone, model.eval(), class_names, traffic)


def place(model: AnyMoE, device: torch.device, offload_memory: int | None) -> Traffic | None:
    """Move a model to the device, all of it, or all but experts in host memory (see `load_trained`)."""
    if offload_memory is None:
        model.to(device)
        return None
    if device.type == "cpu":
        warn("--offload cpu saves nothing on a CPU, which has the experts in its memory anyway")
    return offload(model, device, offload_memory)


def offload_line(traffic: Traffic) -> str:
    """Where the experts were, and what was copied, in words."""
    return (
        f"offload      {counted(traffic.kept, 'expert')} on the device ({gigabytes(traffic.kept_bytes)}), "
        f"{traffic.offloaded:,} in host memory ({gigabytes(traffic.offloaded_bytes)}), "
        f"{gigabytes(traffic.copied_bytes)} copied in {traffic.copies:,} fetches"
    )


def describe(run: RunFolder, say: Callable[[str], None] = print) -> dict[str, Any]:
    """model.json, written first from the best checkpoint where training has not come to do that.

    Raises UserError for what is no folder, EnvironmentFault where it holds neither, or what it holds
    cannot be used.
    """
    if not run.path.is_dir():
        raise UserError(f"{run.path} is not a folder: name a run that train.py wrote")
    with blaming_files():
        return _described(run, say)


def _described(run: RunFolder, say: Callable[[str], None]) -> dict[str, Any]:
    if run.best.is_file():
        best = load_checkpoint(run.best)
        kept = read_description(run).get("epoch") if run.model.is_file() else None
        if not isinstance(kept, int) or kept < best["epoch"]:  # later: best.pt is damaged, and the one before it read
            say(f"{run.weights} is written from {run.best}: the epoch kept so far is {best['epoch']}")
            export_model(run, best)
    elif not run.model.is_file() and run.config.is_file():
        raise UserError(
            f"{run.path} has no checkpoint yet: wait for its first epoch, or where it was interrupted before that, "
            f"{command('train.py', '--resume', run.path)}"
        )
    elif not run.model.is_file():
        raise UserError(f"{run.path} holds neither model.json nor checkpoints/best.pt: name a run that train.py wrote")
    return read_description(run)


def configure(
    values: dict[str, Any], device: str = "auto", root: Path | None = None, weights: Path | None = None
) -> Config:
    """The run's configuration for this machine: device, and where data set and backbone file lie if they have moved.

    Raises EnvironmentFault where the values do not fit this version or the backbone's file is not there.
    """
    with blaming_files():
        config = config_from_dict(values)
    config.device = device
    if root is not None:
        config.data.root = absolute(root)
    if weights is not None:
        config.backbone.weights = absolute(weights)
    if config.backbone.weights is not None and not config.backbone.weights.is_file():
        raise EnvironmentFault(
            f"the backbone's weights {config.backbone.weights} are not there: name the file with --backbone.weights"
        )
    return config
