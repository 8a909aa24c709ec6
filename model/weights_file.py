"""Loads weights of a ViT from a local file, without running code, with the prefixes of common wrappers removed."""

import re
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .archives import check_archive
from .errors import InputError, one_line

WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(?:module\.)+")
"""Prefixes that torch.compile, FSDP, activation checkpointing and DistributedDataParallel add to names of weights."""


def unwrapped(state: dict[str, Tensor], own: list[str]) -> dict[str, Tensor]:
    """The weights under the model's own names, without prefixes of wrappers.

    own: names of the model's weights. If all of them are under one prefix, as in the checkpoint of a larger model, the
    rest of the file is ignored. Raises ValueError if they are under several.
    """
    state = {WRAPPERS.sub("", WRAPPERS.sub("", name)): value for name, value in state.items()}
    prefixes = sorted({name.removesuffix(own[0]) for name in state if name.endswith("." + own[0])})
    whole = [prefix for prefix in prefixes if all(prefix + name in state for name in own)]
    if own[0] in state or not whole:
        return state
    if len(whole) > 1:
        raise ValueError(
            f"it has such weights {' and '.join('under ' + prefix[:-1] for prefix in whole)}: keep one of them"
        )
    return {name.removeprefix(whole[0]): value for name, value in state.items() if name.startswith(whole[0])}


def load_converted(vit: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load a checkpoint as timm does for its own (names converted, position embedding resized), but strictly.

    timm tolerates missing weights, but a partly random backbone must not pass for a pretrained one.
    """
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    place = f"backbone.weights {path} does not fit {name}"
    remedy = f"give weights of {name}, or with --backbone.name the model that the file belongs to"
    own = {key: value.shape for key, value in vit.state_dict().items()}
    try:
        state = unwrapped(state, list(own))
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    try:
        state = convert(state, vit) if convert else state
        for key, shape in own.items():
            if key in state and state[key].shape != shape:
                shapes = f"{key} is {_by(state[key].shape)} in the file and {_by(shape)} in the model"
                raise InputError(f"{place}: it belongs to another model ({shapes}); {remedy}")
        missing, _ = vit.load_state_dict(state, strict=False)
    except InputError:
        raise
    except (RuntimeError, KeyError, AttributeError, IndexError, ValueError, TypeError) as error:
        raise InputError(f"{place}: it belongs to another model ({one_line(error, 120)}); {remedy}") from error
    if missing:
        raise InputError(
            f"{place}: {len(missing)} of its weights are missing from the file, the first is {missing[0]}; {remedy}"
        )


def _by(shape: torch.Size) -> str:
    """A shape as 192x3x16x16."""
    return "x".join(map(str, shape)) or "a single number"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a local file, read without running code. Raises InputError."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"backbone.weights {path} is not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):  # older files are not archives
            check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise all kinds of errors on other files
        raise InputError(
            f"backbone.weights {path} is not a readable file of tensors ({type(error).__name__}): it is truncated, of "
            "another format, or has more than tensors; convert it to .safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"backbone.weights {path} has no state dict: expected names and tensors")
    return state
