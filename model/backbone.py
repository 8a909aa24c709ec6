"""A frozen pretrained ViT from timm, and the features taken from it.

timm is imported where it is used, because importing it takes seconds, and --help should be fast.
"""

import difflib
import hashlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import InputError, UnavailableError, one_line
from .fast_vit import fast_copy
from .options import check_options
from .weights_file import load_converted, read_weights

POOLS = ("cls", "mean", "tokens")
BUNDLED = "bundled/vit_micro"
CANNOT_BUILD = (RuntimeError, TypeError, ValueError, AssertionError, KeyError)  # what timm raises for a wrong model


@dataclass
class BackboneConfig:
    """Backbone: the frozen ViT and its features."""

    name: str = "vit_base_patch16_clip_quickgelu_224.openai"
    """Any timm ViT, such as vit_small_patch14_dinov2.lvd142m, or bundled/vit_micro, which needs no download."""
    weights: Path | None = None
    """Local file of weights (.safetensors, or a .pth of tensors); null: timm downloads pretrained weights."""
    pretrained: bool = True
    """false: random weights from a fixed seed, to test the pipeline."""
    features: list[str] = field(default_factory=lambda: ["cls:-1", "mean:-1"])
    """Features to concatenate, as POOL:BLOCK: cls (class token), mean (of the patch tokens), or tokens (class
    token and patch tokens, as the only feature); blocks count from 0, negative numbers from the end."""
    image_size: int | None = None
    """Side of the input in pixels; null: the size of the pretraining."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the backbone; auto: bfloat16 on a GPU, float32 on a CPU. float16 is more accurate than
    bfloat16, for a ViT whose activations stay below 65,504."""

    def __post_init__(self):
        self.weights = None if self.weights is None else Path(os.path.expanduser(self.weights)).absolute()
        check_options(self, "backbone")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"backbone.image_size is {self.image_size}: it must be a number of pixels above 0")
        if not self.features:
            raise ValueError("backbone.features is empty: name at least one, such as cls:-1")
        pools = [parse_feature(spec)[0] for spec in self.features]
        if "tokens" in pools and len(pools) > 1:
            raise ValueError(f"backbone.features {self.features}: tokens:BLOCK cannot be combined with others")

    @property
    def gives_tokens(self) -> bool:
        """Whether the features are token sequences (B, T, D) instead of vectors (B, F)."""
        return self.features[0].startswith("tokens")


def parse_feature(spec: str) -> tuple[str, int]:
    """`POOL:BLOCK` as (pool, block). Raises ValueError for anything else."""
    pool, _, block = spec.partition(":")
    try:
        if pool in POOLS:
            return pool, int(block)
    except ValueError:
        pass
    raise ValueError(f"backbone.features has '{spec}': expected POOL:BLOCK with POOL one of {', '.join(POOLS)}")


class _Uninitialised(TorchFunctionMode):
    """Skips the random initialisation of weights that a file will replace, which takes a second for a ViT-B."""

    DRAWN = ("uniform_", "normal_", "trunc_normal_", "erfinv_", "kaiming_uniform_", "kaiming_normal_")
    DRAWN += ("xavier_uniform_", "xavier_normal_", "orthogonal_")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        named = kwargs or {}
        if getattr(function, "__name__", "") in self.DRAWN:
            return args[0] if args else named["tensor"]
        return function(*args, **named)


class Backbone(nn.Module):
    """A frozen timm ViT: no gradients, and always in evaluation mode.

    forward: normalised images (B, 3, S, S) -> float32 features (B, F), or tokens (B, T, D) for `tokens:BLOCK`.
    The final norm of the ViT is applied to each block's tokens, as in DINOv2's `get_intermediate_layers(norm=True)`.
    dtype: precision of the forward pass. If it is not float32, a `fast_copy` of `vit` is used. Raises InputError for a
    block or a class token that the ViT does not have.
    """

    def __init__(self, vit: Any, features: list[str], dtype: torch.dtype = torch.float32):
        from timm.data import resolve_model_data_config

        super().__init__()
        self.vit: Any = vit.requires_grad_(False).eval()
        self.dtype = dtype
        self._fast: dict[torch.device, Any] = {}  # not a submodule: only `vit` is hashed and counted
        depth = len(vit.blocks)
        self.features = [(pool, self._block(block, depth)) for pool, block in map(parse_feature, features)]
        self.blocks = sorted({block for _, block in self.features})
        # Some ViTs have no prefix tokens in their blocks, or do not return them (CaiT, XCiT).
        parameters = inspect.signature(vit.forward_intermediates).parameters
        self.has_prefix = getattr(vit, "num_prefix_tokens", 0) > 0 and "return_prefix_tokens" in parameters
        self.has_class_token = self.has_prefix and getattr(vit, "cls_token", None) is not None
        if any(pool == "cls" for pool, _ in self.features) and not self.has_class_token:
            raise InputError(f"backbone.features {features}: this ViT's blocks have no class token: use mean:BLOCK")
        data = resolve_model_data_config(vit)
        self.mean, self.std = tuple(data["mean"]), tuple(data["std"])
        size = getattr(getattr(vit, "patch_embed", None), "img_size", None) or data["input_size"][-2:]
        self.image_size = int(size[0] if isinstance(size, tuple | list) else size)

    @staticmethod
    def _block(block: int, depth: int) -> int:
        if not -depth <= block < depth:
            raise InputError(
                f"backbone.features names block {block}: this ViT has blocks 0 to {depth - 1}; -1 is the last one"
            )
        return block % depth

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)

    def runner(self, device: torch.device) -> Any:
        """The ViT that computes on `device` in `dtype`, created at its first use."""
        if self.dtype == torch.float32:
            return self.vit
        if device not in self._fast:
            self._fast[device] = fast_copy(self.vit, self.dtype).to(device)
        return self._fast[device]

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        outputs = self.runner(images_BCHW.device).forward_intermediates(
            images_BCHW.to(self.dtype),
            indices=self.blocks,
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
            **({"return_prefix_tokens": True} if self.has_prefix else {}),
        )
        by_block = dict(zip(self.blocks, outputs, strict=True))
        return torch.cat([self._pool(pool, by_block[block]) for pool, block in self.features], dim=-1)

    def _pool(self, pool: str, output: Any) -> Tensor:
        """One feature of one block: `output` is (patches_BPD, prefix_BRD), or patches_BPD without a prefix."""
        prefix_BRD: Any
        patches_BPD, prefix_BRD = output if isinstance(output, tuple) else (output, None)
        if pool == "cls":
            return prefix_BRD[:, 0].float()
        if pool == "mean":
            return patches_BPD.mean(dim=1, dtype=torch.float32)
        # Register tokens represent no image region and are left out, as in DINOv2's own heads.
        parts = [prefix_BRD[:, :1]] if self.has_class_token else []
        return torch.cat([*parts, patches_BPD], dim=1).float()

    def fingerprint(self) -> str:
        """SHA-256 over weights, features, mean, std and size."""
        digest = hashlib.sha256(f"{self.features} {self.mean} {self.std} {self.image_size}".encode())
        for name, value in sorted(self.vit.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load_backbone(
    config: BackboneConfig, device: torch.device, reachable: Callable[[str], bool] | None = None
) -> Backbone:
    """Build the configured backbone on `device`.

    reachable: tests whether the host of a URL answers, before a download that would be retried for most of a minute
    (None: no test). Raises InputError for an unknown name, a model that is not a ViT, or weights that do not fit, and
    UnavailableError for weights that cannot be downloaded.
    """
    vit = _load_vit(config, reachable)
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, automatic if config.precision == "auto" else config.precision)
    backbone = Backbone(vit, config.features, dtype).to(device)
    try:
        backbone(torch.zeros(1, 3, backbone.image_size, backbone.image_size, device=device))
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"backbone {config.name} cannot process images of {backbone.image_size} pixels "
            f"({one_line(error, 120)}): choose another backbone.image_size or backbone.name"
        ) from error
    return backbone


def _load_vit(config: BackboneConfig, reachable: Callable[[str], bool] | None) -> nn.Module:
    from .outline import outline

    if config.name == BUNDLED:
        return _load_bundled(config)
    check_name(config)
    options = {} if config.image_size is None else {"img_size": config.image_size}
    if config.weights is not None:
        state = read_weights(config.weights)
        with _Uninitialised():
            vit = _create(config, pretrained=False, **options)
        load_converted(vit, state, config.weights, config.name)
        return vit
    if not config.pretrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _create(config, pretrained=False, **options)
    outline(config)  # before the download
    _require_download(config.name, reachable)
    return _create(config, pretrained=True, **options)


def check_name(config: BackboneConfig) -> None:
    """Raise InputError for a name that timm does not have, or for weights that neither timm nor this machine has."""
    import timm

    name = config.name
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_models(pretrained=True), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('vit*') lists them"
        raise InputError(f"backbone.name '{name}' is not a timm model: {hint}")
    if config.weights is not None:
        if not config.weights.is_file():
            raise InputError(f"backbone.weights {config.weights} is not a file")
    elif config.pretrained:
        try:
            found = timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            known = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
            raise InputError(f"backbone.name {name} names weights that timm does not have; it has {known}") from error
        if found is None or not found.has_weights:
            raise InputError(f"backbone.name {name} has no pretrained weights in timm: pass --backbone.weights FILE")


def check_bundled(config: BackboneConfig) -> None:
    """Raise InputError for options that the bundled ViT does not have."""
    if config.image_size is not None or config.weights is not None:
        raise InputError(
            f"backbone.name {BUNDLED} has a fixed size and its own weights: leave out backbone.weights and image_size"
        )


def _load_bundled(config: BackboneConfig) -> nn.Module:
    from .vit_micro import load_vit_micro, vit_micro

    check_bundled(config)
    if config.pretrained:
        return load_vit_micro()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return vit_micro()


def check_vit(model: nn.Module, name: str) -> None:
    """Raise InputError for a model that is not a ViT."""
    if not all(hasattr(model, part) for part in ("forward_intermediates", "num_prefix_tokens", "blocks")):
        raise InputError(f"backbone.name {name} is not a ViT with tokens: choose one, such as vit_small_patch16_224")


def _create(config: BackboneConfig, **options) -> nn.Module:
    import timm

    try:
        vit = timm.create_model(config.name, num_classes=0, **options)
    except CANNOT_BUILD as error:
        size = "" if config.image_size is None else f" with backbone.image_size {config.image_size}"
        raise InputError(f"backbone {config.name} cannot be built{size}: {one_line(error, 120)}") from error
    except OSError as error:
        reason = one_line(error, 200)
        raise UnavailableError(f"backbone {config.name}: its weights could not be loaded: {reason}") from error
    check_vit(vit, config.name)
    return vit


def _require_download(name: str, reachable: Callable[[str], bool] | None) -> None:
    """Raise an error at once if the hub cannot be reached, which timm would retry for most of a minute."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    config: Any = timm.get_pretrained_cfg(name)
    files = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", config.hf_hub_filename)
    hub = config.hf_hub_id
    if hub and any(isinstance(try_to_load_from_cache(hub, file), str) for file in files if file):
        return
    if reachable is not None and not reachable(url := constants.ENDPOINT if hub else str(config.url)):
        raise UnavailableError(
            f"the weights of {name} are not on this machine and {url} cannot be reached: pass a local file with "
            "--backbone.weights FILE, or train without a download: python train.py --config configs/digits.yaml"
        )
