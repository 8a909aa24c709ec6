"""Options of a benchmark's shortest form, and what it has written."""

import json

TINY = ["--tiny", "--device", "cpu", "--seconds", "0.05", "--out"]


def read(folder, name):
    return json.loads((folder / f"{name}_tiny.json").read_text())
