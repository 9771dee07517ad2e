"""What `bench serve` sends: requests of every kind, of random words and noise, all from one seed."""

from __future__ import annotations

import base64
import io
import random
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from sensorium.config import RequestShape

WORDS = (
    "river stone window garden letter morning silver paper bridge winter corner market yellow engine forest island "
    "travel number simple change answer between behind around follow carry open close write"
).split()
SAMPLE_RATE = 16_000  # Hz
FRAME_RATE = 2  # frames a second of a clip
WEATHER: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 40},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
FORM: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "count": {"type": "integer", "minimum": 0, "maximum": 1000},
    },
    "required": ["title", "words", "count"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Request:
    """`streams`: the answer comes in pieces; otherwise whole, and without generated tokens."""

    path: str
    body: bytes
    streams: bool = True


class Load:
    """Makes requests of the configured kind; no two are the same. `words_per_token` is the model's."""

    def __init__(self, config: RequestShape, model: str, words_per_token: float = 1.0, *, seed: int = 0) -> None:
        self._config = config
        self._model = model
        self._words = max(1, round(config.input_tokens * words_per_token))
        self._random = random.Random(seed)  # noqa: S311  # a load, not a secret
        self._makers: Mapping[str, Callable[[], Request]] = {
            "text": lambda: self._chat([]),
            "image": lambda: self._chat([self._image() for _ in range(config.images)]),
            "audio": lambda: self._chat([self._audio()]),
            "video": lambda: self._chat([self._video()]),
            "tools": lambda: self._chat([], tools=[WEATHER], tool_choice="required"),
            "json": lambda: self._chat(
                [], response_format={"type": "json_schema", "json_schema": {"name": "form", "schema": FORM}}
            ),
            "embeddings": self._embeddings,
            "rerank": self._rerank,
        }

    def request(self) -> Request:
        return self._makers[self._config.kind]()

    def probe(self, num_words: int) -> Request:
        """One text of so many words, the same every time, with as little else as possible."""
        said = text(random.Random(0), num_words)  # noqa: S311
        if self._config.kind == "embeddings":
            return self._pooled("/embeddings", input=said)
        if self._config.kind == "rerank":
            return self._pooled("/rerank", query="a", documents=[said])
        return chat_request(self._model, said, 1)

    def _chat(self, media: list[dict[str, Any]], **more: Any) -> Request:
        said = text(self._random, self._words)
        content: Any = [*media, {"type": "text", "text": said}] if media else said
        return chat_request(self._model, content, self._config.output_tokens, **more)

    def _embeddings(self) -> Request:
        texts = [text(self._random, self._words) for _ in range(self._config.inputs)]
        return self._pooled("/embeddings", input=texts, encoding_format="base64")

    def _rerank(self) -> Request:
        documents = [text(self._random, self._words) for _ in range(self._config.inputs)]
        return self._pooled("/rerank", query=text(self._random, 8), documents=documents, return_documents=False)

    def _pooled(self, path: str, **fields: Any) -> Request:
        return Request(path, msgspec.json.encode({"model": self._model, **fields}), streams=False)

    def _image(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": image_url(self._random, *self._config.image_size)}}

    def _audio(self) -> dict[str, Any]:
        data = base64.b64encode(recording(self._random, self._config.audio_seconds)).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}

    def _video(self) -> dict[str, Any]:
        clip = base64.b64encode(clip_file(self._random, *self._config.image_size, self._config.frames)).decode()
        return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}}


def chat_request(model: str, content: Any, output_tokens: int, **more: Any) -> Request:
    """`ignore_eos` unless the answer has a form, which ends it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": output_tokens,
        "temperature": 0,
        **(more or {"ignore_eos": True}),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Request("/chat/completions", msgspec.json.encode(body))


def text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def image_url(rng: random.Random, width: int, height: int) -> str:
    """A JPEG of noise as a data URL."""
    import numpy as np
    from PIL import Image

    spread = rng.uniform(20, 120)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(128, spread, (height, width, 1)).clip(0, 255)
    buffer = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8).repeat(3, axis=2)).save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def recording(rng: random.Random, seconds: float) -> bytes:
    """A WAV of noise, 16 bit mono."""
    import numpy as np

    count = max(1, round(seconds * SAMPLE_RATE))
    samples = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(500, 5000), count).clip(-32768, 32767)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def clip_file(rng: random.Random, width: int, height: int, frames: int) -> bytes:
    """An MP4 of noise; sides are rounded down to even numbers, as the format wants them."""
    import av
    import numpy as np

    noise = np.random.default_rng(rng.getrandbits(32))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FRAME_RATE)
        stream.width, stream.height, stream.pix_fmt = max(2, width // 2 * 2), max(2, height // 2 * 2), "yuv420p"
        for _ in range(frames):
            pixels = noise.integers(0, 256, (stream.height, stream.width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
