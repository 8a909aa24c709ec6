"""Altered files of every kind that a user may pass: either they are read, or one line says what is wrong with them.

FUZZ_EXAMPLES=20000 pytest tests/test_fuzz.py      longer, and with other inputs each time
"""

import json
import os
import resource
import shutil
import warnings

import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_trainer import make_trainer, splits  # noqa: F401, a fixture

from engine.checkpoint import (
    export_model,
    load_checkpoint,
    load_exported,
    previous,
    read_description,
    save_checkpoint,
    seed_everything,
)
from engine.config import Config, Invocation, config_from_dict, parse_command_line
from engine.pipeline import build_model
from engine.resume import best_kept, finished, load_resumable, metrics_step
from engine.run_folder import RunFolder
from errors import UserError
from model.backbone import _read_weights

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


KILOBYTES = 500_000  # by which the process may grow; the inputs are smaller than a megabyte


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.just([[2**40]]),
    st.recursive(st.integers(-9, 9), lambda inner: st.lists(inner, max_size=3), max_leaves=6),
)


TENSORS = st.sampled_from(
    [
        torch.zeros(()),
        torch.full((3,), float("nan")),
        torch.zeros(1, dtype=torch.int8).expand(10**6, 10**6),  # a byte that claims to be a terabyte
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(0),
    ]
)


BYTES = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "repeat", "cut"]), st.floats(0, 1), st.binary(max_size=12)),
    min_size=1,
    max_size=4,
)


def fuzz(examples, **strategies):
    """`given`, for so many examples: the same ones each time, unless FUZZ_EXAMPLES asks for more."""
    profile = settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=10_000,  # ms: nothing hangs
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: profile(given(**strategies)(test))


def altered(content, changes, within=None):
    """The bytes after some changes, each at a fraction of the first `within` bytes."""
    content = bytearray(content)
    for kind, fraction, data in changes:
        at = int(fraction * min(within or len(content), len(content)))
        if kind == "set":
            content[at : at + len(data)] = data
        elif kind == "insert":
            content[at:at] = data
        elif kind == "delete":
            del content[at : at + len(data)]
        elif kind == "repeat":
            content[at:at] = content[at : at + 40] * (len(data) + 1)
        else:
            del content[at:]
    return bytes(content)


def places(value, path=()):
    """The way to every entry of nested dictionaries and lists."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value))[:40]:
            found += places(inner, (*path, key))
    return found


def replaced(value, path, new):
    """A copy of nested dictionaries and lists with one entry replaced; `DROPPED` removes it."""
    key, *rest = path
    copy = value.copy()
    if rest:
        copy[key] = replaced(copy[key], rest, new)
    elif new is DROPPED:
        del copy[key]
    else:
        copy[key] = new
    return copy


DROPPED = object()


PLAIN = st.lists(st.tuples(st.floats(0, 0.999), st.one_of(st.just(DROPPED), JUNK)), min_size=1, max_size=2)


ENTRIES = st.lists(st.tuples(st.floats(0, 0.999), st.one_of(st.just(DROPPED), JUNK, TENSORS)), min_size=1, max_size=2)


def replaced_at(value, changes):
    """Nested dictionaries and lists with the entries at some fractions of all places replaced."""
    for fraction, new in changes:
        if ways := places(value):
            value = replaced(value, ways[int(fraction * len(ways))], new)
    return value


def survives(read):
    """Run something that may raise errors.UserError of one line, and nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except UserError as error:
        assert "\n" not in str(error) and 10 < len(str(error)) < 900


@pytest.fixture(scope="module", autouse=True)
def no_blow_up():
    """The process may not grow much, whatever the files claim to hold."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES


@pytest.fixture(scope="module")
def whole(tmp_path_factory, splits):  # noqa: F811
    """A run in small that stopped in the middle of its second epoch: its trainer and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, splits, epochs=2)
    trainer.fit()
    export_model(trainer.run)
    trainer.tracker.close()
    trainer._begin_epoch()
    trainer.progress.batches, trainer.step = 2, 12
    trainer.identity["config"] = Config().to_dict()
    save_checkpoint(trainer.run.last, trainer.state_dict())
    previous(trainer.run.last).unlink()  # which would be read instead
    shutil.copy(trainer.run.last, folder / "good.pt")
    return trainer


@fuzz(25, changes=BYTES)
def test_configuration_files(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(altered((ROOT / "configs/digits.yaml").read_bytes(), changes))
    survives(lambda: parse_command_line(["--config", str(path)]))


@fuzz(20, changes=PLAIN)
def test_configurations(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    values = replaced_at(yaml.safe_load((ROOT / "configs/digits.yaml").read_text()), changes)
    path.write_text(yaml.safe_dump(values))
    survives(lambda: parse_command_line(["--config", str(path)]))
    survives(lambda: build_model(config_from_dict(values), (65, 192), 10))


def test_a_few_lines_of_aliases_are_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    for text in ("\n".join([*lines, "experts: {sizes: *a11}"]), "[" * 5_000, "a: " + "9" * 2_000_000):
        (tmp_path / "bomb.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bomb\.yaml"):
            parse_command_line(["--config", str(tmp_path / "bomb.yaml")])


def resume(trainer):
    """What train.py --resume does with the checkpoint."""
    config = Config()
    checkpoint = load_resumable(trainer.run, Invocation(config, "", trainer.run.path))
    finished(trainer.run, config, checkpoint)
    trainer.load_state_dict(checkpoint)
    best_kept(trainer.run, config, checkpoint)
    assert metrics_step(checkpoint) >= 0


@fuzz(50, changes=BYTES)
def test_checkpoint_files(whole, changes):
    run = whole.run
    run.last.write_bytes(altered((run.path / "good.pt").read_bytes(), changes))
    survives(lambda: resume(whole))


@fuzz(40, changes=ENTRIES)
def test_checkpoints(whole, changes):
    run = whole.run
    state = torch.load(run.path / "good.pt", weights_only=True)
    torch.save(replaced_at(state, changes), run.last)
    seed_everything(0)
    survives(lambda: resume(whole))


@pytest.mark.parametrize("what", ["code", "bytes", "compressed"])
def test_archives_that_torch_would_read_but_should_not(whole, tmp_path, what):
    class Code:
        def __reduce__(self):
            return (os.system, ("echo code from a checkpoint ran",)) if what == "code" else (bytearray, (10**10,))

    path = tmp_path / "last.pt"
    if what == "compressed":
        import zipfile

        with zipfile.ZipFile(whole.run.path / "good.pt") as good, zipfile.ZipFile(path, "w", 8) as archive:
            for record in good.infolist():
                archive.writestr(record.filename, good.read(record))
    else:
        torch.save({"format_version": 1, "model": Code()}, path)
    with pytest.raises(UserError, match=r"last\.pt is truncated or no checkpoint"):
        load_checkpoint(path)


@fuzz(60, changes=BYTES, header=st.booleans())
def test_exported_weights(whole, changes, header):
    good = whole.run.weights.read_bytes()
    run = RunFolder(whole.run.path / "altered")
    run.path.mkdir(exist_ok=True)
    run.weights.write_bytes(altered(good, changes, within=1500 if header else None))
    survives(lambda: load_exported(run, whole.model))


@fuzz(60, changes=BYTES, kind=st.sampled_from(["safetensors", "pth", "old"]))
def test_backbone_weights(tmp_path_factory, changes, kind):
    path = tmp_path_factory.getbasetemp() / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    state = {"cls_token": torch.ones(1, 1, 8), "pos_embed": torch.ones(5, dtype=torch.int64)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=kind == "pth")
    path.write_bytes(altered(path.read_bytes(), changes))
    survives(lambda: _read_weights(path))


@fuzz(20, changes=PLAIN)
def test_descriptions(whole, tmp_path_factory, changes):
    run = RunFolder(tmp_path_factory.getbasetemp())
    good = json.loads(whole.run.model.read_text()) | {"config": Config().to_dict(), "class_names": ["a", "b"]}
    run.model.write_text(json.dumps(replaced_at(good, changes)))

    def read():
        described = read_description(run)
        config = config_from_dict(described["config"])
        build_model(config, tuple(described["feature_shape"]), len(described["class_names"]))

    survives(read)


@fuzz(60, changes=BYTES)
def test_description_files(whole, tmp_path_factory, changes):
    run = RunFolder(tmp_path_factory.getbasetemp())
    run.model.write_bytes(altered(whole.run.model.read_bytes(), changes))
    survives(lambda: read_description(run))


@fuzz(60, changes=BYTES)
def test_metrics(whole, tmp_path_factory, changes):
    run = RunFolder(tmp_path_factory.getbasetemp())
    run.metrics.write_bytes(altered(whole.run.metrics.read_bytes(), changes))
    for line in run.history():
        assert line["step"] > 0 and line["epoch"] > 0
