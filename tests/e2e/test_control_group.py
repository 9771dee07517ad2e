"""A server in a small control group: large media at once are answered or refused, and nothing is killed for memory."""

from __future__ import annotations

import base64
import io
import os
import time
import wave
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support import pictures, server

from sensorium.units import MiB

LIMIT = 700 * MiB
ROOT = Path("/sys/fs/cgroup")
CHAT = "/v1/chat/completions"
REFUSALS = {400, 413, 429, 503}


@dataclass(frozen=True, slots=True)
class Group:
    """`folders` of the controllers for memory (the first) and processor time."""

    folders: tuple[Path, ...]

    @property
    def kills(self) -> int:
        """Processes that were ended for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                lines = (self.folders[0] / name).read_text().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        raise AssertionError("no count of kills")


def made(name: str) -> Group:
    """One of version 1 or 2, with one core. OSError where there may be none."""
    if (ROOT / "memory").is_dir():
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
        group = Group((ROOT / "memory" / own.split(":")[2].lstrip("/") / name, ROOT / "cpu" / name))
        settings: tuple[tuple[str, object], ...] = (("memory.limit_in_bytes", LIMIT), ("cpu.cfs_quota_us", 100_000))
    else:
        with suppress(OSError):
            (ROOT / "cgroup.subtree_control").write_text("+memory +cpu")
        group = Group((ROOT / name, ROOT / name))
        settings = (("memory.max", LIMIT), ("cpu.max", "100000 100000"))
    for folder, (file, value) in zip(group.folders, settings, strict=True):
        folder.mkdir(exist_ok=True)
        (folder / file).write_text(str(value))
    return group


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    name = f"sensorium-test-{os.getpid()}"
    try:
        found = made(name)
    except (OSError, StopIteration) as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield found
    for folder in set(found.folders):
        for _ in range(100):  # its processes have ended, the kernel may not have noticed
            with suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.05)


def part(kind: str, data: bytes, media_type: str) -> dict[str, Any]:
    url = f"data:{media_type};base64," + base64.b64encode(data).decode()
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def speech(seconds: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * 16_000 * seconds))
    return out.getvalue()


def attack() -> list[dict[str, Any]]:
    """18 large media, no two of them equal."""
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    flat = Image.new("RGB", (8000, 5000), (3, 90, 200))
    png, jpeg = saved(Image.fromarray(noise), "PNG", compress_level=0), saved(Image.fromarray(noise), "JPEG")
    large = saved(flat, "PNG"), saved(flat, "JPEG", progressive=True), saved(flat, "WEBP", method=0)
    parts = [part("image", png + bytes(number), "image/png") for number in range(6)]
    parts += [part("image", jpeg + bytes(number), "image/jpeg") for number in range(6)]
    parts += [part("image", file, "image/png") for file in large]
    parts += [part("audio", speech(seconds), "audio/wav") for seconds in (500, 60)]
    frames = ",".join(base64.b64encode(jpeg).decode() for _ in range(6))
    return [*parts, {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + frames}}]


GREEDY_TEMPLATES = (
    "{% set a = namespace(s='x' * 999) %}{% for i in range(40) %}{% set a.s = a.s ~ a.s %}{% endfor %}{{ a.s }}",
    "{% set a = [] %}{% for i in range(90000) %}{% set _ = a.append('x' * 2000 ~ i) %}{% endfor %}{{ a | length }}",
    "{{ '%99999999d' | format(1) }}",
)
GREEDY_GRAMMAR = (
    "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1} "x" | (r{i + 1})\n' for i in range(3000)) + 'r3000 ::= "a"'
)


def greedy_prompts() -> list[dict[str, Any]]:
    """Templates and grammars that take all the memory or time they get, four of each at a time."""
    templates = [{"chat_template": template} for template in GREEDY_TEMPLATES * 4]
    return [*templates, *[{"structured_outputs": {"grammar": GREEDY_GRAMMAR}}] * 4]


def test_all_at_once_ends_nothing(group: Group, tmp_path: Path) -> None:
    """Large media, and then templates and grammars as well."""
    parts = attack()
    enter = "".join(f"echo $$ > {folder}/cgroup.procs; " for folder in group.folders)
    flags = ("--port", "0", "--allow-request-chat-template")
    process = server.start(tmp_path / "log", *flags, prefix=("sh", "-c", enter + 'exec "$@"', "sh"))
    try:
        url = server.until_ready(process, tmp_path / "log", 120.0)
        with httpx.Client(base_url=url, timeout=300) as http, ThreadPoolExecutor(len(parts)) as threads:

            def ask(content: dict[str, Any]) -> int:
                message = {"role": "user", "content": [content, {"type": "text", "text": "what is it"}]}
                return http.post(CHAT, json={"messages": [message], "max_tokens": 2}).status_code

            found = Counter(threads.map(ask, parts))
            assert group.kills == 0
            assert set(found) <= {200} | REFUSALS, found
            greedy = [{"messages": [{"role": "user", "content": "hi"}], **fields} for fields in greedy_prompts()]
            found = Counter(threads.map(lambda body: http.post(CHAT, json=body).status_code, greedy))
            assert group.kills == 0
            assert set(found) <= REFUSALS, found
            assert ask(parts[0]) == ask(parts[6]) == 200  # alone they fit
            assert ask(parts[12]) == 400  # 40 megapixels never do
            assert ask(part("image", pictures.encoded(pictures.photo(80, 80), "PNG"), "image/png")) == 200
            assert http.get("/readyz").status_code == 200
        assert group.kills == 0 and process.poll() is None
        assert "engine process was lost" not in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(60)
