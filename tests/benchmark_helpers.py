"""Options for the shortest run of a benchmark, and its stored results."""

import json

TINY = ["--tiny", "--device", "cpu", "--seconds", "0.05", "--out"]


def read(folder, name):
    return json.loads((folder / f"{name}_tiny.json").read_text())
