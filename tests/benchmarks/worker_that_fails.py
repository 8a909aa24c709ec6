"""A benchmark's worker with a section that fails."""

from benchmarks.processes import work


def fails(options, device):
    raise ValueError("no room")


if __name__ == "__main__":
    work([], {"good": lambda options, device: 1, "bad": fails, "after": lambda *_: 2})
