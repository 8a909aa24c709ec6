"""Send an offline session to the ClearML server: python -m tracking.send SESSION.zip

In addition to the SDK's own import, the model becomes an output model with its framework and labels, and a failed run
becomes a failed task.
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from common.arguments import Parser, path_option
from common.errors import EnvironmentFault, UserError, exit_code_of, one_line
from common.text import printable
from tracking.clearml_task import FAILED, MODEL, attempt, server_problem


def send(session: Path) -> str:
    """Import an offline session, and return the id of its task.

    Raises UserError for a file that is not a session, EnvironmentFault if no server accepts it.
    """
    if not session.exists():
        raise UserError(f"{printable(session)} does not exist: name the file that the run printed at its end")
    if problem := server_problem():
        raise problem
    from clearml import Task

    Task.set_offline(False)
    task_id, error = attempt(Task.import_offline_session, str(session))
    if isinstance(error, ValueError | BadZipFile):
        raise UserError(f"{printable(session)} is not an offline session of ClearML: {one_line(error, 160)}") from error
    if error is None:
        _, error = attempt(_complete, Task.get_task(task_id=task_id))
    if error is not None:
        reason = f"{type(error).__name__}: {one_line(error, 160)}"
        raise EnvironmentFault(f"{printable(session)} was not sent completely ({reason}): run this again") from error
    return task_id


def _complete(task: Any) -> None:
    """Register artifacts that `upload` marked as models, and mark the task of a failed run as failed."""
    from clearml import OutputModel

    models = {name: artifact for name, artifact in task.artifacts.items() if MODEL in artifact.metadata}
    if models:
        task.mark_started(force=True)  # the import has completed it
    for name, artifact in models.items():
        labels = {key: int(value) for key, value in artifact.metadata.items() if key != MODEL}
        framework = artifact.metadata[MODEL]
        model = OutputModel(task=task, name=name, framework=framework, label_enumeration=labels or None)
        model.update_weights(register_uri=artifact.url)
    if FAILED in (task.get_tags() or []):
        task.mark_failed(force=True)
    elif models:
        task.mark_completed(force=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises UserError."""
    parser = Parser(prog="-m tracking.send", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=path_option, metavar="SESSION.zip", help="file or folder of an offline session")
    return parser.parse_args(argv)


def main() -> None:
    print(f"sent to ClearML task {send(parse().session)}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
