"""Stored features: complete on disk or not at all, on a device if they fit, and extracted only once."""

import os

import pytest
import torch
from feature_helpers import KEY, SPLITS, Memory, bank, everything, stored_file

from common.errors import EnvironmentFault
from common.memory import available_memory
from config.features import FeaturesConfig
from data.augment import AugmentConfig
from features import file as feature_file
from features.bank import FeatureBank
from features.cache import FeatureCache
from features.placement import fetch_ahead

CPU = torch.device("cpu")


def test_features_stay_on_the_device_if_they_fit_into_half_of_its_memory(capsys):
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
    assert [line for line in lines if "prefetched" in line and "for 1 of them" in line]
    assert [line for line in lines if "kept in host memory, prefetched" in line]


def test_token_features_are_placed_and_fetched_in_the_same_way():
    def extract(batch):
        return batch.float().flatten(2).transpose(1, 2)  # (B, 16 tokens, 3)

    config, memory = FeaturesConfig(batch_size=16), Memory(0)
    features = FeatureBank(SPLITS, extract, AugmentConfig(), config, CPU, memory=memory)
    plain = FeatureBank(SPLITS, extract, AugmentConfig(), config, CPU)
    assert torch.equal(everything(features)[0], everything(plain)[0])
    assert everything(features)[0].shape == (40, 16, 3) and memory.uploads > 0


@pytest.mark.parametrize("cached", [True, False])
def test_a_full_device_falls_back_to_host_memory_with_a_message(tmp_path, capsys, cached):
    expected = everything(bank())[0]
    cache = FeatureCache(tmp_path) if cached else None
    refused = bank(cache, memory=Memory(allocations=0))
    assert torch.equal(everything(refused)[0], expected)
    assert "out of memory: the rest goes to host memory" in capsys.readouterr().out
    if cached:
        cache.wait()
        (path,) = tmp_path.iterdir()
        path.unlink()
    # The second of three batches does not fit: the first one is moved, and nothing is computed twice.
    calls, memory = [], Memory()
    interrupted = bank(cache, memory=memory, calls=calls, fail=(2,))
    assert torch.equal(everything(interrupted)[0], expected)
    assert "out of memory: the rest goes to host memory" in capsys.readouterr().out
    assert calls == [16, 16, 8] and memory.released == 1
    assert interrupted._stored[("train", 0)].device is None


def test_a_stored_view_also_makes_room():
    features = bank(memory=Memory(), fail=(4,))  # the first batch of the second view
    expected = [everything(bank(), view=view)[0] for view in (0, 1)]
    for view in (0, 1, 0):
        assert torch.equal(everything(features, view=view)[0], expected[view % 2])


def test_features_from_disk_are_placed_like_extracted_ones(tmp_path):
    first = bank(FeatureCache(tmp_path))
    expected = everything(first)[0]
    first.cache.wait()
    for memory in (Memory(), Memory(0)):
        calls = []
        second = bank(FeatureCache(tmp_path), memory=memory, calls=calls)
        assert torch.equal(everything(second)[0], expected) and calls == []
        assert (second._stored[("train", 0)].device is None) == (memory.free() == 0)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9])
def test_prefetching_keeps_the_order(count):
    source = torch.arange(50).float()[:, None].expand(-1, 3).contiguous()
    parts = tuple(torch.randint(50, (5 if number % 2 else 3,)) for number in range(count))
    fetched = list(fetch_ahead(source, parts, Memory()))
    assert len(fetched) == count
    assert all(torch.equal(batch, source[part]) for batch, part in zip(fetched, parts, strict=True))


def test_prefetching_propagates_errors_and_can_be_stopped():
    source = torch.zeros(4, 2)
    with pytest.raises(IndexError):
        list(fetch_ahead(source, (torch.tensor([9]),), Memory()))
    fetching = fetch_ahead(source, (torch.tensor([1]),) * 5, Memory())
    next(fetching)
    fetching.close()


def test_features_too_large_for_host_memory_are_rejected_before_extraction(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("features.announcement.available_memory", lambda: 7_000)
    calls = []
    with pytest.raises(EnvironmentFault, match="need 8 kB of host memory, but only 7 kB are available: lower --feat"):
        everything(bank(calls=calls))
    assert calls == [] and "kept in host memory" in capsys.readouterr().out
    everything(bank(memory=Memory(free=8_000)))  # a GPU takes one of the two views
    everything(bank(FeatureCache(tmp_path)))  # and a disk takes all
    assert "for 1 of them" in capsys.readouterr().out


def test_the_host_memory_of_a_container_respects_its_limit(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    assert available_memory(tmp_path) == 4_096_000
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1300000\n")
    (group / "memory.stat").write_text("anon 900000\ninactive_file 300000\n")
    for limit, expected in (("max", 4_096_000), ("3000000", 2_000_000), ("9000000", 4_096_000), ("500", 0)):
        (group / "memory.max").write_text(limit + "\n")
        assert available_memory(tmp_path) == expected


def test_available_host_memory_is_between_zero_and_the_total():
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= pages


def test_a_stronger_augmentation_has_separate_features():
    keys = []
    for crop in (1, 2):
        config = FeaturesConfig(batch_size=16)
        features = FeatureBank(SPLITS, lambda batch: batch, AugmentConfig(flip=True, crop=crop), config, CPU)
        keys.append([features._key("train", 0), features._key("train", None)])
    (weak, plain), (strong, plain_too) = keys
    assert weak != strong and plain == plain_too  # original images do not depend on the augmentation


def test_extraction_on_several_cores_releases_them(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = set()
        features = bank()
        features.extract = lambda batch: (seen.add(torch.get_num_threads()), batch.float().flatten(1))[1]
        everything(features)
        assert torch.get_num_threads() == 3
        assert 1 in seen  # each core on a separate batch
    finally:
        torch.set_num_threads(threads)


def test_a_change_after_the_first_chunk_of_a_file_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_file, "CHUNK", 64)
    cache, path = stored_file(tmp_path, shape=(50, 3))
    assert cache.load(KEY) is not None
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert FeatureCache(tmp_path).load(KEY) is None
    assert "its checksum differs" in capsys.readouterr().err
