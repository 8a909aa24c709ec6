"""Shared fixtures: where real data and weights may be found, and a small run on digits."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Small tensors are slower on two threads than on one, by far where another process wants the cores as well.
torch.set_num_threads(1)

# Stored features of this session only: one that an older version of the code wrote would hide what a change breaks.
_CACHE = tempfile.mkdtemp(prefix="vision-moe-tests-")
os.environ["VISION_MOE_CACHE"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

CLIP = "vit_base_patch16_clip_quickgelu_224.openai"


def run_program(*arguments, timeout=300, **environment):
    """Run `python ARGUMENTS` in the project as a user would, off ClearML unless the environment says otherwise."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with CIFAR-100 and the ViT-B/16, which VISION_MOE_ASSETS names."""
    folder = os.environ.get("VISION_MOE_ASSETS")
    if not folder:
        pytest.skip("VISION_MOE_ASSETS is not set: no folder with cifar-100-python/ and ViT-B/16 weights to test on")
    missing = [name for name in ("cifar-100-python", f"{CLIP}.safetensors") if not (Path(folder) / name).exists()]
    assert not missing, f"VISION_MOE_ASSETS={folder} lacks {', '.join(missing)}"
    return Path(folder)
