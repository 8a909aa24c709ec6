"""Matrices stored in fewer bits: codes and scales worked out by hand, and models that compute with them."""

import copy

import pytest
import torch
from compression_helpers import behind, inputs_of, inside
from conftest import mostly_slow
from safetensors.torch import load, save
from torch import nn

from model.experts import ExpertsConfig
from model.moe_vit import run_block
from model.quantised import Stored, fill, num_parameters, pack, part_bytes, part_numbers, store, stored_in, unpack

WEIGHT = torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0], [-254.0, 3.0, 1.0]])


def test_int8_by_hand():
    codes, scales = pack(WEIGHT, "int8")
    # Rows over 127: 0.01, 1 for a row of zeros, 2; -0.5 / 0.01 = -50; 3 / 2 and 1 / 2 round to the even neighbour.
    assert scales.flatten().tolist() == pytest.approx([0.01, 1.0, 2.0])
    assert codes.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 2, 0]]
    assert unpack([codes, scales], "int8")[2].tolist() == pytest.approx([-254, 4, 0])


def test_fp8_by_hand():
    codes, scales = pack(torch.tensor([[448.0, 17.0, -0.3]]), "fp8")
    # Three bits of mantissa: 17 lies half way from 16 to 18 and goes to the even mantissa, 0.3 lies between 0.28125
    # and 0.3125, nearer to the latter.
    assert scales.item() == 1 and codes.dtype == torch.uint8
    assert unpack([codes, scales], "fp8").tolist() == [[448.0, 16.0, -0.3125]]


@pytest.mark.parametrize("number_format, bound", [("int8", 1 / 254), ("fp8", 1 / 16), ("float16", 2**-11)])
def test_no_number_differs_by_more_than_half_a_step(number_format, bound):
    torch.manual_seed(0)
    weight_OI = torch.randn(16, 50)
    error_OI = (unpack(pack(weight_OI, number_format), number_format) - weight_OI).abs()
    limit = weight_OI.abs().amax(dim=1, keepdim=True) if number_format == "int8" else weight_OI.abs() + 2**-9
    assert (error_OI <= 1.0001 * bound * limit).all()


def test_a_scale_that_is_given_clips():
    codes, scales = pack(torch.tensor([[2.0, -2.0, 0.5]]), "int8", torch.tensor([[1 / 127]]))
    assert codes.tolist() == [[127, -127, 64]] and unpack([codes, scales], "int8")[0, 0] == pytest.approx(1.0)


def test_concatenated_parts_have_separate_scales():
    """Columns of three experts: the large ones of the second do not coarsen the small ones of the first."""
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[0.5, 100.0, 1.0], [0.25, 200.0, 1 / 3]])
    weight = layer.weight.detach().clone()
    layer.weight.requires_grad_(False)
    torch.nn.utils.parametrize.register_parametrization(
        layer, "weight", Stored(["int8", "float16", "float32"], [1, 1, 1], 1), unsafe=True
    )
    torch.testing.assert_close(layer.weight, weight, atol=0, rtol=1e-6)
    _, stored = stored_in(layer, "weight")
    assert [t.dtype for t in stored] == [torch.int8, torch.float32, torch.float16, torch.float32]
    fill(layer, "weight", 2 * weight)
    torch.testing.assert_close(layer.weight, 2 * weight, atol=0, rtol=1e-6)


MIXTURES = {
    "behind": lambda **experts: behind(experts={"shared": [[7]], **experts}),
    "glu": lambda **experts: behind(experts={"kind": "glu", "shared": [[7]], **experts}),
    "adapters": lambda **experts: inside({}, experts),
    "copies": lambda **experts: inside(experts={"kind": "ffn", "sizes": [[64]] * 4, **experts}),
    "on top": lambda **experts: inside(experts={"head": [[4], [3], [2], [5]], **experts}),
}


@pytest.mark.parametrize("name", sorted(MIXTURES))
@pytest.mark.parametrize("number_format", mostly_slow(["int8", "fp8", "float16"], ["int8", "float16"]))
def test_a_model_computes_with_the_stored_weights(name, number_format):
    """The outputs are those of the float model with matrices rounded by hand."""
    _, model, _ = MIXTURES[name]()
    _, stored, _ = MIXTURES[name](weights=number_format)
    state = model.state_dict()
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for path, module in stored.named_modules():
            for matrix in getattr(module, "parametrizations", {}):
                weight = state[f"{path}.{matrix}"]
                fill(module, matrix, weight)
                rounded.get_submodule(path).get_parameter(matrix).copy_(getattr(module, matrix))
                assert not torch.equal(getattr(module, matrix), weight)
        for key, value in stored.state_dict().items():
            if "parametrizations" not in key:
                value.copy_(state[key])
    inputs = inputs_of(model)
    expected = rounded(inputs)[0]
    torch.testing.assert_close(stored(inputs)[0], expected, atol=1e-5, rtol=1e-5)
    assert num_parameters(stored) == num_parameters(model) == sum(p.numel() for p in model.parameters())
    # Through a file, a copy and back.
    again = MIXTURES[name](weights=number_format)[1]
    again.load_state_dict(load(save({k: v.contiguous() for k, v in stored.state_dict().items()})))
    torch.testing.assert_close(copy.deepcopy(again)(inputs)[0], expected, atol=1e-5, rtol=1e-5)
    assert {p.requires_grad for n, p in stored.named_parameters() if "parametrizations" in n} == {False}


def test_each_expert_has_its_format_and_its_bytes():
    _, model, _ = inside(experts={"weights": ["int8", "float16", "fp8", "float32"], "head_weights": "int8"})
    down, up = model.mixtures[0].experts.matrices()
    width = 16
    numbers = [width * units for units in (3, 5, 4, 6)]
    assert [part_numbers(down, e) for e in range(4)] == numbers
    assert [part_bytes(down, e) for e in range(4)] == [48 + 4 * 3, 2 * 80, 64 + 4 * 4, 4 * 96]
    assert [part_bytes(up, e) for e in range(4)] == [48 + 4 * width, 2 * 80, 64 + 4 * width, 4 * 96]
    assert stored_in(model.head, "weight")[1][0].dtype == torch.int8


def test_in_float32_nothing_changes():
    _, model, _ = inside()
    assert not any("parametrizations" in name for name in model.state_dict())
    store(model.mixtures[0].experts.matrices(), ["float32"] * 4)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": "int4"}, "experts.weights is 'int4'"),
        ({"weights": ["int8"]}, "experts.weights has 1 entries for 4 experts"),
        ({"head_weights": "int8"}, "experts.head_weights int8 needs experts.place blocks"),
    ],
)
def test_formats_that_do_not_fit_are_reported_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        ExpertsConfig(sizes=[[2]] * 4, **options)


@pytest.mark.slow
def test_a_block_with_stored_matrices_is_one_graph():
    _, model, _ = inside(experts={"weights": ["int8", "float16", "fp8", "int8"]})
    vit, x_BTD = model.backbone.vit, torch.randn(2, 17, 16)
    parts = (vit.blocks[0], x_BTD, None, model.mixtures[0], False, None)
    compiled = torch.compile(run_block, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*parts)[0], run_block(*parts)[0], atol=1e-5, rtol=1e-5)
