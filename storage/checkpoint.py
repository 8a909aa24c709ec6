"""Save and resume: checkpoints hold the trained part only, plus the name and fingerprint of the backbone."""

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


# What every checkpoint and model.json must have, and what a checkpoint to resume from must have besides.
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
    "said": [str],
    "random": dict,
}


def save_checkpoint(path: Path, state: dict[str, Any], kept: str = "") -> None:
    """Write a checkpoint of tensors and plain values under a temporary name, then rename it.

    The one before stays beside it, for the case that this one turns out corrupt. kept: what remains where this fails.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a file of our own, because torch.save hides why it could not open one
            torch.save({"format_version": FORMAT_VERSION, **state}, file)

    write_atomically(path, write, kept, previous(path))


def previous(path: Path) -> Path:
    """The checkpoint that `path` replaced."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or the one before it where it is corrupt, onto the CPU without running code.

    Raises UserError where neither can be used.
    """
    try:
        return _read_checkpoint(path)
    except UserError:
        before = previous(path)
        if not before.is_file():
            raise
        state = _read_checkpoint(before)
        warn(f"{path} is corrupt or missing; going on with {before} of epoch {state['epoch']}")
        return state


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: the run has no such checkpoint; start it anew in another --run_dir")
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the readers fail in every way there is
        raise UserError(
            f"{path} is truncated or no checkpoint ({type(error).__name__}: {one_line(error, 100)}): "
            "go without it, in a new run"
        ) from error
    found = state.get("format_version") if isinstance(state, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        found = found if isinstance(found, int) else None
        raise UserError(f"{path} has checkpoint format {found}, this version reads {FORMAT_VERSION}: train it anew")
    require_like(state, {**IDENTITY, "model": dict, "epoch": int}, path)
    return state


def require_like(value: dict[str, Any], pattern: dict[str, Any], path: Path) -> None:
    """Raise UserError unless `value` has the entries of `pattern`, {"name": type, "names": [type], ...}."""
    for key, expected in pattern.items():
        found = value.get(key)
        if isinstance(expected, dict) and isinstance(found, dict):
            require_like(found, expected, path)
        elif isinstance(expected, list) and isinstance(found, list):
            if not all(type(item) is expected[0] for item in found):
                raise UserError(f"{path} is not what train.py writes: {key} is not a list of {expected[0].__name__}")
        elif isinstance(expected, dict | list) or not isinstance(found, expected) or isinstance(found, bool):
            raise UserError(f"{path} is not what train.py writes: it has no usable {key}; train it anew")


@contextmanager
def fitting(source: Path) -> Iterator[None]:
    """Raise UserError where what `source` holds does not fit the model that is to take it."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        reason = one_line(error)
        raise UserError(f"{source} does not fit the model that its configuration describes: {reason}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load moments and learning rates; every other setting is that of the configuration and this machine.

    Raises ValueError where shapes differ from those of the parameters.
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
    """The stored learning rate as this machine keeps it: on a GPU a tensor, which a captured step reads."""
    return torch.full_like(own, float(stored)) if isinstance(own, torch.Tensor) else float(stored)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Load a state dict strictly. Raises UserError where names or shapes differ from the configuration."""
    with fitting(source):
        model.load_state_dict(weights)


def check_inputs(stored: dict[str, Any], now: dict[str, Any], source: Path) -> None:
    """Raise UserError unless backbone and data are those that the weights in `source` were trained on.

    stored, now: what assembly.pipeline.identity describes.
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
            raise UserError(f"{source} was trained on other data: its {split} images differ from those of --data.root")


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
    """Put back what `random_state` took."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch (all devices). After the tracker is opened: ClearML reseeds them.

    deterministic: also forbid PyTorch what may differ between two runs on a GPU, for this process.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for, before its first use
        torch.use_deterministic_algorithms(True)
