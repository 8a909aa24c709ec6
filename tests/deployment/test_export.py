"""Exported files: they give the outputs of the run, describe themselves, and run without this project."""

import json
import os
import subprocess
import sys

import pytest
import torch
from deployment_helpers import behind, inside
from PIL import Image

import export as program
from assembly.loading import load_trained
from common.errors import EnvironmentFault, UserError, exit_code_of
from data.image_file import read_picture
from deployment import formats
from deployment.about import about
from deployment.export import BATCHES, TOLERANCE, check_target, compare, export, fits_torch, pictures
from deployment.formats import FORMATS
from deployment.graph import ImagesToAnswers, in_float32, traced
from evaluation.classify import classify
from model.preparation import prepare
from model.routers import ROUTERS

OPTIONS = {
    "hierarchical": {"router": {"kind": "hierarchical", "groups": 2, "top_groups": 1, "top_k": 2}},
    "soft_moe": {
        "router": {"kind": "soft_moe", "slots": 2},
        "neck": {"kind": "tokens"},
        "backbone": {"features": ["tokens:0"]},
    },
}
SHORT = {"backbone": {"features": ["mean:0"]}}  # one block of the ViT, whose operations are traced one by one
pytestmark = pytest.mark.skipif(not fits_torch(), reason="the exporter of this PyTorch is too old")
needs_onnx = pytest.mark.skipif(bool(FORMATS[".onnx"].missing), reason=f"lacks {FORMATS['.onnx'].missing}")


def of_rule(kind, sections=None, **experts):
    options = OPTIONS.get(kind, {"router": {"kind": kind, "top_k": ROUTERS[kind].only_top_k or 2}})
    return behind(**(sections or {}), **options, experts=experts)


def run(monkeypatch, capsys, *words):
    """Exit code, standard output, lines of standard error."""
    monkeypatch.setattr("sys.argv", ["export.py", *map(str, words)])
    code = exit_code_of(program.main)
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def rounded(trained, ending):
    """The differences of a file of a run from that run."""
    content = FORMATS[ending].encode(traced(in_float32(trained)), about(trained, f"x{ending}", ending))
    return compare(FORMATS[ending].opened(content), trained, len(content))


def test_the_graph_returns_experts_and_weights_in_descending_order():
    trained = of_rule("top_p", combine="logits")
    images = pictures(6, 8)
    backbone = trained.backbone
    with torch.no_grad():
        x_BD = backbone(prepare(images, backbone.image_size, backbone.mean, backbone.std))
        logits_BC, (routing,) = trained.model(x_BD)
        probabilities_BC, experts_BK, weights_BK = ImagesToAnswers(trained).eval()(images)
    torch.testing.assert_close(probabilities_BC, logits_BC.softmax(dim=1))
    assert experts_BK.shape == weights_BK.shape == (6, 4) and (experts_BK == -1).any()
    for image in range(6):
        mine_A = routing.sample_A == image
        expected = dict(zip(routing.expert_A[mine_A].tolist(), routing.weight_A[mine_A].tolist(), strict=True))
        told = list(zip(experts_BK[image].tolist(), weights_BK[image].tolist(), strict=True))
        assert dict(pair for pair in told if pair[0] >= 0) == pytest.approx(expected)
        assert [weight for _, weight in told] == sorted((weight for _, weight in told), reverse=True)
        assert all(weight == 0 for expert, weight in told if expert < 0)


def test_inside_the_vit_a_weight_is_the_mean_over_the_tokens_of_an_image():
    trained = inside()
    images = pictures(3, 8)
    with torch.no_grad():
        logits_BC, routings = trained.model(images)
        probabilities_BC, experts_BLK, weights_BLK = ImagesToAnswers(trained).eval()(images)
    torch.testing.assert_close(probabilities_BC, logits_BC.softmax(dim=1))
    assert experts_BLK.shape == weights_BLK.shape == (3, 3, 3)
    for block, routing in enumerate(routings):
        mean_BE = routing.assignments.weights_BE.view(3, 17, 3).mean(dim=1)  # a class token and 16 patches
        torch.testing.assert_close(mean_BE.gather(1, experts_BLK[:, block].clamp_min(0)), weights_BLK[:, block])
    assert (weights_BLK.diff(dim=-1) <= 0).all() and torch.allclose(weights_BLK.sum(dim=-1), torch.ones(3, 3))


@pytest.mark.slow
def test_a_traced_graph_takes_any_number_of_images_and_does_not_change_the_run():
    trained = of_rule("noisy_topk", shared=[[4]], sizes=[[4], [4], [8]], inputs=[[0], [1], [0, 1], [1]])
    graph = traced(trained).module()
    assert trained.model.moe.dispatch_mode == "auto"
    checked = compare(graph, trained, 0)
    assert checked.probabilities <= TOLERANCE and checked.weights <= TOLERANCE
    assert BATCHES == (1, 7, 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_rule_is_exported(kind):
    trained = of_rule(kind) if kind in OPTIONS else of_rule(kind, SHORT, sizes=[[4], [], []])
    checked = compare(traced(trained).module(), trained, 0)
    assert checked.probabilities <= TOLERANCE and checked.weights <= TOLERANCE


@pytest.mark.slow
def test_copies_of_the_ffn_are_exported():
    trained = inside("registers", experts={"kind": "ffn", "sizes": [[64]] * 3})
    checked = compare(traced(trained).module(), trained, 0)
    assert checked.probabilities <= TOLERANCE and checked.weights <= TOLERANCE


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize(
    "make",
    [
        lambda: of_rule("top_p", combine="probabilities", weights=["fp8", "int8", "float16", "float32"]),
        lambda: inside("eva", router={"level": "image"}, experts={"head": [[4], [4], [8]]}),
    ],
    ids=["a sort, a mixture of probabilities, and weights in 8 bits", "one choice an image, and a mixture on top"],
)
def test_onnx_runtime_gives_the_same_outputs(make):
    checked = rounded(make(), ".onnx")
    assert checked.probabilities <= TOLERANCE and checked.weights <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("ending", [pytest.param(".onnx", marks=needs_onnx), ".pt2"])
def test_the_example_in_a_file_gives_the_outputs_of_the_run_without_this_project(
    tiny_run, tmp_path, monkeypatch, capsys, ending
):
    out = tmp_path / f"model{ending}"
    code, printed, err = run(monkeypatch, capsys, tiny_run, out)
    assert (code, err) == (0, []) and printed.count("\n") == 2 and os.listdir(tmp_path) == [out.name]
    trained = load_trained(tiny_run, "cpu")
    Image.fromarray(pictures(1, 50)[0, :, :41].permute(1, 2, 0).numpy()).save(tmp_path / "cat.jpg", "PNG")
    data = trained.config.data
    image = read_picture(tmp_path / "cat.jpg", data.side, data.grey).pixels_CHW[None]
    described = metadata(out)
    assert described["labels"] == list(trained.class_names) and described["data"] == "digits"
    assert described["preprocessing"]["mean"] == list(trained.backbone.mean)
    assert described["expert_names"] == trained.config.experts.labels()
    assert described["example"].count("\n") <= 12
    words = [sys.executable, "-I", "-c", described["example"]]
    paths = "import sys; sys.path[:0] = " + repr([path for path in sys.path if "packages" in path or "pk-" in path])
    words[-1] = f"{paths}\n{words[-1]}"
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "requires_grad" not in ran.stderr
    label, probability, rest = ran.stdout.split(" ", 2)
    experts, weights = json.loads(f"[{rest.strip().replace('] [', '], [')}]")
    (answer,) = classify(trained, image, top=1)
    assert label == answer.classes[0].name
    assert float(probability) == pytest.approx(answer.classes[0].probability, abs=1e-4)
    assert experts == [vote.expert for vote in answer.experts]
    assert weights == pytest.approx([vote.weight for vote in answer.experts], abs=1e-4)


def metadata(path):
    if path.suffix == ".pt2":
        torch.export.load(path, extra_files=(extra := {"metadata.json": ""}))
        return json.loads(extra["metadata.json"])
    import onnx

    texts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return {key: json.loads(text) if text.startswith(("[", "{")) else text for key, text in texts.items()}


@pytest.mark.slow
def test_a_file_with_different_outputs_is_not_written(tmp_path, monkeypatch):
    trained = of_rule("switch")
    other = of_rule("switch", sizes=[[4], [8], [6, 5], [3]])
    monkeypatch.setattr(formats.Pt2, "opened", lambda self, content: ImagesToAnswers(other).eval())
    with pytest.raises(
        EnvironmentFault, match=r"give different outputs than the run: probabilities by up to .*nothing"
    ):
        export(trained, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


class Unexportable(torch.nn.Module):
    def forward(self, x_BD):
        return x_BD[: int(x_BD.sum())]


@pytest.mark.slow
def test_a_model_that_cannot_be_exported_is_reported_in_one_line(tmp_path):
    trained = of_rule("switch")
    trained.model.neck.norm = Unexportable()
    with pytest.raises(UserError, match=r"^this run cannot be exported as .pt2 \(\w+: .*\)") as caught:
        export(trained, tmp_path / "x.pt2")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_mistakes_are_reported_in_one_line_before_anything_is_read(tmp_path, monkeypatch, capsys):
    def mistake(*words, expected=2):
        code, out, err = run(monkeypatch, capsys, *words)
        assert code == expected and out == "" and len(err) == 1, (code, out, err)
        return err[0]

    gone = tmp_path / "gone"
    assert "neither .onnx nor .pt2" in mistake(gone, tmp_path / "x.pth")
    assert f"{gone} is not a folder" in mistake(
        tmp_path, gone / "x.onnx" if not FORMATS[".onnx"].missing else gone / "x.pt2"
    )
    assert "is not a folder: name a run" in mistake(gone, tmp_path / "x.pt2")
    (tmp_path / "y.pt2").mkdir()
    assert "y.pt2 is a folder: name a file" in mistake(tmp_path, tmp_path / "y.pt2")
    assert "cannot be created in /proc" in mistake(gone, "/proc/x.pt2", expected=1)
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    assert "needs onnx, onnxscript, onnxruntime: pip install" in mistake(gone, tmp_path / "x.onnx", expected=1)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    assert "needs the exporter of torch 2.8 or later" in mistake(gone, tmp_path / "x.onnx", expected=1)
    monkeypatch.undo()
    assert check_target(tmp_path / "x.pt2") is FORMATS[".pt2"]
    assert not list(tmp_path.glob("x.*"))


def test_an_image_whose_token_chooses_otherwise_counts_in_the_mean_alone():
    trained = of_rule("mixtral")
    graph = ImagesToAnswers(trained).eval()

    def answer(images, off=2e-3, moved=0.005):
        with torch.no_grad():
            probabilities_BC, experts_BK, weights_BK = graph(images)
        if len(images) == 64:
            probabilities_BC[3, 0] += off
            weights_BK[3, 0] += moved
        return probabilities_BC, experts_BK, weights_BK

    checked = compare(answer, trained, 0)
    assert checked.undecided == 1
    assert checked.probabilities == pytest.approx(2e-3 / 72, rel=1e-2)
    assert checked.weights == pytest.approx(0.005 / 72, rel=1e-2)
    checked = compare(lambda images: answer(images, moved=0), trained, 0)
    assert (checked.undecided, checked.weights) == (0, 0) and checked.probabilities == pytest.approx(2e-3, rel=1e-2)


def test_a_model_too_large_for_onnx_is_reported_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.Onnx, "most", 1000)
    monkeypatch.setattr(formats.Onnx, "packages", ())
    with pytest.raises(UserError, match=r"would have 0.0 GB, .*name a .pt2 file"):
        export(of_rule("switch"), tmp_path / "x.onnx")
