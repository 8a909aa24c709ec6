"""Save and resume: checkpoints hold the trained part only, plus the name and fingerprint of the backbone."""

import pickle
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


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values under a temporary name, then rename it."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a file of our own, because torch.save hides why it could not open one
            torch.save({"format_version": FORMAT_VERSION, **state}, file)

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running code. Raises errors.UserError where it cannot be used."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the run has no such checkpoint yet; start it again without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({' '.join(str(error).split())[:160]})") from error
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        found = state.get("format_version") if isinstance(state, dict) else None
        raise UserError(f"{path} has checkpoint format {found}, this version reads {FORMAT_VERSION}: train it anew")
    return state


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Load a state dict strictly. Raises errors.UserError where names or shapes differ from the configuration."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} does not fit the model that its configuration describes: {reason}") from error


def check_backbone(stored: dict[str, str], name: str, fingerprint: str, source: Path) -> None:
    """Raise errors.UserError unless the backbone at hand is the one that the weights were trained on."""
    if stored["fingerprint"] != fingerprint:
        raise UserError(
            f"{source} was trained on backbone {stored['name']} with weights {stored['fingerprint'][:12]}, "
            f"but {name} here has {fingerprint[:12]}: pass the same file with --backbone.weights"
        )


def export_model(run: RunFolder, description: dict[str, Any]) -> None:
    """Write the best checkpoint as model.safetensors and `description` beside it as model.json."""
    best = load_checkpoint(run.best)
    weights = {name: value.contiguous() for name, value in best["model"].items()}
    write_atomically(run.weights, lambda temporary: save_file(weights, temporary, metadata={"format": "pt"}))
    chosen = {"epoch": best["epoch"], "validation_macro_f1": best["macro_f1"]}
    write_json(run.model, {"format_version": FORMAT_VERSION, **chosen, **description})


def load_exported(run: RunFolder, model: nn.Module) -> None:
    """Load model.safetensors into `model`. Raises errors.UserError where it is unreadable or does not fit."""
    try:
        weights = load_file(run.weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{run.weights} is not a readable safetensors file ({error})") from error
    load_weights(model, weights, run.weights)


def random_state() -> dict[str, Any]:
    """The state of every random number generator in use, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices). After the tracker is opened: ClearML reseeds them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
