"""A tiny Qwen2.5-Omni behind a real server: the examples with every kind of media, and what it says of sizes."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image
from support import checkpoints, server
from support.clips import sound, tone, video

ROOT = Path(__file__).parents[2]
FRAMES = {"size": {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    folder = tmp_path_factory.mktemp("omni")
    model = folder / "model"
    checkpoints.make_qwen2_omni(model, video=FRAMES, dtype="bfloat16")
    with server.running(folder, str(model), "--allow-request-mm-kwargs") as running:
        yield running


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    Image.effect_noise((90, 60), 80).convert("RGB").save(folder / "noise.png")
    (folder / "clip.mp4").write_bytes(video(frames=30, rate=10))
    (folder / "clip.webm").write_bytes(video("libvpx-vp9", "webm", frames=7, rate=10))
    (folder / "tone.wav").write_bytes(sound(np.stack([tone(1.0, 44_100)] * 2), 44_100))
    return folder


@pytest.fixture(scope="module")
def client(served: server.Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: OpenAI, *parts: dict[str, Any], **options: Any) -> Any:
    return cast(Any, client).chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": list(parts)}],
        **{"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}, **options},
    )


def url(path: Path) -> str:
    return f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.mark.parametrize(
    "argv",
    [
        ["one_video.py", "clip.mp4", "--fps", "1"],
        ["one_audio.py", "tone.wav"],
        ["everything.py", "--image", "noise.png", "--video", "clip.mp4", "--audio", "tone.wav"],
    ],
    ids=" ".join,
)
def test_examples(served: server.Server, files: Path, argv: list[str]) -> None:
    words = [str(files / word) if (files / word).is_file() else word for word in argv]
    done = subprocess.run(
        [sys.executable, *words, "--base-url", f"{served.url}/v1", "--max-tokens", "8"],
        cwd=ROOT / "examples",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_tokens_of_sampled_frames_and_seconds(client: OpenAI, files: Path) -> None:
    """Three seconds at two frames a second are three pairs of four rows; a second of sound is 25 rows."""

    def prompt_tokens(*parts: dict[str, Any], **extra: Any) -> int:
        return int(ask(client, *parts, extra_body={"ignore_eos": True, **extra}).usage.prompt_tokens)

    clip = {"type": "video_url", "video_url": {"url": url(files / "clip.mp4")}}
    text = {"type": "text", "text": "So?"}
    bare = prompt_tokens(text)
    assert prompt_tokens(text, clip) == bare + 2 + 3 * 4
    assert prompt_tokens(text, clip, mm_processor_kwargs={"num_frames": 20}) == bare + 2 + 10 * 4
    assert prompt_tokens(text, {"type": "audio_url", "audio_url": {"url": url(files / "tone.wav")}}) == bare + 2 + 25


def test_all_kinds_together_answer_as_alone_again(client: OpenAI, files: Path) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": url(files / "noise.png")}},
        {"type": "video_url", "video_url": {"url": url(files / "clip.webm")}},
        {"type": "audio_url", "audio_url": {"url": url(files / "tone.wav")}},
    ]
    first = ask(client, *parts)
    again = ask(client, *parts)
    assert first.choices[0].message.content == again.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_wrong_bytes_name_the_part(client: OpenAI, files: Path) -> None:
    picture = {"type": "audio_url", "audio_url": {"url": url(files / "noise.png")}}
    with pytest.raises(BadRequestError) as refused:
        ask(client, {"type": "text", "text": "?"}, picture)
    assert "content[1]" in (refused.value.param or "")
