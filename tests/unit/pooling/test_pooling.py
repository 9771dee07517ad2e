"""sentence-transformers' module files in their dialects, and the poolings themselves."""

import json
from pathlib import Path

import pytest
import torch

from sensorium.checkpoint.pooling import activation_name, read_pooling, stated_max_length
from sensorium.checkpoint.prompts import read_prompts
from sensorium.errors import CheckpointError
from sensorium.pooling.pool import POOLINGS, finish, pool


def write(folder: Path, modules: list[tuple[str, str]], pooling: dict[str, object]) -> None:
    (folder / "modules.json").write_text(
        json.dumps([{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)])
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize("package", ["sentence_transformers.models", "sentence_transformers.base.modules.x"])
@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode": "lasttoken"}, ("last",)),
    ],
)
def test_module_files(tmp_path: Path, package: str, settings: dict[str, object], kinds: tuple[str, ...]) -> None:
    write(
        tmp_path,
        [(f"{package}.Transformer", ""), (f"{package}.Pooling", "1_Pooling"), (f"{package}.Normalize", "2_Normalize")],
        settings,
    )
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 256, "do_lower_case": false}')
    spec = read_pooling(tmp_path, "cls")
    assert spec.kinds == kinds
    assert spec.normalize
    assert spec.max_seq_length == 256


def test_no_module_files(tmp_path: Path) -> None:
    spec = read_pooling(tmp_path, "last")
    assert (spec.kinds, spec.normalize, spec.dense) == (("last",), True, ())


def test_normalises_only_if_named(tmp_path: Path) -> None:
    write(tmp_path, [("sentence_transformers.models.Pooling", "1_Pooling")], {"pooling_mode_cls_token": True})
    assert not read_pooling(tmp_path, "cls").normalize


@pytest.mark.parametrize("settings", [{}, {"pooling_mode": "attention"}])
def test_unknown_poolings_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    write(tmp_path, [("sentence_transformers.models.Pooling", "1_Pooling")], settings)
    with pytest.raises(CheckpointError, match="pooling"):
        read_pooling(tmp_path, "cls")


def test_unknown_modules_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [("custom_code.LSTM", "1_LSTM")], {})
    with pytest.raises(CheckpointError, match=r"custom_code\.LSTM"):
        read_pooling(tmp_path, "cls")


def test_activations_are_looked_up_never_imported() -> None:
    assert activation_name("torch.nn.modules.linear.Identity") == "identity"
    for path in ("os.system", "torch.nn.modules.linear.Bilinear", "evil.torch.nn.Sigmoid"):
        with pytest.raises(CheckpointError, match="not supported"):
            activation_name(path)


def test_poolings() -> None:
    hidden = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 0.0]])
    expected = {
        "last": [5.0, 0.0],
        "cls": [1.0, -2.0],
        "mean": [3.0, 2 / 3],
        "max": [5.0, 4.0],
        "mean_sqrt_len": [9 / 3**0.5, 2 / 3**0.5],
        "weighted_mean": [(1 + 6 + 15) / 6, (-2 + 8) / 6],
    }
    assert set(expected) == set(POOLINGS)
    for kind, values in expected.items():
        torch.testing.assert_close(pool(hidden, (kind,)), torch.tensor(values))  # type: ignore[arg-type]
    assert pool(hidden, ("cls", "mean")).tolist()[:2] == [1.0, -2.0]


def test_dimensions_are_cut_before_normalising() -> None:
    vector = finish(torch.tensor([3.0, 4.0, 12.0]), 2, normalize=True)
    torch.testing.assert_close(vector, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(finish(torch.tensor([3.0, 4.0]), None, normalize=False), torch.tensor([3.0, 4.0]))


def test_a_prompt_takes_no_part() -> None:
    hidden = torch.tensor([[9.0, 9.0], [1.0, -2.0], [3.0, 4.0], [5.0, 0.0]])
    for kind in POOLINGS:
        if kind != "weighted_mean":  # whose weights count from the text's beginning
            torch.testing.assert_close(pool(hidden, (kind,), 1), pool(hidden[1:], (kind,)))
    expected = (2 * hidden[1] + 3 * hidden[2] + 4 * hidden[3]) / 9
    torch.testing.assert_close(pool(hidden, ("weighted_mean",), 1), expected)
    torch.testing.assert_close(pool(hidden, ("cls", "mean"), 2), torch.cat([hidden[2], hidden[2:].mean(0)]))
    torch.testing.assert_close(pool(hidden, ("mean",), 9), hidden[-1])


@pytest.mark.parametrize(
    ("settings", "includes"),
    [
        ({"pooling_mode": "mean", "include_prompt": False}, False),
        ({"pooling_mode": "mean"}, True),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, False),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, True),
    ],
)
def test_whether_prompts_are_pooled(tmp_path: Path, settings: dict[str, object], includes: bool) -> None:
    write(tmp_path, [("sentence_transformers.models.Pooling", "1_Pooling")], settings)
    assert read_pooling(tmp_path, "cls").include_prompt is includes


@pytest.mark.parametrize(
    "settings",
    [
        "{",
        {"prompts": ["a"]},
        {"prompts": {"query": 1}},
        {"prompts": {"a": "b"}, "default_prompt_name": "c"},
        {"default_prompt_name": "c"},
    ],
)
def test_broken_prompts_are_named(tmp_path: Path, settings: object) -> None:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (tmp_path / "config_sentence_transformers.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config_sentence_transformers\.json"):
        read_prompts(tmp_path)


def test_names_choose_adapters(tmp_path: Path) -> None:
    """jina-embeddings-v3: a prompt's name is that of an adapter too; config.json has both where no other file has."""
    names = ["retrieval.query", "retrieval.passage", "text-matching"]
    texts = {"retrieval.query": "Represent the query: ", "retrieval.passage": "Represent the document: "}
    prompts = read_prompts(tmp_path, {"lora_adaptations": names, "task_instructions": {**texts, "text-matching": ""}})
    for name, kind, text, adapter in (
        (None, None, "", 0),
        ("retrieval.query", None, "Represent the query: ", 1),
        (None, "search_document", "Represent the document: ", 2),
        (None, "Text-Matching", "", 3),
    ):
        assert (prompts.chosen(name, kind), prompts.adapter(name, kind)) == (text, adapter)
    assert (prompts.adapter_of("query"), prompts.adapter_of("document")) == (1, 2)
    assert read_prompts(tmp_path).adapter(None, "query") == 0  # a model without any
    with pytest.raises(CheckpointError, match="lora_adaptations"):
        read_prompts(tmp_path, {"lora_adaptations": "text-matching"})


@pytest.mark.parametrize("name", POOLINGS)
def test_the_operators_pooling_wins(tmp_path: Path, name: str) -> None:
    bare = read_pooling(tmp_path, "cls", name)
    assert (bare.kinds, bare.normalize, bare.is_stated) == ((name,), True, True)
    write(tmp_path, [("sentence_transformers.models.Pooling", "1_Pooling")], {"pooling_mode": ["cls", "max"]})
    stated = read_pooling(tmp_path, "cls", name)
    assert (stated.kinds, stated.normalize, stated.is_stated) == ((name,), False, True)
    assert read_pooling(tmp_path, "cls").kinds == ("cls", "max")


def test_a_guess_is_known_as_one(tmp_path: Path) -> None:
    assert not read_pooling(tmp_path, "cls").is_stated
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    assert not read_pooling(tmp_path, "cls").is_stated


@pytest.mark.parametrize(
    ("settings", "tokenizer", "length"),
    [
        ({"max_seq_length": 64}, {"model_max_length": 512}, 64),
        ({"max_seq_length": 512}, {"model_max_length": 64}, 64),
        ({}, {"model_max_length": 48}, 48),
        ({"max_seq_length": None}, {"model_max_length": 48}, 48),
        ({"max_seq_length": 64}, {}, 64),
        ({"max_seq_length": 64}, {"model_max_length": 1e30}, 64),
        ({}, {}, None),
        ({"processor_kwargs": {"model_max_length": 40}}, {"model_max_length": 48}, 40),
        ({"tokenizer_args": {"model_max_length": 40}}, {}, 40),
        ({"max_seq_length": 0}, {"model_max_length": True}, None),
    ],
)
@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_the_least_length_that_is_told(
    tmp_path: Path, settings: dict[str, object], tokenizer: dict[str, object], length: int | None, name: str
) -> None:
    (tmp_path / name).write_text(json.dumps(settings))
    assert stated_max_length(tmp_path, tokenizer) == length
