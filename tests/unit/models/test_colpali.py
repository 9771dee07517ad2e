"""ColPali: page images and queries as vectors of tokens, against transformers' class, in every published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.colpali import make_colpali
from support.engine_harness import bench
from support.image_families import noise
from support.late_interaction import late_prompts, page_prompt
from transformers import ColPaliProcessor, SiglipImageProcessorPil

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.kernels import Quantization
from sensorium.models.loading import load_model
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineRequest, PoolingParams, Prompt


def vectors_of(model: Any, *prompts: Prompt, **options: Any) -> list[np.ndarray]:
    asked = [EngineRequest(i, one, pooling=PoolingParams("token_embed")) for i, one in enumerate(prompts)]
    return [result.vector for result in bench(model, **options).run(*asked)]


@pytest.mark.parametrize(("layout", "is_engine"), [("transformers", False), ("hub", False), ("hub", True)])
async def test_pages_and_queries(tmp_path: Path, layout: Any, is_engine: bool) -> None:
    oracle = make_colpali(tmp_path, layout, is_engine=is_engine)
    checkpoint = open_checkpoint(tmp_path)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    assert not model.cache_groups(), "every token sees the whole prompt"
    processor = load_class(checkpoint.family.processor)(checkpoint, Tokenizer.from_folder(tmp_path))
    pages = [noise(50, 70), noise(90, 20, seed=1)]
    prompts = [page_prompt(checkpoint, processor, page) for page in pages]
    late = late_prompts(checkpoint, processor)
    prompts += [one for one, _ in await late.texts(["What is it?", "a" * 30], "query", most=None, params=["q", "r"])]
    decode = processor.tokenizer.decode
    written = [decode(one.token_ids.tolist(), skip_special_tokens=False) for one in prompts]
    assert written[:2] == ["<image>" * 4 + "<bos>Describe the image.\n"] * 2
    assert written[2] == f"<bos>Question: What is it?{'<pad>' * 10}\n"
    found = vectors_of(model, *prompts, max_num_batched_tokens=20)  # a prompt is longer than a step
    processed = SiglipImageProcessorPil(**{**checkpoint.preprocessor, "image_processor_type": None})
    for index, (prompt, ours) in enumerate(zip(prompts, found, strict=True)):
        inputs = {}
        if index < 2:
            inputs = processed([pages[index].data], return_tensors="pt", input_data_format="channels_last")
        ids = torch.from_numpy(prompt.token_ids).long()[None]
        with torch.inference_mode():
            theirs = oracle(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).embeddings[0]
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    pairs = [torch.from_numpy(found[2])], [torch.from_numpy(one) for one in found[:2]]
    theirs = ColPaliProcessor.score_retrieval(None, *pairs)
    np.testing.assert_allclose([late.score(found[2], one) for one in found[:2]], theirs[0], atol=1e-5)


def test_in_int8_with_the_tower(tmp_path: Path) -> None:
    make_colpali(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    processor = load_class(checkpoint.family.processor)(checkpoint, Tokenizer.from_folder(tmp_path))
    prompt = page_prompt(checkpoint, processor, noise(50, 70))
    plain, less = (
        vectors_of(
            load_model(checkpoint, dtype=torch.float32, device="cpu", quantization=how, quantize_towers=True), prompt
        )[0]
        for how in (None, Quantization(8, 32))
    )
    assert 0 < np.linalg.norm(plain - less) < 0.05 * np.linalg.norm(plain)
