"""Builds the parts of a run from its configuration: device, images, backbone, features, model, trainer."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from assembly.agreement import require_same, require_same_inputs
from assembly.early import check_backbone, check_early, model_parts
from assembly.ready import compiles, get_ready, read_images, warm_up
from assembly.transfer import Origin, begin, freeze, read_origin
from common.ahead import Ahead
from common.distributed import expected_world, world
from common.errors import UserError, one_line, warn
from common.network import reachable
from common.text import counted
from config.config import DEVICES, Config
from data.image_set import Splits
from evaluation.cost import cost
from evaluation.validation import validate
from features.bank import FeatureBank
from features.cache import FeatureCache
from features.extraction import Extractor, worth_compiling
from features.images import ImageBank
from features.placement import DeviceMemory
from model.backbone import Backbone, load_backbone
from model.losses import LOSSES
from model.moe_vit import AnyMoE, MoEViT
from model.old_gate import hold_old_gates
from model.spread import check_spread
from storage.checkpoint import check_inputs, seed_everything
from storage.resume import Start, best_kept
from training.expert_parallel import ExpertParallel
from training.length import steps_per_epoch
from training.memory import bytes_per_image, must_recompute
from training.teacher import Teacher
from training.trainer import Trainer


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, and its device. origin: the run that it starts from, if there is one."""

    device: torch.device
    splits: Splits
    backbone: Backbone
    origin: Origin | None = None


def load_inputs(config: Config, resumed: bool = False) -> Inputs:
    """Load device, images, backbone, and the run to start from, so that missing files are reported before any writing.

    Raises UserError and EnvironmentFault as the loaders do, and UserError for a batch larger than the data.
    """
    for line in config.idle:
        warn(line)
    device = pick_device(config.device)
    if world().first:
        print(f"loading      {config.data.name} and {config.backbone.name}, for {device}", flush=True)
    warm_up(device)
    shape = check_early(config)
    origin = None if resumed else read_origin(config)
    if origin is not None and shape is not None:
        origin.require_shape(shape)
    splits, backbone = load_both(config, device)
    steps_per_epoch(config.train, len(splits.train))
    check_backbone(config, backbone)
    require_same_inputs(config, splits, backbone)
    if origin is not None:
        origin.require_backbone(config, backbone_identity(config, backbone))
    return Inputs(device, splits, backbone, origin)


def load_both(
    config: Config, device: torch.device, faults: Callable[[], AbstractContextManager] = nullcontext
) -> tuple[Splits, Backbone]:
    """Images and backbone, loaded at the same time; if both fail, the error of the images is raised.

    faults: converts the errors of the backbone. Raises as the loaders do.
    """
    images = Ahead(lambda: read_images(config))
    get_ready(config, device)
    images.check()  # before a download of weights
    try:
        with faults():
            backbone = load_backbone(config.backbone, device, reachable)
    except (UserError, ValueError, OSError):  # the errors of model/ among them
        images.result()
        raise
    begin_fingerprint(backbone)
    return images.result(), backbone


def pick_device(name: str) -> torch.device:
    """The torch device for a name; a GPU becomes the current one. Raises UserError if it is not available.

    Each of several processes on a machine gets a separate GPU.
    """
    if not re.fullmatch(DEVICES, name):
        raise UserError(f"device is '{name}': use auto, cpu, cuda or cuda:N")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    # With its index, because tensors report cuda:0, which does not equal a plain cuda.
    index = int(name.partition(":")[2] or expected_world().local_rank)
    seen = torch.cuda.device_count()
    if index >= seen and ":" not in name and index:
        raise UserError(
            f"each process needs its own GPU, and PyTorch finds {counted(seen, 'GPU')} for process {index + 1} of "
            f"this machine: start at most {seen}, or choose --device cpu"
        )
    if index >= seen:
        raise UserError(f"device {name} is not available: PyTorch finds {counted(seen, 'GPU')}; use --device cpu")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)  # the default of graphs, streams and memory figures
    return device


def build_bank(config: Config, splits: Splits, backbone: Backbone, device: torch.device) -> FeatureBank | ImageBank:
    """The inputs of the model: features of `splits`, stored where config.features says, or images."""
    features = config.features
    if config.experts.place == "blocks":
        return ImageBank(splits, config.augment, device, features.batch_size)
    views = min(features.views, config.train.epochs) if config.augment.active else 1
    # All views, not only those of a short run, so that a longer run finds its features in the cache.
    views_kept = features.views if config.augment.active else 1
    views_run = views_kept if features.mode == "cached" else config.train.epochs
    images = views_run * len(splits.train) + len(splits.validation) + len(splits.test)
    compiled = worth_compiling(features.compile, images, device)
    cache, source = None, {}
    if features.mode == "cached" and features.cache_dir is not None:
        cache = FeatureCache(features.cache_dir, config.data.name)
        source = {
            "backbone": config.backbone.name,
            "weights": fingerprint_of(backbone),
            "precision": str(backbone.dtype),
            "features": list(config.backbone.features),
        } | ({"compiled": True} if compiled else {})  # compiled code rounds differently
    extractor = Extractor(backbone, features.batch_size, compiled)
    return FeatureBank(splits, extractor, config.augment, features, device, cache, source, views)


def build_model(
    config: Config, feature_shape: tuple[int, ...], num_classes: int, backbone: Backbone | None = None
) -> AnyMoE:
    """The trained part, on the CPU. backbone: the ViT that gets experts inside (None: the experts are behind it).

    Raises as `model_parts`.
    """
    kind, parts = model_parts(config, feature_shape, num_classes, backbone)
    return kind(*parts)


def spread_experts(
    config: Config, model: AnyMoE, bank: FeatureBank | ImageBank, inputs: Inputs
) -> ExpertParallel | None:
    """Keep only the experts of this process in the model (None: all experts, if parallel.experts is 1)."""
    parallel = config.parallel
    if parallel.experts == 1:
        return None
    try:
        check_spread(model)
    except ValueError as error:
        raise UserError(f"parallel.experts {parallel.experts}: {one_line(error)}") from error
    costs = cost(model, inputs.backbone, bank.feature_shape) if world().first else None
    return ExpertParallel(model, parallel.experts, parallel.placement, config.optim, inputs.device, costs)


def compile_blocks(config: Config, model: AnyMoE, device: torch.device) -> None:
    """Compile the blocks of a ViT with experts for the batches of this run, if train.compile says so."""
    if compiles(config, device) and isinstance(model, MoEViT):
        model.compile({samples_of_this(config), config.features.batch_size}, warn)


def plan_memory(config: Config, model: AnyMoE, bank: FeatureBank | ImageBank, device: torch.device) -> None:
    """Decide whether activations of the ViT are recomputed. Raises UserError if the batch does not fit on the GPU."""
    if not isinstance(model, MoEViT):
        return
    model.recompute = config.train.recompute == "on"
    if device.type == "cuda":
        image_1CHW = next(iter(bank.batches("train", 1, torch.tensor([0]))))[0]
        free, batch = min(world().gather(DeviceMemory(device).free())), config.train.batch_size

        def needed(recompute: bool) -> int:
            return max(world().gather(bytes_per_image(model, image_1CHW, recompute)))

        model.recompute = must_recompute(config.train.recompute, needed, batch, free, world().size)


def samples_of_this(config: Config) -> int:
    """The number of samples of a training batch on this process."""
    return world().sizes(config.train.batch_size)[world().rank]


def begin_fingerprint(backbone: Backbone) -> None:
    """Compute the backbone's fingerprint in a thread, once because it is frozen."""
    if backbone not in _FINGERPRINTS:
        _FINGERPRINTS[backbone] = Ahead(backbone.fingerprint)


def fingerprint_of(backbone: Backbone) -> str:
    """The backbone's fingerprint."""
    begin_fingerprint(backbone)
    return _FINGERPRINTS[backbone].result()


_FINGERPRINTS: WeakKeyDictionary[Backbone, Ahead[str]] = WeakKeyDictionary()


def backbone_identity(config: Config, backbone: Backbone) -> dict[str, str]:
    """The identity of a backbone."""
    return {"name": config.backbone.name, "fingerprint": fingerprint_of(backbone)}


def identity(config: Config, splits: Splits, backbone: Backbone, feature_shape: tuple[int, ...]) -> dict[str, Any]:
    """What trained weights depend on (backbone, data, classes, feature shape), as plain values stored with them."""
    return {
        "config": config.to_dict(),
        "backbone": backbone_identity(config, backbone),
        "data": {name: splits[name].fingerprint() for name in ("train", "validation", "test")},
        "class_names": list(splits.train.class_names),
        "feature_shape": list(feature_shape),
    }


def build_trainer(
    config: Config,
    inputs: Inputs,
    start: Start | None = None,
    bank: FeatureBank | ImageBank | None = None,
    teacher: Teacher | None = None,
) -> Trainer:
    """Set the seeds and build features, model and trainer, new or from the checkpoint of `start`.

    Nothing is written: what does not fit is reported before a run has a folder or a task. Call `Trainer.record_in`
    then. bank: features shared by several runs (None: built here). teacher: trained models to distil from. Raises what
    `build_model` and `Trainer` raise, and UserError if the checkpoint belongs to other data, another backbone or
    another model, or if the run of init does not fit.
    """
    checkpoint = start.checkpoint if start else None
    require_same({"the step to resume from": checkpoint["step"] if checkpoint else 0})
    seed_everything(config.train.seed, config.train.deterministic)
    splits, backbone = inputs.splits, inputs.backbone
    bank = bank or build_bank(config, splits, backbone, inputs.device)
    model = build_model(config, bank.feature_shape, splits.train.num_classes, backbone)
    names, origin = splits.train.class_names, inputs.origin
    taken = checkpoint.get("init") if checkpoint else origin and begin(model, origin, names, bank.feature_shape)
    if any(loss.of_init and getattr(config.balance, name) > 0 for name, loss in LOSSES.items()):
        hold_old_gates(model)
    experts = spread_experts(config, model, bank, inputs)
    model = model.to(inputs.device)
    compile_blocks(config, model, inputs.device)
    plan_memory(config, model, bank, inputs.device)
    stored = identity(config, splits, backbone, bank.feature_shape) | ({"init": taken} if taken else {})
    frozen = freeze(config, model, taken, names)
    validated = partial(validate, bank=bank)
    trainer = Trainer(config, model, bank, stored, validated, frozen, teacher, experts)
    if start and checkpoint is not None:
        check_inputs(checkpoint, stored, start.resumed.last)
        trainer.load_state_dict(checkpoint, start.resumed.last)
        trainer.best = best_kept(start.resumed, config, checkpoint)
    return trainer
