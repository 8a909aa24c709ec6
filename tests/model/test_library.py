"""model/ as the library vision_moe: an installed wheel, in an empty folder, in a user's model."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import model
from model import ExpertsConfig, InputError, MixtureOfExperts, MoEFFN, NeckConfig, RouterConfig

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(encoding="utf-8"), re.DOTALL)
SIZES = ExpertsConfig(sizes=[[4], [8], [16]], dropout=0.0)

STRANGER = f"""
import importlib.util
import sys

head, block = {SNIPPETS!r}
exec(head)
assert logits.shape == (32, 10) and routing.num_samples == 32
assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())
exec(block)
assert tokens.shape == (2, 50, 64) and tokens.isfinite().all()

import vision_moe
assert vision_moe.__file__.startswith(sys.argv[1])
assert importlib.util.find_spec("model") is None and importlib.util.find_spec("common") is None
assert all(hasattr(vision_moe, name) for name in vision_moe.__all__)
backbone = vision_moe.load_backbone(vision_moe.BackboneConfig(name="bundled/vit_micro"), torch.device("cpu"))
assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 384)
try:
    RouterConfig(kind="nosy")
except ValueError as error:
    print(error)
"""


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@pytest.mark.slow
def test_an_installed_wheel_works_in_an_empty_folder(tmp_path):
    source, empty, site = tmp_path / "source", tmp_path / "empty", tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "model", source / "model", ignore=ignored)
    (source / "docs").mkdir()
    empty.mkdir()
    for name in ("pyproject.toml", "LICENSE", "docs/library.md"):
        shutil.copy(ROOT / name, source / name)
    quiet = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*quiet, "wheel", str(source), "--no-build-isolation", "--no-deps", "--no-index", "-w", str(tmp_path)]
    subprocess.run(wheel, check=True, capture_output=True)
    [built] = tmp_path.glob("vision_moe-*.whl")
    install = [*quiet, "install", str(built), "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    words = [sys.executable, "-c", STRANGER, str(site)]
    ran = subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("router.kind is 'nosy': give one of article, ")
    assert files(site / "vision_moe") == files(source / "model")


def test_the_example_is_ten_lines_and_in_the_readme_too():
    assert len([line for line in SNIPPETS[0].splitlines() if line]) == 10
    assert SNIPPETS[0] in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["noisy_topk", "switch", "expert_choice", "hash"])
def test_an_ffn_is_the_mixture_of_its_tokens(kind):
    torch.manual_seed(0)
    ffn = MoEFFN(6, RouterConfig(kind=kind, top_k=1 if kind == "switch" else 2), SIZES)
    tokens_BTD = torch.randn(3, 5, 6)
    ffn.train()(tokens_BTD)  # statistics, and thresholds of expert choice
    out_BTD, routing = ffn.eval()(tokens_BTD)
    assert routing.num_samples == 15 and out_BTD.shape == tokens_BTD.shape
    for b in range(3):
        for t in range(5):
            mine = [a for a in range(len(routing.sample_A)) if routing.sample_A[a] == 5 * b + t]
            outputs = [ffn.mixture.experts[routing.expert_A[a]](tokens_BTD[b, t]) * routing.weight_A[a] for a in mine]
            torch.testing.assert_close(out_BTD[b, t], sum(outputs), atol=1e-5, rtol=1e-4)


def test_a_dropped_token_adds_nothing_to_the_residual_stream():
    torch.manual_seed(0)
    ffn = MoEFFN(6, RouterConfig(kind="switch", top_k=1, capacity_factor=0.5, warmup_steps=0), SIZES).train()
    out_BTD, routing = ffn(torch.randn(2, 6, 6))
    served_N = torch.zeros(12, dtype=torch.bool).index_fill(0, routing.sample_A, True)
    assert 0 < served_N.sum() == 12 - routing.dropped < 12
    assert torch.equal(out_BTD.flatten(0, 1).abs().sum(dim=1) > 0, served_N)


def test_an_ffn_computes_in_the_number_format_of_its_tokens():
    ffn = MoEFFN(6, RouterConfig(), SIZES).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert ffn(torch.randn(2, 3, 6, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RouterConfig(kind="nosy"), r"kind is 'nosy': give one of article, .*; did you mean noisy_topk\?"),
        (lambda: RouterConfig(top_k=True), r"router\.top_k is True: give a whole number"),
        (lambda: RouterConfig(noise_std="0.1"), r"router\.noise_std is '0\.1': give a number, or null"),
        (lambda: ExpertsConfig(sizes=[16, 32]), r"experts\.sizes has 16: .* hidden layers, such as \[16\]"),
        (lambda: ExpertsConfig(sizes=[["16"]]), r"experts\.sizes has \['16'\]: hidden layers"),
        (lambda: ExpertsConfig(kind="glue"), r"experts\.kind is 'glue': .* did you mean glu\?"),
        (lambda: ExpertsConfig(kind="adapter"), r"inside the ViT: set experts\.place blocks, or glu or mlp"),
        (lambda: NeckConfig(kind="pool"), r"neck\.kind is 'pool': give one of pooled, .* did you mean pooled\?"),
        (lambda: MixtureOfExperts(6, 3, RouterConfig(top_k=4), SIZES), r"top_k 4 is larger than the number of exp"),
        (lambda: MixtureOfExperts(6, 0, RouterConfig(), SIZES), r"num_classes is 0: give a whole number of at least"),
        (lambda: MixtureOfExperts("6", 3, RouterConfig(), SIZES), r"in_features is '6': give a whole number"),
        (lambda: MoEFFN(-1, RouterConfig(), SIZES), r"^width is -1: give a whole number of at least 1"),
        (lambda: MoEFFN(6, RouterConfig(kind="soft_moe"), SIZES), r"gives one output per sample, an FFN needs one"),
        (lambda: MoEFFN(6, RouterConfig(overflow="residual", capacity_factor=1.0), SIZES), r"set drop"),
        (lambda: MoEFFN(6, RouterConfig(), ExpertsConfig(combine="probabilities")), r"in an FFN set logits"),
    ],
)  # fmt: skip
def test_wrong_values_are_one_clear_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 6)])
def test_a_wrong_shape_is_one_clear_sentence(shape):
    moe, ffn = MixtureOfExperts(6, 3, RouterConfig(), SIZES), MoEFFN(6, RouterConfig(), SIZES)
    with pytest.raises(ValueError, match=r"reads a tensor of shape \(B, 6\), not \("):
        moe(torch.zeros(shape))
    if len(shape) < 3:
        with pytest.raises(ValueError, match=r"reads a tensor of shape \(B, T, 6\), not \("):
            ffn(torch.zeros(shape))


def test_integers_are_one_clear_sentence():
    for module, shape in (
        (MixtureOfExperts(6, 3, RouterConfig(), SIZES), (2, 6)),
        (MoEFFN(6, RouterConfig(), SIZES), (2, 3, 6)),
    ):
        with pytest.raises(ValueError, match=r"reads floating-point numbers, not torch\.int64: convert them first$"):
            module(torch.zeros(shape, dtype=torch.int64))


def test_all_names_exist_and_errors_are_builtin_types():
    assert sorted(model.__all__) == sorted(set(model.__all__)) and all(hasattr(model, name) for name in model.__all__)
    assert issubclass(InputError, ValueError) and issubclass(model.UnavailableError, OSError)
