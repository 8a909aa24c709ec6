"""Stored features: on disk whole or not at all, on a device while they fit, and extracted no more than once."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file

from data import feature_cache, feature_file
from data.augment import AugmentConfig
from data.datasets import ImageSet, Splits
from data.feature_cache import FeatureCache
from data.feature_file import gigabytes
from data.features import FeatureBank, FeaturesConfig
from data.placement import fetch_ahead
from engine.extraction import Extractor, worth_compiling
from errors import EnvironmentFault, UserError
from model.backbone import Backbone, BackboneConfig, load_backbone
from model.fast_vit import PatchProjection, fast_copy

CPU = torch.device("cpu")
KEY = {"split": "train", "view": 1, "data": "d" * 64, "weights": "w" * 64, "storage": "float16"}
SOURCE = {"backbone": "a backbone", "weights": "w" * 64, "precision": "torch.float32"}


def images(count, offset=0):
    values = torch.arange(offset, offset + count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return ImageSet(values.contiguous(), torch.arange(count) % 2, ("even", "odd"))


SPLITS = Splits(images(40), images(10, 100), images(12, 200))


class Memory:
    """Stands for a GPU's memory on a machine without one."""

    pinned = False

    def __init__(self, free=10**9, allocations=None):
        self.bytes_free, self.allocations, self.uploads, self.released = free, allocations, 0, 0

    def free(self):
        return self.bytes_free

    def empty(self, shape, dtype):
        if self.allocations is not None:
            if self.allocations == 0:
                raise torch.OutOfMemoryError("the device is full")
            self.allocations -= 1
        return torch.empty(shape, dtype=dtype)

    def release(self):
        self.released += 1

    def upload(self, host):
        self.uploads += 1
        return host.clone(), Event()

    def ready(self, copy, event):
        event.synchronize()
        return copy


class Event:
    def synchronize(self):
        pass


def bank(cache=None, memory=None, calls=None, source=SOURCE, augment=True, views=2, fail=(), **options):
    """A bank whose features are the pixels; `calls` collects batch sizes, `fail` the calls that run out of memory."""
    calls, seen = [] if calls is None else calls, [0]

    def extract(batch):
        if len(batch) > 1:
            seen[0] += 1
            if seen[0] in fail:
                raise torch.OutOfMemoryError("the device is full")
            calls.append(len(batch))
        return batch.float().flatten(1)

    augment = AugmentConfig(flip=augment, crop=1 if augment else 0)
    config = FeaturesConfig(views=views, batch_size=16, **options)
    return FeatureBank(SPLITS, extract, augment, config, CPU, cache, source, memory=memory)


def everything(features, split="train", view=0, batch=7):
    order = torch.randperm(len(SPLITS[split]), generator=torch.Generator().manual_seed(3))
    parts = list(features.batches(split, batch, order, view))
    return torch.cat([part for part, _ in parts]), torch.cat([labels for _, labels in parts])


def stored_file(folder, value=1.5, key=KEY, shape=(5, 3)):
    cache = FeatureCache(folder)
    draft = cache.draft(key, shape, torch.float16)
    draft.tensor.fill_(value)
    cache.commit(draft)
    cache.wait()
    return cache, cache.path(key)


def test_a_stored_view_comes_back_as_it_was_and_says_in_its_header_what_it_is(tmp_path):
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
def test_features_of_something_else_are_neither_used_nor_deleted(tmp_path, change):
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


def test_another_version_is_left_alone(tmp_path, monkeypatch):
    _, path = stored_file(tmp_path)
    monkeypatch.setattr(feature_file, "FORMAT", feature_file.FORMAT + 1)
    assert FeatureCache(tmp_path).load(KEY) is None
    assert stored_file(tmp_path)[1] != path
    assert path.exists()


def test_a_file_that_lies_about_its_name_is_left_alone(tmp_path, capsys):
    cache, path = stored_file(tmp_path)
    other = cache.path({**KEY, "view": 2})
    os.replace(path, other)
    assert cache.load({**KEY, "view": 2}) is None
    assert "other features than its name says" in capsys.readouterr().err
    assert cache.draft({**KEY, "view": 2}, (5, 3), torch.float16) is None
    assert other.exists()


def torn(path):
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


@pytest.mark.parametrize("damage", [torn, altered, emptied, pickled])
def test_a_damaged_file_is_said_in_one_line_and_rebuilt(tmp_path, capsys, damage):
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
    for writer in writers:
        writer.start()
    barrier.wait()
    cache, whole = FeatureCache(tmp_path), 0
    while any(writer.is_alive() for writer in writers):
        loaded = cache.load(KEY)
        if loaded is not None:
            assert torch.all(loaded == 2.5)
            whole += 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert whole > 0 and torch.all(cache.load(KEY) == 2.5)
    assert [path.name for path in tmp_path.iterdir()] == [cache.path(KEY).name]


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_extracted(tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureCache, "free", lambda self: 1000)
    calls = []
    with pytest.raises(
        EnvironmentFault, match=r"need 8 kB in .*, where 1 kB are free: choose another --features\.cache_dir"
    ):
        everything(bank(FeatureCache(tmp_path), calls=calls))
    assert calls == [] and not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_or_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capsys):
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


def test_an_interrupted_extraction_leaves_nothing_behind(tmp_path):
    features = bank(FeatureCache(tmp_path), fail=(2,))
    with pytest.raises(torch.OutOfMemoryError):
        everything(features)
    assert list(tmp_path.iterdir()) == []


def test_the_size_is_said_before_it_is_written(tmp_path, capsys):
    features = bank(FeatureCache(tmp_path), views=3)
    everything(features)
    everything(features, view=1)
    features.cache.wait()
    out = capsys.readouterr().out
    assert out.count("features     train") == 1
    # 40 images of 48 numbers in float16 are 3,840 bytes a view.
    assert "12 kB (3 views of 4 kB), kept in host memory; 0 of 3 in" in out
    everything(bank(FeatureCache(tmp_path), views=3))
    assert f"2 of 3 in {tmp_path}, 4 kB to be written" in capsys.readouterr().out


def test_list_and_clear(tmp_path, capsys):
    stored_file(tmp_path)
    path = stored_file(tmp_path, key={**KEY, "view": None})[1]
    path.rename(tmp_path / f".{path.name}.12-34.partial")
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    feature_cache.main(["list", "--dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "train, view 1, data dddddddd" in out and "unfinished" in out and "model.safetensors" not in out
    feature_cache.main(["clear", "--dir", str(tmp_path)])
    assert "deleted 2 files" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(UserError, match="is not a folder"):
        feature_cache.main(["clear", "--dir", str(tmp_path / "nowhere")])


def test_clear_deletes_what_it_was_asked_to_and_shows_it_first(tmp_path, capsys):
    paths = {}
    for view, (dataset, backbone) in enumerate([("digits", "vit"), ("digits", "other"), ("cifar100", "vit")]):
        cache = FeatureCache(tmp_path, dataset)
        draft = cache.draft({**KEY, "view": view, "backbone": backbone}, (5, 3), torch.float16)
        assert draft.finish()
        paths[dataset, backbone] = draft.path
    month_ago = time.time() - 30 * 86400
    os.utime(paths["digits", "other"], (month_ago, month_ago))
    del cache, draft  # and with them the lock on the last file

    def clear(*words):
        before = set(tmp_path.iterdir())
        feature_cache.main(["clear", *words, "--dir", str(tmp_path), "--dry_run"])
        shown = capsys.readouterr().out
        assert set(tmp_path.iterdir()) == before and "would delete" in shown
        feature_cache.main(["clear", *words, "--dir", str(tmp_path)])
        assert capsys.readouterr().out == shown.replace("would delete", "deleted")
        return sorted(name for name, path in paths.items() if path in before and not path.exists())

    feature_cache.main(["list", "--dir", str(tmp_path)])
    shown = next(line for line in capsys.readouterr().out.splitlines() if "cifar100" in line)
    assert clear("0" * 12) == clear("--older_than", "31") == clear("--data.name", "vit") == []
    assert clear("--data.name", "digits", "--older_than", "29") == [("digits", "other")]
    assert clear("--backbone.name", "vit", "--data.name", "digits") == [("digits", "vit")]
    assert clear(shown.split()[0]) == [("cifar100", "vit")]
    for words in (["clear", "--older_than", "x"], ["clean"], ["list", "--dry_run"]):
        with pytest.raises(UserError) as caught:
            feature_cache.main(words)
        assert "\n" not in str(caught.value)


def test_clear_keeps_what_a_running_process_reads_or_writes(tmp_path, capsys):
    reader = FeatureCache(tmp_path)
    path = stored_file(tmp_path)[1]
    features = reader.load(KEY)
    draft = reader.draft({**KEY, "view": 2}, (5, 3), torch.float16)
    draft.tensor.fill_(2.5)
    stored_file(tmp_path, key={**KEY, "view": 3})
    clear = [sys.executable, "-m", "data.feature_cache", "clear", "--dir", str(tmp_path)]
    out = subprocess.run(clear, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.count("kept, a running process uses it") == 2 and "deleted 1 files" in out
    assert path.exists() and torch.all(features == 1.5)
    assert draft.finish() and torch.all(FeatureCache(tmp_path).load({**KEY, "view": 2}) == 2.5)
    feature_cache.main(["clear", "--dir", str(tmp_path)])
    assert "deleted 0 files" in capsys.readouterr().out
    del reader, draft
    feature_cache.main(["clear", "--dir", str(tmp_path)])
    assert "deleted 2 files" in capsys.readouterr().out


def test_sizes_are_said_in_plain_units():
    assert [gigabytes(size) for size in (1_500, 2_340_000, 13_600_000_000)] == ["2 kB", "2.3 MB", "13.6 GB"]


def test_features_stay_on_the_device_while_half_of_its_memory_suffices(capsys):
    view_bytes = 40 * 48 * 2
    roomy, tight, none = Memory(4 * view_bytes), Memory(2 * view_bytes), Memory(0)
    expected = [everything(bank(), view=view)[0] for view in (0, 1)]
    for memory, on_device in ((roomy, 2), (tight, 1), (none, 0)):
        features = bank(memory=memory)
        for view in (0, 1):
            assert torch.equal(everything(features, view=view)[0], expected[view])
        assert sum(stored.device is not None for stored in features._stored.values()) == on_device
        assert memory.uploads == (2 - on_device) * 6  # batches of 7 of 40 that came from host memory
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "fetched ahead" in line and "as far as 1 of them fit" in line]
    assert [line for line in lines if "kept in host memory and fetched ahead" in line]


def test_token_features_are_placed_and_fetched_alike():
    def extract(batch):
        return batch.float().flatten(2).transpose(1, 2)  # (B, 16 tokens, 3)

    config, memory = FeaturesConfig(batch_size=16), Memory(0)
    features = FeatureBank(SPLITS, extract, AugmentConfig(), config, CPU, memory=memory)
    plain = FeatureBank(SPLITS, extract, AugmentConfig(), config, CPU)
    assert torch.equal(everything(features)[0], everything(plain)[0])
    assert everything(features)[0].shape == (40, 16, 3) and memory.uploads > 0


@pytest.mark.parametrize("cached", [True, False])
def test_a_device_that_is_full_falls_back_to_host_memory_and_says_so(tmp_path, capsys, cached):
    expected = everything(bank())[0]
    cache = FeatureCache(tmp_path) if cached else None
    refused = bank(cache, memory=Memory(allocations=0))
    assert torch.equal(everything(refused)[0], expected)
    assert "out of memory: host memory takes" in capsys.readouterr().out
    if cached:
        cache.wait()
        (path,) = tmp_path.iterdir()
        path.unlink()
    # The second of three batches finds no room: what the first one left is moved, and nothing is done twice.
    calls, memory = [], Memory()
    interrupted = bank(cache, memory=memory, calls=calls, fail=(2,))
    assert torch.equal(everything(interrupted)[0], expected)
    assert "out of memory: host memory takes" in capsys.readouterr().out
    assert calls == [16, 16, 8] and memory.released == 1
    assert interrupted._stored[("train", 0)].device is None


def test_a_view_that_was_stored_makes_room_too():
    features = bank(memory=Memory(), fail=(4,))  # the first batch of the second view
    expected = [everything(bank(), view=view)[0] for view in (0, 1)]
    for view in (0, 1, 0):
        assert torch.equal(everything(features, view=view)[0], expected[view % 2])


def test_what_is_read_from_disk_is_placed_like_what_is_extracted(tmp_path):
    first = bank(FeatureCache(tmp_path))
    expected = everything(first)[0]
    first.cache.wait()
    for memory in (Memory(), Memory(0)):
        calls = []
        second = bank(FeatureCache(tmp_path), memory=memory, calls=calls)
        assert torch.equal(everything(second)[0], expected) and calls == []
        assert (second._stored[("train", 0)].device is None) == (memory.free() == 0)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9])
def test_fetching_ahead_keeps_the_order(count):
    source = torch.arange(50).float()[:, None].expand(-1, 3).contiguous()
    parts = tuple(torch.randint(50, (5 if number % 2 else 3,)) for number in range(count))
    fetched = list(fetch_ahead(source, parts, Memory()))
    assert len(fetched) == count
    assert all(torch.equal(batch, source[part]) for batch, part in zip(fetched, parts, strict=True))


def test_fetching_ahead_passes_errors_on_and_can_be_left():
    source = torch.zeros(4, 2)
    with pytest.raises(IndexError):
        list(fetch_ahead(source, (torch.tensor([9]),), Memory()))
    fetching = fetch_ahead(source, (torch.tensor([1]),) * 5, Memory())
    next(fetching)
    fetching.close()


@pytest.fixture(scope="module")
def vit_micro():
    return load_backbone(BackboneConfig(name="bundled/vit_micro"), CPU)


def test_half_precision_features_are_those_of_float32_within_its_rounding(vit_micro):
    from data.datasets import load_digits

    fast = Backbone(vit_micro.vit, ["cls:-1", "mean:-1"], torch.bfloat16)
    batch = load_digits().images_NCHW[:3]
    exact, half = Extractor(vit_micro, 64)(batch), Extractor(fast, 64)(batch)  # 3 images: on a CPU it is slow
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, half).min() > 0.999
    assert (exact - half).abs().mean() < 0.02 * exact.abs().mean()
    assert fast.fingerprint() == vit_micro.fingerprint()  # of the weights as they are stored, on any device


def test_the_fast_copy_means_the_same(vit_micro):
    import timm

    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    quick = timm.layers.get_act_layer("quick_gelu")
    vit = timm.models.VisionTransformer(**options, act_layer=quick).eval()
    torch.nn.init.normal_(vit.blocks[0].mlp.fc1.bias)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    fast = fast_copy(vit, torch.float32)
    assert isinstance(fast.patch_embed.proj, PatchProjection)
    assert isinstance(fast.blocks[0].mlp.act, torch.nn.SiLU)
    batch = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fast.forward_features(batch), vit.forward_features(batch), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    plain = fast_copy(vit_micro.vit, torch.float32)  # its activation is GELU, which stays
    batch = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(batch), vit_micro.vit(batch), atol=1e-4, rtol=1e-4)


def test_a_backbone_is_compiled_for_whole_batches_and_a_failure_is_survived(vit_micro, monkeypatch, capsys):
    compiled = []

    def compile(module, **options):
        compiled.append(options)
        return lambda batch: module(batch) + 1

    monkeypatch.setattr(torch, "compile", compile)
    batch = SPLITS.train.images_NCHW[:4]
    plain = Extractor(vit_micro, 4)(batch)
    extractor = Extractor(vit_micro, 4, compiled=True)
    assert torch.equal(extractor(batch), plain + 1) and torch.equal(extractor(batch), plain + 1)
    torch.testing.assert_close(extractor(batch[:3]), plain[:3])  # the last batch of a split runs as it is
    assert len(compiled) == 1 and compiled[0]["dynamic"] is False

    def broken(module, **options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    assert torch.equal(Extractor(vit_micro, 4, compiled=True)(batch), plain)
    assert "cannot be compiled (no compiler here): going on without" in capsys.readouterr().err


def test_compiling_must_repay_itself():
    gpu = torch.device("cuda", 0)
    assert worth_compiling("auto", 10**8, gpu) and not worth_compiling("auto", 1000, gpu)
    assert not worth_compiling("auto", 10**8, CPU)
    assert worth_compiling("always", 1, CPU) and not worth_compiling("never", 10**8, gpu)
