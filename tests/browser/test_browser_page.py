"""The page around the chat: key, keyboard, languages, themes, narrow screens, the other tabs, weight and policy."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect
from support.browser_support import KEY, OpenPage, answer_with, answered, change_models, events, press, say
from support.server import Server

MAX_PAGE_BYTES = 200_000


def test_light_and_only_from_here(open_page: OpenPage, site: Server) -> None:
    sizes: dict[str, int] = {}

    def prepare(page: Page) -> None:
        page.on("response", lambda response: sizes.update({response.url: len(response.body())}))

    page = open_page(prepare=prepare)
    expect(page.locator("#send")).to_be_enabled()
    assert all(url.startswith(site.url + "/") for url in sizes)
    assert 10_000 < sum(sizes.values()) < MAX_PAGE_BYTES


def test_the_policy_holds_in_the_browser(browser: Browser, site: Server) -> None:
    page = browser.new_page(base_url=site.url)
    response = page.goto("/")
    assert response is not None
    assert "default-src 'none'" in response.headers["content-security-policy"]
    broken = page.evaluate("""async () => {
        const broken = [];
        document.addEventListener('securitypolicyviolation', (event) => broken.push(event.effectiveDirective));
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 1';
        const style = document.createElement('style');
        style.textContent = 'body { color: red }';
        const image = new Image();
        image.src = 'http://127.0.0.2:9/x.png';
        document.body.append(script, style, image);
        await fetch('http://127.0.0.2:9/').catch(() => 0);
        await new Promise((resolve) => setTimeout(resolve, 100));
        return broken;
    }""")
    assert set(broken) == {"script-src-elem", "style-src-elem", "img-src", "connect-src"}
    assert page.evaluate("window.hacked") is None
    page.close()


def test_the_key_is_asked_for_and_kept(open_page: OpenPage) -> None:
    page = open_page(key=False)
    dialog = page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    expect(page.locator("#key-field")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The API key is wrong.")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#banner")).to_contain_text("An API key is needed.")
    assert page.locator("#send").is_disabled()
    page.click("#banner button")
    expect(page.locator("#key-field")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_value("demo")
    expect(page.locator("#banner")).to_be_hidden()
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
    page.reload()
    expect(page.locator("#model")).to_have_value("demo")
    expect(dialog).to_be_hidden()
    expect(page.locator("#key")).to_be_visible()


def test_a_loading_server_is_waited_for(open_page: OpenPage) -> None:
    asked = []

    def busy(route: Route) -> None:
        asked.append(1)
        if len(asked) > 1:
            route.fallback()
            return
        error = {"message": "The model is still loading.", "type": "server_error", "param": None, "code": "unavailable"}
        route.fulfill(status=503, json={"error": error})

    page = open_page(prepare=lambda page: page.route("**/v1/models", busy))
    expect(page.locator("#banner")).to_have_text("The model is still loading.")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#banner")).to_be_hidden()


def test_everything_works_by_keyboard(open_page: OpenPage) -> None:
    page = open_page(prepare=lambda page: answer_with(page, events("Yes.")))
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    expect(page.locator("#text")).to_have_value("first line\nsecond line")
    page.keyboard.press("Enter")
    answered(page)
    page.locator("#tab-chat").focus()
    for key, tab in (("ArrowRight", "compare"), ("ArrowRight", "server"), ("ArrowRight", "chat"), ("End", "server")):
        page.keyboard.press(key)
        expect(page.locator(f"#tab-{tab}")).to_be_focused()
        expect(page.locator(f"#{tab}")).to_be_visible()
    page.keyboard.press("Home")
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.dataset.i18nTitle || ''"))
        if seen[-1] == "send":
            break
    wanted = [
        "model",
        "language",
        "theme",
        "system",
        "field-max_tokens",
        "turns",
        "turn.edit",
        "turn.again",
        "turn.request",
        "text",
        "attach-file",
        "toggle-settings",
        "send",
    ]
    assert [name for name in seen if name in wanted] == wanted
    page.click("#tab-server")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    expect(page.locator("#server")).to_be_visible()
    page.goto("/#compare")
    expect(page.locator("#tab-compare")).to_have_attribute("aria-selected", "true")


def test_everything_has_a_name(page: Page) -> None:
    nameless = page.evaluate("""() => {
        const named = (node) => node.getAttribute('aria-label') || node.getAttribute('aria-labelledby') ||
            node.labels?.length || node.textContent.trim() || ['status', 'alert'].includes(node.getAttribute('role'));
        return [...document.querySelectorAll('button, input, select, textarea, [role]')].filter((node) => !named(node))
            .map((node) => node.outerHTML);
    }""")
    assert nameless == []
    assert page.locator("h1").count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


def test_two_languages(open_page: OpenPage) -> None:
    page = open_page(locale="zh-CN")
    expect(page.locator("#tab-chat")).to_have_text("对话")
    expect(page.locator("html")).to_have_attribute("lang", "zh-Hans")
    expect(page.locator("#text")).to_have_attribute("placeholder", "输入消息")
    answer_with(page, events("好。"))
    say(page, "你好")
    expect(answered(page).locator("[data-stat=tokens]")).to_have_text("3 + 1 个词元")
    page.click("#language")
    expect(page.locator("#tab-chat")).to_have_text("Chat")
    expect(page.locator("[data-stat=tokens]")).to_have_text("3 + 1 tokens")
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send (Enter)")
    page.reload()
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.locator("#tab-chat")).to_have_text("Chat")


def test_light_and_dark(open_page: OpenPage) -> None:
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.slice(4))"
    page = open_page(color_scheme="dark")
    assert page.evaluate(brightness) < 60
    page.click("#theme")
    assert page.evaluate(brightness) > 200
    page.reload()
    assert page.evaluate(brightness) > 200
    page.click("#theme")
    assert page.evaluate(brightness) < 60


def test_a_narrow_screen(open_page: OpenPage) -> None:
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    expect(page.locator("#send")).to_be_enabled()
    answer_with(page, events("word " * 60, "\n\n```\n" + "x" * 300 + "\n```\n\n" + "y" * 300))
    say(page, "z" * 200)
    answered(page)
    for tab in ("chat", "compare", "server"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") == 360, tab
    page.click("#tab-chat")
    expect(page.locator("#send")).to_be_in_viewport(ratio=1)
    expect(page.locator("#settings")).to_be_hidden()
    page.click("#toggle-settings")
    expect(page.locator("#system")).to_be_focused()
    expect(page.locator("#text")).to_be_in_viewport(ratio=1)


def test_embeddings_as_a_table_with_bars(page: Page, files: Path) -> None:
    page.click("#tab-compare")
    page.click("#compare-run")
    cells = page.locator(".bars tbody td")
    expect(cells).to_have_count(9)
    for place in (0, 4, 8):
        expect(cells.nth(place).locator(".value")).to_have_text("1.000")
    expect(page.locator("#compare-result .stats")).to_contain_text("dimensions")
    width = cells.nth(0).locator(".length").evaluate("node => node.style.width")
    assert width == "100%"
    page.set_input_files("#compare-file", files / "it's a dot.png")
    page.fill("#items textarea >> nth=1", "A red dot.")
    page.click("#compare-run")
    expect(page.locator(".bars tbody td")).to_have_count(16)
    expect(page.locator(".bars tbody img")).to_have_js_property("naturalWidth", 96)
    page.check("[name=how][value=score]")
    page.click("#compare-run")
    expect(page.locator(".bars tbody td")).to_have_count(3)
    shown = [float(text) for text in page.locator(".bars tbody .value").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    page.click("#compare-result button")
    page.click("#request-python")
    printed = run(page.locator("#request-code").inner_text(), files)
    assert max(row["score"] for row in ast.literal_eval(printed)["data"]) == pytest.approx(shown[0], abs=1e-2)


@pytest.mark.parametrize(("tasks", "chats", "compares"), [(["generate"], True, False), (["embed"], False, True)])
def test_what_the_model_cannot_do_is_said(open_page: OpenPage, tasks: list[str], chats: bool, compares: bool) -> None:
    page = open_page(prepare=lambda page: change_models(page, tasks=tasks))
    expect(page.locator("#model")).to_have_value("demo")
    assert page.locator("#send").is_enabled() == chats
    assert page.locator("#notice").is_hidden() == chats
    page.click("#tab-compare")
    assert page.locator("#compare-run").is_enabled() == compares
    if not compares:
        expect(page.locator("#compare-notice")).to_have_text("demo makes no embeddings or scores on this server.")


def test_the_server_tab_lives(page: Page) -> None:
    say(page, "hello")
    answered(page)
    page.click("#tab-server")
    expect(page.locator("[data-fact='fact.version'] dd")).to_have_text(re.compile(r"^\d+\.\d+"))
    expect(page.locator("[data-fact='fact.weights'] dd")).to_have_text(re.compile(r"^[\d.]+ .B$"))
    expect(page.locator("[data-fact='fact.state'] dd")).to_have_text("ready")
    expect(page.locator("#models tbody tr")).to_have_count(2)
    page.evaluate("""() => fetch('v1/chat/completions', {method: 'POST', headers: {
        'Content-Type': 'application/json', Authorization: 'Bearer ' + sessionStorage.getItem('sensorium-key')},
        body: JSON.stringify({messages: [{role: 'user', content: 'hi'}], max_tokens: 16, ignore_eos: true})})""")
    expect(page.locator("#plots .plot")).to_have_count(6)
    for plot in (0, 3, 4):  # tokens generated, time to the first, time between
        expect(page.locator("#plots .plot").nth(plot).locator("polyline").first).to_be_attached()
        expect(page.locator("#plots .plot").nth(plot).locator("svg")).to_have_attribute("aria-label", re.compile(r"\d"))
    expect(page.locator("#memory-plot svg")).to_have_attribute("aria-label", re.compile(r"Memory by model: \d"))


def test_models_are_loaded_and_unloaded_by_hand(open_page: OpenPage) -> None:
    rows = [
        {"id": name, "root": name, "state": state, "tasks": ["generate"], "modalities": ["text"], "max_model_len": 64}
        for name, state in (("one", "ready"), ("two", "unloaded"), ("three", "failed"))
    ]
    rows[0]["memory"] = {"weights": 1, "kv_cache": 2, "resident": 300_000_000}
    asked: list[dict[str, str]] = []

    def do(route: Route) -> None:
        body: Any = route.request.post_data_json
        asked.append({**body, "path": route.request.url.rpartition("/")[2]})
        if body["model"] == "three":
            route.fulfill(status=503, json={"error": {"message": "The model 'three' cannot be loaded: no weights"}})
            return
        row = next(row for row in rows if row["id"] == body["model"])
        row["state"] = "ready" if asked[-1]["path"] == "load" else "unloaded"
        route.fulfill(json=row)

    def prepare(page: Page) -> None:
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": rows}))
        page.route("**/v1/models/*load", do)

    page = open_page(prepare=prepare)
    page.click("#tab-server")
    cells = {name: page.locator(f"#models [data-model='{name}'] td") for name in ("one", "two", "three")}
    expect(cells["one"].nth(1)).to_have_text("300.0 MB")
    expect(cells["two"].nth(0)).to_have_text("not loaded")
    page.click("#models [data-model='two'] button")
    expect(cells["two"].nth(0)).to_have_text("ready")
    page.click("#models [data-model='one'] button")
    expect(cells["one"].nth(0)).to_have_text("not loaded")
    page.click("#models [data-model='three'] button")
    expect(page.locator("#models-notice")).to_have_text("The model 'three' cannot be loaded: no weights")
    assert [(one["path"], one["model"]) for one in asked] == [("load", "two"), ("unload", "one"), ("load", "three")]


def run(code: str, folder: Path, *command: str) -> str:
    """What a snippet prints, run where the files are and with the key where it looks for it."""
    done = subprocess.run(
        [*(command or (sys.executable, "-c")), code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "SENSORIUM_API_KEY": KEY},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_request_as_code_runs(open_page: OpenPage, files: Path, language: str) -> None:
    if language == "curl" and not shutil.which("curl"):
        pytest.skip("no curl on this machine")
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    expect(page.locator("#send")).to_be_enabled()
    page.fill("[name=max_tokens]", "4")
    page.fill("[name=top_k]", "3")
    page.fill("#system", 'Costs $5 `or` \\ more; "it\'s"\nJSON\n你好')
    page.set_input_files("#file", files / "it's a dot.png")
    say(page, "What $HOME?")
    turn = answered(page)
    press(turn, "request")
    page.click(f"#request-{language}")
    page.click("#request-copy")
    expect(page.locator("#request-copy")).to_have_text("Copied")
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == page.locator("#request-code").inner_text()
    assert KEY not in code
    assert len(code) < 3000
    printed = run(code, files, *(("bash", "-c") if language == "curl" else ()))
    if language == "curl":
        usage = re.search(r'"prompt_tokens":(\d+)', printed)
        assert usage, printed
        shown = turn.locator("[data-stat=tokens]").inner_text()
        assert usage[1] == shown.split()[0]  # the very same prompt, image and all


def test_events_however_they_are_cut(page: Page) -> None:
    text = "data: a\n\n: comment\n\ndata:b\r\n\r\ndata: 你\ndata: 好\n\nevent: x\ndata: last\n\ndata: unfinished"
    for size in (1, 2, 3, 7, 1000):
        found = page.evaluate(
            """async ([text, size]) => {
            const {events} = await import('/playground/sse.js');
            const bytes = new TextEncoder().encode(text);
            const body = new ReadableStream({start(controller) {
                for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                controller.close();
            }});
            const found = [];
            for await (const data of events(body)) found.push(data);
            return found;
        }""",
            [text, size],
        )
        assert found == ["a", "b", "你\n好", "last"], size


def test_metrics_are_read_with_their_labels(page: Page) -> None:
    found = page.evaluate(r"""async () => {
        const {parse, Reading} = await import('/playground/metrics.js');
        const page = (count, sum, low) => parse(String.raw`# HELP x y
x_total{model_name="a\"b\\c",engine="0"} ${count}
t_bucket{model_name="a\"b\\c",le="0.5"} ${low}
t_bucket{model_name="a\"b\\c",le="+Inf"} ${count}
t_sum{model_name="a\"b\\c"} ${sum}
t_count{model_name="a\"b\\c"} ${count}
x_total{model_name="other"} 1e6
plain 3`);
        const then = new Reading(page(2, 1, 2), 'a"b\\c', 1000);
        const now = new Reading(page(6, 3, 6), 'a"b\\c', 3000);
        return [now.rate('x_total', then), now.mean('t', then), now.quantile('t', 0.95, then), now.mean('t', now),
                now.value('nothing')].map(String);
    }""")
    assert found == ["2", "0.5", "0.5", "NaN", "NaN"]


def test_growing_text_is_shown_as_its_whole(page: Page) -> None:
    text = (
        "# Title\n\nA **bold** `word`\nand more\n\n```py\nx = '<b>'\n\ny = 2\n```\n\n1. one\n2. two\n\n"
        "* not ** closed\n\n```\nopen"
    )
    grown, whole, nodes = page.evaluate(
        """async (text) => {
        const {renderInto} = await import('/playground/render.js');
        const [grown, whole] = [document.createElement('div'), document.createElement('div')];
        for (let end = 1; end <= text.length; end++) renderInto(grown, text.slice(0, end));
        renderInto(whole, text);
        return [grown, whole].map((node) => node.textContent).concat([[...whole.children].map((node) => node.tagName)]);
    }""",
        text,
    )
    assert grown == whole
    assert nodes == ["P", "P", "DIV", "OL", "UL", "DIV"]
