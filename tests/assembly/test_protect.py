"""--quantise.protect auto: the most sensitive experts stay in 16 bits, as few as the budget needs."""

from types import SimpleNamespace
from typing import Any

import pytest

from assembly import compression_steps
from assembly.compression_steps import AUTO, Plan, _formats
from compression.quantise import Owner

LOST = {0: 0.1, 1: 0.6, 2: 0.0, 3: 0.3}  # points lost by each in 8 bits; together their sum


@pytest.mark.parametrize(
    "protect, budget, spared",
    [
        (AUTO, 1.0, []),
        (AUTO, 0.9, [1]),
        (AUTO, 0.4, [1]),
        (AUTO, 0.39, [1, 3]),
        (AUTO, 0.0, [0, 1, 3]),
        ([2], 0.0, [2]),
    ],
)
def test_as_few_are_protected_as_keep_to_the_budget(monkeypatch, protect, budget, spared):
    monkeypatch.setattr(compression_steps, "rounded", lambda model, owners, formats, scales: dict(formats))
    work: Any = SimpleNamespace(
        plan=Plan(quantise="int8", protect=protect),
        model=None,
        least=0.9 - budget / 100 - 1e-9,
        score=lambda formats: 0.9 - sum(LOST[number] for number in formats if formats[number] == "int8") / 100,
    )
    owners = [Owner(number, {}) for number in LOST]
    chosen: Any = SimpleNamespace(scales={}, errors=dict.fromkeys(LOST))
    formats = _formats(work, owners, "int8", chosen, LOST)
    assert sorted(number for number, number_format in formats.items() if number_format == "float16") == spared
    assert set(formats.values()) <= {"int8", "float16"}
