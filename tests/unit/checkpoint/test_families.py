"""The registry: a row holds all of a family's data, and what else tells of it agrees."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from support.families import MAKERS

import sensorium
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.decoders import DECODERS
from sensorium.checkpoint.families import FAMILIES, VISION_TOWERS, family_of, load_class
from sensorium.errors import CheckpointError

SOURCE = Path(sensorium.__file__).parent
ASK_THE_ROW = ("checkpoint", "models", "processors", "prompt", "serving", "engine", "cli")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_agrees_with_its_classes(name: str) -> None:
    row = family_of(name)
    assert set(load_class(row.processor).modalities) == set(row.modalities)
    assert load_class(row.model).__name__ == row.model.partition(":")[2]
    assert row.text_model_type in DECODERS
    assert len(set(row.tasks)) == len(row.tasks) > 0
    assert row.encoder is None or "generate" not in row.tasks


def test_every_decoder_class_has_a_maker_for_the_tests_of_all_families() -> None:
    made = {FAMILIES[name].model for name in MAKERS}
    assert {row.model for row in FAMILIES.values() if "generate" in row.tasks} <= made


def test_nothing_but_the_registry_compares_names() -> None:
    known = {*FAMILIES, *DECODERS, *VISION_TOWERS, "roberta", "xlm-roberta", "modernbert", "thinker_config"}
    found = []
    for file in (file for folder in ASK_THE_ROW for file in (SOURCE / folder).rglob("*.py")):
        if file.name == "families.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                words = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                found += [f"{file.relative_to(SOURCE)}:{node.lineno}" for word in words if word in known]
    assert not found


def test_one_refusal_of_architectures() -> None:
    with pytest.raises(CheckpointError, match=r"Falcon is not supported; supported are LlamaForCausalLM, "):
        family_of("Falcon")
    said = [
        file for file in SOURCE.rglob("*.py") if re.search(r"architecture.{0,40} is not supported", file.read_text())
    ]
    assert said == [SOURCE / "checkpoint" / "families.py"]


@pytest.mark.parametrize(
    ("architecture", "stated", "length"),
    [
        ("BertModel", {"model_type": "bert", "max_position_embeddings": 512}, 512),
        ("BertModel", {"model_type": "bert"}, 512),
        ("RobertaModel", {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("RobertaModel", {"model_type": "camembert", "max_position_embeddings": 514}, 512),
        ("RobertaForSequenceClassification", {"max_position_embeddings": 514, "pad_token_id": 0}, 513),
        ("ModernBertModel", {}, 8192),
        ("ModernBertForSequenceClassification", {"max_position_embeddings": 1024}, 1024),
    ],
)
def test_lengths_of_encoders(architecture: str, stated: dict[str, object], length: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    config = {"architectures": [architecture], "vocab_size": 100, **stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path).max_model_len == length
