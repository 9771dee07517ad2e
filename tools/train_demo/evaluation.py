"""Held-out questions through a server's HTTP API, greedy, in the file formats that people send.

Every sample is drawn anew from seeds that training never uses, at any size, and written as PNG, JPEG or WebP, wav,
mp3 or ogg, mp4 or webm. An answer is right when it says what was asked for, no more and no less; the
order of a list is free.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

import av
import dialogs
import httpx
import numpy as np
from dialogs import FRAMES_A_SECOND, SKILLS, Medium, Source, facts
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scenes import Clip, Picture
from sounds import RATE, Samples, Sound, Speech, wav
from turns import Turn

WANTED = {"number": 0.85, "speech": 0.85, "followup": 0.85, "schema": 0.85, "json": 0.85, "valid": 1.0}
PICTURES = {"png": {}, "jpeg": {"quality": 85}, "webp": {"quality": 85}}
SOUNDS = {"wav": ("", ""), "mp3": ("libmp3lame", "mp3"), "ogg": ("libopus", "ogg")}
VIDEOS = {"mp4": ("libx264", "mp4"), "webm": ("libvpx", "webm")}


@dataclass(frozen=True, slots=True)
class Sample:
    skill: str
    messages: list[dict[str, Any]]
    answer: str
    formats: tuple[str, ...]  # of the media, and "large" where pictures are
    fields: dict[str, Any] = field(default_factory=dict)  # what else the request has
    calls: tuple[dict[str, Any], ...] = ()  # that the answer is to make
    schema: dict[str, Any] | None = None  # that it is to fit


def evaluate(base_url: str, count: int, seed: int, skills: list[str], work: Path, into: Path | None, show: int) -> None:
    speech = Speech(work, 40, seed)  # voices, rates and pitches of their own
    client = httpx.Client(base_url=base_url, timeout=120)
    console = Console()
    right: dict[str, list[bool]] = defaultdict(list)
    by_format: dict[str, list[bool]] = defaultdict(list)
    for skill in skills or SKILLS:
        jobs = [(skill, f"{seed}-{skill}-{index}") for index in range(count)]
        with ThreadPoolExecutor(4) as pool:
            results = list(
                track(
                    pool.map(lambda job: examine(client, speech, *job), jobs),
                    skill,
                    count,
                    console=console,
                    transient=True,
                )
            )
        shown = 0
        for sample, said, is_right in results:
            right[skill].append(is_right)
            for name in sample.formats:
                by_format[name].append(is_right)
            if not is_right and shown < show:
                shown += 1
                console.print(f"{skill}: {last_text(sample)!r} -> {said!r}, not {sample.answer!r}", highlight=False)
        console.print(f"{skill}: {np.mean(right[skill]):.1%}")
    rows = [(skill, len(values), float(np.mean(values)), WANTED.get(skill, 0.95)) for skill, values in right.items()]
    table = Table("skill", "samples", "right", "wanted")
    for skill, samples, share, wanted in rows:
        table.add_row(skill, str(samples), f"{share:.1%}", f"{wanted:.0%}")
    console.print(table)
    formats = Table("format", "samples", "right")
    for name, values in sorted(by_format.items()):
        formats.add_row(name, str(len(values)), f"{np.mean(values):.1%}")
    console.print(formats)
    if into:
        lines = [
            "| skill | samples | right | wanted |",
            "|---|---|---|---|",
            *(f"| {skill} | {samples} | {share:.1%} | {wanted:.0%} |" for skill, samples, share, wanted in rows),
            "",
            "| sent as | samples | right |",
            "|---|---|---|",
            *(f"| {name} | {len(values)} | {np.mean(values):.1%} |" for name, values in sorted(by_format.items())),
        ]
        text = into.read_text()
        begin, end = "<!-- begin report -->", "<!-- end report -->"
        head, rest = text.split(begin)
        into.write_text(f"{head}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.split(end)[1]}")


def examine(client: httpx.Client, speech: Speech, skill: str, seed: str) -> tuple[Sample, str, bool]:
    sample = make_sample(speech, skill, seed)
    body = {"messages": sample.messages, "temperature": 0, "max_tokens": 200, **sample.fields}
    reply = client.post("/v1/chat/completions", json=body)
    reply.raise_for_status()
    message = reply.json()["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    said = json.dumps(calls, ensure_ascii=False) if calls else message["content"] or ""
    return sample, said, is_right(sample, calls, said)


def is_right(sample: Sample, calls: Sequence[dict[str, Any]], said: str) -> bool:
    """The same call, JSON that fits (and says the same), or a text with the same facts."""
    if sample.calls:
        return [_made(call) for call in calls] == [_made(call["function"]) for call in sample.calls]
    if sample.skill in ("json", "schema", "valid", "extract"):
        try:
            found = json.loads(said)
        except ValueError:
            return False
        if sample.skill == "valid":
            return sample.schema is not None and fits(found, sample.schema)
        return in_any_order(found) == in_any_order(json.loads(sample.answer))
    return facts(said) == facts(sample.answer)


def _made(call: dict[str, Any]) -> tuple[str, Any]:
    """The name and the arguments, as text where they are not JSON."""
    try:
        return call["name"], json.loads(call["arguments"])
    except ValueError:
        return call["name"], call["arguments"]


def in_any_order(value: Any) -> Any:
    """Lists sorted, so that equal ones name the same things."""
    if isinstance(value, dict):
        return {key: in_any_order(one) for key, one in value.items()}
    if isinstance(value, list):
        return sorted((in_any_order(one) for one in value), key=json.dumps)
    return value


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value has the schema's types and keys; what `records.schema_of` writes is understood."""
    if schema["type"] == "object":
        inner = schema["properties"]
        return isinstance(value, dict) and value.keys() == inner.keys() and all(fits(value[k], inner[k]) for k in inner)
    if schema["type"] == "array":
        return isinstance(value, list) and all(fits(one, schema["items"]) for one in value)
    if isinstance(value, bool):
        return bool(schema["type"] == "boolean")
    kinds: dict[str, type | UnionType] = {"integer": int, "number": int | float, "string": str}
    return schema["type"] in kinds and isinstance(value, kinds[schema["type"]])


def make_sample(speech: Speech, skill: str, seed: str) -> Sample:
    rng = random.Random(seed)
    dialog = dialogs.examination(Source(rng, speech, held=True), skill)
    messages: list[dict[str, Any]] = []
    formats: list[str] = []
    for turn in dialog:
        if turn.role == "tool":
            messages.append({"role": "tool", "tool_call_id": "call_0", "content": turn.question})
        else:
            parts: list[dict[str, Any]] = [{"type": "text", "text": turn.question}]
            media = [part_of(rng, medium, formats) for medium in turn.media]
            messages.append({"role": "user", "content": media + parts if rng.random() < 0.5 else parts + media})
        messages.append(_answered(turn))
    last = dialog[-1]
    fields: dict[str, Any] = {}
    if tools := [tool for turn in dialog for tool in turn.tools]:
        fields["tools"] = tools
    if last.schema is not None:
        named = {"name": "answer", "schema": last.schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    return Sample(skill, messages[:-1], last.answer, tuple(dict.fromkeys(formats)), fields, last.calls, last.schema)


def _answered(turn: Turn) -> dict[str, Any]:
    """A turn's answer as a message of the history."""
    if turn.calls:
        return {"role": "assistant", "content": None, "tool_calls": list(turn.calls)}
    return {"role": "assistant", "content": turn.answer}


def part_of(rng: random.Random, medium: Medium, formats: list[str]) -> dict[str, Any]:
    if isinstance(medium, Picture):
        name = rng.choice(list(PICTURES))
        pixels = Image.fromarray(medium.pixels)
        if rng.random() < 0.5:
            factor = rng.uniform(2, 6)
            pixels = pixels.resize(
                (round(pixels.width * factor), round(pixels.height * factor)), Image.Resampling.BICUBIC
            )
            formats.append("large image")
        buffer = io.BytesIO()
        pixels.save(buffer, name, **PICTURES[name])
        formats.append(name)
        return {"type": "image_url", "image_url": {"url": data_url(f"image/{name}", buffer.getvalue())}}
    if isinstance(medium, Clip):
        name = rng.choice(list(VIDEOS))
        formats.append(name)
        return {"type": "video_url", "video_url": {"url": data_url(f"video/{name}", video(medium, *VIDEOS[name]))}}
    assert isinstance(medium, Sound)
    name = rng.choice(list(SOUNDS))
    formats.append(name)
    codec, container = SOUNDS[name]
    data = sound(medium.samples, codec, container) if codec else wav(medium.samples)
    return {"type": "audio_url", "audio_url": {"url": data_url(f"audio/{name}", data)}}


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video(clip: Clip, codec: str, container: str) -> bytes:
    height, width = (side // 2 * 2 for side in clip.frames.shape[1:3])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=FRAMES_A_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.bit_rate = 1_500_000
        for frame in clip.frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]))))
        output.mux(stream.encode())
    return buffer.getvalue()


def sound(samples: Samples, codec: str, container: str) -> bytes:
    buffer = io.BytesIO()
    rate = 48_000
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        resampler = av.AudioResampler(format=stream.codec_context.format.name, layout="mono", rate=rate)
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        fifo = av.AudioFifo()
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            fifo.write(converted)
        size = stream.codec_context.frame_size or 960
        while (piece := fifo.read(size, partial=True)) is not None:
            output.mux(stream.encode(piece))
        output.mux(stream.encode())
    return buffer.getvalue()


def last_text(sample: Sample) -> str:
    content = sample.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")
