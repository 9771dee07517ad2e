"""Language models that score by the logits of one or two tokens, against the logits of transformers' classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.checkpoints import make_gemma, make_llama, make_phi3, make_qwen2, make_qwen3, read_weights, write_weights
from support.model_driver import Driver, Sequence
from tokenizers import AddedToken, Tokenizer

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.pair_templates import reads_pairs
from sensorium.errors import CheckpointError
from sensorium.models.loading import load_model
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import Message, TextPart
from sensorium.prompt.tokenizer import Tokenizer as HubTokenizer
from sensorium.types import PoolingParams

WORDS = ("no", "yes", "0", "1", "Yes")
AS_VLLM = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}
MAKERS = {"gemma": make_gemma, "llama": make_llama, "phi3": make_phi3, "qwen2": make_qwen2, "qwen3": make_qwen3}


def words_of(folder: Path) -> dict[str, int]:
    """Give the tokenizer the words that rerankers answer with -> all of its vocabulary."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def logit_score(folder: Path, yes: int, no: int | None) -> None:
    """The files of a CrossEncoder."""
    kinds = ("sentence_transformers.base.modules.transformer.Transformer", ""), ("x.LogitScore", "1_LogitScore")
    (folder / "modules.json").write_text(json.dumps([{"type": kind, "path": path} for kind, path in kinds]))
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps({"true_token_id": yes, "false_token_id": no}))


@pytest.mark.parametrize(
    ("family", "name", "saved", "overrides", "tokens"),
    [
        ("qwen3", "m", False, AS_VLLM, ("yes", "no")),
        ("qwen3", "m", False, {"is_original_qwen3_reranker": True}, ("yes", "no")),
        ("qwen3", "Qwen3-Reranker-0.6B", False, {}, ("yes", "no")),
        ("qwen3", "models--Qwen--Qwen3-Reranker-8B/snapshots/0a1b", False, {}, ("yes", "no")),
        ("qwen3", "m", True, {}, ("yes", "no")),
        ("qwen2", "mxbai-rerank-large-v2", False, {}, ("1", "0")),
        ("gemma", "bge-reranker-v2-gemma", False, {}, ("Yes", None)),
        ("qwen2", "m", False, {"classifier_from_token": ["0", "1"], "method": "from_2_way_softmax"}, ("1", "0")),
        ("llama", "m", False, {"classifier_from_token": ["Yes"]}, ("Yes", None)),
        ("phi3", "m", False, {"classifier_from_token": ["Yes"], "method": "no_post_processing"}, ("Yes", None)),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_scores_are_made_of_logits(
    tmp_path: Path, family: str, name: str, saved: bool, overrides: Any, tokens: tuple[str, str | None], tied: bool
) -> None:
    folder = tmp_path / name
    oracle = MAKERS[family](folder, tie_word_embeddings=tied)
    vocabulary = words_of(folder)
    yes, no = vocabulary[tokens[0]], None if tokens[1] is None else vocabulary[tokens[1]]
    if saved:
        logit_score(folder, yes, no)
    checkpoint = open_checkpoint(folder, overrides=overrides)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    assert not model.generates
    assert {"score", "classify", "embed"} <= set(model.poolers)
    known = "reranker" in name.lower() or "mxbai" in name or "is_original_qwen3_reranker" in overrides
    assert reads_pairs(checkpoint.chat_template) == known
    ids = [7, 19, 3, 88, 41]
    state = Driver(model).step([(Sequence(list(ids)), len(ids))])[-1:]
    logits = oracle(torch.tensor([ids])).logits[0, -1]
    expected = logits[yes] if no is None else logits[yes] - logits[no]
    assert abs(float(expected)) > 1e-3
    for activation, wanted in ((False, expected), (None, expected.sigmoid())):
        params = PoolingParams("score", activation=activation)
        found = model.poolers["score"](state, params, np.array(ids, np.int32))
        torch.testing.assert_close(found, wanted.reshape(1), atol=1e-5, rtol=1e-5)


def test_pairs_of_bge_reranker_v2_gemma(tmp_path: Path) -> None:
    """As FlagEmbedding puts them together: the beginning, query, line break, document, line break, prompt."""
    folder = tmp_path / "bge-reranker-v2-gemma"
    make_gemma(folder)
    words_of(folder)
    template = LocalTemplate(open_checkpoint(folder).chat_template or "", HubTokenizer.from_folder(folder))
    pair = [Message("query", (TextPart("how?"),)), Message("document", (TextPart("so."),))]
    asked = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing "
    )
    assert template.render(pair, add_generation_prompt=False) == (
        f"<bos>A: how?\nB: so.\n{asked}a prediction of either 'Yes' or 'No'."
    )
    told = [Message("system", (TextPart("Same?"),)), *pair]
    assert template.render(told, add_generation_prompt=False) == "<bos>A: how?\nB: so.\nSame?"


@torch.inference_mode()
def test_several_tokens_are_classes_and_stay_float32(tmp_path: Path) -> None:
    oracle = make_qwen3(tmp_path)
    vocabulary = words_of(tmp_path)
    overrides = {"classifier_from_token": ["no", "0", "yes"]}
    model = load_model(open_checkpoint(tmp_path, overrides=overrides), dtype=torch.bfloat16, device="cpu")
    assert "score" not in model.poolers
    rows = oracle.lm_head.weight[[vocabulary[word] for word in ("no", "0", "yes")]]
    torch.testing.assert_close(cast(Any, model.score).weight, rows, atol=0, rtol=0)


def test_a_converted_reranker_has_its_own_score_and_the_known_template(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-Reranker-0.6B-seq-cls"
    oracle = make_qwen3(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {**config, "architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(config))
    score = torch.randn(1, oracle.config.hidden_size)
    write_weights(folder, {**read_weights(folder), "score.weight": score})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.score_tokens is None and reads_pairs(checkpoint.chat_template)
    model: Any = load_model(checkpoint, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(model.score.weight, score)
    words_of(folder)
    with pytest.raises(CheckpointError, match="a score of its own"):
        load_model(open_checkpoint(folder, overrides=AS_VLLM), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"classifier_from_token": ["never", "yes"]}, "no token 'never'"),
        ({"classifier_from_token": "yes"}, "list of tokens"),
        ({"classifier_from_token": [3]}, "list of tokens"),
        ({"classifier_from_token": []}, "0 tokens"),
        ({"classifier_from_token": ["yes"], "method": "from_2_way_softmax"}, "needs two"),
        ({"classifier_from_token": ["yes"], "method": "mean"}, "'mean' is not supported"),
    ],
)
def test_what_is_said_wrongly_of_tokens(tmp_path: Path, overrides: Any, words: str) -> None:
    make_qwen3(tmp_path)
    words_of(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path, overrides=overrides)


def test_a_chat_model_of_another_name_stays_one(tmp_path: Path) -> None:
    for name in ("Qwen3-0.6B", "Qwen3-Embedding-0.6B"):
        make_qwen3(tmp_path / name)
        assert open_checkpoint(tmp_path / name).score_tokens is None
        assert load_model(open_checkpoint(tmp_path / name), dtype=torch.float32, device="cpu").generates


def test_a_name_alone_makes_no_reranker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that is called like one and whose tokenizer lacks the words is served as what it is."""
    folder = tmp_path / "my_Qwen3-Reranker-0.6B"
    make_qwen3(folder)
    assert open_checkpoint(folder).score_tokens is None
    assert "no 'no' or 'yes'" in caplog.text
    with pytest.raises(CheckpointError, match="no token 'no'"):
        open_checkpoint(folder, None, AS_VLLM)
