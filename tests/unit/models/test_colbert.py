"""ColBERT in three kinds of folders, against sentence-transformers' multi-vector encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from support.bert import SHAPE, make_colbert, make_marked, save, write_marked_tokenizer
from support.checkpoints import read_weights, write_weights
from support.encoder_support import load
from support.engine_harness import bench
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3Model,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.late_interaction import read_late_interaction
from sensorium.prompt.tokenizer import Tokenizer as OurTokenizer
from sensorium.serving.concurrency import PromptThreads
from sensorium.serving.late import LatePrompts
from sensorium.types import EngineRequest, PoolingParams, Prompt

QUERIES = ["what is the capital of france ?", "a", "who wrote this book " * 9]
DOCUMENTS = ["Paris, the capital of France.", "bread . , flour ?", "a cat and a dog sit under the table . " * 6]
DEBERTA = {  # v2's, with its convolution
    **{"relative_attention": True, "position_buckets": 16, "pos_att_type": "p2c|c2p", "share_att_key": True},
    **{"conv_kernel_size": 3, "conv_act": "gelu"},
}


def chained(folder: Path, **settings: Any) -> None:
    """As sentence-transformers saves it."""
    make_marked(folder / "base")
    transformer = Transformer(str(folder / "base"), **settings)
    dense = Dense(32, 24, bias=True, activation_function=torch.nn.Tanh(), module_input_name="token_embeddings")
    mask = MultiVectorMask(["?", "the"], skiplist_tasks=["query", "document"])
    modules = [transformer, dense, mask, Normalize(module_input_name="token_embeddings")]
    prompts = {"query": "[Q] ", "document": "who : "}
    MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(folder))


def pylate(folder: Path, **settings: Any) -> None:
    """A ModernBERT as PyLate saves it: the projection in a folder, all else in one file."""
    shape = {**SHAPE, "local_attention": 24, "global_attn_every_n_layers": 2}
    shape.pop("initializer_range")
    size = write_marked_tokenizer(folder)
    save(ModernBertModel(ModernBertConfig(vocab_size=size, pad_token_id=0, **shape)), folder)
    kinds = (("sentence_transformers.models.Transformer", ""), ("pylate.models.Dense.Dense", "1_Dense"))
    (folder / "modules.json").write_text(
        json.dumps([{"idx": i, "name": str(i), "type": kind, "path": path} for i, (kind, path) in enumerate(kinds)])
    )
    torch.manual_seed(1)
    dense = Dense(32, 24, bias=False, activation_function=torch.nn.Identity())
    (folder / "1_Dense").mkdir()
    dense.save(str(folder / "1_Dense"))
    config = {"in_features": 32, "out_features": 24, "bias": False}
    (folder / "1_Dense" / "config.json").write_text(
        json.dumps({**config, "activation_function": "torch.nn.modules.linear.Identity"})
    )
    own = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 20}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({**own, "document_length": 40, **settings}))


EXPANSION = {"strategy": "min", "length": 12, "token": None, "attend": False}
FOLDERS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "stanford": (make_colbert, {}),
    "stanford-attending": (make_colbert, {"attend_to_mask_tokens": True, "mask_punctuation": False}),
    "pylate": (pylate, {}),
    "pylate-attending": (pylate, {"attend_to_expansion_tokens": True, "skiplist_words": ["."]}),
    "pylate-plain": (pylate, {"do_query_expansion": False}),
    "chained": (chained, {}),
    "chained-expanding": (chained, {"query_expansion": EXPANSION, "query_length": 24, "document_length": 20}),
}


def late_prompts(folder: Path) -> LatePrompts:
    checkpoint = open_checkpoint(folder)
    prompts = SimpleNamespace(tokenizer=OurTokenizer.from_folder(folder), prompt_of_ids=lambda ids, param: Prompt(ids))
    limit = SimpleNamespace(max_model_len=checkpoint.max_model_len)
    spec = read_late_interaction(folder, is_colbert=checkpoint.family.is_colbert)
    return LatePrompts(spec, cast("Any", prompts), cast("Any", limit), PromptThreads(2), filler="[MASK]")


@pytest.mark.parametrize("kind", FOLDERS)
async def test_vectors_and_scores(tmp_path: Path, kind: str) -> None:
    write, settings = FOLDERS[kind]
    write(tmp_path, **settings)
    oracle = MultiVectorEncoder(str(tmp_path), device="cpu", model_kwargs={"dtype": torch.float32})
    late, engine = late_prompts(tmp_path), bench(load(tmp_path))
    asked = [
        *await late.texts(QUERIES, "query", most=None, params=["q"] * 3),
        *await late.texts(DOCUMENTS, "document", most=None, params=["d"] * 3),
    ]
    requests = [EngineRequest(i, prompt, pooling=params) for i, (prompt, params) in enumerate(asked)]
    found = [result.vector for result in engine.run(*requests)]
    roles = ["query"] * 3 + ["document"] * 3
    rows = [late.counted(*one) for one in zip(found, [prompt for prompt, _ in asked], roles, strict=True)]  # type: ignore[arg-type]
    queries = oracle.encode_query(QUERIES, batch_size=1)
    documents = oracle.encode_document(DOCUMENTS, batch_size=1)
    for ours, theirs in zip(rows, [*queries, *documents], strict=True):
        np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-5)
    expected = np.asarray(oracle.similarity(queries, documents))
    scores = [[late.score(query, document) for document in rows[3:]] for query in rows[:3]]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


async def test_jina_colbert(tmp_path: Path) -> None:
    """jina-colbert-v2's files: keys of its own, marks, queries whose filling is attended to."""
    size = write_marked_tokenizer(tmp_path)
    shape = {**SHAPE, "type_vocab_size": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    oracle = save(JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(vocab_size=size, **shape)), tmp_path)
    linear = torch.randn(24, int(SHAPE["hidden_size"]))
    weights = {f"roberta.{key}": value for key, value in read_weights(tmp_path).items() if "pooler" not in key}
    write_weights(tmp_path, {**weights, "linear.weight": linear})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["HF_ColBERT"], "position_embedding_type": "rotary", "rope_parameters": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    marks = {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "attend_to_mask_tokens": True}
    (tmp_path / "artifact.metadata").write_text(json.dumps({**marks, "query_maxlen": 16, "doc_maxlen": 30}))
    late, engine = late_prompts(tmp_path), bench(load(tmp_path))
    asked = [
        *await late.texts(QUERIES, "query", most=None, params=["q"] * 3),
        *await late.texts(DOCUMENTS, "document", most=None, params=["d"] * 3),
    ]
    assert [len(prompt.token_ids) for prompt, _ in asked[:3]] == [16] * 3
    requests = [EngineRequest(i, prompt, pooling=params) for i, (prompt, params) in enumerate(asked)]
    for result, (prompt, _) in zip(engine.run(*requests), asked, strict=True):
        with torch.inference_mode():
            states = oracle(torch.from_numpy(prompt.token_ids).long()[None]).last_hidden_state[0]
            expected = torch.nn.functional.normalize(states @ linear.t(), dim=-1)
        np.testing.assert_allclose(result.vector, expected, atol=1e-5)


def test_maxsim() -> None:
    late = LatePrompts(read_late_interaction(Path("none"), is_colbert=False), *[cast("Any", None)] * 3, filler=None)
    query, document = np.eye(2, dtype=np.float32), np.array([[0.6, 0.8], [1, 0]], np.float32)
    assert late.score(query, document) == pytest.approx(1.8)
    assert late.score(query, document[:0]) == 0


UNSEEN: dict[str, Callable[[int], PreTrainedModel]] = {
    "bert": lambda size: BertModel(BertConfig(vocab_size=size, **SHAPE)),
    "mpnet": lambda size: MPNetModel(MPNetConfig(vocab_size=size, **SHAPE)),
    "deberta": lambda size: DebertaV2Model(DebertaV2Config(vocab_size=size, **SHAPE, **DEBERTA)),
}


@pytest.mark.parametrize("family", list(UNSEEN))
def test_what_nobody_sees_changes_nothing(family: str, tmp_path: Path) -> None:
    """The vectors of a query's own tokens are those that it has without what fills it up."""
    save(UNSEEN[family](write_marked_tokenizer(tmp_path)), tmp_path)
    ids = np.array([2, 9, 14, 3], np.int32)
    filled = np.concatenate([ids, np.full(5, 70, np.int32)])
    params = PoolingParams("token_embed", unseen_tokens=5)
    both = [
        EngineRequest(0, Prompt(ids), pooling=PoolingParams("token_embed")),
        EngineRequest(1, Prompt(filled), pooling=params),
        EngineRequest(2, Prompt(filled), pooling=PoolingParams("token_embed")),
    ]
    alone, unseen, seen = (result.vector for result in bench(load(tmp_path)).run(*both))
    np.testing.assert_allclose(unseen[:4], alone, atol=1e-6)
    assert np.abs(seen[:4] - alone).max() > 1e-3
    assert np.abs(unseen[4:] - seen[4:]).max() > 1e-3
