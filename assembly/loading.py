"""Loading a trained run from its folder: configuration, backbone, model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assembly.pipeline import Inputs, build_bank, build_model, identity, pick_device
from common.errors import EnvironmentFault, as_environment_fault
from common.network import reachable
from common.paths import absolute
from config.config import Config, config_from_dict
from data.datasets import load_splits
from evaluation.trained import TrainedRun
from features.bank import FeatureBank
from features.images import ImageBank
from model.backbone import load_backbone
from model.moe_vit import AnyMoE
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


@dataclass(frozen=True)
class OpenRun:
    """A trained run with the data that it was trained on. model: on its device."""

    run: RunFolder
    config: Config
    inputs: Inputs
    bank: FeatureBank | ImageBank
    model: AnyMoE


def open_run(
    path: Path,
    device: str = "auto",
    root: Path | None = None,
    weights: Path | None = None,
    cache_dir: Path | None = None,
) -> OpenRun:
    """Rebuild the model of the run in `path`, and read its data set.

    root, weights: where data set and backbone file lie, if they have moved. cache_dir: where features are stored, if
    not where they were; "null": in memory only. Raises what `load_trained` does, and UserError for data that are not
    there or not those of training.
    """
    run = RunFolder(path)
    described = describe(run)
    config = configure(described["config"], device, root, weights)
    if cache_dir is not None:
        config.features.cache_dir = None if str(cache_dir) == "null" else cache_dir.absolute()
    where, splits = pick_device(config.device), load_splits(config.data)
    with as_environment_fault():
        backbone = load_backbone(config.backbone, where, reachable)
    bank = build_bank(config, splits, backbone, where)
    with as_environment_fault():
        check_inputs(described, identity(config, splits, backbone, bank.feature_shape), run.weights)
        model = build_model(config, bank.feature_shape, splits.test.num_classes, backbone).to(where)
        load_exported(run, model, described.get("weights_sha256"))
    return OpenRun(run, config, Inputs(where, splits, backbone), bank, model)


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
