"""`python -m features.cache`: list and clear stored features."""

import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from feature_helpers import KEY, stored_file
from safetensors.torch import save_file

from common.errors import UserError
from features import cache as feature_cache
from features.cache import FeatureCache
from features.file import gigabytes


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
    for words, said in ((["list", "--dir", "/nowhere"], "not a folder"), ([], r"required: list\|clear; see")):
        with pytest.raises(UserError, match=said):
            feature_cache.main(words)


def test_clear_shows_and_deletes_the_requested_files(tmp_path, capsys):
    paths = {}
    for view, (dataset, backbone) in enumerate([("digits", "vit"), ("digits", "other"), ("cifar100", "vit")]):
        cache = FeatureCache(tmp_path, dataset)
        key = {**KEY, "view": view, "backbone": backbone, "features": ["cls:-1", "mean:-2", "mean:-1"][: 1 + view]}
        draft = cache.draft({**key, "augment": {"flip": True, "crop": 3, "seed": 0}}, (5, 3), torch.float16)
        assert draft.finish()
        paths[dataset, backbone] = draft.path
    os.utime(paths["digits", "other"], (time.time() - 30 * 86400,) * 2)  # a month ago
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
    lines = capsys.readouterr().out.splitlines()
    shown = next(line for line in lines if "cifar100" in line)
    assert "cls:-1 to mean:-1 (3), " in shown and shown.endswith(", crop 3 flip True")
    assert any(", cls:-1, " in line for line in lines) and any(", cls:-1 mean:-2, " in line for line in lines)
    for words in (["0" * 12], ["--older_than", "31"], ["--data.name", "vit"]):
        with pytest.raises(UserError, match="no features in"):
            feature_cache.main(["clear", *words, "--dir", str(tmp_path)])
    feature_cache.main(["list", "--backbone.name", "other", "--dir", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert clear("--data.name", "digits", "--older_than", "29") == [("digits", "other")]
    assert clear("--backbone.name", "vit", "--data.name", "digits") == [("digits", "vit")]
    assert clear(shown.split()[0]) == [("cifar100", "vit")]
    for words in (["clear", "--older_than", "x"], ["clear", "--older_than", "-1"], ["clear", ""], ["clean"]):
        with pytest.raises(UserError) as caught:
            feature_cache.main(words)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_clear_keeps_files_that_a_running_process_uses(tmp_path, capsys):
    reader = FeatureCache(tmp_path)
    path = stored_file(tmp_path)[1]
    features = reader.load(KEY)
    draft = reader.draft({**KEY, "view": 2}, (5, 3), torch.float16)
    draft.tensor.fill_(2.5)
    stored_file(tmp_path, key={**KEY, "view": 3})
    clear = [sys.executable, "-m", "features.cache", "clear", "--dir", str(tmp_path)]
    out = subprocess.run(clear, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.count("kept: a running process uses it") == 2 and "deleted 1 file," in out
    assert path.exists() and torch.all(features == 1.5)
    reader.commit(draft)
    reader.wait()
    assert torch.all(FeatureCache(tmp_path).load({**KEY, "view": 2}) == 2.5)
    feature_cache.main(["clear", "--dir", str(tmp_path)])
    assert "deleted 0 files" in capsys.readouterr().out
    del reader, draft
    feature_cache.main(["clear", "--dir", str(tmp_path)])
    assert "deleted 2 files" in capsys.readouterr().out


def test_sizes_have_readable_units():
    assert [gigabytes(size) for size in (1_500, 2_340_000, 13_600_000_000)] == ["2 kB", "2.3 MB", "13.6 GB"]
