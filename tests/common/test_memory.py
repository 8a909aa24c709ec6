"""Amounts of memory as text."""

import pytest

from common.memory import size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MB", 512_000_000), ("1.5GB", 1_500_000_000), ("200 MiB", 200 * 2**20), ("2g", 2 * 10**9), ("0", 0)],
)
def test_a_size_is_parsed_to_bytes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1MB", "3x", "1.2.3GB"])
def test_an_invalid_size_is_reported(text):
    with pytest.raises(ValueError, match="is not a size: write it as 512MB"):
        size_in_bytes(text)
