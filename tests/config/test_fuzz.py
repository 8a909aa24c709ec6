"""Altered files of every kind that a user can pass: they are read, or one line says what is wrong with them.

FUZZ_EXAMPLES=20000 pytest tests/test_fuzz.py      longer, and with other inputs each time
"""

import json
import os
import shutil

import pytest
import torch
import yaml
from block_helpers import block_trainer
from conftest import ROOT
from fuzz_helpers import (
    BYTES,
    ENTRIES,
    PLAIN,
    altered,
    fuzz,
    replaced_at,
    survives,
)
from hypothesis import strategies as st
from safetensors.torch import save_file
from trainer_helpers import CPU, make_trainer

from assembly.pipeline import build_model
from common.errors import UserError
from config.command_line import parse_command_line
from config.config import Config, config_from_dict
from model.backbone import BackboneConfig, load_backbone
from model.weights_file import read_weights
from storage.checkpoint import load_checkpoint, previous, save_checkpoint, seed_everything
from storage.export import export_model, load_exported, read_description
from storage.folder import RunFolder
from storage.resume import best_kept, finished, load_resumable, metrics_step

CONFIGS = st.sampled_from(["digits", "digits_blocks"])  # experts behind the ViT and inside it


@pytest.fixture(scope="module")
def whole(tmp_path_factory, splits):
    """A small run that stopped in the middle of its second epoch: its trainer and its folder."""
    return stopped(make_trainer(tmp_path_factory.mktemp("whole"), splits, epochs=2))


@pytest.fixture(scope="module")
def inside(tmp_path_factory, splits):
    """The same with experts inside the ViT."""
    return stopped(block_trainer(tmp_path_factory.mktemp("inside"), splits, epochs=2))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BackboneConfig(name="bundled/vit_micro", features=["cls:3", "mean:3"]), CPU)


def stopped(trainer):
    export_model(trainer.run, trainer.fit())
    trainer.tracker.close()
    trainer._begin_epoch()
    trainer.progress.batches, trainer.step = 2, 12
    trainer.identity["config"] = Config().to_dict()
    save_checkpoint(trainer.run.last, trainer.state_dict())
    previous(trainer.run.last).unlink()  # otherwise it would be read instead
    shutil.copy(trainer.run.last, trainer.run.path / "good.pt")
    return trainer


@pytest.mark.slow
@fuzz(25, name=CONFIGS, changes=BYTES)
def test_configuration_files(tmp_path_factory, name, changes):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(altered((ROOT / f"configs/{name}.yaml").read_bytes(), changes))
    survives(lambda: parse_command_line(["--config", str(path)]))


@pytest.mark.slow
@fuzz(20, name=CONFIGS, changes=PLAIN)
def test_configurations(tmp_path_factory, backbone, name, changes):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    values = replaced_at(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()), changes)
    path.write_text(yaml.safe_dump(values))
    survives(lambda: parse_command_line(["--config", str(path)]))
    survives(lambda: build_model(config_from_dict(values), (65, 192), 10, backbone))


@pytest.mark.slow
def test_a_few_lines_of_aliases_are_rejected(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    for text in ("\n".join([*lines, "experts: {sizes: *a11}"]), "[" * 5_000, "a: " + "9" * 2_000_000):
        (tmp_path / "bomb.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bomb\.yaml"):
            parse_command_line(["--config", str(tmp_path / "bomb.yaml")])


def resume(trainer):
    """Load the checkpoint like train.py --resume."""
    config = Config()
    checkpoint = load_resumable(trainer.run, config)
    finished(trainer.run, config, checkpoint)
    trainer.load_state_dict(checkpoint, trainer.run.last)
    best_kept(trainer.run, config, checkpoint)
    assert metrics_step(checkpoint) >= 0


@pytest.mark.slow
@fuzz(50, changes=BYTES)
def test_checkpoint_files(whole, changes):
    run = whole.run
    run.last.write_bytes(altered((run.path / "good.pt").read_bytes(), changes))
    survives(lambda: resume(whole))


@pytest.mark.slow
@fuzz(40, place=st.sampled_from(["head", "blocks"]), changes=ENTRIES)
def test_checkpoints(whole, inside, place, changes):
    trainer = {"head": whole, "blocks": inside}[place]
    run = trainer.run
    state = torch.load(run.path / "good.pt", weights_only=True)
    torch.save(replaced_at(state, changes), run.last)
    seed_everything(0)
    survives(lambda: resume(trainer))


@pytest.mark.parametrize("what", ["code", "bytes", "compressed"])
def test_unsafe_archives_that_torch_would_read(whole, tmp_path, what):
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
    with pytest.raises(UserError, match=r"last\.pt is truncated or not a checkpoint"):
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
    survives(lambda: read_weights(path))


@pytest.mark.slow
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
