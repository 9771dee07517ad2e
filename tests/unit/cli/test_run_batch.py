"""A file of requests: every line has one answer, whatever is refused, wrong, or killed on the way."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.api_support import FakeEngine, make_model, serving, speak
from support.scripted import prompt_of

from sensorium.api.transport.multipart import FormReader
from sensorium.api.transport.server import build_app
from sensorium.cli import batch as batch_module
from sensorium.cli.batch import Ask, Batch
from sensorium.cli.batch_lines import InputFile, Journal
from sensorium.cli.client import Answer, Endpoint, Remote, RemoteError, UnreachableError
from sensorium.cli.in_process import AppCaller
from sensorium.cli.main import main
from sensorium.config import Limits, ServerConfig
from sensorium.errors import StartupError
from sensorium.serving.catalog import Catalog
from sensorium.types import EngineOutput, EngineRequest

CHAT = "/v1/chat/completions"


def chat_line(name: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": name}], "max_tokens": 30, **fields}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


class Files:
    """One batch's files, in a folder."""

    def __init__(self, folder: Path, *lines: Any) -> None:
        self.input = write(folder / "in.jsonl", *lines)
        self.journal = folder / "out.jsonl.journal"
        self.output = folder / "out.jsonl"

    async def answer(self, ask: Ask, *, most: int = 8, finish: bool = True) -> Batch:
        lines = InputFile(self.input)
        journal = Journal(self.journal, {"input": lines.digest}, len(lines))
        try:
            batch = Batch(lines, journal, ask, fetched, most=most)
            await batch.run(lambda **_: None)
            if finish:
                journal.write_output(self.output)
            return batch
        finally:
            journal.close()

    def answers(self) -> list[dict[str, Any]]:
        return answers_of(self.output)


def answers_of(path: Path) -> list[dict[str, Any]]:
    """Without what differs at every run: ids and times of the answers themselves."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for one in found:
        body = (one["response"] or {}).get("body")
        if isinstance(body, dict):
            body.pop("id", None)
            body.pop("created", None)
    return found


async def fetched(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


class Server:
    """An `Ask` that answers by what it is told; `asked` counts the custom ids."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.asked: Counter[str] = Counter()
        self.poison = ""
        self.in_flight = self.refusals = 0

    async def __call__(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        name = json.loads(body)["messages"][0]["content"]
        self.asked[name] += 1
        self.in_flight += 1
        await asyncio.sleep(0)
        try:
            if self.in_flight > self.most or name == self.poison:
                self.refusals += 1
                return Answer(503, {b"content-type": b"application/json"}, b'{"error": {"code": "overloaded"}}')
        finally:
            self.in_flight -= 1
        said = json.dumps({"said": name, "usage": {"completion_tokens": 2}}, indent=2).encode()
        return Answer(200, {b"content-type": b"application/json; charset=utf-8", b"x-request-id": b"theirs"}, said)


async def test_every_line_has_an_answer_in_openais_form(tmp_path: Path) -> None:
    lines = [
        chat_line("slow"),
        chat_line("wrong", max_tokens=-1),
        "no JSON",
        "",
        chat_line("streamed", stream=True),
        chat_line("slow"),
        {"custom_id": "nowhere", "url": "/v1/nothing", "body": {}},
        {"custom_id": "got", "method": "GET", "url": CHAT, "body": {}},
        {"custom_id": "list", "method": "POST", "url": CHAT, "body": []},
        {"custom_id": 3, "method": "POST", "url": CHAT, "body": {}},
        chat_line("last"),
    ]

    async def script(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        async for output in speak(request, delay_s=0.002 if "slow" in prompt_of(request) else 0.0):
            yield output

    engine, server, limits = FakeEngine(script=script), ServerConfig(), Limits()
    model = make_model(engine, server, limits)
    files = Files(tmp_path, *lines)
    batch = await files.answer(AppCaller(build_app(Catalog.of({"tiny": model}), server, limits)))
    await model.aclose()
    found = files.answers()
    assert [one["custom_id"] for one in found] == [
        *("slow", "wrong", None, "streamed", "slow", "nowhere", "got", "list", None, "last")
    ]
    assert all(set(one) == {"id", "custom_id", "response", "error"} for one in found)
    assert len({one["id"] for one in found}) == len(found)
    statuses = [one["response"]["status_code"] if one["response"] else one["error"]["code"] for one in found]
    assert statuses == [
        *(200, 400, "invalid_line", "stream", "duplicate_custom_id", 404),
        *("invalid_method", "invalid_body", "invalid_line", 200),
    ]
    assert "Grüße" in found[0]["response"]["body"]["choices"][0]["message"]["content"]
    assert found[0]["response"]["request_id"] == found[0]["id"]
    assert found[1]["response"]["body"]["error"]["param"] == "max_tokens"
    used = [one["response"]["body"]["usage"]["completion_tokens"] for one in (found[0], found[9])]
    assert (batch.failed, batch.tokens) == (8, sum(used))
    assert not files.journal.exists()
    assert not engine.active  # the stream that nobody read was ended


async def test_a_killed_batch_goes_on_wherever_its_journal_ends(tmp_path: Path) -> None:
    names = [f"line {number} 🙂" for number in range(30)]
    files = Files(tmp_path, *map(chat_line, names))
    await files.answer(Server(), finish=False)
    whole = files.journal.read_bytes()
    await files.answer(undisturbed := Server())
    expected = files.answers()
    assert not undisturbed.asked  # all of it was in the journal
    chance = random.Random(7)
    for size in (0, 1, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(20))):
        # A power failure may leave anything behind what was written.
        files.journal.write_bytes(whole[:size] + chance.choice((b"", b"\0" * 50, b"\0\n7 {}\n")))
        kept = max(whole[:size].count(b"\n") - 1, 0)
        await files.answer(server := Server())
        assert files.answers() == expected
        assert set(server.asked.values()) <= {1}
        assert len(server.asked) == len(names) - kept


async def test_kill_9(tmp_path: Path) -> None:
    """A process that is killed while answers come, twice; the third is let finish."""
    engine = FakeEngine(script=lambda request: speak(request, delay_s=0.002, chunk=8))
    files = Files(tmp_path, *(chat_line(f"number {number}") for number in range(40)))
    async with serving(engine) as served:
        command = ["-m", "sensorium", "run-batch", "-i", str(files.input), "-o", str(files.output)]
        command += ["--url", served.url, "--concurrency", "4"]
        chance = random.Random(3)
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(sys.executable, *command)
            enough = len(engine.requests) + chance.randrange(5, 12)
            while len(engine.requests) < enough:
                await asyncio.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL
        journaled = files.journal.read_bytes().count(b"\n") - 1
        before = len(engine.requests)
        assert await (await asyncio.create_subprocess_exec(sys.executable, *command)).wait() == 0
        assert 0 < journaled == 40 - (len(engine.requests) - before)
        killed = files.answers()
        async with Remote(Endpoint.parse(served.url)) as remote:
            await files.answer(remote.ask)
    assert killed == files.answers()
    assert {one["response"]["status_code"] for one in killed} == {200}


async def test_refusals_make_the_batch_slower_not_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "LONGEST_WAIT_S", 0.0)
    files = Files(tmp_path, *(chat_line(str(number)) for number in range(200)))
    server = Server(most=5)
    server.poison = "17"
    batch = await files.answer(server, most=64)
    found = files.answers()
    assert [one["custom_id"] for one in found if one["response"]["status_code"] != 200] == ["17"]
    assert found[17]["response"]["body"] == {"error": {"code": "overloaded"}}
    assert found[16]["response"] == {
        "status_code": 200,
        "request_id": "theirs",
        "body": {"said": "16", "usage": {"completion_tokens": 2}},
    }
    assert batch.failed == 1
    assert server.refusals > 10


async def test_a_server_that_is_gone_ends_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "LONGEST_WAIT_S", 0.0)
    files = Files(tmp_path, *(chat_line(str(number)) for number in range(20)))
    server = Server()

    async def dies(path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        if server.asked.total() >= 10:
            raise UnreachableError("cannot connect to it")
        return await server(path, headers, body)

    with pytest.raises(StartupError, match="cannot connect to it; what is answered is kept"):
        await files.answer(dies)
    await files.answer(server)
    assert set(server.asked.values()) == {1}

    async def breaks_off(path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        if b'"3"' in body:
            raise RemoteError("the connection closed")
        return await server(path, headers, body)

    await files.answer(breaks_off)
    assert files.answers()[3]["error"] == {"code": "no_answer", "message": "the connection closed."}


async def test_recordings_become_forms(tmp_path: Path) -> None:
    body = {
        "model": "ears",
        "file_url": "data:audio/wav;base64," + base64.b64encode(b"RIFF\r\n--x").decode(),
        "timestamp_granularities": ["word", "segment"],
        "temperature": 0.5,
        "stream": False,
        "prompt": None,
    }
    lines = [{"custom_id": "a", "url": "/v1/audio/transcriptions", "body": body}]
    lines.append({"custom_id": "b", "url": "/v1/audio/transcriptions", "body": {"model": "ears"}})
    lines.append({"custom_id": "c", "url": "/v1/audio/translations", "body": {**body, 'a"\r\n': "x"}})

    async def ask(path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        reader = FormReader(headers["Content-Type"].partition("boundary=")[2].encode(), "file")
        reader.feed(body)
        form = reader.finish()
        assert form.file == b"RIFF\r\n--x"
        return Answer(200, {b"content-type": b"text/plain"}, json.dumps(form.fields).encode())

    files = Files(tmp_path, *lines)
    await files.answer(ask)
    first, second, third = files.answers()
    assert json.loads(first["response"]["body"]) == {
        "model": ["ears"],
        "timestamp_granularities[]": ["word", "segment"],
        "temperature": ["0.5"],
        "stream": ["false"],
    }
    assert second["error"]["code"] == "missing_required_parameter"
    assert third["error"]["code"] == "invalid_value"


def test_what_stands_in_the_way_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = Files(tmp_path, chat_line("a"))
    words = ["run-batch", "-i", str(files.input), "-o", str(files.output), "--url", "http://127.0.0.1:1"]

    def said(*argv: str) -> str:
        assert main(argv) == 2
        line: str = capsys.readouterr().err.strip()
        assert "\n" not in line
        return line

    files.output.write_text("")
    assert "exists: name another one" in said(*words)
    files.output.unlink()
    files.journal.write_text('{"input":"other"}\n')
    assert "is the journal of another input or model" in said(*words)
    files.journal.unlink()
    lines = InputFile(files.input)
    held = Journal(files.journal, {}, len(lines))
    assert "Another run-batch is writing" in said(*words)
    held.close()
    assert "No such file" in said("run-batch", "-i", "nowhere", *words[3:])
    assert "cannot be fetched" in said("run-batch", "-i", "http://127.0.0.1:1/in.jsonl", *words[3:])


def test_a_model_is_loaded_for_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The whole command, with the built-in model in an engine of its own."""
    lines = [chat_line("hi", temperature=0), {"custom_id": "v", "url": "/v1/embeddings", "body": {"input": "red"}}]
    files = Files(tmp_path, *lines)
    words = ["run-batch", "-i", str(files.input), "-o", str(files.output), "--kv-cache-memory", "32MiB"]
    assert main([*words, "--api-key", "not asked for", "--threads", "1"]) == 0
    chat, vector = (one["response"]["body"] for one in files.answers())
    assert chat["choices"][0]["message"]["content"]
    assert len(vector["data"][0]["embedding"]) > 100
    assert "2 lines in" in caplog.text
