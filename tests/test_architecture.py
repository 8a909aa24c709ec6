"""The rooms: imports go downwards only, the library is self-contained, and importing has no side effects."""

import ast
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT

LAYERS = (
    {"common", "analysis", "model"},
    {"data"},
    {"config"},
    {"features", "storage"},
    {"tracking"},
    {"training", "evaluation", "compression"},
    {"assembly", "deployment"},
    {"benchmarks", "distillation", "tuning"},
    {"train", "evaluate", "predict", "compress", "export", "tune"},
)
"""From bottom to top: each room imports only rooms of lower levels, none of its own level."""
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
FEW = {"data": {"common"}, "distillation": {"common", "model"}}
"""Rooms that use fewer rooms than allowed."""
MODEL_NEEDS = {"torch", "timm", "safetensors", "huggingface_hub"}  # timm brings the last two


def sources() -> list[Path]:
    """Every Python file of the project except its tests."""
    folders = (path for path in ROOT.iterdir() if path.is_dir() and path.name in RANK)
    return [*ROOT.glob("*.py"), *chain.from_iterable(folder.rglob("*.py") for folder in folders)]


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports by absolute names, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}


def test_every_room_has_its_place():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    rooms = {room_of(ROOT / line) for line in tracked.stdout.split()}
    assert rooms - {"tests"} == set(RANK)


def test_imports_go_downwards_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in sources()
        for other in imported(path) & set(RANK) - {room_of(path)}
        if RANK[other] >= RANK[room_of(path)] or other not in FEW.get(room_of(path), RANK)
    ]
    assert not wrong


def test_the_library_imports_torch_timm_and_itself():
    for path in (ROOT / "model").rglob("*.py"):
        foreign = imported(path) - MODEL_NEEDS - sys.stdlib_module_names
        assert not foreign, f"{path.relative_to(ROOT)} imports {', '.join(foreign)}"
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        assert not any(isinstance(name, ast.Name) and name.id == "print" for name in calls), path


def test_analysis_needs_no_torch():
    assert not [path for path in (ROOT / "analysis").rglob("*.py") if imported(path) & {"torch", "timm"}]


IMPORT_ALL = """
import importlib, random, sys, tempfile, threading
import matplotlib.pyplot, numpy, sklearn.datasets, timm, torch, torchvision

tempfile.gettempdir()  # which tries folders once
numpy.random.seed(0), random.seed(0), torch.manual_seed(0)
state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy(), torch.get_default_dtype()
threads, names, found = threading.active_count(), sys.argv[1:], []

def hook(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("socket.connect", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename", "signal.signal"):
        found.append((event, str(arguments)[:200]))

sys.addaudithook(hook)
for name in names:
    importlib.import_module(name)
assert not found, found
assert threads == threading.active_count()
assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
assert (state[2] == numpy.random.get_state()[1]).all() and state[3] == torch.get_default_dtype()
"""


@pytest.mark.slow
def test_to_import_anything_does_nothing():
    relative = (path.relative_to(ROOT).with_suffix("") for path in sources())
    names = sorted({".".join(path.parts).removesuffix(".__init__") for path in relative})
    words = [sys.executable, "-B", "-c", IMPORT_ALL, *names]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.slow
def test_programs_start_without_what_takes_seconds():
    """It is imported where it is needed, most of it while images are read or after the scores."""
    slow = {"timm", "torchvision", "sklearn", "scipy", "matplotlib", "clearml", "torch._dynamo", "torch._inductor"}
    code = f"import sys, train, evaluate, predict, compress, export, tune; print(*sorted({slow} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.split()) == (0, [])
