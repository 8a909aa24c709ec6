"""Merging: permuted hidden units are matched, means and groups by hand, and a fit against NumPy."""

import copy
from itertools import permutations

import numpy as np
import pytest
import torch
from compression_helpers import behind, inputs_of, inside

from common.errors import UserError
from compression.align import align, average, layers_of, write_layers
from compression.merge import check_merge, choose_groups, fit, group, merge, merged_config, similarity_of_gates
from compression.observe import inputs_of as matrix_inputs
from compression.observe import observe, output_of
from config.config import Config

KINDS = {
    "mlp": lambda: behind(experts={"sizes": [[6, 5]] * 4}),
    "glu": lambda: behind(experts={"kind": "glu", "sizes": [[6, 5]] * 4}),
    "adapters": lambda: inside(experts={"sizes": [[6]] * 4}),
    "copies": lambda: inside(experts={"kind": "ffn", "sizes": [[64]] * 4}),
}


def shuffle(experts, number, copy_of):
    """Make expert `number` equal to `copy_of`, with permuted hidden units."""
    layers = layers_of(experts, copy_of)
    generator = torch.Generator().manual_seed(number)
    for layer, units in enumerate(layers.hidden):
        layers.reorder(layer, torch.randperm(units, generator=generator))
    write_layers(layers, experts, number)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_equal_experts_with_permuted_units_merge_to_the_same_function(name):
    config, model, build = KINDS[name]()
    for mixture in model.mixtures:
        for number in (1, 2, 3):
            shuffle(mixture.experts, number, copy_of=0)
    rows_ND = torch.randn(10, 8 if name in ("mlp", "glu") else 16)
    expected = output_of(model, 0, 0, rows_ND)
    torch.testing.assert_close(output_of(model, 0, 3, rows_ND), expected, atol=1e-5, rtol=1e-5)
    groups = [[[0, 1], [2, 3]]] * len(model.mixtures)
    smaller_config, smaller = merge(config, model, groups, build)
    for index in (0, 1):
        torch.testing.assert_close(output_of(smaller, 0, index, rows_ND), expected, atol=1e-5, rtol=1e-5)
    assert len(smaller_config.experts.sizes) == 2 == smaller.mixtures[0].router.num_experts


def adapters(down, bias, up):
    """Adapters of one block of width 2 with these numbers; everything else is random."""
    mixture = inside({"kind": "switch", "top_k": 1}, {"sizes": [[len(units)] for units in bias]})
    for each in mixture[1].mixtures:
        each.experts.down.weight.data.zero_()[:, :2] = torch.tensor([row for rows in down for row in rows])
        each.experts.down.bias.data[:] = torch.tensor([unit for units in bias for unit in units])
        each.experts.up.data.zero_()[:2] = torch.tensor([column for columns in up for column in columns]).T
    return mixture


def test_the_mean_by_hand():
    """Unit a of the first expert is nearest to unit b of the second. Usage 3 to 1: shares 0.75 and 0.25."""
    config, model, build = adapters(
        down=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [3.0, 0.0]]],
        bias=[[0.1, 0.2], [0.4, 0.5]],
        up=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 5.0], [9.0, 0.0]]],
    )
    for mixture in model.mixtures:
        mixture.usage_E[:] = torch.tensor([30, 10])
    _, smaller = merge(config, model, [[[0, 1]]] * 2, build)
    merged = smaller.mixtures[1].experts
    # 0.75 * 1 + 0.25 * 3, 0.75 * 1 + 0.25 * 2; 0.75 * 0.1 + 0.25 * 0.5, 0.75 * 0.2 + 0.25 * 0.4; then 1, 9 and 1, 5.
    assert merged.down.weight[:, :2].tolist() == [[1.5, 0.0], [0.0, 1.25]]
    assert merged.down.bias.tolist() == pytest.approx([0.2, 0.25])
    assert merged.up[:2].tolist() == [[3.0, 0.0], [0.0, 2.0]]
    gate, before = smaller.mixtures[1].router.gate, model.mixtures[1].router.gate
    torch.testing.assert_close(gate.weight[0], 0.75 * before.weight[0] + 0.25 * before.weight[1])
    assert smaller.mixtures[1].usage_E.tolist() == [40]


def test_an_expert_with_fewer_units_contributes_to_some_units():
    """The unit of the small expert is closest to the second unit of the large one, and contributes only to that."""
    config, model, build = adapters(
        down=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0]]],
        bias=[[0.0, 0.0], [0.4]],
        up=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 5.0]]],
    )
    for mixture in model.mixtures:
        mixture.usage_E[:] = torch.tensor([10, 10])
    smaller_config, smaller = merge(config, model, [[[1, 0]]] * 2, build)
    merged = smaller.mixtures[0].experts
    assert smaller_config.experts.sizes == [[2]]
    assert merged.down.weight[:, :2].tolist() == [[1.0, 0.0], [0.0, 1.5]]
    assert merged.down.bias.tolist() == pytest.approx([0.0, 0.2])
    assert merged.up[:2].tolist() == [[0.5, 0.0], [0.0, 3.0]]


def test_alignment_finds_the_best_permutation():
    experts = inside(experts={"sizes": [[4]] * 4})[1].mixtures[0].experts
    one, other = layers_of(experts, 0), layers_of(experts, 1)

    def distance(layers):
        pairs = [*zip(layers.matrices, one.matrices, strict=True), (layers.vectors[0][0], one.vectors[0][0])]
        return sum(float((a - b).square().sum()) for a, b in pairs)

    orders = []
    for order in permutations(range(4)):
        candidate = layers_of(experts, 1)
        candidate.reorder(0, torch.tensor(order))
        orders.append(distance(candidate))
    assert distance(align(other, one)) == pytest.approx(min(orders))
    assert average([one, one], [0.5, 0.5]).matrices[0].tolist() == one.matrices[0].tolist()


def test_groups_by_hand():
    similarity = torch.tensor([[1, 0.1, 0.9, 0.2], [0.1, 1, 0.3, 0.4], [0.9, 0.3, 1, 0], [0.2, 0.4, 0, 1.0]])
    usage, same = [0.4, 0.3, 0.2, 0.1], [[4]] * 4
    assert group(similarity, usage, same, 2) == [[0, 2], [1, 3]]
    assert group(similarity, usage, same, 3) == [[0], [1, 3], [2]]
    assert group(similarity, usage, same, 1) == [[0, 1, 2, 3]]
    # By size where a leader has the same; expert 2 would go to 0 by its gate.
    assert group(similarity, usage, [[4], [8], [8], [2]], 2) == [[0], [1, 2, 3]]


def test_gates_are_compared_over_the_samples():
    _, model, _ = behind()
    inputs = inputs_of(model)
    [found] = similarity_of_gates(model, [inputs[:15], inputs[15:]])
    logits_BE = observe(model, inputs)[0].logits_BE.numpy().astype(np.float64)
    for a in range(4):
        for b in range(4):
            norms = np.linalg.norm(logits_BE[:, a]) * np.linalg.norm(logits_BE[:, b])
            assert found[a, b].item() == pytest.approx(logits_BE[:, a] @ logits_BE[:, b] / norms)


def test_blocks_are_grouped_separately_if_all_sizes_are_equal():
    rows = [torch.eye(4), torch.eye(4)]
    rows[0][3, 0] = rows[1][3, 1] = 0.5
    for sizes, equal in (([[3]] * 4, True), ([[3], [4], [5], [6]], False)):
        config, model, _ = inside(experts={"sizes": sizes})
        for mixture in model.mixtures:
            mixture.usage_E[:] = torch.tensor([40, 30, 20, 10])
        first, second = choose_groups(config, model, rows, 3)
        assert first == [[0, 3], [1], [2]] and second == ([[0], [1, 3], [2]] if equal else first)


@pytest.mark.parametrize(
    "mixture",
    [
        lambda: behind(experts={"sizes": [[3, 2], [9, 4], [5], [12, 3]]}),
        lambda: inside(experts={"sizes": [[3], [9], [5], [6]]}),
    ],
)
def test_the_fit_is_that_of_numpy(mixture):
    config, model, build = mixture()
    groups = [[[0, 1, 2], [3]]] * len(model.mixtures)
    _, smaller = merge(config, model, groups, build)
    untouched = copy.deepcopy(smaller)
    inputs = inputs_of(model, 200)
    fit(model, smaller, groups, [inputs[:120], inputs[120:]])
    seen = observe(model, inputs)[0]
    weights_NE = seen.assignments.weights_BE[:, :3].numpy().astype(np.float64)
    mine = weights_NE.sum(axis=1) > 0
    rows_ND, weights_NE = seen.rows_ND[torch.from_numpy(mine)], weights_NE[mine]
    with torch.no_grad():
        each = [output_of(model, 0, member, rows_ND).numpy() for member in range(3)]
        found = output_of(smaller, 0, 0, rows_ND).numpy()
        before = output_of(untouched, 0, 0, rows_ND).numpy()
    wanted = sum(w[:, None] * output for w, output in zip(weights_NE.T, each, strict=True))
    total_N1 = weights_NE.sum(axis=1, keepdims=True)

    def loss(outputs):
        return float(((total_N1 * outputs - wanted) ** 2).sum())

    read_NH = total_N1 * last_inputs(smaller, rows_ND)
    least = float(((read_NH @ np.linalg.lstsq(read_NH, wanted, rcond=None)[0] - wanted) ** 2).sum())
    assert loss(before) > loss(found) >= least * (1 - 1e-6)
    assert loss(found) <= least + 0.02 * (loss(before) - least)
    rows = torch.randn(5, rows_ND.shape[1])  # the other one has equal members: none
    torch.testing.assert_close(output_of(smaller, 0, 1, rows), output_of(untouched, 0, 1, rows))


def last_inputs(model, rows_ND):
    """The input of the first expert's last layer, with a column of ones if it has a bias."""
    with torch.no_grad():
        hidden_NH = matrix_inputs(model, 0, 0, rows_ND)[-1].numpy().astype(np.float64)
    if hasattr(model.mixtures[0].experts, "up"):
        return hidden_NH
    return np.concatenate([hidden_NH, np.ones((len(hidden_NH), 1))], axis=1)


def test_the_configuration_is_that_of_the_widest_members():
    config, *_ = behind({"target_load": [1.0, 2.0, 3.0, 4.0]}, {"sizes": [[3], "small", [9, 4], [5]], "shared": [[7]]})
    merged = merged_config(config, [[0, 3], [1, 2]])
    assert merged.experts.sizes == [[5], "small"] and merged.router.target_load == [5.0, 5.0]
    assert merged.experts.shared == [[7]]


@pytest.mark.parametrize(
    "router, number, message",
    [
        ({}, 4, "--merge is 4: there are 4 experts to merge, so give 2 to 3"),
        ({}, 7, "--merge is 7"),
        ({}, 0, "--merge is 0"),
        ({}, 1, "fewer experts than each sample uses"),
        ({"kind": "hash"}, 2, "no gate whose columns"),
        ({"kind": "hierarchical"}, 2, "groups must stay equal in size"),
    ],
)
def test_impossible_merges_are_reported_in_one_line(router, number, message):
    with pytest.raises(UserError, match=message) as raised:
        check_merge(behind(router)[0], number)
    assert "\n" not in str(raised.value)


def test_a_single_expert_cannot_be_merged():
    config = Config()
    with pytest.raises(UserError, match="--merge is 1: there is only one expert, so nothing to merge"):
        check_merge(config, 1, 1)
    with pytest.raises(UserError, match=r"--merge is 1: there are 2 experts, and each sample uses router\.top_k 2"):
        check_merge(behind()[0], 1, 2)
