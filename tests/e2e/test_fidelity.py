"""Greedy answers through HTTP equal transformers' on the same checkpoint in float32, token by token, however computed:
streaming or not, cold or warm, together or alone, in chunks that cut pictures, after preemption.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import checkpoints
from support.live import Live, events, live
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, PreTrainedModel, Qwen2VLImageProcessorPil

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.prompt.tokenizer import Tokenizer

MAKERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": checkpoints.make_llama,
    "mistral": checkpoints.make_mistral,
    "qwen2": checkpoints.make_qwen2,
    "qwen3": checkpoints.make_qwen3,
    "phi3": checkpoints.make_phi3,
    "llava": checkpoints.make_llava,
    "llava_next": checkpoints.make_llava_next,
    # A tied head makes random weights repeat their last token for ever, which hides mistakes.
    "qwen2_vl": partial(checkpoints.make_qwen2_vl, tie_word_embeddings=False),
}
IMAGE_PROCESSORS: dict[str, Any] = {
    "llava": CLIPImageProcessorPil,
    "llava_next": LlavaNextImageProcessorPil,
    "qwen2_vl": Qwen2VLImageProcessorPil,
}
MAX_TOKENS = 24
STEP_TOKENS = 13  # a prime, smaller than every picture's rows
Token = tuple[list[int], float]


@dataclass(frozen=True, slots=True)
class Case:
    """One request and transformers' answer: every token's bytes and log-probability."""

    messages: list[dict[str, Any]]
    media_tokens: int
    tokens: list[Token]

    def body(self, **fields: Any) -> dict[str, Any]:
        return {
            "messages": self.messages,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 2,
            "skip_special_tokens": False,
            **fields,
        }


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_part(shown: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()},
    }


def conversations(family: str) -> list[tuple[list[dict[str, Any]], list[Image.Image]]]:
    """Eight unequal chats; with pictures some have one size and one text, and differ in the picture alone."""
    words = [
        "What is it?",
        "Describe the picture. " * 3,
        "a",
        "Grüße 你好 🙂",
        "one two three " * 5,
        "x y z",
        "def f(): 1",
        "?",
    ]
    if family not in IMAGE_PROCESSORS:
        return [([{"role": "user", "content": text}], []) for text in words]
    shown = [
        [picture(60, 90, 1)],
        [picture(60, 90, 2)],
        [picture(60, 90, 3)],
        [],
        [picture(112, 56, 4), picture(30, 84, 5)],
        [picture(60, 90, 1)],
        [picture(84, 140, 6)],
        [picture(60, 90, 1), picture(60, 90, 2)],
    ]
    chats = []
    for place, (text, images) in enumerate(zip(words, shown, strict=True)):
        say = "What is it?" if place < 3 else text
        parts = [*map(image_part, images), {"type": "text", "text": say}]
        chats.append(([{"role": "user", "content": parts}], images))
    return chats


class Oracle:
    """transformers' model and image processor."""

    def __init__(self, family: str, folder: Path, model: PreTrainedModel) -> None:
        self.family = family
        self.model = model
        self.checkpoint = open_checkpoint(folder)
        self.tokenizer = Tokenizer.from_folder(folder, vocab_size=self.checkpoint.vocab_size)

    def answer(self, prompt_ids: list[int], images: list[Image.Image]) -> list[Token]:
        ids = torch.tensor([prompt_ids])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            inputs |= IMAGE_PROCESSORS[self.family](**self.checkpoint.preprocessor)(images, return_tensors="pt")
        if self.family == "qwen2_vl":
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        made = self.model.generate(
            **inputs,
            max_new_tokens=MAX_TOKENS,
            min_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = made.sequences[0, len(prompt_ids) :].tolist()
        values = [row[0].log_softmax(-1)[token].item() for row, token in zip(made.logits, new, strict=True)]
        return [(list(self.tokenizer.token_text(token)[1]), value) for token, value in zip(new, values, strict=True)]


@dataclass(frozen=True, slots=True)
class Bench:
    """A family's checkpoint with a server in a roomy and one in a narrow setting, and what they must say."""

    roomy: Live
    narrow: Live
    cases: list[Case]


def media_token_of(oracle: Oracle) -> int:
    config = oracle.model.config
    return int(getattr(config, "image_token_id", getattr(config, "image_token_index", -1)))


def kv_bytes(model: PreTrainedModel, tokens: int) -> int:
    text: Any = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(tokens * 2 * text.num_hidden_layers * text.num_key_value_heads * head * 4)


@pytest.fixture(
    scope="module",
    params=[("qwen2_vl", "hub"), ("llava_next", "transformers"), ("phi3", "hub")],
    ids=lambda param: param[0],
)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    family, layout = request.param
    folder = tmp_path_factory.mktemp(family)
    model = MAKERS[family](folder / "model", layout)
    oracle = Oracle(family, folder / "model", model)
    (folder / "narrow").mkdir()
    with live(folder, str(folder / "model"), "--dtype", "float32") as roomy:
        cases = []
        for messages, images in conversations(family):
            ids = roomy.post("/tokenize", {"messages": messages}).json()["tokens"]
            rows = ids.count(media_token_of(oracle))
            cases.append(Case(messages, rows, oracle.answer(ids, images)))
        longest = max(len(roomy.post("/tokenize", {"messages": case.messages}).json()["tokens"]) for case in cases)
        room = 5 * (longest + MAX_TOKENS) // 2
        with live(
            folder / "narrow",
            str(folder / "model"),
            "--dtype",
            "float32",
            "--max-num-batched-tokens",
            str(STEP_TOKENS),
            "--block-size",
            "4",
            kv_cache_memory=str(kv_bytes(model, room)),
        ) as narrow:
            yield Bench(roomy, narrow, cases)


def check(found: list[dict[str, Any]], case: Case) -> None:
    assert [entry["bytes"] for entry in found] == [token for token, _ in case.tokens]
    values = np.array([entry["logprob"] for entry in found])
    np.testing.assert_allclose(values, [value for _, value in case.tokens], atol=2e-4, rtol=0)
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in found)  # greedy


def ask(server: Live, case: Case, **fields: Any) -> dict[str, Any]:
    reply = server.post("/v1/chat/completions", case.body(**fields))
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    check(found["choices"][0]["logprobs"]["content"], case)
    media = found["usage"]["prompt_tokens_details"]["multimodal_tokens"]
    assert (media or {"image": 0}) == {"image": case.media_tokens}
    return found


def ask_streaming(server: Live, case: Case) -> None:
    found = events(server.post("/v1/chat/completions", case.body(stream=True)).text)
    choices = [event["choices"][0] for event in found]
    check([entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]], case)
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text == b"".join(bytes(token) for token, _ in case.tokens).decode("utf-8", "replace")


def test_alone_cold_and_warm_streaming_and_not(bench: Bench) -> None:
    for case in bench.cases:
        ask(bench.roomy, case)
        warm = ask(bench.roomy, case)
        assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 or warm["usage"]["prompt_tokens"] <= 16
        ask_streaming(bench.roomy, case)
    assert len({tuple(map(tuple, (token for token, _ in case.tokens))) for case in bench.cases}) >= 6
    bench.roomy.check_unharmed()


@pytest.mark.parametrize("narrow", [False, True])
def test_together(bench: Bench, narrow: bool) -> None:
    """Narrow: a step has fewer tokens than a picture has rows, and the cache room for two and a half requests."""
    server = bench.narrow if narrow else bench.roomy
    for attempt in range(20):
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(partial(ask, server), bench.cases))
        if attempt and not (narrow and server.metric("vllm:num_preemptions_total") == 0):
            break
    else:
        pytest.fail("nobody was ever preempted")
    server.check_unharmed()


def test_in_chunks_alone(bench: Bench) -> None:
    for case in bench.cases:
        ask(bench.narrow, case)
        ask_streaming(bench.narrow, case)


def test_n_of_one_prompt(bench: Bench) -> None:
    case = bench.cases[0]
    reply = bench.narrow.post("/v1/chat/completions", case.body(n=3))
    assert reply.status_code == 200, reply.text
    for choice in reply.json()["choices"]:
        check(choice["logprobs"]["content"], case)
