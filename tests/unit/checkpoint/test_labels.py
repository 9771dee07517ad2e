"""Which function makes scores of a classifier's logits: sentence-transformers' own CrossEncoder is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sensorium.checkpoint.labels import classifier_activation
from sensorium.errors import CheckpointError

SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"
SOFTMAX = "torch.nn.modules.activation.Softmax"


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({"num_labels": 1, "problem_type": "regression"}, "identity"),
        ({"num_labels": 3, "problem_type": "regression"}, "identity"),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "sigmoid"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "softmax"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 1, "problem_type": None}, "sigmoid"),
        ({"num_labels": 3}, "softmax"),
    ],
)
def test_without_a_saved_activation_the_problem_type_says_it(
    tmp_path: Path, config: dict[str, Any], activation: str
) -> None:
    assert classifier_activation(tmp_path, config) == activation


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification", "single_label_classification"])
@pytest.mark.parametrize(("path", "activation"), [(SIGMOID, "sigmoid"), (IDENTITY, "identity"), (SOFTMAX, "softmax")])
@pytest.mark.parametrize("where", ["sentence_transformers", "sbert_ce_default_activation_function", "file"])
def test_a_saved_activation_wins(tmp_path: Path, problem: str | None, path: str, activation: str, where: str) -> None:
    config: dict[str, Any] = {"num_labels": 1, "problem_type": problem}
    if where == "file":
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": path}))
    elif where == "sentence_transformers":
        config[where] = {"activation_fn": path, "version": "6.2.0"}
    else:
        config[where] = path
    assert classifier_activation(tmp_path, config) == activation


def test_the_newest_place_wins(tmp_path: Path) -> None:
    config = {
        "num_labels": 1,
        "sentence_transformers": {"activation_fn": IDENTITY},
        "sbert_ce_default_activation_function": SOFTMAX,
    }
    assert classifier_activation(tmp_path, config) == "identity"
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": SIGMOID}))
    assert classifier_activation(tmp_path, config) == "sigmoid"


@pytest.mark.parametrize("path", ["my_code.Scale", "torch.nn.modules.linear.Bilinear", "", 3, ["Sigmoid"]])
def test_unknown_activations_are_refused(tmp_path: Path, path: object) -> None:
    config = {"num_labels": 1, "problem_type": "regression", "sentence_transformers": {"activation_fn": path}}
    with pytest.raises(CheckpointError, match="activation"):
        classifier_activation(tmp_path, config)
