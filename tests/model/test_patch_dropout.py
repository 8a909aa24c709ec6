"""PatchDropout and drop path: the patches and paths that a training step drops; evaluation drops nothing."""

import pytest
import torch
from block_helpers import images, moe_vit, spread, tiny_vit

from config.config import Config, config_from_dict
from model.vit_parts import drop_patches


def test_patches_are_dropped_and_prefix_tokens_kept():
    torch.manual_seed(0)
    x_BTD = torch.arange(2 * 11 * 1).view(2, 11, 1).float()  # a class token and ten patches
    kept_BTD = drop_patches(x_BTD, 1, 0.35)  # 6.5 patches, rounded to even
    assert kept_BTD.shape == (2, 7, 1)
    assert (kept_BTD[:, 0] == x_BTD[:, 0]).all()
    for kept_T, whole_T in zip(kept_BTD[..., 0].tolist(), x_BTD[..., 0].tolist(), strict=True):
        assert len(set(kept_T)) == 7
        assert set(kept_T) <= set(whole_T)
    assert set(kept_BTD[0, :, 0].tolist()) != {x - 11 for x in kept_BTD[1, :, 0].tolist()}  # drawn for each image


def test_one_patch_is_always_kept():
    assert drop_patches(torch.zeros(1, 5, 2), 1, 0.999).shape == (1, 2, 2)


def test_every_patch_is_equally_likely():
    torch.manual_seed(0)
    x_BTD = torch.eye(8).expand(4000, 8, 8)  # a patch is identified by its column
    counts_D = drop_patches(x_BTD, 0, 0.5).sum(dim=(0, 1))
    assert counts_D.sum() == 4000 * 4
    assert (counts_D - 2000).abs().max() < 160  # five standard deviations


def test_a_step_uses_fewer_tokens_and_trains_the_experts():
    model = spread(moe_vit()).train()
    logits_BC, routings = model(images(), patch_dropout=0.5)
    assert [routing.num_samples for routing in routings] == [6 * (1 + 8)] * 3
    logits_BC.sum().backward()
    assert all(mixture.experts.up.grad.abs().sum() > 0 for mixture in model.mixtures)


def test_rotary_embeddings_are_rejected():
    with pytest.raises(ValueError, match=r"patch_dropout does not work for a ViT with rotary"):
        moe_vit(tiny_vit("eva"))(images(), patch_dropout=0.5)


def test_drop_path_skips_the_experts_of_whole_images_and_keeps_their_mean():
    model = spread(moe_vit(experts={"drop_path": 0.25}, kind="mixtral", norm="none"))
    mixture = model.mixtures[0].train()
    torch.manual_seed(0)
    x_BTD, dense_BTD = torch.randn(1, 3, 16).expand(4000, 3, 16), torch.zeros(4000, 3, 16)
    added_BTD = mixture(x_BTD, dense_BTD)[0].detach()
    skipped_B = (added_BTD == 0).all(dim=(1, 2))
    assert abs(skipped_B.float().mean() - 0.25) < 0.035
    whole_BTD = mixture.eval()(x_BTD, dense_BTD)[0].detach()
    assert (whole_BTD != 0).any(dim=(1, 2)).all()
    torch.testing.assert_close(added_BTD[~skipped_B], whole_BTD[~skipped_B] / 0.75)


def test_options_need_the_right_place():
    values = Config().to_dict()
    values["train"]["patch_dropout"] = 0.3
    with pytest.raises(Exception, match=r"train.patch_dropout needs experts.place blocks"):
        config_from_dict(values)
