"""The memory of a step through the ViT: counted, compared with the free memory, and reported."""

import weakref

import pytest
import torch
from block_helpers import images, moe_vit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.errors import UserError
from training.memory import bytes_per_image, must_recompute


def needed(recompute: bool) -> int:
    """Bytes per image; of 1,000 free bytes, 850 are for activations."""
    return 10 if recompute else 30


class Alive(TorchDispatchMode):
    """The memory of all tensors of a forward pass that still exist, and of those that the backward pass makes."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.storages[id(storage)] = weakref.ref(storage)
        self.most = max(self.most, self.bytes())
        return out

    def bytes(self) -> int:
        """Bytes of the tensors that exist now."""
        found = {storage.data_ptr(): storage.nbytes() for each in self.storages.values() if (storage := each())}
        return sum(found.values())


@pytest.mark.parametrize("kind, sizes", [("adapter", [[2], [4], [6]]), ("ffn", [[64]] * 4)])
def test_counted_bytes_are_those_that_exist_after_a_forward_pass(kind, sizes):
    model = moe_vit(experts={"kind": kind, "sizes": sizes}, norm="none").train()
    counted, kept = {}, {}
    for recompute in (False, True):
        counted[recompute] = bytes_per_image(model, images(1), recompute)
        assert model.recompute is False
        model.recompute = recompute
        after = []
        for count in (8, 16):
            with Alive() as alive:
                logits_BC, _routings = model.eval()(images(count))
            del _routings
            after.append(alive.bytes() - logits_BC.untyped_storage().nbytes())
        kept[recompute] = (after[1] - after[0]) / 8
        model.recompute = False
    assert counted[False] == pytest.approx(kept[False], rel=0.1)
    assert kept[True] < counted[True] < counted[False]


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
    [("auto", 28, False), ("auto", 29, True), ("auto", 85, True), ("off", 28, False), ("on", 10, True)],
)
def test_recomputing_is_chosen_if_the_activations_do_not_fit(choice, batch, expected):
    assert must_recompute(choice, needed, batch_size=batch, free=1000) is expected


@pytest.mark.parametrize("choice, batch, fits", [("auto", 86, 85), ("off", 29, "28 or --train.recompute on")])
def test_a_batch_that_does_not_fit_is_rejected_with_a_suggestion(choice, batch, fits):
    with pytest.raises(UserError, match=f"set --train.batch_size {fits}$"):
        must_recompute(choice, needed, batch_size=batch, free=1000)


def test_several_processes_share_a_batch():
    assert must_recompute("auto", needed, batch_size=56, free=1000, processes=2) is False
    assert must_recompute("auto", needed, batch_size=57, free=1000, processes=2) is True
    with pytest.raises(UserError, match=r"of train.batch_size 171 .* set --train.batch_size 170$"):
        must_recompute("auto", needed, batch_size=171, free=1000, processes=2)
