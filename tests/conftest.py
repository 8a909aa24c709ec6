"""Shared fixtures: the location of real data and weights, and a small run on digits."""

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
from filelock import FileLock  # a requirement of PyTorch

from common.errors import exit_code_of
from common.meter import Meter

ROOT = Path(__file__).resolve().parent.parent
# Small tensors are slower on two threads than on one, by far where another process wants the cores as well. PyTorch
# reads it when it is imported, which is not here: the process that only hands tests to workers needs no PyTorch.
os.environ["OMP_NUM_THREADS"] = "1"

# Containers often forbid the files of compiled modules: each of the many processes here would compile all of them anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Stored features of this session only: features from an older version of the code could hide a broken change.
_CACHE = tempfile.mkdtemp(prefix="vision-moe-tests-")
os.environ["VISION_MOE_CACHE"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

# Imports leave a million objects that stay: the collector looks through them neither meanwhile nor afterwards.
gc.disable()

PNG = bytes.fromhex(  # one pixel
    "89504e470d0a1a0a0000000d494844520000000100000001080000000"
    "03a7e9b550000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)
TINY = (
    "--config configs/digits.yaml --data.max_per_class 40 --neck.kind pooled --backbone.features [cls:1,mean:1] "
    "--train.epochs 4 --train.batch_size 32 --router.warmup_steps 5 --optim.lr 0.01"
)
CLIP = "vit_base_patch16_clip_quickgelu_224.openai"


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing
def pytest_xdist_auto_num_workers(config) -> int:
    """One worker more than there are cores, because slow tests wait for a server or a time limit."""
    quick = config.option.markexpr == "not slow"  # then the imports of one more worker cost more than it gains
    return min(4, len(os.sched_getaffinity(0)) + (not quick))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def without_drawing(patch):
    """Figures are built, but only one pixel is written: rendering is slow, and tested elsewhere."""
    from matplotlib.figure import Figure

    patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(PNG))


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch):
    """A line of progress is due every half minute, in whichever test runs then. The tests of the meter set a clock."""
    monkeypatch.setattr(Meter, "next_line", float("inf"))


@pytest.fixture
def undrawn(monkeypatch):
    without_drawing(monkeypatch)


@pytest.fixture
def without_figures(monkeypatch):
    """An evaluation writes no figures: building them takes most of a second, and is tested elsewhere."""
    monkeypatch.setattr("evaluation.figures.draw", lambda *_: [])


def mostly_slow(values, quick):
    """Parameters of a test; all except the `quick` ones are marked slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def run_program(*arguments, **environment):
    """Run `python ARGUMENTS` in the project like a user, without ClearML unless the environment enables it."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def import_lazy_modules() -> None:
    """Import the modules that a run imports inside functions, once for all forks of this process."""
    for name in ("train", "evaluate", "evaluation.figures", "evaluation.report", "model.vit_micro", "timm.optim"):
        import_module(name)
    for name in ("datasets", "decomposition", "discriminant_analysis", "model_selection"):
        import_module(f"sklearn.{name}")


def in_a_fork(function) -> tuple[int, str]:
    """Exit code and standard error of a function that runs as a program in a separate process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(write, 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            code = exit_code_of(function)
        finally:
            os._exit(code)
    os.close(write)
    try:
        with os.fdopen(read) as pipe:
            text = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
    except BaseException:  # the time limit of the test
        os.kill(pid, signal.SIGKILL)
        raise


@contextmanager
def running_program(*arguments, **options):
    """`python ARGUMENTS` in the project, as a running Popen; it is killed at the end of the block."""
    with subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder VISION_MOE_ASSETS, with CIFAR-100 and the ViT-B/16."""
    folder = os.environ.get("VISION_MOE_ASSETS")
    if not folder:
        pytest.skip("VISION_MOE_ASSETS is not set: no folder with cifar-100-python/ and ViT-B/16 weights to test on")
    missing = [name for name in ("cifar-100-python", f"{CLIP}.safetensors") if not (Path(folder) / name).exists()]
    assert not missing, f"VISION_MOE_ASSETS={folder} lacks {', '.join(missing)}"
    return Path(folder)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with ClearML's cache and a configuration that names no server."""
    folder = tmp_path_factory.mktemp("tracking")
    (folder / "clearml.conf").write_text("sdk { development { report_use_subprocess: false } }\n")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a run that train.py made: 500 digits, an early block of the bundled ViT. All workers share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():  # a run that fails half-way keeps another name
            make_tiny_run(Path(tempfile.mkdtemp(dir=folder.parent)) / "tiny").rename(folder)
    return folder


def make_tiny_run(folder: Path) -> Path:
    import train  # here, because most test files do not need its imports

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("evaluation.figures.draw", lambda *_: [])  # a second, and tested elsewhere
        words = ["train.py", *TINY.split(), "--tracking", "none", "--run_dir", str(folder)]
        patch.setattr("sys.argv", words)
        assert exit_code_of(train.main) == 0
    return folder


@pytest.fixture(scope="module")
def splits():
    from data.datasets import DataConfig, load_splits

    return load_splits(DataConfig(name="digits", max_per_class=40))
