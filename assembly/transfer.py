"""A run that starts from another one: read that run, check that it fits, and copy its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.errors import UserError, as_environment_fault, one_line
from common.text import counted, printable, quoted
from config.config import Config, flatten
from config.origin import GROWING, SHAPING
from model.moe_vit import AnyMoE
from model.parts import PARTS, class_rows, part_of
from model.transfer import Frozen, Shared, take
from storage.described import describe
from storage.export import load_weights_of
from storage.folder import RunFolder
from tracking.tasks import tasks_of

NAMED = 5  # classes named in the summary


@dataclass(frozen=True)
class Origin:
    """The run that init names: its folder, the content of model.json, and its weights."""

    run: RunFolder
    described: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def task_id(self) -> str | None:
        """Its ClearML task on a server, if it has one."""
        online = [task["task_id"] for task in tasks_of(self.run.path) if task["mode"] == "clearml"]
        return online[-1] if online else None

    def shared(self, class_names: Sequence[str]) -> Shared:
        """The classes that it shares with a run on these classes."""
        return Shared.by_name(class_names, self.described["class_names"])

    def require_shape(self, feature_shape: Sequence[int]) -> None:
        """Raise UserError unless it reads features of this shape."""
        before = self.described["feature_shape"]
        if before != list(feature_shape):
            raise UserError(
                f"--init {quoted(self.run.path)} reads features of shape {before}, but those here have "
                f"{list(feature_shape)}: use the backbone, backbone.features and data.image_size of the run"
            )

    def require_backbone(self, config: Config, backbone: dict[str, str]) -> None:
        """Raise UserError unless it was trained on this backbone. backbone: name and fingerprint, as in identity()."""
        before = self.described["backbone"]
        if before["fingerprint"] != backbone["fingerprint"]:
            features = flatten(self.described["config"]).get("backbone.features")
            raise UserError(
                f"--init {quoted(self.run.path)} was trained on backbone {before['name']} with features {features} and "
                f"fingerprint {before['fingerprint'][:12]}, but {backbone['name']} with features "
                f"{config.backbone.features} here has {backbone['fingerprint'][:12]}: use those of the run, or start "
                "without --init"
            )


def read_origin(config: Config) -> Origin | None:
    """The run that config.init names (None: no run); it must fit the configuration.

    Raises UserError for a folder that is not a run, a corrupt run, and options that would give the model different
    weights.
    """
    if config.init is None:
        return None
    run = RunFolder(config.init)
    described = describe(run)
    named = f"--init {quoted(run.path)}"
    theirs, ours = flatten(Config().to_dict()) | flatten(described["config"]), flatten(config.to_dict())
    if {theirs["experts.head_weights"], str(theirs["experts.weights"])} != {"float32"}:
        raise UserError(f"{named} stores its experts in fewer bits: start from the run that it was made from")
    before_add, now = theirs["experts.sizes"], ours["experts.sizes"]
    if config.experts.add and now[: config.experts.first_new] == before_add:
        ours |= {key: theirs[key] for key in GROWING}
    for key in SHAPING:
        if theirs.get(key) != ours[key]:
            raise UserError(f"{named} has {key} {theirs.get(key)}, and not {ours[key]}: leave {key} out")
    with as_environment_fault():
        return Origin(run, described, load_weights_of(run, described.get("weights_sha256")))


def begin(model: AnyMoE, origin: Origin, class_names: Sequence[str], feature_shape: Sequence[int]) -> dict[str, Any]:
    """Copy the weights of `origin` into a new model; returns a record of what was copied, as plain values.

    Raises UserError if they do not fit.
    """
    origin.require_shape(feature_shape)
    shared = origin.shared(class_names)
    try:
        take(model, origin.weights, shared)
    except ValueError as error:
        raise UserError(f"--init {quoted(origin.run.path)} does not fit: {one_line(error)}") from error
    return {
        "run": str(origin.run.path),
        "epoch": origin.described.get("epoch"),
        "task_id": origin.task_id,
        "classes": [class_names[row] for row in shared.new.tolist()],
        "classes_before": len(origin.described["class_names"]),
    }


def freeze(config: Config, model: AnyMoE, taken: dict[str, Any] | None, class_names: Sequence[str]) -> Frozen | None:
    """Freeze the parts of config.freeze, within what was `taken` (see begin). Raises UserError."""
    if taken is None or not config.freeze:
        return None
    shared = Shared.by_name(class_names, taken["classes"])
    try:
        return Frozen(model, config.freeze, shared, len(class_names))
    except ValueError as error:
        raise UserError(one_line(error)) from error


def lines(
    config: Config, model: AnyMoE, taken: dict[str, Any], class_names: Sequence[str], frozen: Frozen | None
) -> list[str]:
    """What was copied, what is new and what is trained, for the terminal."""
    rows, common = class_rows(model), len(taken["classes"])
    parameters = dict(model.named_parameters())
    old_parts = [
        part for part in PARTS if any(part_of(name, rows) == part for name in parameters) and (part != "head" or common)
    ]
    shown = ", ".join(part if part != "head" else f"{common} of {len(class_names)} class rows" for part in old_parts)
    found = [f"init         {printable(taken['run'])}, epoch {taken['epoch']}: {shown}"]
    new = [name for name in class_names if name not in set(taken["classes"])]
    if config.experts.add:
        labels = config.experts.labels()[config.experts.grown[-1] :]
        found.append(f"new          {counted(len(labels), 'expert')}: {', '.join(labels)}, with gate columns")
    if new:
        more = f" and {len(new) - NAMED:,} more" if len(new) > NAMED else ""
        found.append(f"new          {counted(len(new), 'class row')}: {printable(', '.join(new[:NAMED]))}{more}")
    if (left := taken["classes_before"] - common) > 0:
        found.append(f"left out     {counted(left, 'class')} of that run that this dataset does not have")
    if frozen is not None:
        total = sum(value.numel() for value in parameters.values())
        trained = total - frozen.count
        found.append(f"frozen       {', '.join(config.freeze)}; {trained:,} of {total:,} parameters are trained")
    if config.optim.lr_of:
        rates = (f"{part} {config.optim.lr * times:g}" for part, times in config.optim.multiples.items())
        found.append(f"rates        {', '.join(rates)}, all others {config.optim.lr:g}")
    return found
