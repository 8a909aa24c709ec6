"""predict.py from the user's view, on a run of digits: valid and invalid files of every kind, every kind of output."""

import json
import os
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from picture_helpers import square
from PIL import Image

import predict
from analysis.plots.pictures import explanation
from assembly.loading import load_trained
from assembly.pipeline import build_bank
from common.errors import exit_code_of
from data.datasets import load_splits
from data.image_file import read_picture
from evaluation.classify import classify
from evaluation.predict import predict as predict_split


@pytest.fixture(scope="module")
def trained(tiny_run):
    return load_trained(tiny_run, "cpu")


@pytest.fixture(scope="module")
def digits(trained):
    return load_splits(trained.config.data).test


def run(monkeypatch, capsys, *words):
    """Exit code, standard output, lines of standard error."""
    monkeypatch.setattr("sys.argv", ["predict.py", *map(str, words)])
    code = exit_code_of(predict.main)
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_an_image_file_gets_the_prediction_of_the_test_set(trained, digits, tmp_path):
    """Written to files and read back, the test images get exactly the predictions of the evaluation."""
    before = predict_split(
        trained.model,
        build_bank(trained.config, load_splits(trained.config.data), trained.backbone, trained.device),
        "test",
    )
    images = []
    for index in range(8):
        path = tmp_path / f"{index}.png"
        Image.fromarray(digits.images_NCHW[index].permute(1, 2, 0).numpy()).save(path)
        images.append(read_picture(path, trained.config.data.side, trained.config.data.grey).pixels_CHW)
    assert torch.equal(torch.stack(images), digits.images_NCHW[:8])
    after = classify(trained, torch.stack(images), top=10)
    probabilities_NC = torch.from_numpy(before.logits_NC[:8]).softmax(dim=1)
    for index, answer in enumerate(after):
        by_name = {score.name: score.probability for score in answer.classes}
        expected = probabilities_NC[index].tolist()
        assert [by_name[str(digit)] for digit in range(10)] == pytest.approx(expected, abs=2e-3)  # stored as float16
        assert [score.probability for score in answer.classes] == sorted(by_name.values(), reverse=True)
        mine_A = before.sample_A == index
        assert {vote.expert: vote.weight for vote in answer.experts} == pytest.approx(
            dict(zip(before.expert_A[mine_A], before.weight_A[mine_A], strict=True)), abs=2e-3
        )


def test_an_expert_alone_is_the_prediction_without_the_others(trained, digits):
    """The mixture of logits is the weighted sum of its experts' outputs; here computed from the experts themselves."""
    images = digits.images_NCHW[:3]
    answers = classify(trained, images, top=10)
    with torch.no_grad():
        features = trained.backbone(predict_input(trained, images))
        x_BD = trained.model.neck(features)
        for index, answer in enumerate(answers):
            mixed_C = 0
            for vote in answer.experts:
                logits_C = trained.model.moe.experts[vote.expert](x_BD)[index]
                probability, label = logits_C.softmax(0).max(0)
                assert vote.alone.name == str(int(label))
                assert vote.alone.probability == pytest.approx(float(probability), abs=1e-5)
                mixed_C = mixed_C + vote.weight * logits_C
            assert answer.classes[0].probability == pytest.approx(float(mixed_C.softmax(0).max()), abs=1e-5)


def predict_input(trained, images):
    from model.preparation import prepare

    backbone = trained.backbone
    return prepare(images, backbone.image_size, backbone.mean, backbone.std)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with an invalid file of every kind, and the words that each is reported with."""
    folder = tmp_path_factory.mktemp("bad")
    square(256).save(folder / "whole.jpg")
    square(256).save(folder / "whole.png")
    for ending in ("jpg", "png"):
        content = (folder / f"whole.{ending}").read_bytes()
        (folder / f"whole.{ending}").unlink()
        (folder / f"cut.{ending}").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("not an image")
    square().save(folder / "program.eps")
    (folder / "program.eps").rename(folder / "program.png")
    (folder / "empty.jpg").touch()
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    Image.new("1", (14_000, 14_000)).save(folder / "bomb.png")
    return folder, {
        "cut.jpg": "cannot be read as an image (",
        "cut.png": "cannot be read as an image (",
        "text.png": "Pillow does not know its format",
        "program.png": "Pillow does not know its format",
        "empty.jpg": "Pillow does not know its format",
        "dot.png": "1 x 1 pixels",
        "huge.png": "100 megapixels",
        "bomb.png": "more than 178 megapixels",
    }


def test_bad_files_are_reported_in_one_line_each_and_the_others_are_classified(
    tiny_run, digits, bad, tmp_path, monkeypatch, capsys
):
    folder, expected = bad
    good = tmp_path / "good.png"
    Image.fromarray(digits.images_NCHW[0].permute(1, 2, 0).numpy()).resize((50, 50)).save(good)
    code, out, err = run(monkeypatch, capsys, tiny_run, folder, tmp_path / "gone.png", good, good, "--device", "cpu")
    assert code == 1
    assert out.count("good.png") == 2
    assert len(err) == len(expected) + 2
    for name, words in (expected | {"gone.png": "does not exist"}).items():
        (line,) = [line for line in err if name in line]
        assert words in line and line.startswith("error: ")
    assert err[-1] == f"error: {len(expected) + 1} of {len(expected) + 3} images could not be read"


def test_json_is_one_document_and_explain_is_a_figure(tiny_run, digits, bad, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images" / "deeper"
    images.mkdir(parents=True)
    for index in range(3):
        Image.fromarray(digits.images_NCHW[index].permute(1, 2, 0).numpy()).save(images / f"{index}.png")
    (images / "notes.txt").write_text("passed over")
    broken, picture = bad[0] / "text.png", tmp_path / "out.png"
    words = (tmp_path / "images", broken, "--json", "--top", 3, "--explain", picture)
    code, out, err = run(monkeypatch, capsys, tiny_run, *words, "--device", "cpu")
    document = json.loads(out)
    assert code == 1 and len(err) == 4
    assert err[0].endswith(f"not the extension of an image (.txt): {images}/notes.txt")
    assert [document[key] for key in ("run", "data", "backbone")] == [str(tiny_run), "digits", "bundled/vit_micro"]
    assert [row["file"] for row in document["images"]] == [str(images / f"{index}.png") for index in range(3)]
    assert [row["file"] for row in document["failed"]] == [str(broken)]
    for row in document["images"]:
        assert len(row["classes"]) == 3 and len(row["experts"]) == 2 and row["notes"] == []
        assert sum(vote["weight"] for vote in row["experts"]) == pytest.approx(1)
        assert {"name", "probability"} == row["classes"][0].keys() == row["experts"][0]["alone"].keys()
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and drawn.width == 1350
        assert drawn.convert("L").getextrema() == (0, 255)


def test_the_figure_shows_its_inputs():
    image = np.zeros((8, 8, 3), np.uint8)
    votes = [("2 · 64", 0.75, "cat", 0.5), ("0 · 16", 0.25, "cow", 0.125)]
    figure = explanation([image] * 2, ["a$.png", "b.png"], [[("cat", 0.9), ("dog", 0.1)]] * 2, [votes, []])
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    for words in ("cat", "90.0%", "2 · 64, alone: cat (50%)", "0.75", "0 · 16, alone: cow (12%)", "0.25"):
        assert words in texts
    assert [axes.get_title() for axes in figure.axes[::3]] == [r"a\$.png", "b.png"]
    figure = explanation([image], ["a.png"], [[("cat", 0.9)]], [votes], shared=True)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "2 · 64 + shared: cat (50%)" in texts and not [text for text in texts if "alone" in text]
    assert "its prediction + shared" in figure.axes[2].get_title()


def test_a_prediction_with_shared_experts_is_labelled(trained, digits):
    (answer,) = classify(trained, digits.images_NCHW[:1])
    shown = [predict.text("a.png", Namespace(notes=()), answer, shared) for shared in (False, True)]
    assert "alone: " in shown[0] and "with the shared" not in shown[0]
    assert shown[1] == shown[0].replace("alone: ", "with the shared: ")


def test_mistakes_are_reported_in_one_line(tiny_run, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    image = tmp_path / "a.png"
    square().save(image)

    def describe(**changes):
        described = json.loads((tiny_run / "model.json").read_text())
        for key, value in changes.items():
            described[key] = value(described[key]) if callable(value) else value
        (other / "model.json").write_text(json.dumps(described))
        shutil.rmtree(other / "checkpoints", ignore_errors=True)

    def mistake(*words, expected=2):
        code, out, err = run(monkeypatch, capsys, *words)
        assert code == expected and out == "" and len(err) == 1, (code, out, err)
        return err[0]

    assert "is not a folder" in mistake(tmp_path / "gone", image)
    assert "neither model.json nor" in mistake(tmp_path, image, expected=1)
    assert "required: IMAGE" in mistake(tiny_run)
    assert "--top is 0" in mistake(tiny_run, image, "--top", "0")
    assert "the name must end in .png" in mistake(tiny_run, image, "--explain", "out.jpg")
    assert "is not a folder" in mistake(tiny_run, image, "--explain", tmp_path / "gone" / "out.png")
    describe(format_version=0)
    assert "is not of format" in mistake(other, image, expected=1)
    moved = {"weights": "/gone/vit.safetensors", "name": "vit_tiny_patch16_224"}
    describe(config=lambda config: config | {"backbone": config["backbone"] | moved})
    assert "/gone/vit.safetensors are missing: name the file with --backbone.weights" in mistake(
        other, image, expected=1
    )
    describe(backbone=lambda backbone: backbone | {"fingerprint": "0" * 64})
    assert "fingerprint 000000000000" in mistake(other, image, expected=1)
    describe()
    (other / "model.safetensors").write_bytes(b"cut")
    assert "model.safetensors is corrupt" in mistake(other, image, expected=1)
    describe(weights_sha256=None)  # as a run of an earlier version
    assert "is truncated or not a safetensors file" in mistake(other, image, expected=1)
    (other / "model.safetensors").unlink()
    assert "model.safetensors" in mistake(other, image, expected=1)


def cut(content):
    return content[:1000]


def flipped_weight(content):
    return content[:-1000] + bytes([content[-1000] ^ 64]) + content[-999:]


def flipped_name(content):
    return content.replace(b"num_batches_tracked", b"oum_batches_tracked", 1)


@pytest.mark.parametrize("damage", [cut, flipped_weight, flipped_name])
def test_the_advice_about_corrupt_weights_works(tiny_run, tmp_path, monkeypatch, capsys, damage):
    copy, image = tmp_path / "copy", tmp_path / "a.png"
    shutil.copytree(tiny_run, copy)
    square().save(image)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(damage(whole))
    code, _, (line,) = run(monkeypatch, capsys, copy, image)
    assert code == 1 and "model.safetensors is corrupt" in line
    assert f"delete {copy}/model.json and run this again" in line
    (copy / "model.json").unlink()
    assert run(monkeypatch, capsys, copy, image)[0] == 0
    assert (copy / "model.safetensors").read_bytes() == whole
    (copy / "model.safetensors").write_bytes(damage(whole))
    shutil.rmtree(copy / "checkpoints")
    code, _, (line,) = run(monkeypatch, capsys, copy, image)
    assert code == 1 and "copy the run folder again" in line and "delete" not in line


def test_a_corrupt_best_checkpoint_does_not_replace_the_weights_by_older_ones(tiny_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    best, before = copy / "checkpoints" / "best.pt", (copy / "model.safetensors").read_bytes()
    older = torch.load(best, weights_only=True)
    torch.save(older | {"epoch": older["epoch"] - 1, "model": {}}, best.with_name("best.previous.pt"))
    best.write_bytes(cut(best.read_bytes()))
    load_trained(copy, "cpu")
    assert (copy / "model.safetensors").read_bytes() == before


def test_a_folder_without_images_does_not_affect_the_others(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    files, failed = predict.gather([tmp_path / "empty", tmp_path / "a.png"])
    assert files == [tmp_path / "a.png"] and [row["file"] for row in failed] == [str(tmp_path / "empty")]
    assert capsys.readouterr().err.count("\n") == 1


def test_offloaded_experts_give_the_same_outputs(tiny_run, tmp_path, monkeypatch, capsys):
    image = tmp_path / "a.png"
    square().save(image)
    words = (tiny_run, image, "--device", "cpu")
    code, expected, _ = run(monkeypatch, capsys, *words)
    code, out, err = run(monkeypatch, capsys, *words, "--offload", "cpu", "--offload.memory", "30kB")
    assert (code, out) == (0, expected)
    assert "saves nothing on a CPU" in err[0] and err[1].startswith("offload      1 expert on the device (")
    code, _, (line,) = run(monkeypatch, capsys, *words, "--offload.memory", "1GB")
    assert code == 2 and "--offload.memory needs --offload cpu" in line
    code, _, (line,) = run(monkeypatch, capsys, *words, "--offload", "cpu", "--offload.memory", "much")
    assert code == 2 and "'much' is not a size: write it as 512MB" in line


def test_names_of_files_and_classes_never_reach_the_terminal_raw(tiny_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / os.fsdecode(b"a\nb\x1b[31m\xff")
    folder.mkdir()
    square().save(folder / "x.png")
    code, out, err = run(monkeypatch, capsys, tiny_run, folder, folder / "gone.png", "--explain", folder / "out.png")
    shown = f"{tmp_path}/a\\nb\\u001b[31m\\udcff/"
    assert code == 1 and out.startswith(f"{shown}x.png\n") and "\x1b" not in out + "".join(err)
    assert err[:2] == [f"error: {shown}gone.png does not exist: check the name", f"drawn in {shown}out.png"]
    code, out, _ = run(monkeypatch, capsys, tiny_run, folder / "x.png", "--json")
    assert json.loads(out)["images"][0]["file"] == str(folder / "x.png")
