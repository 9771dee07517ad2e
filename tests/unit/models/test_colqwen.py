"""ColQwen2: page images and queries as vectors of tokens, against transformers' class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_qwen2_5_vl, make_qwen2_vl, read_weights, write_weights
from support.engine_harness import bench
from support.image_families import noise
from support.late_interaction import late_prompts, page_prompt
from transformers import ColQwen2Config, ColQwen2ForRetrieval, Qwen2VLImageProcessorPil

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.models.loading import load_model
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineRequest, PoolingParams

VISUAL = "<|im_start|>user\n<|vision_start|>{}<|vision_end|>Describe the image.<|im_end|><|endoftext|>"


def write(folder: Path, kind: str) -> Any:
    base = make_qwen2_vl(folder)
    oracle = ColQwen2ForRetrieval(ColQwen2Config(vlm_config=base.config.to_dict(), embedding_dim=24)).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.normal_(std=0.2)
    files = {name: (folder / name).read_text() for name in ("config.json",)}
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    oracle.save_pretrained(folder)
    if kind == "engine":  # as colpali-engine has it
        weights = {}
        for key, value in read_weights(folder).items():
            name = key.removeprefix("vlm.").replace("embedding_proj_layer", "custom_text_proj")
            weights[name.removeprefix("model.").replace("language_model.", "model.")] = value
        write_weights(folder, weights)
        (folder / "config.json").write_text(files["config.json"].replace("Qwen2VLForConditionalGeneration", "ColQwen2"))
    return oracle


@pytest.mark.parametrize("kind", ["hf", "engine"])
async def test_pages_and_queries(tmp_path: Path, kind: str) -> None:
    oracle = write(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    tokenizer = Tokenizer.from_folder(tmp_path)
    processor = load_class(checkpoint.family.processor)(checkpoint, tokenizer)
    page = noise(90, 130)
    document = page_prompt(checkpoint, processor, page)
    rows = document.spans[0].length
    decoded = tokenizer.decode(document.token_ids.tolist(), skip_special_tokens=False)
    assert decoded == VISUAL.format("<|image_pad|>" * rows)
    late = late_prompts(checkpoint, processor)
    query = (await late.texts(["What is shown in this image?"], "query", most=None, params=["q"]))[0][0]
    begin, end = ("Query: ", "\n") if kind == "hf" else ("", "")
    assert tokenizer.decode(query.token_ids.tolist(), skip_special_tokens=False) == (
        f"{begin}What is shown in this image?{'<|endoftext|>' * 10}{end}"
    )
    asked = [EngineRequest(i, one, pooling=PoolingParams("token_embed")) for i, one in enumerate((document, query))]
    found = [result.vector for result in bench(model, max_num_batched_tokens=20).run(*asked)]
    made = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(
        [page.data], return_tensors="pt", input_data_format="channels_last"
    )
    made["pixel_values"] = made["pixel_values"][None]  # one row of a padded batch
    for prompt, options, ours in ((document, made, found[0]), (query, {}, found[1])):
        ids = torch.from_numpy(prompt.token_ids).long()[None]
        with torch.inference_mode():
            is_image = (ids == oracle.config.vlm_config.image_token_id).int()
            kinds = {"mm_token_type_ids": is_image} if options else {}
            if kind == "engine" and options:  # its own class takes the positions of Qwen2-VL
                kinds["position_ids"] = torch.from_numpy(prompt.positions).long()[:, None]
            expected = oracle(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **kinds).embeddings[0]
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)
    assert late.score(found[1], found[0]) > 0


def test_the_generation_on_qwen2_5_vl(tmp_path: Path) -> None:
    """colpali-engine's class: the language model's last states through a head of their own, of length 1."""
    base = make_qwen2_5_vl(tmp_path).eval()
    head = torch.nn.Linear(base.config.text_config.hidden_size, 24)
    weights = {name: value for name, value in read_weights(tmp_path).items() if name != "lm_head.weight"}
    write_weights(tmp_path, weights | {f"custom_text_proj.{name}": value for name, value in head.state_dict().items()})
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("Qwen2_5_VLForConditionalGeneration", "ColQwen2_5"))
    checkpoint = open_checkpoint(tmp_path)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    processor = load_class(checkpoint.family.processor)(checkpoint, Tokenizer.from_folder(tmp_path))
    page = noise(90, 130)
    prompt = processor.build(VISUAL.format("<|image_pad|>"), [processor.process(page)], add_special_tokens=False)
    asked = EngineRequest(0, prompt, pooling=PoolingParams("token_embed"))
    (found,) = bench(model, max_num_batched_tokens=20).run(asked)
    made = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(
        [page.data], return_tensors="pt", input_data_format="channels_last"
    )
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    positions = torch.from_numpy(prompt.positions).long()[:, None]
    with torch.inference_mode():
        states = base.model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, **made)
        expected = torch.nn.functional.normalize(head(states.last_hidden_state[0]), dim=-1)
    np.testing.assert_allclose(found.vector, expected.numpy(), atol=1e-4)
