"""Quantisation: scales, calibration and errors by hand, and outputs against those of rounded weights."""

import pytest
import torch
from compression_helpers import behind, inputs_of, inside

from common.errors import UserError
from compression.merge import merge
from compression.observe import HEAD, observe
from compression.quantise import (
    best_scales,
    calibrate,
    check_format,
    choose_scales,
    output_errors,
    owners_of,
    quantise,
    rounded,
)
from model.experts import ExpertKind
from model.quantised import pack, unpack

KINDS = {
    "behind": lambda: behind({"kind": "switch", "top_k": 1}, {"shared": [[7]]}),
    "soft": lambda: behind({"kind": "soft_moe"}),
    "adapters": inside,
    "by image": lambda: inside({"level": "image"}),
    "copies": lambda: inside(experts={"kind": "ffn", "sizes": [[64]] * 4}),
    "on top": lambda: inside(experts={"head": [[4], [3], [2], [5]]}),
}


def test_routed_and_shared_experts_and_the_linear_head_are_quantised():
    assert [owner.number for owner in owners_of(behind(experts={"shared": [[7]]})[1])] == [0, 1, 2, 3, 4]
    owners = owners_of(inside()[1])
    assert [owner.number for owner in owners] == [0, 1, 2, 3, HEAD]
    assert [(part.name, part.position) for part in owners[2].parts[1]] == [("weight", 2), ("up", 2)]
    _, model, _ = inside(experts={"head": [[4], [3], [2], [5]]})
    assert [len(owner.parts) for owner in owners_of(model)] == [3, 3, 3, 3]


def test_clipping_pays_off_if_the_large_weight_has_no_input():
    """One row: the weight 10 forces steps of 10 / 127 on the others, although its input is always zero."""
    weight_OI = torch.tensor([[10.0, 0.3, -0.21, 0.17]])
    assert best_scales(weight_OI, "int8", None).item() == pytest.approx(10 / 127)
    even = best_scales(weight_OI, "int8", torch.ones(4)).item()
    assert even == pytest.approx(10 / 127)  # to clip 10 by a fortieth is dearer than all rounding
    clipped = best_scales(weight_OI, "int8", torch.tensor([0.0, 1.0, 1.0, 1.0]))

    def error(scale: torch.Tensor) -> float:
        return float((unpack(pack(weight_OI, "int8", scale), "int8") - weight_OI)[0, 1:].square().sum())

    grid = [10 / 127 * (1 - step / 40) for step in range(25)]
    assert error(clipped) == pytest.approx(min(error(torch.tensor([[scale]])) for scale in grid), abs=1e-12)
    assert error(clipped) < 0.5 * error(torch.tensor([[10 / 127]]))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_calibration_uses_the_inputs_of_the_experts(name):
    """The first matrix of an expert reads the rows that are sent to it; sums of squares by a loop over them."""
    _, model, _ = KINDS[name]()
    inputs, owners = inputs_of(model, 12), owners_of(model)
    found = calibrate(model, owners, [inputs], rows=10**6, equal=False)
    for place, seen in observe(model, inputs).items():
        if place == HEAD:
            continue
        for owner in owners[:4]:
            total = sum(
                seen.rows_ND[sample].double().square()
                for sample, expert, weight in zip(
                    *(getattr(seen.assignments, name) for name in ("sample_A", "expert_A", "weight_A")), strict=True
                )
                if expert == owner.number and weight > 0
            )
            if isinstance(total, int):  # no row
                assert owner.parts[place][0] not in found.squares
            else:
                torch.testing.assert_close(found.squares[owner.parts[place][0]], total)


def test_calibration_rows_are_equal_or_as_they_come():
    _, model, _ = KINDS["behind"]()
    batches = [inputs_of(model, 40), 2 * inputs_of(model, 60) - 1]
    owners = owners_of(model)
    visits = sum(torch.bincount(model(batch)[1][0].expert_A, minlength=4) for batch in batches).tolist()
    assert min(visits) >= 3 < max(visits)
    equal = calibrate(model, owners, batches, rows=3, equal=True).rows
    assert [equal[0, number] for number in range(5)] == [3] * 5
    come = calibrate(model, owners, batches, rows=10**6, equal=False).rows
    assert [come[0, number] for number in range(5)] == [*visits, 100]
    some = calibrate(model, owners, batches, rows=8, equal=False).rows
    assert sum(some.values()) == pytest.approx(5 * 8, abs=3)


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("number_format", ["int8", "fp8"])
def test_the_small_model_gives_the_outputs_of_the_rounded_one(name, number_format):
    config, model, build = KINDS[name]()
    owners, inputs = owners_of(model), inputs_of(model)
    scales = choose_scales(model, owners, number_format, calibrate(model, owners, [inputs], 20, equal=True))
    formats = {owner.number: number_format for owner in owners} | {1: "float16"}
    by_hand = rounded(model, owners, formats, scales)
    small_config, small = quantise(config, model, owners, formats, scales, build)
    torch.testing.assert_close(small(inputs)[0], by_hand(inputs)[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(small(inputs)[0], model(inputs)[0])
    assert small_config.experts.weights[:3] == [number_format, "float16", number_format]
    sizes = [sum(v.numel() * v.element_size() for v in each.state_dict().values()) for each in (small, model)]
    assert sizes[0] < sizes[1]


def test_errors_by_hand():
    """One expert is doubled: its error equals its output; the others have no error."""
    _, model, _ = behind(experts={"kind": "mlp", "sizes": [[]] * 4})  # linear experts, without biases:
    for expert in model.moe.experts:
        expert[0].bias.data.zero_()
    owners = owners_of(model)
    changed = rounded(model, owners, {}, {})
    changed.moe.experts[2][0].weight.data *= 2
    found = output_errors(model, changed, owners, [inputs_of(model), inputs_of(model, 7)])
    assert found == {0: 0.0, 1: 0.0, 2: pytest.approx(1.0), 3: 0.0}
    model.moe.router.gate.bias.data[3] = -1e9
    assert output_errors(model, changed, owners, [inputs_of(model)])[3] is None


def test_rounding_one_leaves_the_others():
    _, model, _ = inside()
    owners = owners_of(model)
    scales = choose_scales(model, owners, "int8")
    changed = rounded(model, owners, {3: "int8"}, scales)
    for owner in owners:
        for part in (part for parts in owner.parts.values() for part in parts):
            assert torch.equal(part.weight(changed), part.weight(model)) == (owner.number != 3)


class Odd(ExpertKind, torch.nn.Module):
    """An expert from a plug-in that reads its weights directly."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 5)

    def forward(self, x_BD):
        return x_BD @ self.layer.weight.T


def test_a_kind_whose_inputs_or_layers_cannot_be_observed_is_reported_in_one_line():
    config, model, build = behind()
    model.moe.experts._modules.update((str(number), Odd()) for number in range(4))
    with pytest.raises(UserError, match="cannot be quantised: Odd has linear layers that it does not call"):
        calibrate(model, owners_of(model), [inputs_of(model)], rows=8, equal=True)
    with pytest.raises(UserError, match="Odd does not consist of layers"):
        merge(config, model, [[[0, 1], [2, 3]]], build)


@pytest.mark.parametrize("number_format, other", [("int8", "--device cpu"), ("fp8", "int8")])
def test_a_format_that_a_device_lacks_names_another_way(monkeypatch, number_format, other):
    monkeypatch.setattr("compression.quantise.pack", lambda *_: torch.ones(1).view(2))  # raises RuntimeError
    with pytest.raises(UserError, match=rf"--quantise {number_format} does not work on cpu \(.*\): use {other}$"):
        check_format(number_format, torch.device("cpu"))
