"""Save and resume: checkpoints hold the trained part only, plus the name and fingerprint of the backbone."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from engine.run_folder import RunFolder, write_atomically, write_json
from errors import UserError

FORMAT_VERSION = 1
REWRITE = "delete model.json, and evaluate.py will write it and the weights again from checkpoints/best.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values under a temporary name, then rename it."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a file of our own, because torch.save hides why it could not open one
            torch.save({"format_version": FORMAT_VERSION, **state}, file)

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running code. Raises errors.UserError where it cannot be used."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the run has no such checkpoint; start it anew in another --run_dir")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the reader fail in every way there is
        raise UserError(
            f"{path} is truncated or no checkpoint ({type(error).__name__}): go without it, in a new run"
        ) from error
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        found = state.get("format_version") if isinstance(state, dict) else None
        raise UserError(f"{path} has checkpoint format {found}, this version reads {FORMAT_VERSION}: train it anew")
    if missing := {"config", "backbone", "data", "model", "epoch"} - state.keys():
        raise UserError(f"{path} is not a whole checkpoint: it lacks {', '.join(sorted(missing))}")
    return state


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Load a state dict strictly. Raises errors.UserError where names or shapes differ from the configuration."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} does not fit the model that its configuration describes: {reason}") from error


def check_inputs(stored: dict[str, Any], now: dict[str, Any], source: Path) -> None:
    """Raise errors.UserError unless backbone and data are those that the weights in `source` were trained on.

    stored, now: what engine.pipeline.identity describes.
    """
    before, after = stored["backbone"], now["backbone"]
    if before["fingerprint"] != after["fingerprint"]:
        raise UserError(
            f"{source} was trained on backbone {before['name']} with fingerprint {before['fingerprint'][:12]}, but "
            f"{after['name']} here has {after['fingerprint'][:12]}: pass the same file with --backbone.weights"
        )
    for split, digest in stored["data"].items():
        if now["data"][split] != digest:
            raise UserError(f"{source} was trained on other data: its {split} images differ from those of --data.root")


def export_model(run: RunFolder) -> None:
    """Write the best checkpoint as model.safetensors, and as model.json what the weights mean nothing without."""
    best = load_checkpoint(run.best)
    weights = {name: value.contiguous() for name, value in best["model"].items()}
    write_atomically(run.weights, lambda temporary: save_file(weights, temporary, metadata={"format": "pt"}))
    write_json(run.model, {key: value for key, value in best.items() if key != "model"})


def read_description(run: RunFolder) -> dict[str, Any]:
    """What model.json says. Raises errors.UserError where it is unreadable, incomplete or of another version."""
    try:
        described = json.loads(run.model.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run.model} is not readable JSON: {REWRITE}") from error
    keys = {"config", "backbone", "data", "class_names", "feature_shape"}
    if not isinstance(described, dict) or described.get("format_version") != FORMAT_VERSION or keys - described.keys():
        raise UserError(f"{run.model} is not of format {FORMAT_VERSION}: {REWRITE}")
    return described


def load_exported(run: RunFolder, model: nn.Module) -> None:
    """Load model.safetensors into `model`. Raises errors.UserError where it is unreadable or does not fit."""
    try:
        weights = load_file(run.weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{run.weights} is truncated or no safetensors file ({error}): {REWRITE}") from error
    load_weights(model, weights, run.weights)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random number generator that a run on `device` uses, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices). After the tracker is opened: ClearML reseeds them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
