"""Tool calls, structured output and reasoning in the playground: set up, shown while they come, and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from support.browser_support import CHAT, MARKUP, Requests, answer_with, answered, events, press, say

HOLD = """() => {
    const real = window.fetch;
    const encoder = new TextEncoder();
    window.fetch = (path, options) => {
        if (!String(path).endsWith('chat/completions')) return real(path, options);
        window.asked = [...(window.asked ?? []), JSON.parse(options.body)];
        const body = new ReadableStream({start(controller) {
            window.feed = (text) => controller.enqueue(encoder.encode(text));
            window.end = () => controller.close();
            options.signal?.addEventListener('abort', () => controller.error(new DOMException('', 'AbortError')));
        }});
        return Promise.resolve(new Response(body, {headers: {'Content-Type': 'text/event-stream'}}));
    };
}"""
"""Answers chats from `feed` and `end`; what was sent is in `asked`."""

FEED = """async (text) => {
    for (let tries = 0; !window.feed && tries < 500; tries++) await new Promise((go) => setTimeout(go, 20));
    window.feed(text);
}"""


def feed(page: Page, *deltas: dict[str, Any], finish: str | None = None) -> None:
    """Lets these deltas come, and the end of the stream if there is a `finish`."""
    choices: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    if finish:
        choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    chunks = [json.dumps({"choices": [choice], "usage": usage}) for choice in choices]
    page.evaluate(FEED, "".join(f"data: {chunk}\n\n" for chunk in chunks))
    if finish:
        page.evaluate("() => { window.feed('data: [DONE]\\n\\n'); window.end(); window.feed = null; }")


def call(index: int, name: str, call_id: str) -> dict[str, Any]:
    function = {"name": name, "arguments": ""}
    return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}


def arguments(index: int, text: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def test_tool_calls_are_shown_as_they_come_and_answered(page: Page) -> None:
    page.evaluate(HOLD)
    page.click("#example-tools")
    page.select_option("[name=tool_choice]", "auto")
    say(page, "How is the weather in Bonn and Ulm?")
    feed(page, {"role": "assistant", "content": ""}, call(0, "get_weather", "call_a"), arguments(0, '{"city": "Bo'))
    turn = page.locator(".turn").first
    expect(turn.locator(".call .name")).to_have_text("get_weather")
    expect(turn.locator(".call pre")).to_have_text('{"city": "Bo')
    assert turn.locator("[data-i18n='call.send']").is_hidden()
    feed(page, arguments(0, 'nn"}'), call(1, MARKUP, "call_b"), arguments(1, MARKUP), finish="tool_calls")
    expect(turn.locator(".call pre")).to_have_text(['{"city": "Bonn"}', MARKUP])
    expect(turn.locator(".call .name").last).to_have_text(MARKUP)
    expect(page.locator("#announcer")).to_have_text(f"The model calls tools: get_weather, {MARKUP}.")
    turn.locator(".call textarea").first.fill("12 degrees")
    turn.locator("[data-i18n='call.send']").click()
    feed(page, {"content": "It is mild."}, finish="stop")
    expect(answered(page, 2).locator(".answer > .text")).to_have_text("It is mild.")
    first, second = page.evaluate("window.asked")
    assert first["tools"][0]["function"]["name"] == "get_weather"
    assert first["tool_choice"] == second["tool_choice"] == "auto"
    made = [("call_a", "get_weather", '{"city": "Bonn"}'), ("call_b", MARKUP, MARKUP)]
    assert second["messages"] == [
        *first["messages"],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}
                for call_id, name, given in made
            ],
        },
        {"role": "tool", "content": "12 degrees", "tool_call_id": "call_a"},
        {"role": "tool", "content": "", "tool_call_id": "call_b"},
    ]
    say(page, "Thanks.")
    feed(page, {"content": "Welcome."}, finish="stop")
    answered(page, 3)
    roles = [message["role"] for message in page.evaluate("window.asked.at(-1).messages")]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user"]
    turn.locator(".call textarea").first.fill("30 degrees")  # other results: what came after the first ones is gone
    page.fill("[name=top_k]", "few")
    turn.locator("[data-i18n='call.send']").click()
    expect(page.locator("#field-top_k-error")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(3)  # nothing was sent, nothing is gone
    page.fill("[name=top_k]", "")
    turn.locator("[data-i18n='call.send']").click()
    feed(page, {"content": "It is hot."}, finish="stop")
    answered(page, 2)
    expect(page.locator(".turn")).to_have_count(2)
    assert page.evaluate("window.asked.at(-1).messages[2].content") == "30 degrees"
    assert page.locator(".turn img").count() == 0  # what a model calls is text


def test_calls_without_results_are_not_told_again(page: Page) -> None:
    page.evaluate(HOLD)
    for number, finish in enumerate(("length", "tool_calls"), 1):
        say(page, "one")
        feed(page, {"content": "Let me look."}, call(0, "look", "call_a"), arguments(0, '{"a'), finish=finish)
        turn = answered(page, number)
        assert turn.locator("[data-i18n='call.send']").is_visible() == (finish == "tool_calls")
    say(page, "two")
    feed(page, {"content": "Yes."}, finish="stop")
    answered(page, 3)
    said = {"role": "assistant", "content": "Let me look."}
    asked = {"role": "user", "content": "one"}
    assert page.evaluate("window.asked.at(-1).messages") == [
        asked,
        said,
        asked,
        said,
        {"role": "user", "content": "two"},
    ]


def test_reasoning_is_open_until_the_answer_begins(page: Page) -> None:
    page.evaluate(HOLD)
    page.select_option("[name=reasoning_effort]", "low")
    say(page, "2 + 3?")
    block = page.locator(".turn .reasoning")
    feed(page, {"role": "assistant", "content": ""}, {"reasoning": "Two and ", "reasoning_content": "Two and "})
    expect(block.locator(".text")).to_be_visible()
    feed(page, {"reasoning": "three.", "reasoning_content": "three."})
    expect(block.locator(".text")).to_have_text("Two and three.")
    feed(page, {"content": "It is "})
    expect(page.locator(".answer > .text")).to_have_text("It is")
    expect(block.locator(".text")).to_be_hidden()
    block.locator("summary").click()
    feed(page, {"content": "5."}, finish="stop")
    expect(answered(page).locator(".answer > .text")).to_have_text("It is 5.")
    expect(block.locator(".text")).to_be_visible()  # whoever opened it is still reading
    say(page, "Sure?")
    feed(page, {"content": "Yes."}, finish="stop")
    expect(answered(page, 2).locator(".reasoning")).to_be_hidden()
    body = page.evaluate("window.asked.at(-1)")
    assert body["reasoning_effort"] == "low"
    assert body["messages"][1] == {"role": "assistant", "content": "It is 5.", "reasoning": "Two and three."}


def test_answers_in_json(page: Page, requests: Requests) -> None:
    assert page.locator("[name=schema]").is_hidden()
    page.fill("[name=max_tokens]", "400")  # white space counts
    page.select_option("[name=response_format]", "json_schema")
    schema: dict[str, Any] = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    page.fill("[name=schema]", json.dumps(schema))
    say(page, "Is a circle round?")
    shown = answered(page).locator(".answer > .text pre code")
    assert set(json.loads(shown.inner_text())) == {"ok"}
    assert requests.last["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema},
    }
    page.fill("[name=schema]", '{"type": "no such type"}')
    say(page, "And now?")
    expect(page.locator("#field-schema-error")).to_contain_text("type")
    page.select_option("[name=response_format]", "json_object")
    answer_with(page, events('{"a": "**b**"}'))
    say(page, "Anything.")
    expect(answered(page, 3).locator("pre code")).to_have_text('{"a": "**b**"}')
    assert requests.last["response_format"] == {"type": "json_object"}


def test_wrong_tools_are_told_at_their_field(page: Page, requests: Requests) -> None:
    page.select_option("[name=response_format]", "json_schema")
    page.select_option("[name=tool_choice]", "required")
    for name, value, words in (
        ("tools", '[{"type": "function"', "This must be JSON"),
        ("tools", '{"type": "function"}', "This must be a list of tools"),
        ("schema", "[]", "This must be a JSON object."),
        ("schema", "{'type': 'object'}", "This must be JSON"),
    ):
        before = page.input_value(f"[name={name}]")
        page.fill(f"[name={name}]", value)
        say(page, "hello")
        expect(page.locator(f"#field-{name}-error")).to_contain_text(words)
        expect(page.locator(f"[name={name}]")).to_have_attribute("aria-invalid", "true")
        expect(page.locator("#text")).to_have_value("hello")
        page.fill(f"[name={name}]", before)
    assert requests.bodies == []
    page.click("#settings [type=reset]")
    expect(page.locator("[name=schema]")).to_be_hidden()
    page.select_option("[name=tool_choice]", "required")
    answer_with(page, events("Hello."))
    page.press("#text", "Enter")
    answered(page)
    assert not {"tools", "tool_choice", "response_format"} & requests.last.keys()
    page.unroute(CHAT)
    refusal = {"message": "The model has no format for tool calls.", "param": "tools", "code": "unsupported_field"}
    answer_with(page, json.dumps({"error": {**refusal, "type": "invalid_request_error"}}), status=400)
    page.click("#example-tools")
    say(page, "Call something.")
    expect(page.locator(".turn .error").last).to_contain_text(refusal["message"])
    expect(page.locator("#field-tools-error")).to_have_text(refusal["message"])
    press(page.locator(".turn").last, "edit")
    expect(page.locator("#text")).to_have_value("Call something.")


PYTHON_CLIENT = """
import json
from types import SimpleNamespace as Part

class OpenAI:
    def __init__(self, *, base_url, api_key):
        self.chat = Part(completions=self)

    def create(self, extra_body=None, **body):
        print(json.dumps({**body, **(extra_body or {})}))
        pieces = (("get_weather", None), (None, '{"a":'), (None, "1}"))
        calls = [Part(function=Part(name=name, arguments=piece)) for name, piece in pieces]
        for fields in ({"reasoning": "Hm."}, {"content": "Yes."}, *({"tool_calls": [call]} for call in calls)):
            delta = Part(**{"content": None, "tool_calls": None, **fields})
            yield Part(choices=[Part(delta=delta)])
        yield Part(choices=[])
"""
JAVASCRIPT_CLIENT = """
export default class {
    chat = {completions: {create: async (body) => {
        console.log(JSON.stringify(body));
        const calls = [{name: "get_weather"}, {arguments: '{"a":'}, {arguments: "1}"}];
        const deltas = [{reasoning: "Hm."}, {content: "Yes."},
                        ...calls.map((called) => ({tool_calls: [{function: called}]}))];
        return [...deltas.map((delta) => ({choices: [{delta}]})), {choices: []}];
    }}};
}
"""
"""Stand for OpenAI's clients: print what they are given, and answer with reasoning, text and a call."""


def run_code(language: str, code: str, tmp_path: Path, files: Path) -> str:
    """What code prints whose client stands in `tmp_path`, run where the files are."""
    if language == "curl":
        command = ["bash", "-c", f"curl() {{ cat; }}\n{code}"]
    elif language == "python":
        (tmp_path / "openai.py").write_text(PYTHON_CLIENT)
        command = [sys.executable, "-c", code]
    else:
        package = tmp_path / "node_modules" / "openai"
        package.mkdir(parents=True)
        (package / "package.json").write_text('{"name": "openai", "type": "module", "main": "index.js"}')
        (package / "index.js").write_text(JAVASCRIPT_CLIENT)
        (tmp_path / "code.mjs").write_text(code)
        command = ["node", str(tmp_path / "code.mjs")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=files, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("language", ["curl", "python", "javascript"])
def test_the_code_of_a_request_says_the_same(page: Page, files: Path, tmp_path: Path, language: str) -> None:
    if language == "javascript" and not shutil.which("node"):
        pytest.skip("no node on this machine")
    page.evaluate(HOLD)
    page.click("#example-tools")
    page.select_option("[name=response_format]", "json_schema")
    page.fill(
        "[name=schema]", '{"$defs": {"n": {"const": null}}, "properties": {"a": {"$ref": "#/$defs/n"}, "b": true}}'
    )
    page.select_option("[name=reasoning_effort]", "low")
    page.fill("[name=top_k]", "3")
    page.set_input_files("#file", files / "it's a dot.png")
    expect(page.locator("#tray img")).to_be_visible()
    say(page, "How is the weather there?")
    feed(page, {"reasoning": "It's `red`."}, call(0, "get_weather", "call_a"), arguments(0, '{"city": "$HOME\\n"}'))
    feed(page, finish="tool_calls")
    page.locator(".call textarea").fill('{"sun": true}\nEOF')
    page.click("[data-i18n='call.send']")
    feed(page, {"content": "{}"}, finish="stop")
    press(answered(page, 2), "request")
    page.click(f"#request-{language}")
    printed = run_code(language, page.locator("#request-code").inner_text(), tmp_path, files)
    sent = page.evaluate("window.asked.at(-1)")
    del sent["stream_options"]["continuous_usage_stats"]  # the page's own
    body, end = json.JSONDecoder().raw_decode(printed)
    assert body == sent
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "tool"]
    if language != "curl":
        assert printed[end:].split() == ["Hm.Yes.", "get_weather", '{"a":1}']
