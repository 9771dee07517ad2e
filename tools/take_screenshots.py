"""Screenshots of the playground for docs/images, taken from a running server: python tools/take_screenshots.py [URL].

Needs Playwright (the dev extra), Chromium and a font with Chinese characters (apt-get install chromium
fonts-wqy-zenhei). Look at them before committing.
"""

from __future__ import annotations

import io
import shutil
import sys
import threading
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

OUT = Path(__file__).parents[1] / "docs" / "images"
MAX_BYTES = 150_000
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDE = {"width": 1100, "height": 720}
PHONE = {"width": 390, "height": 760}
DRAWN = "#samples [data-kind=image]"


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    OUT.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        chat(browser, url)
        dark(browser, url)
        phone(browser, url)
        embeddings(browser, url)
        server(browser, url)
        browser.close()


def open_page(browser: Browser, url: str, **options: object) -> Page:
    page = browser.new_page(**{"viewport": WIDE, "locale": "en-US", **options})  # type: ignore[arg-type]
    page.goto(url)
    expect(page.locator("#send")).to_be_enabled(timeout=30_000)
    page.locator("[name=max_tokens]").evaluate("field => { field.value = '40'; }")
    return page


def ask(page: Page, words: str = "") -> None:
    """Ask in words, or about an image that the page draws."""
    before = page.locator(".turn").count()
    if words:
        page.fill("#text", words)
        page.press("#text", "Enter")
    else:
        page.click(DRAWN)
    expect(page.locator(".turn").nth(before).locator("[data-stat=tokens]")).to_be_visible(timeout=60_000)


def keep(page: Page, name: str) -> None:
    """A small PNG: few colours are enough for a page."""
    page.wait_for_timeout(300)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    file = OUT / f"{name}.png"
    image.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.name}: {file.stat().st_size} bytes")
    if file.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{file.name} is too large")
    page.close()


def chat(browser: Browser, url: str) -> None:
    page = open_page(browser, url)
    ask(page)
    keep(page, "playground-chat")


def dark(browser: Browser, url: str) -> None:
    page = open_page(browser, url, color_scheme="dark")
    ask(page, "What can you do?")
    page.locator("[data-i18n-title='turn.request']").click()
    page.click("#request-python")
    keep(page, "playground-dark")


def phone(browser: Browser, url: str) -> None:
    page = open_page(browser, url, viewport=PHONE, locale="zh-CN", has_touch=True, is_mobile=True)
    ask(page)
    keep(page, "playground-phone")


def embeddings(browser: Browser, url: str) -> None:
    page = open_page(browser, url, viewport={"width": 1100, "height": 860})
    page.click("#tab-compare")
    page.click("#compare-run")
    expect(page.locator(".bars")).to_be_visible(timeout=30_000)
    keep(page, "playground-embeddings")


def server(browser: Browser, url: str) -> None:
    """With something to see: a few requests at once, again and again, while the page looks."""
    page = open_page(browser, url, viewport={"width": 1100, "height": 780})
    page.click("#tab-server")
    done = threading.Event()
    threads = [threading.Thread(target=load, args=(url, number, done)) for number in range(3)]
    for thread in threads:
        thread.start()
    page.wait_for_timeout(40_000)
    done.set()
    keep(page, "playground-server")
    for thread in threads:
        thread.join()


def load(url: str, number: int, done: threading.Event) -> None:
    count = 0
    while not done.wait(0.5 * number):
        count += 1
        body = {
            "messages": [{"role": "user", "content": f"Question {number}-{count}: what is it? " * (1 + count % 9)}],
            "max_tokens": 40 + 60 * (count % 4),
            "ignore_eos": True,
        }
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status()


if __name__ == "__main__":
    main()
