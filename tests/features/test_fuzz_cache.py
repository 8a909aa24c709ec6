"""Stored features with altered bytes are extracted again or found unchanged; no code in them runs."""

import pytest
import torch
from fuzz_helpers import BYTES, altered, fuzz

from features.cache import FeatureCache

KEY = {"format": 1, "split": "train", "view": 0}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    cache = FeatureCache(tmp_path_factory.mktemp("features"))
    features = torch.arange(600, dtype=torch.float16).view(20, 30)
    draft = cache.draft(KEY, tuple(features.shape), features.dtype)
    draft.tensor.copy_(features)
    assert draft.finish()
    return cache, features, cache.path(KEY).read_bytes()


@fuzz(200, changes=BYTES)
def test_caches(stored, changes):
    cache, features, content = stored
    path = cache.path(KEY)
    path.unlink(missing_ok=True)  # a mapped file is replaced, never written over
    path.write_bytes(altered(content, changes))
    found = cache.load(KEY)
    assert found is None or torch.equal(found, features)
