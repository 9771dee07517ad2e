"""Checked values of a model folder's JSON files. Every error is one line that names the file or the key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sensorium.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's object, or None if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def unsupported(what: str, value: object, supported: Iterable[str]) -> CheckpointError:
    return CheckpointError(f"config.json: {what} {value!r} is not supported; supported are {', '.join(supported)}")


MOST: Mapping[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"), 4096),
    **dict.fromkeys(("num_nextn_predict_layers", "n_layers"), 4096),
    **dict.fromkeys(("head_dim", "global_head_dim"), 65536),
    **dict.fromkeys(("hidden_size", "output_proj_dims", "d_model"), 1 << 20),
}
"""Of what is counted before any weight is read, so that no number makes a list, or a model, that memory cannot hold."""


def positive_int(source: Mapping[str, Any], key: str, default: int | None) -> int:
    value = source.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"config.json: {key} must be a positive integer, not {value!r}")
    _check_count(key, value)
    return value


def check_counts(config: Mapping[str, Any]) -> None:
    """CheckpointError if any part of a config counts more than `MOST`."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(value)
        elif isinstance(value, int):
            _check_count(str(key), value)


def _check_count(key: str, value: int) -> None:
    if value > MOST.get(key, value):
        raise CheckpointError(f"config.json: {key} {value} is more than {MOST[key]}, the most there can be")


def count(source: Mapping[str, Any], key: str, default: int) -> int:
    """An integer that may be 0."""
    value = source.get(key)
    value = default if value is None else value
    return 0 if value == 0 and not isinstance(value, bool) else positive_int(source, key, default)


def number(source: Mapping[str, Any], key: str, default: float) -> float:
    value = source.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise CheckpointError(f"config.json: {key} must be a number, not {value!r}")
    return float(value)


def epsilon(source: Mapping[str, Any], key: str, default: float) -> float:
    """What a norm adds to a variance: below zero its root is no number."""
    value = number(source, key, default)
    if value < 0:
        raise CheckpointError(f"config.json: {key} must not be below zero, as {value!r} is")
    return value


def _is_finite(value: float) -> bool:
    """Whether it is a float's number."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def numbers(source: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = source.get(key) or []
    if not isinstance(value, list) or not all(isinstance(x, int | float) and _is_finite(x) for x in value):
        raise CheckpointError(f"config.json: {key} must be a list of numbers")
    return tuple(float(x) for x in value)


def indices(source: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """A list of integers; None if there is none."""
    value = source.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(x) is int for x in value):
        raise CheckpointError(f"config.json: {key} must be a list of integers")
    return tuple(value)


def square(source: Mapping[str, Any], key: str, default: int) -> int:
    """The edge of a square that is given as one number or as two equal ones."""
    value = source.get(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return positive_int({key: value}, key, default)


def inverse(source: Mapping[str, Any], key: str, default: float) -> int:
    """n of a ratio 1/n."""
    ratio = number(source, key, default)
    found = round(1 / ratio) if ratio > 0 else 0
    if not found or abs(ratio * found - 1) > 1e-6:
        raise CheckpointError(f"config.json: {key} {ratio} must be 1 divided by a whole number")
    return found
