"""A classifier's labels and activation, resolved from its config. Torch-free: the HTTP process names classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sensorium.checkpoint.pooling import activation_name
from sensorium.errors import CheckpointError


def num_labels(config: dict[str, Any]) -> int:
    """`id2label`'s size or `num_labels`; two where config.json says neither (transformers leaves its default out)."""
    labels = config.get("id2label")
    if isinstance(labels, dict) and labels:
        return len(labels)
    count = config.get("num_labels", 2)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CheckpointError(f"config.json: num_labels must be a positive integer, not {count!r}")
    return count


def label_names(config: dict[str, Any]) -> list[str]:
    """Names by class index; `LABEL_i` where config.json has none."""
    named = config.get("id2label") or {}
    return [str(named.get(str(i), f"LABEL_{i}")) for i in range(num_labels(config))]


def classifier_activation(folder: Path, config: dict[str, Any]) -> str:
    """What makes scores of logits: what sentence-transformers' files say, else `problem_type`, else by label count."""
    named = _saved_activation(folder, config)
    if named is not None:
        return activation_name(named)
    by_problem = {
        "regression": "identity",
        "multi_label_classification": "sigmoid",
        "single_label_classification": "softmax" if num_labels(config) > 1 else "sigmoid",
    }
    return by_problem.get(config.get("problem_type") or "", "sigmoid" if num_labels(config) == 1 else "softmax")


def _saved_activation(folder: Path, config: dict[str, Any]) -> str | None:
    """The class that a CrossEncoder was saved with, in the order in which sentence-transformers looks for it."""
    own = config.get("sentence_transformers")
    for named in (
        _from_file(folder),
        own.get("activation_fn") if isinstance(own, dict) else None,
        config.get("sbert_ce_default_activation_function"),
    ):
        if named is None:
            continue
        if not isinstance(named, str):
            raise CheckpointError(f"the checkpoint's activation function must be the name of a class, not {named!r}")
        return named
    return None


def _from_file(folder: Path) -> object:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from None
    return settings.get("activation_fn") if isinstance(settings, dict) else None
