"""Valid search spaces, and the messages for invalid ones."""

import pytest

from common.errors import UserError
from tuning.space import Choice, Range, as_plain, decoded, read_space, suggest

optuna = pytest.importorskip("optuna")


def write(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_space_has_the_types_of_its_options(tmp_path):
    text = """
    optim: {lr: {low: 1e-4, high: 0.1, log: true}, kind: [adam, adamw]}
    router.top_k: {low: 1, high: 2.0}
    experts.sizes: [[[16], [32]], [small, large]]
    neck.dropout: [0, 0.5]
    router.inputs: [null, [0]]
    """
    space = read_space(write(tmp_path, text))
    assert space == {
        "optim.lr": Range(1e-4, 0.1, log=True, whole=False),
        "optim.kind": Choice(("adam", "adamw")),
        "router.top_k": Range(1, 2, log=False, whole=True),
        "experts.sizes": Choice(([[16], [32]], ["small", "large"])),
        "neck.dropout": Choice((0.0, 0.5)),
        "router.inputs": Choice((None, [0])),
    }
    asked = {
        "optim.lr": 0.01,
        "optim.kind": "adam",
        "router.top_k": 2,
        "experts.sizes": "[[16], [32]]",
        "neck.dropout": 0.5,
        "router.inputs": "[0]",
    }
    found = suggest(optuna.trial.FixedTrial(asked), space)
    assert found == asked | {"experts.sizes": [[16], [32]], "router.inputs": [0]} == decoded(asked, space)
    assert as_plain(space)["experts.sizes"] == ["[[16], [32]]", '["small", "large"]']


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("{}", "names no option"),
        ("train.epochz: [1]", "unknown option train.epochz in .*: did you mean train.epochs?"),
        ("optim: [1]", "is a section: name an option of it, such as optim.kind"),
        ("optim.lr: [fast]", "is 'fast': give a number"),
        ("optim.lr: 3", "is 3: give a list of values"),
        ("optim.lr: []", r"is \[\]: give a list of values"),
        ("optim.lr: {low: 2}", "give low and high, and log"),
        ("optim.lr: {low: 1, high: 2, step: 1}", "give low and high, and log"),
        ("optim.lr: {low: 1, high: many}", "low and high must be numbers"),
        ("router.top_k: {low: 1, high: 2.5}", "low and high must be whole numbers"),
        ("router.top_k: {low: 3, high: 1}", "goes from 3 to 1: low must be below high"),
        ("optim.lr: {low: 0, high: 1, log: true}", "a logarithmic scale must start above 0"),
        ("router.kind: {low: 1, high: 2}", "is not a number, so low and high do not apply"),
        ("router.top_k: [1, 1]", "contains a value twice"),
        ("data.validation: [0.1, 0.2]", "cannot be searched: all trials use the same data"),
        ("train.seed: [1, 2]", "cannot be searched: all trials use the same data"),
    ],
)
def test_an_invalid_space_is_reported_in_one_line(tmp_path, text, said):
    with pytest.raises(UserError, match=said) as caught:
        read_space(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_space(tmp_path):
    with pytest.raises(UserError, match=r"--space .*none\.yaml: no such file"):
        read_space(tmp_path / "none.yaml")
