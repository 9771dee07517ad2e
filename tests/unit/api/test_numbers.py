"""Numbers of other types, against torch's own conversions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from sensorium.api.numbers import fp8_values, item_bytes, packed

TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def numbers() -> np.ndarray:
    """Of every size, zeros of both signs, and the middles between two codes of eight bits."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 3, 4000)
    middles = [(values[1:] + values[:-1]) / 2 for values in (fp8_values("fp8_e4m3"), fp8_values("fp8_e5m2"))]
    all_of_them = np.concatenate([[0.0, -0.0], drawn, *middles, *(-one for one in middles)])
    return np.clip(all_of_them, -400, 400).astype(np.float32)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_rounds_as_torch_does(name: str) -> None:
    found = torch.frombuffer(bytearray(packed(numbers(), name)), dtype=TYPES[name])
    assert found.element_size() == item_bytes(name)
    assert torch.equal(found.float(), torch.from_numpy(numbers()).to(TYPES[name]).float())
    assert np.signbit(found.float().numpy())[1]


@pytest.mark.parametrize("name", TYPES)
def test_bytes_in_both_orders(name: str) -> None:
    vector = numbers()
    little, big = packed(vector, name, "little"), packed(vector, name, "big")
    size = item_bytes(name)
    assert big == b"".join(little[start : start + size][::-1] for start in range(0, len(little), size))
    assert packed(vector, name) == (little if sys.byteorder == "little" else big)


@pytest.mark.parametrize(("name", "largest"), [("float16", 65504.0), ("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)])
def test_what_is_too_large_becomes_the_largest(name: str, largest: float) -> None:
    vector = np.array([1e30, -1e30], np.float32)
    found = torch.frombuffer(bytearray(packed(vector, name)), dtype=TYPES[name])
    assert found.float().tolist() == [largest, -largest]
