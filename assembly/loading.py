"""A trained run, put together again from its folder: configuration, backbone, model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from assembly.pipeline import build_model, pick_device
from common.errors import EnvironmentFault, blaming_files
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
    """Rebuild the model of the run in `path`; its data set need not be there.

    weights: the backbone's file, if it has moved. say: gets a line where the weights are written first.
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
    return TrainedRun(run, config, device, backbone, model.to(device).eval(), class_names)


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
