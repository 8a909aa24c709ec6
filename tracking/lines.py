"""RUN/metrics.jsonl, opened for appending."""

import json
from pathlib import Path
from typing import Any, TextIO

from common.errors import EnvironmentFault


def open_lines(path: Path, last_step: int | None) -> tuple[TextIO, list[dict[str, Any]]]:
    """Open the file for appending, without lines after last_step and truncated ones; and the lines that remain.

    Raises EnvironmentFault.
    """

    def keep(line: bytes) -> bool:
        try:
            step = json.loads(line)["step"]
            return line.endswith(b"\n") and (last_step is None or step <= last_step)
        except (ValueError, KeyError, TypeError):
            return False

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if not all(map(keep, lines)):
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(b"".join(filter(keep, lines)))
            temporary.replace(path)
        return path.open("a", encoding="utf-8"), [json.loads(line) for line in filter(keep, lines)]
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be written: {error.strerror or error}") from error
