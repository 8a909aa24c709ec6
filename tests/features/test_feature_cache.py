"""Features on disk: complete or not at all, only under the right key, listed and cleared."""

import json
import multiprocessing
import os
import pickle
import time

import pytest
import torch
from feature_helpers import KEY, SOURCE, bank, everything, stored_file
from safetensors import safe_open

from common.errors import EnvironmentFault
from features import file as feature_file
from features.cache import FeatureCache


def test_a_stored_view_is_read_back_unchanged_and_described_in_its_header(tmp_path):
    cache, path = stored_file(tmp_path)
    loaded = cache.load(KEY)
    assert loaded.dtype == torch.float16 and torch.equal(loaded, torch.full((5, 3), 1.5).half())
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["key"]) == {"format": feature_file.FORMAT, **KEY}
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
def test_a_second_run_reads_what_the_first_one_extracted(tmp_path, storage):
    plain = everything(bank(storage=storage))
    first, second = [], []
    written = bank(FeatureCache(tmp_path), calls=first, storage=storage)
    for features, labels in (everything(written), everything(written, view=2)):  # view 2 is view 0 again
        assert torch.equal(features, plain[0]) and torch.equal(labels, plain[1])
    written.cache.wait()
    again = bank(FeatureCache(tmp_path), calls=second, storage=storage)
    assert torch.equal(everything(again)[0], plain[0])
    assert sum(first) == 40 and second == []
    assert again._stored[("train", 0)].host.dtype == getattr(torch, storage)


@pytest.mark.parametrize(
    "change",
    [
        {"source": {**SOURCE, "weights": "x" * 64}},
        {"source": {**SOURCE, "precision": "torch.bfloat16"}},
        {"storage": "bfloat16"},
        {"augment": False},
    ],
)
def test_features_of_another_key_are_neither_used_nor_deleted(tmp_path, change):
    first = bank(FeatureCache(tmp_path))
    everything(first)
    first.cache.wait()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []
    other = bank(FeatureCache(tmp_path), calls=calls, **change)
    everything(other)
    other.cache.wait()
    assert sum(calls) == 40
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.read_bytes() == content for path, content in before.items())


def test_another_version_is_not_changed(tmp_path, monkeypatch):
    _, path = stored_file(tmp_path)
    monkeypatch.setattr(feature_file, "FORMAT", feature_file.FORMAT + 1)
    assert FeatureCache(tmp_path).load(KEY) is None
    assert stored_file(tmp_path)[1] != path
    assert path.exists()


def test_a_file_with_a_wrong_name_is_not_changed(tmp_path, capsys):
    cache, path = stored_file(tmp_path)
    other = cache.path({**KEY, "view": 2})
    os.replace(path, other)
    assert cache.load({**KEY, "view": 2}) is None
    assert "contains other features than its name says" in capsys.readouterr().err
    assert cache.draft({**KEY, "view": 2}, (5, 3), torch.float16) is None
    assert other.exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-3])


def altered(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a feature file ran')",))


def pickled(path):
    path.write_bytes(pickle.dumps(Bomb()))


@pytest.mark.parametrize("damage", [truncated, altered, emptied, pickled])
def test_a_corrupt_file_is_reported_in_one_line_and_rebuilt(tmp_path, capsys, damage):
    first = bank(FeatureCache(tmp_path))
    expected = everything(first)[0]
    first.cache.wait()
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    damage(path)
    calls = []
    second = bank(FeatureCache(tmp_path), calls=calls)
    assert torch.equal(everything(second)[0], expected)
    second.cache.wait()
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and str(path) in errors and "extracting its features again" in errors
    assert sum(calls) == 40 and path.read_bytes() == good


def _write_often(folder, barrier):
    barrier.wait()
    for _ in range(20):
        stored_file(folder, value=2.5, shape=(500, 64))


def test_two_processes_at_once_do_not_corrupt_it(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_write_often, args=(tmp_path, barrier)) for _ in range(2)]
    cache, whole = FeatureCache(tmp_path), 0
    for writer in writers:
        writer.start()
    try:
        barrier.wait()
        while any(writer.is_alive() for writer in writers):
            loaded = cache.load(KEY)
            if loaded is not None:
                assert torch.all(loaded == 2.5)
                whole += 1
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert whole > 0 and torch.all(cache.load(KEY) == 2.5)
    assert [path.name for path in tmp_path.iterdir()] == [cache.path(KEY).name]


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_extracted(tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureCache, "free", lambda self: 1000)
    calls = []
    with pytest.raises(
        EnvironmentFault, match=r"need 10 kB in .*, but only 1 kB are free: choose another --features\.cache_dir"
    ):
        everything(bank(FeatureCache(tmp_path), calls=calls))
    assert calls == [] and not list(tmp_path.iterdir())


def test_a_full_or_unwritable_disk_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    expected = everything(bank())[0]
    (tmp_path / "file").write_text("no folder")
    assert torch.equal(everything(bank(FeatureCache(tmp_path / "file")))[0], expected)
    assert "cannot be written" in capsys.readouterr().err

    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_file, "_take_space", full)
    assert torch.equal(everything(bank(FeatureCache(tmp_path)))[0], expected)
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_truncated_file_counts_as_missing(tmp_path, capsys):
    first = bank(FeatureCache(tmp_path), views=1)
    everything(first)
    first.cache.wait()
    (path,) = tmp_path.iterdir()
    truncated(path)
    capsys.readouterr()
    everything(bank(FeatureCache(tmp_path), views=1))
    assert f"0 of 1 in {tmp_path}, 4 kB to write" in capsys.readouterr().out


def test_files_of_a_killed_process_are_removed_and_those_of_a_running_one_are_kept(tmp_path):
    cache, path = stored_file(tmp_path)
    path.unlink()
    writing = cache.draft(KEY, (5, 3), torch.float16)
    left, fresh = (tmp_path / f".{path.name}.{process}.partial" for process in ("12-34", "12-35"))
    for partial in (left, fresh):
        partial.write_bytes(b"half")
    for partial in (left, writing.temporary):
        os.utime(partial, (time.time() - 90_000,) * 2)
    other = FeatureCache(tmp_path).draft(KEY, (500, 3), torch.float16)
    assert not left.exists() and fresh.exists() and writing.temporary.exists()
    other.discard()
    writing.discard()


def test_an_interrupted_extraction_leaves_nothing_behind(tmp_path):
    features = bank(FeatureCache(tmp_path), fail=(2,))
    with pytest.raises(torch.OutOfMemoryError):
        everything(features)
    assert list(tmp_path.iterdir()) == []


def test_the_size_is_printed_before_writing(tmp_path, capsys):
    features = bank(FeatureCache(tmp_path), views=3)
    everything(features)
    everything(features, view=1)
    features.cache.wait()
    out = capsys.readouterr().out
    assert out.count("features     train") == 1
    # 40 images of 48 numbers in float16 are 3,840 bytes a view; 10 of validation and 12 of test 960 and 1,152.
    assert "12 kB (3 views of 4 kB), kept in host memory; 0 of 3 in" in out
    assert "12 kB to write, and 2 kB for other splits (" in out
    everything(bank(FeatureCache(tmp_path), views=3))
    assert f"2 of 3 in {tmp_path}, 4 kB to write" in capsys.readouterr().out
