"""Qwen3-VL-Reranker and Qwen3-VL-Embedding: pairs and inputs of text and media, in the words of their own scripts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import make_qwen3_vl
from support.image_families import noise, normalised
from support.media_models import Served
from support.model_driver import Driver
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedModel

from sensorium.checkpoint.configs import Checkpoint, open_checkpoint
from sensorium.checkpoint.families import FAMILIES, load_class
from sensorium.models.loading import load_model
from sensorium.processors.base import Processor
from sensorium.prompt import builtin
from sensorium.prompt import tokenizer as tokenizers
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.types import MediaItem, PoolingParams, Prompt

IMAGE, VIDEO = MediaPart("image"), MediaPart("video")
STILL = "<|vision_start|><|image_pad|><|vision_end|>"
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: '
)
TASK = "Given a search query, retrieve relevant candidates that answer the query."
END = "<|im_end|>\n<|im_start|>assistant\n"


@cache
def reranker(name: str = "Qwen3-VL-Reranker-2B", tied: bool = True) -> tuple[PreTrainedModel, Checkpoint, Served]:
    with TemporaryDirectory() as parent:
        folder = Path(parent) / name
        oracle = make_qwen3_vl(folder, tie_word_embeddings=tied)
        words = Tokenizer.from_file(str(folder / "tokenizer.json"))
        words.add_tokens([AddedToken(word, normalized=False) for word in ("yes", "no")])
        words.save(str(folder / "tokenizer.json"))
        overrides: dict[str, Any] = {}
        if "Reranker" not in name:  # as vLLM's users write it
            overrides = {
                "architectures": ["Qwen3VLForSequenceClassification"],
                "classifier_from_token": ["no", "yes"],
                "is_original_qwen3_reranker": True,
            }
        checkpoint = open_checkpoint(folder, overrides=overrides)
        model = load_model(checkpoint, dtype=torch.float32, device="cpu")
        processor: Processor = load_class(checkpoint.family.processor)(
            checkpoint, tokenizers.Tokenizer.from_folder(folder)
        )
    return oracle, checkpoint, Served(oracle, model, processor, checkpoint.preprocessor)


def rendered(source: str, processor: Processor, *messages: tuple[str, Sequence[str | MediaPart]]) -> str:
    template = LocalTemplate(
        source, processor.tokenizer, modalities=processor.modalities, placeholder=processor.placeholder
    )
    return template.render(
        [
            Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))
            for role, parts in messages
        ],
        add_generation_prompt=False,
    )


def scored(here: Served, prompt: Prompt) -> float:
    state = Driver(here.model).step([(here.run(prompt), len(prompt.token_ids))])[-1:]
    return float(here.model.poolers["score"](state, PoolingParams("score"), prompt.token_ids))


def expected(oracle: PreTrainedModel, here: Served, prompt: Prompt) -> float:
    """sigmoid(yes - no) of transformers' logits behind the same tokens and images."""
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    inputs: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": (ids == oracle.config.image_token_id).int()}
    if prompt.media:
        pixels = [normalised(one.arrays).reshape(-1, 3, 1, 256).repeat(2, axis=2) for one in prompt.media]
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(pixels).reshape(-1, 1536))
        inputs["image_grid_thw"] = torch.tensor(np.stack([one.arrays["grid"] for one in prompt.media])).long()
    with torch.inference_mode():
        logits = oracle(**inputs).logits[0, -1]
    yes, no = (here.processor.tokenizer.token_to_id(word) for word in ("yes", "no"))
    return float((logits[yes] - logits[no]).sigmoid())


@pytest.mark.parametrize(("name", "tied"), [("Qwen3-VL-Reranker-2B", True), ("m", False)])
def test_pairs_with_images_are_scored_by_yes_and_no(name: str, tied: bool) -> None:
    oracle, checkpoint, here = reranker(name, tied)
    assert checkpoint.chat_template is not None and not here.model.generates and "score" in here.model.poolers
    pairs: list[tuple[list[str | MediaPart], list[str | MediaPart], list[MediaItem]]] = [
        (["a cat"], ["a dog"], []),
        (["a cat"], [IMAGE, "with words"], [noise(60, 90)]),
        ([IMAGE, "this?"], [IMAGE], [noise(64, 64, seed=1), noise(40, 100, seed=2)]),
    ]
    for query, document, items in pairs:
        text = rendered(checkpoint.chat_template, here.processor, ("query", query), ("document", document))
        prompt = here.processor.build(text, [here.processor.process(item) for item in items])
        found = scored(here, prompt)
        assert found == pytest.approx(expected(oracle, here, prompt), abs=1e-5)
        assert abs(found - 0.5) > 1e-3


def test_the_rerankers_words() -> None:
    _, checkpoint, here = reranker()
    source = checkpoint.chat_template or ""
    pair: list[tuple[str, list[str | MediaPart]]] = [("query", ["what?"]), ("document", [VIDEO, IMAGE, "this"])]
    document = CLIP + STILL + "this"
    said = f"{JUDGE}{TASK}<Query>:what?\n<Document>:{document}{END}"
    assert rendered(source, here.processor, *pair) == said
    told = rendered(source, here.processor, ("system", ["Find it."]), *pair)
    assert told == said.replace(TASK, "Find it.")


@pytest.mark.parametrize(
    ("messages", "system", "user"),
    [
        ([("user", ["a cat"])], "Represent the user's input.", "a cat"),
        ([("user", ["a", IMAGE, VIDEO, "b"])], "Represent the user's input.", f"{CLIP}{STILL}ab"),
        ([("system", [" Find it "]), ("user", [IMAGE])], "Find it.", STILL),
        ([("system", ["Find it?"]), ("user", [""])], "Find it?", "NULL"),
        ([("system", ["找到它。"]), ("user", ["x"])], "找到它。", "x"),
    ],
)
def test_the_embedders_words(messages: Any, system: str, user: str) -> None:
    processor = reranker()[2].processor
    source = builtin.pooling_template_of(["Qwen/Qwen3-VL-Embedding-2B"])
    assert source is not None and builtin.is_embedder_name(["Qwen3-VL-Embedding-8B"])
    text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}{END}"
    assert rendered(source, processor, *messages) == text


def test_the_family_without_a_template_has_no_system_turn() -> None:
    processor = reranker()[2].processor
    source = FAMILIES["Qwen3VLForConditionalGeneration"].chat_template or ""
    assert rendered(source, processor, ("user", [IMAGE, "what?"])) == f"<|im_start|>user\n{STILL}what?<|im_end|>\n"
