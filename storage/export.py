"""The exported model: model.safetensors, and model.json with configuration, backbone, data and classes."""

import hashlib
import json
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_atomically, write_json
from storage.checkpoint import FORMAT_VERSION, IDENTITY, load_weights, require_like
from storage.folder import RunFolder


def export_model(run: RunFolder, best: dict[str, Any]) -> None:
    """Write model.safetensors and model.json.

    best: the content of checkpoints/best.pt, as returned by `Trainer.fit`. Raises EnvironmentFault.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in best["model"].items()}
    content = save(weights, metadata={"format": "pt"})
    write_atomically(run.weights, lambda temporary: temporary.write_bytes(content))
    described = {key: value for key, value in best.items() if key != "model"} | {"format_version": FORMAT_VERSION}
    write_json(run.model, described | {"weights_sha256": hashlib.sha256(content).hexdigest()})


def read_description(run: RunFolder) -> dict[str, Any]:
    """The content of model.json. Raises UserError if it is unreadable, incomplete or of another version."""
    try:
        described = json.loads(run.model.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{run.model} is not readable JSON: {_remedy(run)}") from error
    if not isinstance(described, dict) or described.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{run.model} is not of format {FORMAT_VERSION}: {_remedy(run)}")
    require_like(described, IDENTITY, run.model)
    return described


def load_exported(run: RunFolder, model: nn.Module, sha256: str | None = None) -> None:
    """Load model.safetensors into `model`. Raises UserError as `load_weights_of`, and if it does not fit."""
    weights = load_weights_of(run, sha256)
    try:
        load_weights(model, weights, run.weights)
    except UserError as error:
        raise UserError(f"{error}; {_remedy(run)}") from error


def load_weights_of(run: RunFolder, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of model.safetensors by name.

    sha256: checksum from model.json (None in runs of earlier versions). Raises UserError if the file is unreadable or
    altered.
    """
    try:
        content = run.weights.read_bytes()
        if sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise UserError(
                f"{run.weights} is corrupt: its checksum is not the one in {run.model.name}; {_remedy(run)}"
            )
        return load(content)
    except OSError as error:
        raise UserError(f"{run.weights} cannot be read ({error.strerror}): {_remedy(run)}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{run.weights} is truncated or not a safetensors file ({error}): {_remedy(run)}") from error


def _remedy(run: RunFolder) -> str:
    """What to do about a corrupt model.safetensors or model.json."""
    if run.best.is_file():
        return f"delete {run.model} and run this again, which exports both files from {run.best}"
    return f"there is no {run.best} to export it from, so copy the run folder again from an intact copy"
