"""Stale results of a run that was trained further: they are kept, and marked, until there are new ones."""

import json
from contextlib import suppress
from html import escape
from typing import Any

from common.files import write_json, write_text
from storage.folder import RunFolder

STALE = "stale"  # the key of metrics.json with the reason


def mark_stale(run: RunFolder, reason: str) -> None:
    """Mark metrics.json and report.html, if they exist, as results of earlier weights. Raises EnvironmentFault."""
    with suppress(OSError, ValueError):
        results = json.loads(run.results.read_text(encoding="utf-8"))
        if isinstance(results, dict) and not why_stale(results):
            write_json(run.results, {STALE: reason, **results})
    with suppress(OSError, ValueError):
        page = run.report.read_text(encoding="utf-8")
        note = f'<p class="{STALE}" style="color: #a00000"><strong>{escape(reason)}.</strong></p>'
        if f'class="{STALE}"' not in page:
            page = page.replace("<body>", f"<body>\n{note}", 1)
            write_text(run.report, page)


def why_stale(results: dict[str, Any]) -> str:
    """Why the results of metrics.json are stale; empty if they are not."""
    return str(results.get(STALE, ""))
