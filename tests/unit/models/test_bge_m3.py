"""BGE-M3: dense, sparse and per-token vectors of one pass, against transformers' encoder and the published rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.encoder_support import VOCAB, load, save
from support.engine_harness import bench
from torch import nn
from transformers import XLMRobertaConfig, XLMRobertaModel

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.models.loading import load_model
from sensorium.types import EngineRequest, PoolingParams, Prompt

CLS, PAD, EOS, UNK = 0, 1, 2, 3
TEXTS = ([CLS, 9, 9, UNK, 31, 9, EOS], [CLS, 77, EOS], [CLS, *range(40, 60), 41, EOS])
ALL = PoolingParams("embed", also=("sparse", "token_embed", "token_classify"))


def write(folder: Path) -> tuple[Any, nn.Linear, nn.Linear]:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = XLMRobertaConfig(
        **shape, vocab_size=VOCAB, max_position_embeddings=40, type_vocab_size=1, pad_token_id=PAD
    )
    oracle = save(XLMRobertaModel(config, add_pooling_layer=False), folder)
    sparse, colbert = nn.Linear(32, 1), nn.Linear(32, 24)
    torch.save(sparse.state_dict(), folder / "sparse_linear.pt")
    torch.save(colbert.state_dict(), folder / "colbert_linear.pt")
    added = {str(index): {"content": text} for index, text in enumerate(("<s>", "<pad>", "</s>", "<unk>"))}
    config_json = {"added_tokens_decoder": added, "cls_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config_json, "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>"})
    )
    return oracle, sparse, colbert


def words(states: torch.Tensor, ids: list[int], sparse: nn.Linear) -> dict[int, float]:
    found: dict[int, float] = {}
    for token, weight in zip(ids, torch.relu(sparse(states))[:, 0].tolist(), strict=True):
        if token not in (CLS, PAD, EOS, UNK) and weight > 0:
            found[token] = max(weight, found.get(token, 0))
    return found


@pytest.mark.parametrize("overrides", [{}, {"architectures": ["BgeM3EmbeddingModel"]}])
@torch.inference_mode()
def test_all_outputs_of_one_pass(tmp_path: Path, overrides: Any) -> None:
    oracle, sparse, colbert = write(tmp_path)
    model = load_model(open_checkpoint(tmp_path, overrides=overrides), dtype=torch.float32, device="cpu")
    requests = [EngineRequest(i, Prompt(np.array(ids, np.int32)), pooling=ALL) for i, ids in enumerate(TEXTS)]
    steps: list[int] = []
    results = bench(model).run(*requests, before_step=steps.append)
    assert len(steps) == 2  # the second finds nothing to do
    for ids, result in zip(TEXTS, results, strict=True):
        states = oracle(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(torch.tensor(result.vector), nn.functional.normalize(states[0], dim=-1))
        found, vectors, weights = result.others
        expected = words(states, ids, sparse)
        assert [int(token) for token, _ in found] == sorted(expected)
        np.testing.assert_allclose(found[:, 1], [expected[token] for token in sorted(expected)], atol=1e-5)
        rows = nn.functional.normalize(colbert(states[1:]), dim=-1)
        torch.testing.assert_close(torch.tensor(vectors), rows, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(weights), torch.relu(sparse(states[1:-1])), atol=1e-5, rtol=1e-5)
    assert len({tuple(result.others[0][:, 0]) for result in results}) == len(TEXTS)


def test_each_output_alone_is_the_same(tmp_path: Path) -> None:
    write(tmp_path)
    model = load(tmp_path)
    together = bench(model).run(EngineRequest(0, Prompt(np.array(TEXTS[2], np.int32)), pooling=ALL))[0]
    for task, vector in zip(ALL.tasks, (together.vector, *together.others), strict=True):
        one = EngineRequest(0, Prompt(np.array(TEXTS[2], np.int32)), pooling=PoolingParams(task))
        np.testing.assert_allclose(bench(model).run(one)[0].vector, vector, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("sparse_linear.pt", {"weight": torch.ones(2, 32)}, "not a linear layer of 32 numbers to 1"),
        ("colbert_linear.pt", {"weight": torch.ones(8, 31)}, "not a linear layer of 32 numbers"),
        ("colbert_linear.pt", {"weight": torch.ones(8, 32), "bias": torch.ones(9)}, "other tensors"),
        ("colbert_linear.pt", {"bias": torch.ones(8)}, "not a linear layer"),
        ("sparse_linear.pt", [torch.ones(1)], "something else than named tensors"),
    ],
)
def test_a_head_that_does_not_fit_is_named(tmp_path: Path, name: str, contents: Any, words: str) -> None:
    write(tmp_path)
    torch.save(contents, tmp_path / name)
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path)
