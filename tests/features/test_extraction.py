"""The backbone for extraction: its fast copy, half precision, and compilation."""

import pytest
import torch
from feature_helpers import SPLITS, bank, everything

from assembly.pipeline import build_bank
from config.command_line import parse_command_line
from evaluation.cost import flops
from features.cache import FeatureCache
from features.extraction import HOURS, Extractor, warn_of_hours, worth_compiling
from model.backbone import Backbone, BackboneConfig, load_backbone
from model.fast_vit import PatchProjection, fast_copy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vit_micro():
    return load_backbone(BackboneConfig(name="bundled/vit_micro"), CPU)


def test_half_precision_features_are_those_of_float32_within_its_rounding(vit_micro):
    from data.datasets.digits import load_digits

    fast = Backbone(vit_micro.vit, ["cls:-1", "mean:-1"], torch.bfloat16)
    batch = load_digits().images_NCHW[:3]
    exact, half = Extractor(vit_micro, 64)(batch), Extractor(fast, 64)(batch)  # 3 images: on a CPU it is slow
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, half).min() > 0.999
    assert (exact - half).abs().mean() < 0.02 * exact.abs().mean()
    assert fast.fingerprint() == vit_micro.fingerprint()  # of the weights as they are stored, on any device


def test_the_fast_copy_is_equivalent(vit_micro):
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


def test_a_backbone_is_compiled_for_full_batches_and_a_failure_is_tolerated(vit_micro, monkeypatch, capsys):
    compiled = []

    def compile(module, **options):
        compiled.append(options)
        return lambda *batch: module(*batch) + 1

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
    assert "cannot be compiled (no compiler here): continuing without compiling" in capsys.readouterr().err


def test_compiling_must_pay_off():
    gpu = torch.device("cuda", 0)
    assert worth_compiling("auto", 10**8, gpu) and not worth_compiling("auto", 1000, gpu)
    assert not worth_compiling("auto", 10**8, CPU)
    assert worth_compiling("always", 1, CPU) and not worth_compiling("never", 10**8, gpu)


def test_hours_on_a_cpu_are_reported_before_they_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def said(flops, **options):
        features = bank(**options)
        warn_of_hours(features, flops, epochs=3)
        return capsys.readouterr().err

    # 2 views of 40 images, 10 of validation and 12 of test; live, 3 epochs of 40 + 10, and 12.
    assert said(HOURS / 102) == ""
    assert said(HOURS / 101).startswith("warning: 102 images, each view counted,")
    assert "configs/cifar100_cpu.yaml), or fewer --features.views" in said(HOURS)
    assert "configs/cifar100_cpu.yaml)\n" in said(HOURS, augment=False, views=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert said(HOURS / 101) == ""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    live = said(HOURS, mode="live")
    assert "162 images" in live and "--features.mode cached" in live
    cache = FeatureCache(tmp_path)
    stored = bank(cache)
    everything(stored)
    cache.wait()
    assert stored.images_left() == 62 and "62 images" in said(HOURS, cache=cache)
    stored.device = torch.device("cuda", 0)
    warn_of_hours(stored, HOURS, epochs=3)
    assert capsys.readouterr().err == ""


def test_the_configuration_for_a_cpu_takes_no_hours(vit_micro):
    config = parse_command_line(["--config", "configs/cifar100_cpu.yaml"]).config
    images = 50_000 * config.features.views + 10_000
    assert images * flops(vit_micro, torch.zeros(1, 3, vit_micro.image_size, vit_micro.image_size)) < HOURS / 2


def test_compiled_and_eager_backbones_have_separate_features(vit_micro, tmp_path):
    sources = []
    for choice in ("never", "auto", "always"):  # auto: not on a CPU
        config = parse_command_line(["--config", "configs/digits.yaml", "--features.compile", choice]).config
        config.features.cache_dir = tmp_path
        sources.append(build_bank(config, SPLITS, vit_micro, CPU).source)
    assert sources[0] == sources[1] and sources[2] == {**sources[0], "compiled": True}
