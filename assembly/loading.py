"""Loading a trained run from its folder: configuration, backbone, model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from assembly.pipeline import build_model, pick_device
from common.errors import EnvironmentFault, as_environment_fault
from common.network import reachable
from common.paths import absolute
from config.config import Config, config_from_dict
from evaluation.trained import TrainedRun
from model.backbone import load_backbone
from storage.checkpoint import check_inputs
from storage.described import describe
from storage.export import load_exported
from storage.folder import RunFolder


def load_trained(
    path: Path, device: str = "auto", weights: Path | None = None, say: Callable[[str], None] = print
) -> TrainedRun:
    """Load the model of the run in `path`, without its dataset.

    weights: the backbone's file, if it has moved. say: receives a line if the weights are exported first.
    Raises UserError for a path that is not a folder and for a missing GPU; EnvironmentFault for a run of another
    version, a file that is missing or does not fit, or a backbone other than that of training.
    """
    run = RunFolder(path)
    described = describe(run, say)
    config = configure(described["config"], device, weights=weights)
    device = pick_device(config.device)
    with as_environment_fault():
        backbone = load_backbone(config.backbone, device, reachable)
        here = {"name": config.backbone.name, "fingerprint": backbone.fingerprint()}
        check_inputs(described, {**described, "backbone": here}, run.weights)
        class_names = tuple(described["class_names"])
        model = build_model(config, tuple(described["feature_shape"]), len(class_names), backbone)
        load_exported(run, model, described.get("weights_sha256"))
    return TrainedRun(run, config, device, backbone, model.to(device).eval(), class_names)


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
        config.data.root = absolute(root)
    if weights is not None:
        config.backbone.weights = absolute(weights)
    if config.backbone.weights is not None and not config.backbone.weights.is_file():
        raise EnvironmentFault(
            f"the backbone's weights {config.backbone.weights} are missing: name the file with --backbone.weights"
        )
    return config
