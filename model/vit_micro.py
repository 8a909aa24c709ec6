"""A ViT with 3.6 M parameters for 32x32 images, whose weights are small enough for the repository.

`vit_micro()` builds it, `load_vit_micro()` loads the distilled weights in `weights/`, which
`distillation/train_vit_micro.py` trained without labels on the CIFAR-100 training images.
"""

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from timm.models.vision_transformer import VisionTransformer

from .errors import InputError

WEIGHTS = Path(__file__).parent / "weights" / "vit_micro.safetensors"
# What distillation/train_vit_micro.py prints as "sha256" for the file above.
WEIGHTS_SHA256 = "e9a397cd7aa8e73f4cffc91e781757421c0d991d8c19ad2da83070997de05807"

# Per-channel mean and standard deviation of the CIFAR-100 training images, in [0, 1] units.
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)

IMAGE_SIZE = 32


def vit_micro(drop_path_rate: float = 0.0) -> VisionTransformer:
    """A randomly initialised timm VisionTransformer without a classifier.

    Input: x_B3HW, H = W = 32 pixels, normalised with MEAN and STD. `forward_features` gives 65 tokens (the
    class token, then 8 x 8 patches of 4 pixels) of 192 features; `forward` gives the class token, (B, 192).
    8 blocks, 3 heads, 0.5 GFLOP per image. drop_path_rate: stochastic depth of the last block, rising linearly
    from 0 at the first.
    """
    model: Any = VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=4,
        num_classes=0,
        embed_dim=192,
        depth=8,
        num_heads=3,
        class_token=True,
        global_pool="token",
        drop_path_rate=drop_path_rate,
    )
    model.pretrained_cfg = {
        "architecture": "vit_micro",
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": MEAN,
        "std": STD,
        "num_classes": 0,
    }
    return model


def load_vit_micro(path: Path = WEIGHTS) -> VisionTransformer:
    """The distilled model: float32 weights, evaluation mode, on the CPU.

    path: a safetensors state dict (stored as float16), which must hash to WEIGHTS_SHA256.
    Raises InputError if the file cannot be read or has another hash, before it is parsed.
    """
    advice = f"restore it with `git checkout -- {_shown(path)}`"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the weights {path} ({error.strerror}): {advice}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != WEIGHTS_SHA256:
        raise InputError(f"the weights {path} have SHA-256 {found}, expected {WEIGHTS_SHA256}: {advice}")
    model = vit_micro()
    state = {name: tensor.float() for name, tensor in load_safetensors(content).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def _shown(path: Path) -> Path:
    """The path relative to the repository, if possible."""
    root = Path(__file__).resolve().parent.parent
    return path.resolve().relative_to(root) if path.resolve().is_relative_to(root) else path
