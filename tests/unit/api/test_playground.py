"""The web page's files as they are served: only they, to everybody, under a policy that lets nothing else in."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import pytest
from support.api_support import Served, get, raw, request, serving

import sensorium
from sensorium.api.playground import PAGES, read_pages
from sensorium.errors import StartupError

FOLDER = Path(sensorium.__file__).parent / "playground"
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "media-src": "blob: data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
MAX_PAGE_BYTES = 200_000
HTML = (FOLDER / "index.html").read_text()
SCRIPTS = {file.name: file.read_text() for file in FOLDER.glob("*.js")}
WORDS = {
    language: dict(re.findall(r'^  "([\w.]+)": "(.*)",$', text, re.M))
    for language, text in zip(("en", "zh"), SCRIPTS["words.js"].split("const zh = "), strict=True)
}


async def test_every_file_is_served_with_policy_and_type(served: Served) -> None:
    types = {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
    for path, name in PAGES.items():
        reply = await get(served.port, path)
        assert (reply.status, reply.body) == (200, (FOLDER / name).read_bytes())
        assert reply.headers["content-type"] == types[Path(name).suffix]
        assert reply.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
        assert policy == POLICY


def test_what_is_served_is_what_is_there_and_light() -> None:
    assert {file.name for file in FOLDER.iterdir()} == set(PAGES.values())
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < MAX_PAGE_BYTES


async def test_no_way_out_of_the_dict(served: Served) -> None:
    started_s = time.process_time()
    paths = [
        "/playground",
        "/playground/",
        "/playground/..%2f..%2fetc/passwd",
        "/playground/../../etc/passwd",
        "/playground/%2e%2e/serve.py",
        "//etc/passwd",
        "/playground//etc/passwd",
        "/playground/index.html",
        "/playground/main.js/",
        "/playground/main.js%00",
        "/playground/MAIN.JS",
        "/playground/..%5c..%5cserve.py",
        "/index.html",
        "/favicon.ico",
    ]
    for path in paths:
        assert (await raw(served.port, request("GET", path))).status == 404, path
    assert time.process_time() - started_s < 10


async def test_ranges_are_not_offered(served: Served) -> None:
    for value in ("bytes=0-0", "bytes=0-," * 100, "bytes=-1", "bytes=9-3"):
        reply = await get(served.port, "/playground/main.js", headers={"Range": value})
        assert (reply.status, reply.body) == (200, (FOLDER / "main.js").read_bytes())
        assert "accept-ranges" not in reply.headers
        assert "content-range" not in reply.headers


async def test_a_kept_file_is_not_sent_again(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client:
        first = await client.get("/playground/main.js")
        assert first.headers["cache-control"] == "no-cache"
        tag = first.headers["etag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}'):
            again = await client.get("/playground/main.js", headers={"If-None-Match": known})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == tag
            assert "content-security-policy" in again.headers
        assert (await client.get("/playground/main.js", headers={"If-None-Match": '"other"'})).status_code == 200


async def test_the_page_is_public_and_what_it_calls_is_not() -> None:
    async with serving(api_key=("secret",)) as served:
        for path in PAGES:
            assert (await get(served.port, path)).status == 200
        for path in ("/v1/models", "/metrics", "/version", "/v1/chat/completions", "/playground/other.js"):
            assert (await get(served.port, path)).status == 401


async def test_the_page_is_no_part_of_the_api(served: Served) -> None:
    paths = (await get(served.port, "/openapi.json")).json["paths"]
    assert not [path for path in paths if path in PAGES]


def test_an_incomplete_installation_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="incomplete"):
        read_pages(tmp_path)


def test_the_page_has_no_code_or_style_of_its_own_and_loads_nothing_from_elsewhere() -> None:
    for forbidden in (r"<style", r"\sstyle=", r"\son\w+=", r"<script(?![^>]*\ssrc=)", r"javascript:", r"<base"):
        assert not re.search(forbidden, HTML), forbidden
    sources = re.findall(r'(?:src|href)="([^"#]+)"', HTML)
    assert {source for source in sources if source != "docs"} <= {path.lstrip("/") for path in PAGES}
    style = (FOLDER / "style.css").read_text()
    assert "url(" not in style
    assert "@import" not in style
    everything = HTML + style + "".join(SCRIPTS.values())
    assert set(re.findall(r"https?://[\w./]*", everything)) <= {"http://www.w3.org/2000/svg", "https://"}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_no_script_makes_markup_or_code_of_text(name: str) -> None:
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "DOMParser",
        "srcdoc",
        "eval(",
        "new Function",
        "createContextualFragment",
        "setHTMLUnsafe",
    ):
        assert forbidden not in SCRIPTS[name]
    for imported in re.findall(r'^(?:import|export)\b[^;]*?(?:from|import) ?"([^"]+)"', SCRIPTS[name], re.M):
        assert imported.startswith("./")
        assert imported.removeprefix("./") in SCRIPTS


def test_both_languages_say_everything() -> None:
    assert WORDS["en"].keys() == WORDS["zh"].keys()
    for name in WORDS["en"]:
        places = [sorted(re.findall(r"\{\w+\}", words[name])) for words in WORDS.values()]
        assert places[0] == places[1], name
    used = set(re.findall(r'data-i18n(?:-\w+)?="([^"]+)"', HTML))
    for text in SCRIPTS.values():
        used |= set(re.findall(r'\b(?:t|say|title)\((?:[^()"]|\([^()]*\))*?"([a-z][\w.]*\.?[\w.]+)"', text))
    missing = {
        name for name in used if name not in WORDS["en"] and not any(known.startswith(name) for known in WORDS["en"])
    }
    assert not missing
