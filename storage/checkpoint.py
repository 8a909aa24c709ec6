"""Checkpoints: they hold the trained part only, plus the name and fingerprint of the backbone."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import UserError, one_line, warn
from common.files import write_atomically
from model.archives import check_archive

FORMAT_VERSION = 1


# Entries of every checkpoint and of model.json, and the entries that resuming needs.
IDENTITY = {
    "config": dict,
    "backbone": {"name": str, "fingerprint": str},
    "data": {"train": str, "validation": str, "test": str},
    "class_names": [str],
    "feature_shape": [int],
}
RESUMABLE = {
    "model": dict,
    "optimizer": {"state": dict, "param_groups": [dict]},
    "epoch": int,
    "step": int,
    "best": {"epoch": int, "macro_f1": float},
    "improved": int,
    "warned": [str],
    "random": dict,
}


def save_checkpoint(path: Path, state: dict[str, Any], kept: str = "") -> None:
    """Write a checkpoint of tensors and plain values atomically.

    The previous one is kept in the same folder, in case this one becomes corrupt. kept: what remains after a failure.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # torch.save hides why it cannot open a file
            torch.save({"format_version": FORMAT_VERSION, **state}, file)

    write_atomically(path, write, kept, previous(path))


def previous(path: Path) -> Path:
    """The checkpoint that `path` replaced."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or the previous one if it is corrupt, onto the CPU without running code.

    Raises UserError if neither can be used.
    """
    try:
        return _read_checkpoint(path)
    except UserError:
        before = previous(path)
        if not before.is_file():
            raise
        state = _read_checkpoint(before)
        warn(f"{path} is corrupt or missing; continuing with {before} of epoch {state['epoch']}")
        return state


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: start a new run in another --run_dir")
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise all kinds of errors on a corrupt file
        raise UserError(
            f"{path} is truncated or not a checkpoint ({type(error).__name__}: {one_line(error, 100)}): start a new run"
        ) from error
    found = state.get("format_version") if isinstance(state, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        found = found if isinstance(found, int) else None
        raise UserError(f"{path} has checkpoint format {found}, this version reads {FORMAT_VERSION}: train again")
    require_like(state, {**IDENTITY, "model": dict, "epoch": int}, path)
    if "said" in state:  # the name of this entry before version 0.2
        state["warned"] = state.pop("said")
    return state


def require_like(value: dict[str, Any], pattern: dict[str, Any], path: Path) -> None:
    """Raise UserError unless `value` matches `pattern`, {"name": type, "names": [type], ...}."""
    for key, expected in pattern.items():
        found = value.get(key)
        if isinstance(expected, dict) and isinstance(found, dict):
            require_like(found, expected, path)
        elif isinstance(expected, list) and isinstance(found, list):
            if not all(type(item) is expected[0] for item in found):
                raise UserError(f"{path} was not written by train.py: {key} is not a list of {expected[0].__name__}")
        elif isinstance(expected, dict | list) or not isinstance(found, expected) or isinstance(found, bool):
            raise UserError(f"{path} was not written by train.py: it has no usable {key}; train again")


@contextmanager
def fitting(source: Path) -> Iterator[None]:
    """Raise UserError if the content of `source` does not fit the model that loads it."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        reason = one_line(error)
        raise UserError(f"{source} does not fit the model of its configuration: {reason}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load moments and learning rates; all other settings come from the configuration and this machine.

    Raises ValueError if shapes differ from those of the parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in state["state"].items():
        for name, value in moments.items():
            if value.shape != (() if name == "step" else parameters[index].shape):
                raise ValueError(f"{name} of parameter {index} has shape {tuple(value.shape)}")
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [{**own, "params": stored["params"], "lr": _like(own["lr"], stored["lr"])} for stored, own in groups]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def _like(own: float | torch.Tensor, stored: float | torch.Tensor) -> float | torch.Tensor:
    """The stored learning rate in the type of this machine: on a GPU a tensor, which a captured step reads."""
    return torch.full_like(own, float(stored)) if isinstance(own, torch.Tensor) else float(stored)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Load a state dict strictly. Raises UserError if names or shapes differ from the configuration."""
    with fitting(source):
        model.load_state_dict(weights)


def check_inputs(stored: dict[str, Any], now: dict[str, Any], source: Path) -> None:
    """Raise UserError unless backbone and data are those of the training.

    stored, now: dicts from assembly.pipeline.identity. source: the file of the weights, for the message.
    """
    before, after = stored["backbone"], now["backbone"]
    if before["fingerprint"] != after["fingerprint"]:
        raise UserError(
            f"{source} was trained on backbone {before['name']} with fingerprint {before['fingerprint'][:12]}, but "
            f"{after['name']} here has {after['fingerprint'][:12]}: pass the same file with --backbone.weights"
        )
    if stored.get("feature_shape") != now.get("feature_shape"):
        raise UserError(
            f"{source} reads features of shape {stored['feature_shape']}, but the backbone gives {now['feature_shape']}"
        )
    for split, digest in stored["data"].items():
        if now["data"].get(split) != digest:
            raise UserError(f"{source} was trained on other data: its {split} images differ from those in --data.root")


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random number generator that a run on `device` uses, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(internal), gauss],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore a state from `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch (all devices).

    deterministic: use only deterministic algorithms on a GPU, for the rest of the process.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs this before its first use
        torch.use_deterministic_algorithms(True)
