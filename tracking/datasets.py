"""Images from ClearML datasets."""

from pathlib import Path

from common.errors import EnvironmentFault, UserError, one_line
from tracking.clearml_runs import quiet
from tracking.clearml_task import attempt, server_problem


def fetch_dataset(name: str) -> Path:
    """A read-only local copy of a ClearML dataset, downloaded if it is not in ClearML's cache yet.

    name: PROJECT/NAME or NAME (the newest version), or the id of a dataset. Raises UserError if no server is configured
    or it has no such dataset, EnvironmentFault if it does not answer or the files cannot be downloaded.
    """
    if problem := server_problem():
        raise problem
    from clearml import Dataset, Task

    Task.set_offline(False)
    project, _, last = name.rpartition("/")
    is_id = len(name) == 32 and all(letter in "0123456789abcdef" for letter in name)
    wanted = {"dataset_id": name} if is_id else {"dataset_name": last, "dataset_project": project or None}
    with quiet():
        dataset, error = attempt(Dataset.get, only_completed=True, silence_alias_warnings=True, **wanted)
    if dataset is None:
        reason = one_line(str(error), 160) if error else "none found"
        raise UserError(
            f"data.clearml_dataset {name} is not a finished dataset on the ClearML server ({reason}): give "
            "PROJECT/NAME or its id"
        ) from error
    folder, error = attempt(dataset.get_local_copy)
    if folder is None:
        reason = f"{type(error).__name__}: {one_line(str(error), 160)}" if error else "no files"
        raise EnvironmentFault(f"the files of ClearML dataset {name} cannot be downloaded ({reason})") from error
    return Path(folder)
