"""What browser tests share: constants, made-up answers, and what a person does with the page."""

from __future__ import annotations

import io
import json
import shutil
import wave
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from playwright.sync_api import Locator, Page, expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
KEY = "a-key-of-the-tests"
MARKUP = '<img src=x onerror="window.hacked=1">'
REMEMBER_KEY = f"sessionStorage.setItem('sensorium-key', '{KEY}')"
CHAT = "**/v1/chat/completions"

OpenPage = Callable[..., Page]


class Requests:
    """The bodies of the chat requests that a page sends."""

    def __init__(self, page: Page) -> None:
        self.bodies: list[dict[str, Any]] = []
        page.on("request", self._note)

    def _note(self, request: Any) -> None:
        if request.method == "POST" and request.url.endswith("/v1/chat/completions"):
            self.bodies.append(json.loads(request.post_data))

    @property
    def last(self) -> dict[str, Any]:
        return self.bodies[-1]


def say(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered(page: Page, number: int = 1) -> Locator:
    """The turn of that number, once its answer has ended well."""
    turn = page.locator(".turn").nth(number - 1)
    expect(turn.locator("[data-stat=tokens]")).to_be_visible(timeout=60_000)
    expect(turn.locator(".answer")).to_have_attribute("aria-busy", "false")
    return turn


def press(turn: Locator, what: str) -> None:
    """One of the buttons under a question or an answer."""
    turn.locator(f"[data-i18n-title='turn.{what}']").click()


def events(*texts: str, end: str = "data: [DONE]\n\n") -> str:
    """An answer that a test makes up."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(texts), "total_tokens": 3}})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def answer_with(page: Page, body: str, status: int = 200) -> None:
    kind = "text/event-stream" if status == 200 else "application/json"
    page.route(CHAT, lambda route: route.fulfill(status=status, content_type=kind, body=body))


def change_models(page: Page, **fields: Any) -> None:
    """Let the server's models look different to the page."""

    def answer(route: Any) -> None:
        listed = route.fetch().json()
        for model in listed.get("data", ()):
            model.update(fields)
        route.fulfill(json=listed)

    page.route("**/v1/models", answer)


def image_bytes() -> bytes:
    image = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def beeps(count: int) -> bytes:
    """A wav file of so many beeps of a fifth of a second."""
    rate = 16_000
    time = np.arange(rate // 5) / rate
    beep = 0.5 * np.sin(2 * np.pi * 880 * time) * np.minimum(1, np.minimum(time, time[::-1]) * 100)
    samples = np.concatenate(
        [np.concatenate([np.zeros(rate // 4), beep]) for _ in range(count)] + [np.zeros(rate // 5)]
    )
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()
