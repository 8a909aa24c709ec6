"""The memory of a step through the ViT: counted, compared with the free memory, and reported."""

import pytest
import torch
from block_helpers import images, moe_vit

from common.errors import UserError
from training.memory import bytes_per_image, must_recompute


def test_bytes_are_counted_for_the_blocks_that_have_gradients():
    counted = {}
    for blocks in ([2], [1, 2], [0, 1, 2]):
        model = moe_vit(experts={"blocks": blocks}, norm="none", kind="mixtral").train()
        before = model.mixtures[0].usage_E.clone()
        counted[len(blocks)] = bytes_per_image(model, images(1))
        assert model.training and torch.equal(model.mixtures[0].usage_E, before)
    # A whole block keeps twelve times its 17 tokens of 16 float32 and more; the first with experts no attention.
    assert counted[3] - counted[2] == pytest.approx(counted[2] - counted[1], rel=0.05)
    assert counted[3] - counted[2] > 12 * 17 * 16 * 4
    assert counted[1] < counted[2] - counted[1]


def test_counting_leaves_no_graph_behind():
    """A remaining graph binds the gradients to its stream, and then no CUDA graph can be captured."""
    model = moe_vit(norm="none", kind="mixtral").train()
    bytes_per_image(model, images(1))
    ends = [torch.autograd.graph.get_gradient_edge(parameter).node for parameter in model.parameters()]
    for end in ends:
        end.metadata["counted"] = True
    del end, ends
    bytes_per_image(model, images(1))
    for parameter in model.parameters():  # a node that nothing holds is made anew
        assert "counted" not in torch.autograd.graph.get_gradient_edge(parameter).node.metadata


@pytest.mark.parametrize(
    "choice, batch, expected",
    [("auto", 85, False), ("auto", 86, True), ("auto", 255, True), ("off", 85, False), ("on", 10, True)],
)
def test_recomputing_is_chosen_if_the_activations_do_not_fit(choice, batch, expected):
    assert must_recompute(choice, per_image=10, batch_size=batch, free=1000) is expected


@pytest.mark.parametrize("choice, batch, fits", [("auto", 256, 255), ("off", 86, "85 or --train.recompute on")])
def test_a_batch_that_does_not_fit_is_rejected_with_a_suggestion(choice, batch, fits):
    with pytest.raises(UserError, match=f"set --train.batch_size {fits}$"):
        must_recompute(choice, per_image=10, batch_size=batch, free=1000)


def test_several_processes_share_a_batch():
    assert must_recompute("auto", per_image=10, batch_size=170, free=1000, processes=2) is False
    assert must_recompute("auto", per_image=10, batch_size=171, free=1000, processes=2) is True
    with pytest.raises(UserError, match=r"of train.batch_size 511 .* set --train.batch_size 510$"):
        must_recompute("auto", per_image=10, batch_size=511, free=1000, processes=2)
