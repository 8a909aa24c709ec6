"""Loading a trained run from its folder: configuration, backbone, model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from assembly.pipeline import Inputs, build_bank, build_model, identity, load_both, pick_device
from assembly.ready import get_ready
from common.errors import EnvironmentFault, as_environment_fault, warn
from common.network import reachable
from common.paths import absolute
from common.text import counted, printable
from config.config import Config, config_from_dict
from evaluation.trained import TrainedRun
from features.bank import FeatureBank
from features.file import gigabytes
from features.images import ImageBank
from model.backbone import load_backbone
from model.moe_vit import AnyMoE
from model.offload import Traffic, offload
from storage.checkpoint import check_inputs
from storage.described import describe
from storage.export import load_exported
from storage.folder import RunFolder


def load_trained(
    path: Path,
    device: str = "auto",
    weights: Path | None = None,
    say: Callable[[str], None] = print,
    offload_memory: int | None = None,
) -> TrainedRun:
    """Load the model of the run in `path`, without its dataset.

    weights: the backbone's file, if it has moved. say: receives a line if the weights are exported first.
    offload_memory: experts stay in host memory, except for this many bytes (None: all are on the device).
    Raises UserError for a path that is not a folder and for a missing GPU; EnvironmentFault for a run of another
    version, a file that is missing or does not fit, or a backbone other than that of training.
    """
    run = RunFolder(path)
    described = describe(run, say)
    config = configure(described["config"], device, weights=weights)
    device = pick_device(config.device)
    get_ready(config, device, compiling=False)
    with as_environment_fault():
        backbone = load_backbone(config.backbone, device, reachable)
        here = {"name": config.backbone.name, "fingerprint": backbone.fingerprint()}
        check_inputs(described, {**described, "backbone": here}, run.weights)
        class_names = tuple(described["class_names"])
        model = build_model(config, tuple(described["feature_shape"]), len(class_names), backbone)
        load_exported(run, model, described.get("weights_sha256"))
    traffic = _place(model, device, offload_memory)
    return TrainedRun(run, config, device, backbone, model.eval(), class_names, traffic)


def _place(model: AnyMoE, device: torch.device, offload_memory: int | None) -> Traffic | None:
    """Move a model to the device, except for experts in host memory (see `load_trained`)."""
    if offload_memory is None:
        model.to(device)
        return None
    if device.type == "cpu":
        warn("--offload cpu saves nothing on a CPU: the experts are in host memory anyway")
    with as_environment_fault():
        return offload(model, device, offload_memory)


def offload_line(traffic: Traffic) -> str:
    """Where the experts are stored, and how much was copied, in words."""
    return (
        f"offload      {counted(traffic.kept, 'expert')} on the device ({gigabytes(traffic.kept_bytes)}), "
        f"{traffic.offloaded:,} in host memory ({gigabytes(traffic.offloaded_bytes)}), "
        f"{gigabytes(traffic.copied_bytes)} copied in {traffic.copies:,} fetches"
    )


@dataclass(frozen=True)
class OpenRun:
    """A trained run with its dataset. model: on its device. traffic: copies of experts from host memory."""

    run: RunFolder
    config: Config
    inputs: Inputs
    bank: FeatureBank | ImageBank
    model: AnyMoE
    traffic: Traffic | None = None


def open_run(
    path: Path,
    device: str = "auto",
    root: Path | None = None,
    weights: Path | None = None,
    cache_dir: Path | None = None,
    offload_memory: int | None = None,
) -> OpenRun:
    """Rebuild the model of the run in `path`, and read its dataset.

    root, weights: dataset and backbone file, if they have moved. cache_dir: folder for stored features, if it has
    changed; "null": in memory only. offload_memory: as for `load_trained`.
    Raises what `load_trained` does, and UserError for data that is missing or differs from that of training.
    """
    run = RunFolder(path)
    described = describe(run)
    config = configure(described["config"], device, root, weights)
    if cache_dir is not None:
        config.features.cache_dir = None if str(cache_dir) == "null" else cache_dir.absolute()
    where = pick_device(config.device)
    print(f"loading      {printable(run.path)}: {config.data.name} and {config.backbone.name}, for {where}", flush=True)
    splits, backbone = load_both(config, where, as_environment_fault)
    bank = build_bank(config, splits, backbone, where)
    with as_environment_fault():
        check_inputs(described, identity(config, splits, backbone, bank.feature_shape), run.weights)
        model = build_model(config, bank.feature_shape, splits.test.num_classes, backbone)
        load_exported(run, model, described.get("weights_sha256"))
    traffic = _place(model, where, offload_memory)
    return OpenRun(run, config, Inputs(where, splits, backbone), bank, model, traffic)


def configure(
    values: dict[str, Any], device: str = "auto", root: Path | None = None, weights: Path | None = None
) -> Config:
    """The run's configuration on this machine: device, and the new paths of dataset and backbone if they have moved.

    Raises EnvironmentFault if the values do not fit this version or the backbone's file is missing.
    """
    with as_environment_fault():
        config = config_from_dict(values)
    config.device = device
    if root is not None:
        config.data.root, config.data.clearml_dataset = absolute(root), None
    if weights is not None:
        config.backbone.weights = absolute(weights)
    if config.backbone.weights is not None and not config.backbone.weights.is_file():
        raise EnvironmentFault(
            f"the backbone's weights {config.backbone.weights} are missing: name the file with --backbone.weights"
        )
    return config
