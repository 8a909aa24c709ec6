"""The teachers of a student whose training was interrupted: distillation continues when train.py resumes it."""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from assembly.loading import load_trained
from assembly.pipeline import compile_blocks
from common.distributed import world
from common.errors import UserError, one_line, say
from common.files import write_json
from common.text import command, printable
from config.config import Config
from model.moe_vit import AnyMoE, MoEViT
from storage.described import describe
from storage.folder import RunFolder
from storage.resume import Start
from training.teacher import Teacher


@dataclass(frozen=True)
class Teachers:
    """The teacher runs and their settings for `Teacher`. quantise: the later step of compress.py, if any.

    Stored in the student's folder while the student is in training.
    """

    runs: list[str]
    temperature: float
    weight: float
    quantise: str | None = None

    def keep(self, run: RunFolder) -> None:
        """Store them for a later process."""
        write_json(run.teachers, asdict(self))

    def teach(self, models: Sequence[AnyMoE], config: Config, device: torch.device) -> Teacher:
        """Teacher models for a student of this configuration: copies, compiled like its own model."""
        own = [m.on(m.backbone) if isinstance(m, MoEViT) else copy.deepcopy(m) for m in models]
        for model in own:
            compile_blocks(config, model, device)
        return Teacher(own, self.temperature, self.weight)


def teacher_of(start: Start, config: Config, device: torch.device) -> Teacher | None:
    """The teacher of a resumed run whose compression has not finished; None for any other run.

    Raises as `named_teachers`.
    """
    run, found = start.resumed, named_teachers(start)
    if run is None or found is None:
        return None
    models = []
    for path in map(Path, found.runs):
        with _naming(run, path):
            backbone = describe(RunFolder(path))["config"]["backbone"]["name"]
            moved = config.backbone.weights if backbone == config.backbone.name else None
            models.append(load_trained(path, str(device), moved, say).model)
    if world().first:
        print(f"teachers     {', '.join(map(printable, found.runs))}")
    if found.quantise is not None:
        then = command("compress.py", run.path, "--out", f"{run.path}-{found.quantise}", "--quantise", found.quantise)
        say(f"--quantise {found.quantise} is not done here: when this run has ended, {then}")
    return found.teach(models, config, device)


def named_teachers(start: Start) -> Teachers | None:
    """The runs that teach a resumed run whose compression has not finished; None for any other run. Loads no model.

    Raises UserError if there is no checkpoint, because the initial weights of the run are not stored, if a teacher is
    missing, and for an invalid file.
    """
    run = start.resumed
    if run is None or not run.teachers.is_file():
        return None
    try:
        found = Teachers(**json.loads(run.teachers.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{run.teachers} was not written by compress.py: delete it to continue without teachers"
        ) from error
    if start.checkpoint is None:
        raise UserError(
            f"{printable(run.path)} was interrupted before its first checkpoint: delete it, and give compress.py "
            "--distil again"
        )
    for path in map(Path, found.runs):
        with _naming(run, path):
            describe(RunFolder(path))
    return found


@contextmanager
def _naming(run: RunFolder, teacher: Path) -> Iterator[None]:
    """Say in a UserError which run needs the teacher that cannot be opened."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{printable(run.path)} is distilled from {printable(teacher)}, which cannot be opened "
            f"({one_line(error, 100)}): restore it, or delete {printable(run.teachers)} to continue without"
        ) from error
