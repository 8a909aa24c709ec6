"""The experts of one block: against numbers by hand and a loop over tokens and experts."""

import copy

import pytest
import torch
from block_helpers import plain_ffn
from routing_helpers import listed_routing
from torch.nn import functional as F

from model.blocks import BlockMixture
from model.experts import ExpertsConfig
from model.experts.adapter import Adapters
from model.routers import RouterConfig
from model.routing import Assignments


def block_experts(kind: str, sizes: list[list[int]], **options) -> ExpertsConfig:
    return ExpertsConfig(place="blocks", kind=kind, sizes=sizes, **options)


def test_two_adapters_by_hand():
    """One token (1, 2), two experts of one unit each: relu-free numbers through GELU, weights and up."""
    adapters = Adapters(2, block_experts("adapter", [[1], [1]]), plain_ffn())
    adapters.down.weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    adapters.down.bias.data = torch.tensor([0.0, 1.0])
    adapters.up.data = torch.tensor([[2.0, 4.0], [10.0, 20.0]])
    x_BTD, dense_BTD = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[100.0, 200.0]]])
    # Units: gelu(1) = 0.8413447, gelu(-2 + 1) = -0.1586553; weights 0.25 and 0.5.
    expected = torch.tensor(
        [[[100 + 2 * 0.25 * 0.8413447 - 4 * 0.5 * 0.1586553, 200 + 10 * 0.25 * 0.8413447 - 20 * 0.5 * 0.1586553]]]
    )
    chosen = Assignments.of_each(torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.25]]), 2)
    torch.testing.assert_close(adapters(x_BTD, dense_BTD, chosen), expected)


@pytest.mark.parametrize("top_k", [2, None])
def test_the_assignments_of_images_are_repeated_for_their_tokens(top_k):
    lists = (torch.tensor([0, 0, 1, 1]), torch.tensor([2, 0, 1, 2]), torch.tensor([0.7, 0.3, 0.6, 0.4]))
    each = Assignments.listed(*lists, (2, 3), top_k).repeated(3)
    assert each.num_samples == 6 and each.counts_E.tolist() == [3, 3, 6]
    expected = torch.tensor([[0.3, 0.0, 0.7], [0.0, 0.6, 0.4]]).repeat_interleave(3, dim=0)
    torch.testing.assert_close(each.weights_BE, expected)
    if top_k:
        assert each.sample_A.tolist() == [token for token in range(6) for _ in range(2)]


def test_the_table_of_weights_by_hand():
    routing = listed_routing(
        torch.tensor([0, 0, 2]), torch.tensor([1, 0, 2]), torch.tensor([0.7, 0.3, 0.9]), torch.zeros(3, 3)
    )
    expected = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.9]])
    torch.testing.assert_close(routing.assignments.weights_BE, expected)


def brute_force(mixture: BlockMixture, x_BTD, ffn, kind: str) -> torch.Tensor:
    """Token by token, chosen expert by chosen expert, in float64."""
    routing = mixture.router(mixture._read(x_BTD))
    x_BTD, ffn, mixture = x_BTD.double(), copy.deepcopy(ffn).double(), copy.deepcopy(mixture).double()
    batch, tokens, _ = x_BTD.shape
    out_BTD = torch.zeros_like(x_BTD)
    for b in range(batch):
        for t in range(tokens):
            x_D, sample = x_BTD[b, t], b if mixture.by_image else b * tokens + t
            out_D, left = ffn(x_D), 1.0
            total = torch.zeros_like(out_D)
            for expert, weight in zip(
                routing.expert_A[routing.sample_A == sample], routing.weight_A[routing.sample_A == sample], strict=True
            ):
                if kind == "ffn":
                    expert_D, left = mixture.experts.copies[expert](x_D), left - weight
                else:
                    first = sum(mixture.experts.widths[:expert])
                    units = slice(first, first + mixture.experts.widths[expert])
                    down = mixture.experts.down
                    hidden = F.gelu(down.weight[units] @ x_D + down.bias[units])
                    expert_D = mixture.experts.up[:, units] @ hidden
                total = total + weight * expert_D
            out_BTD[b, t] = left * out_D + total
    return out_BTD


@pytest.mark.parametrize("level", ["token", "image"])
@pytest.mark.parametrize(
    "kind, sizes, how",
    [("adapter", [[2], [3], [1]], "auto"), *(("ffn", [[4]] * 3, how) for how in ("sorted", "grouped", "dense"))],
)
@pytest.mark.parametrize("rule", ["noisy_topk", "vmoe"])  # weights that sum to 1, and weights that do not
@pytest.mark.parametrize("class_token", [True, False])
def test_a_block_equals_the_loop_over_tokens_and_experts(rule, kind, sizes, how, level, class_token):
    ffn = plain_ffn()
    torch.manual_seed(0)
    router = RouterConfig(kind=rule, level=level, norm="none")
    mixture = BlockMixture(
        3, router, block_experts(kind, sizes, dispatch=how), ffn, class_token, prefix=int(class_token)
    ).eval()
    for parameter in mixture.parameters():
        parameter.data = torch.randn_like(parameter)
    x_BTD = torch.randn(2, 5, 3)
    out_BTD, routing = mixture(x_BTD, ffn(x_BTD))
    assert routing.num_samples == (2 if level == "image" else 10)
    torch.testing.assert_close(out_BTD.double(), brute_force(mixture, x_BTD, ffn, kind), rtol=1e-5, atol=1e-5)


def test_gate_and_experts_with_a_separate_norm_read_standardised_tokens():
    """(1, 2, 3) less its mean over its deviation is (-1.2247, 0, 1.2247), regardless of the FFN's norm."""
    chosen = block_experts("adapter", [[1], [1]], norm="own", activation="relu")
    mixture = BlockMixture(3, RouterConfig(kind="mixtral", norm="none"), chosen, plain_ffn(), True, prefix=1).eval()
    mixture.router.gate.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    mixture.router.gate.bias.data.zero_()
    mixture.experts.down.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    mixture.experts.down.bias.data.zero_()
    mixture.experts.up.data = torch.tensor([[5.0, 2.0]] * 3)
    x_BTD = torch.tensor([[[1.0, 2.0, 3.0]]])
    read_BTD = mixture.normalise(x_BTD, torch.full_like(x_BTD, torch.nan))
    out_BTD, routing = mixture(read_BTD, torch.tensor([[[10.0, 20.0, 30.0]]]))
    torch.testing.assert_close(routing.logits_BE, torch.tensor([[-1.224736, 1.224736]]), rtol=1e-4, atol=0)
    # The second expert weighs 1 / (1 + exp(-2.449472)) = 0.920521 and adds 2 * 1.224736 of that; the first, relu(-), 0.
    torch.testing.assert_close(out_BTD - torch.tensor([10.0, 20.0, 30.0]), torch.full((1, 1, 3), 2.254792))
