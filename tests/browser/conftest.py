"""The playground in a real browser: Debian's Chromium, driven by Playwright, against one real server with a key.

Chromium and its driver live as long as one test module: Playwright's event loop must not outlast it, because other
modules of this process may run loops of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from support import server
from support.browser_support import CHROMIUM, FLAGS, KEY, MARKUP, REMEMBER_KEY, OpenPage, Requests, beeps, image_bytes


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with server.running(
        tmp_path_factory.mktemp("playground"),
        "--api-key",
        KEY,
        "--allowed-media-domains",
        "127.0.0.1",
        "--served-model-name",
        "demo",
        MARKUP,
        "--pooling",
        "last",
    ) as found:
        yield found


@pytest.fixture(scope="module")
def browser(site: server.Server) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        expect.set_options(timeout=15_000)
        found = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser, site: server.Server) -> Iterator[OpenPage]:
    """Opens pages in contexts of their own. Whatever a page complains about in its console fails the test."""
    complaints: list[str] = []
    contexts: list[BrowserContext] = []

    def complain(message: Any) -> None:
        # The browser itself notes every answer that is no success; what the page makes of it is tested.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    def open_page(
        path: str = "/", *, key: bool = True, prepare: Callable[[Page], None] = lambda page: None, **options: Any
    ) -> Page:
        context = browser.new_context(base_url=site.url, **{"locale": "en-US", "reduced_motion": "reduce", **options})
        context.set_default_timeout(15_000)
        contexts.append(context)
        if key:
            context.add_init_script(REMEMBER_KEY)
        page = context.new_page()
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        prepare(page)
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """The chat, ready to be written to, with short answers."""
    page = open_page()
    expect(page.locator("#send")).to_be_enabled()
    page.fill("[name=max_tokens]", "12")
    return page


@pytest.fixture
def requests(page: Page) -> Requests:
    return Requests(page)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image, a video of a square that goes right, three beeps, and files that are none of that."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "it's a dot.png").write_bytes(image_bytes())
    (folder / "broken.png").write_bytes(b"not an image at all")
    (folder / "notes.txt").write_text("words")
    with av.open(str(folder / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 160
        stream.codec_context.bit_rate = 1_500_000
        for place in range(20):
            pixels = np.full((160, 160, 3), 255, np.uint8)
            pixels[56:104, 8 + 5 * place : 56 + 5 * place] = (0, 0, 220)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    (folder / "beeps.wav").write_bytes(beeps(3))
    return folder


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def elsewhere(files: Path) -> Iterator[str]:
    """The same files behind a web server that is not ours."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=files))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
