"""Chatting in the playground: text and media in, a streamed answer out, and what goes wrong on the way."""

from __future__ import annotations

import base64
import io
import json
import re
import wave
from collections.abc import Callable
from pathlib import Path

import httpx
from playwright.sync_api import Page, Route, expect
from support.browser_support import (
    CHAT,
    KEY,
    MARKUP,
    OpenPage,
    Requests,
    answer_with,
    answered,
    change_models,
    events,
    image_bytes,
    press,
    say,
)
from support.server import Server

IMAGE = "data:image/png;base64," + base64.b64encode(image_bytes()).decode()


def test_text_gets_a_streamed_answer_with_its_figures(page: Page, requests: Requests) -> None:
    say(page, "What are you made of, and what can you do for me today?")
    turn = answered(page)
    assert turn.locator(".answer > .text").inner_text().strip()
    expect(turn.locator("[data-stat=tokens]")).to_have_text(re.compile(r"^\d+ \+ \d+ tokens$"))
    expect(turn.locator("[data-stat=first]")).to_have_text(re.compile(r"^first token \d+\.\d\d s$"))
    expect(turn.locator("[data-stat=cached]")).to_have_text(re.compile(r"^\d+ cached$"))
    expect(page.locator("#announcer")).to_have_text(re.compile(r"^The answer is complete: \d+ tokens\.$"))
    assert requests.last["stream"] is True
    press(turn, "again")
    answered(page)
    cached = turn.locator("[data-stat=cached]").inner_text()
    assert int(cached.split()[0]) >= 16  # the same prompt once more
    assert requests.bodies[0]["messages"] == requests.bodies[1]["messages"]
    assert page.locator(".turn").count() == 1


def test_settings_and_history_are_in_the_request(page: Page, requests: Requests) -> None:
    page.fill("#system", "Be brief.")
    for name, value in {"temperature": "0.5", "top_p": "0.9", "top_k": "5", "seed": "7", "stop": "END|STOP"}.items():
        page.fill(f"[name={name}]", value)
    say(page, "one")
    first = answered(page).locator(".answer > .text").evaluate("node => node.textContent")
    say(page, "two")
    answered(page, 2)
    body = requests.last
    assert (body["temperature"], body["top_p"], body["top_k"], body["seed"]) == (0.5, 0.9, 5, 7)
    assert (body["stop"], body["max_tokens"], body["model"]) == (["END", "STOP"], 12, "demo")
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][0]["content"] == "Be brief."
    assert body["messages"][2]["content"].split() == first.split()
    assert "min_p" not in body
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    say(page, "three")
    answered(page)
    assert [message["role"] for message in requests.last["messages"]] == ["system", "user"]


def test_an_image_and_a_video_by_file(page: Page, requests: Requests, files: Path) -> None:
    page.set_input_files("#file", [files / "it's a dot.png", files / "video.mp4"])
    expect(page.locator("#tray img")).to_have_js_property("naturalWidth", 96)
    expect(page.locator("#tray video")).to_be_visible()
    say(page, "What is it?")
    turn = answered(page)
    for kind in ("image", "video"):
        tokens = turn.locator(f"[data-stat={kind}]").inner_text()
        assert int(tokens.split()[0]) > 0
    image, video, words = requests.last["messages"][0]["content"]
    assert image == {"type": "image_url", "image_url": {"url": IMAGE}}
    assert video["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert words == {"type": "text", "text": "What is it?"}
    assert page.locator("#tray").is_hidden()


def test_images_by_drop_paste_and_url(page: Page, requests: Requests, elsewhere: str) -> None:
    drop = page.evaluate_handle(
        """url => {
        const bytes = Uint8Array.from(atob(url.split(',')[1]), (letter) => letter.charCodeAt(0));
        const given = new DataTransfer();
        given.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));
        return given;
    }""",
        IMAGE,
    )
    page.dispatch_event("#chat", "dragover", {"dataTransfer": drop})
    expect(page.locator(".drop")).to_be_visible()
    page.dispatch_event("#chat", "drop", {"dataTransfer": drop})
    expect(page.locator("#tray li")).to_have_count(1)
    expect(page.locator(".drop")).to_be_hidden()
    page.evaluate(
        """given => document.getElementById('text').dispatchEvent(
        new ClipboardEvent('paste', {clipboardData: given, bubbles: true, cancelable: true}))""",
        drop,
    )
    expect(page.locator("#tray li")).to_have_count(2)
    page.click("#attach-url")
    page.fill("#url-field", f"{elsewhere}/it's%20a%20dot.png")
    page.keyboard.press("Enter")
    expect(page.locator("#tray li")).to_have_count(3)
    expect(page.locator("#tray figcaption").last).to_have_text("it's a dot.png")
    page.locator("#tray .remove").first.click()
    say(page, "Alike?")
    answered(page)
    urls = [part["image_url"]["url"] for part in requests.last["messages"][0]["content"][:-1]]
    assert urls == [IMAGE, f"{elsewhere}/it's%20a%20dot.png"]


def test_the_built_in_model_tells_what_it_is_shown(page: Page, files: Path) -> None:
    for number, (name, question, words) in enumerate(
        (
            ("it's a dot.png", "Describe this image.", "red circle"),
            ("video.mp4", "What happens in this video?", "blue square moves to the right"),
            ("beeps.wav", "How many beeps do you hear?", "three"),
        ),
        1,
    ):
        page.set_input_files("#file", files / name)
        expect(page.locator("#tray li")).to_have_count(1)
        say(page, question)
        expect(answered(page, number).locator(".answer > .text")).to_contain_text(re.compile(words, re.I))


def test_camera_and_samples(page: Page, requests: Requests) -> None:
    page.click("#attach-camera")
    expect(page.locator("#camera-view")).to_have_js_property("readyState", 4)
    page.click("#camera-take")
    expect(page.locator("#tray li")).to_have_count(1)
    expect(page.locator("#camera-dialog")).to_be_hidden()
    page.locator("#tray .remove").click()
    page.click("#samples [data-kind=image]")
    answered(page)
    assert requests.last["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_recording_is_sent_as_wav(open_page: OpenPage) -> None:
    def prepare(page: Page) -> None:
        change_models(page, modalities=["text", "audio"])
        answer_with(page, events("A beep."))

    page = open_page(prepare=prepare)
    requests = Requests(page)
    page.click("#attach-microphone")
    expect(page.locator("#attach-microphone")).to_have_class(re.compile("recording"))
    page.wait_for_timeout(600)
    page.click("#attach-microphone")
    expect(page.locator("#tray audio")).to_be_visible()
    assert page.locator("#attach-camera").is_disabled()
    say(page, "What do you hear?")
    answered(page)
    part = requests.last["messages"][0]["content"][0]
    assert (part["type"], part["input_audio"]["format"]) == ("input_audio", "wav")
    with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as audio:
        assert (audio.getnchannels(), audio.getsampwidth(), audio.getframerate()) == (1, 2, 16_000)
        assert 0.2 < audio.getnframes() / 16_000 < 5


def test_what_the_model_does_not_take_is_not_offered(open_page: OpenPage, files: Path) -> None:
    page = open_page(prepare=lambda page: change_models(page, modalities=["text", "image"]))
    expect(page.locator("#attach-camera")).to_be_enabled()
    assert page.locator("#attach-microphone").is_disabled()
    expect(page.locator("#attach-microphone")).to_have_attribute("aria-label", "This model takes no audio")
    page.set_input_files("#file", files / "notes.txt")
    expect(page.locator("#notice")).to_have_text("notes.txt is neither an image, a video nor audio.")
    assert page.locator("#tray").is_hidden()


def test_every_refused_file_is_named(open_page: OpenPage, files: Path, tmp_path: Path) -> None:
    page = open_page(
        prepare=lambda page: change_models(page, modalities=["text", "image"], tasks=["generate", "embed"])
    )
    expect(page.locator("#attach-file")).to_be_enabled()
    image = files / "it's a dot.png"
    page.set_input_files("#file", [files / "notes.txt", files / "video.mp4", image, files / "beeps.wav"])
    expect(page.locator("#notice .line")).to_have_text(
        [
            "notes.txt is neither an image, a video nor audio.",
            "video.mp4: this model does not take this kind of input: video.",
            "beeps.wav: this model does not take this kind of input: audio.",
        ]
    )
    expect(page.locator("#tray figcaption")).to_have_text(["it's a dot.png"])
    gone = tmp_path / "gone.png"
    gone.write_bytes(image_bytes())
    page.evaluate("""() => {
        const read = FileReader.prototype.readAsDataURL;
        FileReader.prototype.readAsDataURL = function (file) {
            if (file.name === 'gone.png') setTimeout(() => this.onerror());
            else read.call(this, file);
        };
    }""")
    page.set_input_files("#file", [gone, image])
    expect(page.locator("#notice .line")).to_have_text(["gone.png cannot be read."])
    expect(page.locator("#tray li")).to_have_count(2)
    page.click("#tab-compare")
    page.set_input_files("#compare-file", [files / "notes.txt", image, files / "beeps.wav"])
    expect(page.locator("#compare-notice .line")).to_have_text(
        [f"{name}: only images and texts can be compared here." for name in ("notes.txt", "beeps.wav")]
    )
    expect(page.locator("#items img")).to_have_count(1)


def test_a_stream_can_be_stopped(page: Page, site: Server) -> None:
    def endless(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        route.continue_(post_data=json.dumps({**body, "min_tokens": 20_000, "max_tokens": 20_000}))

    page.route(CHAT, endless)
    ways: tuple[Callable[[], None], ...] = (lambda: page.click("#stop"), lambda: page.press("#text", "Escape"))
    for number, stop in enumerate(ways, 1):
        say(page, "Tell me a very long story.")
        text = page.locator(".answer > .text").nth(number - 1)
        expect(text).to_have_text(re.compile(r".{40}", re.S))
        assert page.locator("#send").is_hidden()
        stop()
        turn = answered(page, number)
        expect(turn.locator("[data-stat=stopped]")).to_have_text("stopped")
        kept = text.inner_text()
        page.wait_for_timeout(200)
        assert text.inner_text() == kept
        assert page.locator("#send").is_visible()
    metrics = httpx.get(f"{site.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert re.search(r'request_success_total\{[^}]*finished_reason="abort"[^}]*\} [1-9]', metrics)


def test_a_refused_file_shows_its_error_and_field_and_can_be_mended(
    page: Page, requests: Requests, files: Path
) -> None:
    page.set_input_files("#file", [files / "it's a dot.png", files / "broken.png"])
    say(page, "What is it?")
    error = page.locator(".turn .error")
    expect(error).to_contain_text("not in a supported image format")
    expect(error.locator("code")).to_have_text("messages[0].content[1].image_url.url")
    expect(page.locator(".media-item.refused figcaption")).to_have_text("broken.png")
    say(page, "Never mind.")  # what failed is not told again
    answered(page, 2)
    assert requests.last["messages"] == [{"role": "user", "content": "Never mind."}]
    press(page.locator(".turn").first, "edit")
    expect(page.locator("#text")).to_have_value("What is it?")
    assert page.locator(".turn").count() == 0
    page.locator("#tray .remove").last.click()
    page.press("#text", "Enter")
    answered(page)
    assert page.locator(".error:visible").count() == 0


def test_errors_of_settings_stand_at_their_field(page: Page, requests: Requests) -> None:
    page.fill("[name=temperature]", "9")
    say(page, "hello")
    expect(page.locator("#field-temperature-error")).to_contain_text("at most 2")
    expect(page.locator("[name=temperature]")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".turn .error code").last).to_have_text("temperature")
    page.fill("[name=temperature]", "warm")
    assert page.locator("[name=temperature][aria-invalid]").count() == 0
    sent = len(requests.bodies)
    say(page, "again")
    expect(page.locator("#field-temperature-error")).to_have_text("This must be a number.")
    expect(page.locator("#text")).to_have_value("again")
    assert len(requests.bodies) == sent
    page.fill("[name=temperature]", "")
    page.press("#text", "Enter")
    answered(page, 2)


def test_nothing_that_comes_from_outside_is_markup(page: Page, tmp_path: Path) -> None:
    probe = (
        f"{MARKUP} <script>window.hacked=1</script>\n\n```html\n{MARKUP}\n```\n\n- {MARKUP}\n- **<b>x</b>** `<i>y</i>`"
    )
    name = tmp_path / "<img src=x onerror=hacked=1>.png"
    name.write_bytes(image_bytes())
    page.set_input_files("#file", name)
    answer_with(page, events(probe))
    say(page, MARKUP)
    turn = answered(page)
    assert turn.locator("img").count() == 1  # the attached image
    assert turn.locator("script, b, i").count() == 0
    expect(turn.locator("pre code")).to_have_text(MARKUP)
    expect(turn.locator("strong")).to_have_text("<b>x</b>")
    expect(turn.locator(".question > .text")).to_have_text(MARKUP)
    expect(turn.locator("figcaption")).to_have_text(name.name)
    page.unroute(CHAT)
    error = {"message": f"{MARKUP} is wrong", "type": "x", "param": f"messages[0]{MARKUP}", "code": "x"}
    answer_with(page, json.dumps({"error": error}), status=400)
    say(page, "more")
    expect(page.locator(".error").last).to_contain_text(MARKUP)
    expect(page.locator(".error code").last).to_have_text(error["param"])
    page.select_option("#model", MARKUP)
    page.click("#tab-server")
    expect(page.locator("#models tbody th").last).to_have_text(MARKUP)
    assert page.locator("#models img, .error img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_stream_that_breaks_keeps_what_came(page: Page) -> None:
    error = {"message": "The step failed.", "type": "server_error", "param": None, "code": "engine_error"}
    for end, words in ((f"data: {json.dumps({'error': error})}\n\n", "The step failed."), ("", "cut off")):
        answer_with(page, events("Half an", " answer", end=end))
        say(page, "hello")
        expect(page.locator(".error").last).to_contain_text(words)
        expect(page.locator(".answer > .text").last).to_have_text("Half an answer")
        assert page.locator("#send").is_visible()
        page.unroute(CHAT)
