"""Fuzz inputs for the readers of files and options: junk, altered bytes, replaced values."""

import os
import resource
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import exit_code

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


KILOBYTES = 500_000  # limit for the growth of the process; the inputs are smaller than a megabyte


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.just([[2**40]]),
    st.recursive(st.integers(-9, 9), lambda inner: st.lists(inner, max_size=3), max_leaves=6),
)


TENSORS = st.sampled_from(
    [
        torch.zeros(()),
        torch.full((3,), float("nan")),
        torch.zeros(1, dtype=torch.int8).expand(10**6, 10**6),  # one byte that claims to be a terabyte
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(0),
    ]
)


BYTES = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "repeat", "cut"]), st.floats(0, 1), st.binary(max_size=12)),
    min_size=1,
    max_size=4,
)


def fuzz(examples, **strategies):
    """`given` with this number of examples: the same ones each time, unless FUZZ_EXAMPLES sets a number."""
    profile = settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,  # a busy machine takes longer; hanging code hits the time limit of every test
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: profile(given(**strategies)(test))


def altered(content, changes, within=None):
    """The bytes after some changes, each at a fraction of the first `within` bytes."""
    content = bytearray(content)
    for kind, fraction, data in changes:
        at = int(fraction * min(within or len(content), len(content)))
        if kind == "set":
            content[at : at + len(data)] = data
        elif kind == "insert":
            content[at:at] = data
        elif kind == "delete":
            del content[at : at + len(data)]
        elif kind == "repeat":
            content[at:at] = content[at : at + 40] * (len(data) + 1)
        else:
            del content[at:]
    return bytes(content)


def places(value, path=()):
    """The path to every entry of nested dictionaries and lists."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value))[:40]:
            found += places(inner, (*path, key))
    return found


def replaced(value, path, new):
    """A copy of nested dictionaries and lists with one entry replaced; `DROPPED` removes it."""
    key, *rest = path
    copy = value.copy()
    if rest:
        copy[key] = replaced(copy[key], rest, new)
    elif new is DROPPED:
        del copy[key]
    else:
        copy[key] = new
    return copy


DROPPED = object()


PLAIN = st.lists(st.tuples(st.floats(0, 0.999), st.one_of(st.just(DROPPED), JUNK)), min_size=1, max_size=2)


ENTRIES = st.lists(st.tuples(st.floats(0, 0.999), st.one_of(st.just(DROPPED), JUNK, TENSORS)), min_size=1, max_size=2)


def replaced_at(value, changes):
    """Nested dictionaries and lists with the entries at some fractions of all places replaced."""
    for fraction, new in changes:
        if ways := places(value):
            value = replaced(value, ways[int(fraction * len(ways))], new)
    return value


def survives(read):
    """Run something that may raise an error of one line for the user, and nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except Exception as error:
        if exit_code(error) is None:
            raise
        assert "\n" not in str(error) and 10 < len(str(error)) < 900


@pytest.fixture(scope="module", autouse=True)
def no_blow_up():
    """Memory must not grow much, regardless of the sizes that the files claim."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES
