"""DSE-Qwen2 and VLM2Vec from messages to vectors: their own prompts, the last token's state, cut, then normalised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support import checkpoints
from support.engine_harness import bench
from support.image_families import noise
from torch.nn import functional
from transformers import PreTrainedModel, Qwen2VLImageProcessorPil

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.models.base import Model
from sensorium.models.loading import load_model
from sensorium.processors.base import Processor
from sensorium.prompt.builtin import pooling_template_of
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineRequest, MediaItem, PoolingParams, Prompt

NAMES = {"dse": "MrLight/dse-qwen2-2b-mrl-v1", "vlm2vec": "TIGER-Lab/VLM2Vec-Full"}
PICTURE_AND_TEXT = (MediaPart("image"), TextPart("What is shown in this image?"))


class Embedder:
    def __init__(self, name: str, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        self.model: Model = load_model(checkpoint, dtype=torch.float32, device="cpu")
        tokenizer = Tokenizer.from_folder(folder)
        self.processor: Processor = load_class(checkpoint.family.processor)(checkpoint, tokenizer)
        source = pooling_template_of([NAMES[name]])
        assert source is not None
        self.template = LocalTemplate(
            source,
            tokenizer.with_literals(self.processor.literals, special=True),
            modalities=self.processor.modalities,
            placeholder=self.processor.placeholder,
        )

    def prompt(self, parts: Sequence[MediaPart | TextPart], pictures: Sequence[MediaItem]) -> Prompt:
        text = self.template.render([Message("user", tuple(parts))], add_generation_prompt=False)
        media = [self.processor.process(picture) for picture in pictures]
        return self.processor.build(text, media, add_special_tokens=True)

    def vectors(self, prompts: Sequence[Prompt], dimensions: int | None = None) -> list[np.ndarray]:
        params = PoolingParams("embed", dimensions=dimensions)
        requests = [EngineRequest(i, prompt, pooling=params) for i, prompt in enumerate(prompts)]
        return [result.vector for result in bench(self.model, max_num_batched_tokens=30).run(*requests)]


def qwen_state(oracle: PreTrainedModel, prompt: Prompt, pictures: Sequence[MediaItem], folder: Path) -> torch.Tensor:
    """The last token's state after the last norm."""
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    made = Qwen2VLImageProcessorPil.from_pretrained(folder)(
        [picture.data for picture in pictures], return_tensors="pt", input_data_format="channels_last"
    )
    with torch.inference_mode():
        states = oracle.model(input_ids=ids, mm_token_type_ids=(ids == oracle.config.image_token_id).int(), **made)
    state: torch.Tensor = states.last_hidden_state[0, -1]
    return state


@pytest.mark.parametrize("pickled", [True, False])
def test_dse(pickled: bool, tmp_path: Path) -> None:
    oracle = checkpoints.make_qwen2_vl(tmp_path, pickled=pickled)  # published as pytorch_model.bin
    here = Embedder("dse", tmp_path)
    black = MediaItem("image", np.zeros((56, 56, 3), np.uint8), b"black")
    document, query = (PICTURE_AND_TEXT, [noise(90, 130)]), ((MediaPart("image"), TextPart("Query: who?")), [black])
    prompts = [here.prompt(*one) for one in (document, query)]
    tokenizer = here.processor.tokenizer
    assert tokenizer.decode(prompts[1].token_ids.tolist(), skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{'<|image_pad|>' * 4}<|vision_end|>Query: who?<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    states = [
        qwen_state(oracle, prompt, pictures, tmp_path)
        for prompt, (_, pictures) in zip(prompts, (document, query), strict=True)
    ]
    for size in (None, 24):
        for ours, state in zip(here.vectors(prompts, size), states, strict=True):
            np.testing.assert_allclose(ours, functional.normalize(state[:size], dim=-1), atol=1e-5)


def test_vlm2vec(tmp_path: Path) -> None:
    checkpoints.make_phi3_v(tmp_path)
    here = Embedder("vlm2vec", tmp_path)
    prompt = here.prompt(PICTURE_AND_TEXT, [noise(60, 60)])
    tokenizer = here.processor.tokenizer
    begin = tokenizer.token_to_id("<s>")
    rows, text = prompt.spans[0].length, tokenizer.encode(" What is shown in this image?")
    assert prompt.token_ids.tolist() == [begin, *[here.processor.placeholder_id("image")] * rows, begin, *text]
    plain = here.prompt([TextPart("A cat and a dog")], [])
    assert plain.token_ids.tolist() == [begin, *tokenizer.encode("A cat and a dog")]
    for vector in here.vectors([prompt, plain]):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    two = here.prompt([TextPart("a"), MediaPart("image"), TextPart("b"), MediaPart("image")], [noise(60, 60)] * 2)
    assert [span.item for span in two.spans] == [0, 1]
