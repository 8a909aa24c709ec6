"""The frozen backbone: it stays frozen, gives the right features, and loads weights without running code."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from model.backbone import Backbone, BackboneConfig, load_backbone
from model.errors import InputError, UnavailableError

CPU = torch.device("cpu")


def config(**options):
    return BackboneConfig(**{"name": "test_vit", "pretrained": False, "image_size": 32, **options})


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_stays_frozen_and_in_evaluation_mode():
    backbone = load_backbone(config(), CPU)
    wrapper = torch.nn.Sequential(backbone, torch.nn.Linear(128, 2))
    wrapper.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    before = backbone.fingerprint()
    optimizer = torch.optim.SGD([p for p in wrapper.parameters() if p.requires_grad], lr=1.0)
    wrapper(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert backbone.fingerprint() == before


def test_features_are_the_normed_tokens_of_the_chosen_blocks(images):
    backbone = load_backbone(config(features=["cls:-1", "mean:-1", "cls:2"]), CPU)
    vit = backbone.vit
    with torch.no_grad():
        tokens = vit.forward_features(images)  # the last block's tokens after the final norm
        hidden = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for block in vit.blocks[:3]:
            hidden = block(hidden)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1), vit.norm(hidden)[:, 0]], dim=1)
    torch.testing.assert_close(backbone(images), expected, atol=1e-5, rtol=1e-5)


def test_token_features_contain_the_class_token_and_the_patches(images):
    backbone = load_backbone(config(features=["tokens:-1"]), CPU)
    torch.testing.assert_close(backbone(images), backbone.vit.forward_features(images), atol=1e-5, rtol=1e-5)


def test_a_vit_without_a_class_token(images):
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    vit = timm.models.VisionTransformer(**options, class_token=False, global_pool="avg")
    assert Backbone(vit, ["mean:-1"])(images).shape == (2, 32)
    assert Backbone(vit, ["tokens:-1"])(images).shape == (2, 4, 32)
    with pytest.raises(InputError, match="have no class token"):
        Backbone(vit, ["cls:-1"])


@pytest.mark.parametrize(
    ("name", "options", "patches", "prefix"),
    [
        ("vit_relpos_small_patch16_224", {}, 4, 0),
        ("vit_relpos_small_patch16_224", {"class_token": True, "global_pool": "token"}, 4, 1),
        ("cait_xxs24_224", {}, 4, 0),  # its class token is added after the blocks
        ("xcit_nano_12_p16_224", {}, 4, 0),
        ("naflexvit_base_patch16_gap", {"img_size": None}, 4, 0),  # four registers, and no patch_embed
    ],
)
def test_vits_with_other_architectures_give_features(images, name, options, patches, prefix):
    small = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0, **options}
    small = {option: value for option, value in small.items() if value is not None}
    vit = timm.create_model(name, **small).eval()
    width = vit.num_features
    assert Backbone(vit, ["tokens:-1"])(images).shape == (2, prefix + patches, width)
    mean = Backbone(vit, ["tokens:-1"])(images)[:, prefix:].mean(dim=1)
    torch.testing.assert_close(Backbone(vit, ["mean:-1"])(images), mean)
    if prefix:
        torch.testing.assert_close(Backbone(vit, ["cls:-1"])(images), vit.forward_features(images)[:, 0])
        return
    with pytest.raises(InputError, match="have no class token"):
        Backbone(vit, ["cls:-1"])


@pytest.mark.parametrize("size", [1, 7, 15])
def test_an_image_size_below_the_patch_size_is_reported_in_one_line(size):
    with pytest.raises(InputError, match=rf"cannot process images of {size} pixels .*choose another") as caught:
        load_backbone(config(image_size=size), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",  # DistributedDataParallel
        lambda name: f"_orig_mod.{name}",  # torch.compile
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),  # a block alone
        lambda name: f"backbone.{name}",  # a part of a larger model
        lambda name: f"module.student.vit.{name}",
    ],
)
def test_weights_saved_under_a_wrapper_are_loaded(tmp_path, rename):
    torch.manual_seed(7)
    vit = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
    state = {rename(name): value for name, value in vit.state_dict().items()}
    torch.save({"model": {**state, "classifier.weight": torch.zeros(2)}}, tmp_path / "weights.pth")
    backbone = load_backbone(config(weights=tmp_path / "weights.pth"), CPU)
    for name, value in vit.state_dict().items():
        assert torch.equal(backbone.vit.state_dict()[name], value), name


def test_ambiguous_weights_are_rejected(tmp_path):
    state = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    both = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in state.items()}
    torch.save(both, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="under student and under teacher"):
        load_backbone(config(weights=tmp_path / "weights.pth"), CPU)


@pytest.mark.parametrize("weights", [None, "weights.pth"])
def test_a_model_that_is_not_a_vit_is_rejected_before_its_weights_are_loaded(tmp_path, weights):
    if weights:
        torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / weights)
        weights = tmp_path / weights
    with pytest.raises(InputError, match=r"resnet18\.a1_in1k is not a ViT with tokens"):
        load_backbone(BackboneConfig(name="resnet18.a1_in1k", weights=weights), CPU, lambda url: False)


def test_registers_are_left_out(images):
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    vit = timm.models.VisionTransformer(**options, reg_tokens=3).eval()
    whole = vit.forward_features(images)
    assert whole.shape == (2, 8, 32)
    torch.testing.assert_close(Backbone(vit, ["mean:-1"])(images), whole[:, 4:].mean(dim=1), atol=1e-5, rtol=1e-5)
    expected = torch.cat([whole[:, :1], whole[:, 4:]], dim=1)
    torch.testing.assert_close(Backbone(vit, ["tokens:-1"])(images), expected, atol=1e-5, rtol=1e-5)


def test_mean_and_std_are_the_models_own():
    clip = timm.create_model("vit_base_patch32_clip_quickgelu_224.openai", num_classes=0, depth=1)
    assert Backbone(clip, ["cls:-1"]).mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert load_backbone(config(), CPU).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_are_loaded(tmp_path, images, suffix):
    torch.manual_seed(7)
    vit = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": vit.state_dict()}, path)
    else:
        save_file(vit.state_dict(), path)
    backbone = load_backbone(config(weights=path, features=["tokens:-1"]), CPU)
    torch.testing.assert_close(backbone(images), vit.forward_features(images), atol=1e-5, rtol=1e-5)
    assert backbone.fingerprint() != load_backbone(config(), CPU).fingerprint()


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone():
    torch.manual_seed(3)
    first = load_backbone(config(), CPU).fingerprint()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert load_backbone(config(), CPU).fingerprint() == first


def test_the_fingerprint_covers_everything_that_features_depend_on():
    backbone = load_backbone(config(features=["cls:-1"]), CPU)
    seen = {backbone.fingerprint()}
    state = backbone.vit.state_dict()
    assert any(name.startswith("blocks.") for name in state)
    for name, value in state.items():
        value.view(-1)[-1] += 1.0
        seen.add(backbone.fingerprint())
        assert len(seen) == 2, name
        value.view(-1)[-1] -= 1.0
        seen = {backbone.fingerprint()}
    for name, value in [
        ("mean", (0.1, 0.2, 0.3)),
        ("std", (1.0, 1.0, 1.0)),
        ("features", [("mean", 3)]),
        ("image_size", 48),
    ]:
        before = getattr(backbone, name)
        setattr(backbone, name, value)
        assert backbone.fingerprint() not in seen, name
        setattr(backbone, name, before)


def test_a_weights_file_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemError('code from a weights file ran')",))

    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="not a readable file of tensors"):
        load_backbone(config(weights=path), CPU)
    torch.save({"state_dict": {"x": Bomb()}}, path)
    with pytest.raises(InputError, match="not a readable file of tensors"):
        load_backbone(config(weights=path), CPU)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "vit_base_patch16_223"}, "did you mean vit_base_patch16"),
        ({"name": "resnet18", "image_size": None}, "not a ViT"),
        (
            {"name": "vit_base_patch16_224.openai", "pretrained": True, "image_size": None},
            "it has vit_base_patch16_224",
        ),
        ({"features": ["cls:99"]}, "blocks 0 to 5"),
        ({"weights": "/nowhere/file.pth"}, "is not a file"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(InputError, match=words):
        load_backbone(config(**options), CPU)


def test_weights_of_another_model_are_rejected(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"fit test_vit: \d+ of its weights are missing .* --backbone\.name"):
        load_backbone(config(weights=path), CPU)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=32).state_dict(), path)
    with pytest.raises(InputError) as caught:
        load_backbone(config(weights=path), CPU)
    assert str(caught.value) == (
        f"backbone.weights {path} does not fit test_vit: it belongs to another model (cls_token is 1x1x192 in the file "
        "and 1x1x64 in the model); give weights of test_vit, or with --backbone.name the model that the file belongs to"
    )


def test_weights_that_cannot_be_downloaded_are_reported_at_once():
    with pytest.raises(UnavailableError, match=r"--backbone\.weights FILE"):
        load_backbone(BackboneConfig(name="vit_large_patch16_224"), CPU, lambda url: False)


@pytest.mark.parametrize("features", [[], ["cls"], ["max:-1"], ["cls:x"], ["tokens:-1", "cls:-1"]])
def test_impossible_features_are_rejected(features):
    with pytest.raises(ValueError, match=r"backbone\.features"):
        BackboneConfig(features=features)
