"""The whole program as a user meets it: `sensorium serve` without a model, and the official client's requests."""

from __future__ import annotations

import base64
import io
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from openai import OpenAI
from PIL import Image
from support import server
from support.live import until

from sensorium.system.processes import family

ROOT = Path(__file__).parents[2]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web server on loopback with a duck and a lion, as far as a test can tell."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (120, 80), "green").save(folder / "duck.jpg")
    Image.new("RGB", (90, 140), "orange").save(folder / "lion.png")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    folder = tmp_path_factory.mktemp("server")
    with server.running(folder, "--allowed-media-domains", "127.0.0.1", "--trust-remote-code") as found:
        yield found


@pytest.fixture(scope="module")
def client(demo: server.Server) -> OpenAI:
    return OpenAI(base_url=f"{demo.url}/v1", api_key="EMPTY", max_retries=0)


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def inline(color: str = "red") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


CHATS = ("text", "one picture", "one picture inline", "two pictures")


def content(chat: str, pictures: str) -> Any:
    return {
        "text": "What's the capital of France?",
        "one picture": [text("What's in this image?"), picture(f"{pictures}/duck.jpg")],
        "one picture inline": [text("请描述这张图片"), picture(inline())],
        "two pictures": [
            text("What are the animals in these images?"),
            picture(f"{pictures}/duck.jpg"),
            picture(f"{pictures}/lion.png"),
        ],
    }[chat]


@pytest.mark.parametrize("chat", CHATS)
def test_chats_of_the_tutorials(client: OpenAI, pictures: str, chat: str) -> None:
    request: Any = {
        "model": client.models.list().data[0].id,
        "max_completion_tokens": 16,
        "temperature": 0,
        "messages": [{"role": "user", "content": content(chat, pictures)}],
        "extra_body": {"ignore_eos": True},
    }
    plain = client.chat.completions.create(**request)
    assert plain.choices[0].message.role == "assistant"
    assert plain.choices[0].finish_reason == "length"
    assert plain.usage.completion_tokens == 16
    assert plain.choices[0].message.content
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == plain.choices[0].message.content
    assert chunks[-1].usage.total_tokens == plain.usage.total_tokens


def test_stop_token_ids_of_the_tutorials(client: OpenAI, pictures: str) -> None:
    completion = cast(Any, client).chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content("one picture", pictures)}],
        extra_body={"stop_token_ids": [5, 6]},
        max_tokens=8,
    )
    assert completion.choices[0].finish_reason in ("stop", "length")


def test_old_prefix_serves_too(demo: server.Server, client: OpenAI) -> None:
    other = OpenAI(base_url=f"{demo.url}/api/v1", api_key="dummy_key", max_retries=0)
    model = other.models.list().data[0].id
    stream = cast(Any, other).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [text("Describe the image to me"), picture(inline())]}],
        max_tokens=8,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_large_requests_share_a_connection(demo: server.Server) -> None:
    """A body that arrives in one read with its head is no large head."""
    noise = Image.effect_noise((448, 448), 100)
    buffer = io.BytesIO()
    noise.convert("RGB").save(buffer, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    body = {"messages": [{"role": "user", "content": [picture(url)]}], "max_tokens": 1}
    with httpx.Client(base_url=demo.url) as connection:
        assert [connection.post("/v1/chat/completions", json=body).status_code for _ in range(4)] == [200] * 4


def test_many_at_once_answer_as_one_by_one(client: OpenAI, pictures: str) -> None:
    model = client.models.list().data[0].id

    def ask(chat: str, results: list[str], place: int) -> None:
        completion = cast(Any, client).chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content(chat, pictures)}],
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        results[place] = completion.choices[0].message.content or ""

    alone, together = [""] * len(CHATS), [""] * len(CHATS)
    for place, chat in enumerate(CHATS):
        ask(chat, alone, place)
    threads = [threading.Thread(target=ask, args=(chat, together, place)) for place, chat in enumerate(CHATS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_log_says_what_a_user_must_know(demo: server.Server) -> None:
    log = demo.text()
    ready = [line for line in log.splitlines() if server.READY.search(line)]
    assert len(ready) == 1
    assert all(word in ready[0] for word in ("weights", "KV cache", "tokens", "resident"))
    assert log.count("built-in demonstration") == 1
    assert log.count("--trust-remote-code") == 1
    assert "Traceback" not in log


def test_the_engine_is_one_more_process_and_torch_stays_in_it(demo: server.Server) -> None:
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in family(demo.process.pid)}
    with_torch = [pid for pid, text in maps.items() if "libtorch" in text]
    assert len(with_torch) == 1
    assert demo.process.pid not in with_torch


@pytest.mark.parametrize(
    "argv",
    [
        ["chat_text.py"],
        ["one_image.py", "{pictures}/duck.jpg"],
        ["several_images.py", "{pictures}/duck.jpg", "{pictures}/lion.png"],
        ["streaming.py"],
    ],
    ids=lambda argv: argv[0],
)
def test_examples_run(demo: server.Server, pictures: str, argv: list[str]) -> None:
    words = [word.format(pictures=pictures) for word in argv]
    prefix = "/api/v1" if argv[0] == "streaming.py" else "/v1"
    done = subprocess.run(
        [sys.executable, *words, "--base-url", demo.url + prefix, "--max-tokens", "8"],
        cwd=ROOT / "examples",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_chat_command(demo: server.Server, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    typed = f"hello\n/image {tmp_path / 'blue.png'}\nwhat is it?\n/image nowhere.png\n/clear\n/help\n/quit\n"
    done = subprocess.run(
        [sys.executable, "-m", "sensorium", "chat", "--base-url", demo.url, "--max-tokens", "8"],
        input=typed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "attached" in done.stdout
    assert "cannot read it" in done.stdout


def test_bench_command(demo: server.Server) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sensorium",
            "bench",
            "serve",
            "--base-url",
            demo.url,
            "--requests",
            "4",
            "--concurrency",
            "2",
            "--output-tokens",
            "8",
            "--kind",
            "image",
            "--image-size",
            "56",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "32 output tokens" in done.stdout


def refused(folder: Path, *argv: str) -> str:
    """The one line with which a start ends that cannot work; before it, at most how far loading came."""
    log = folder / "refused.log"
    process = server.start(log, *argv)
    try:
        assert process.wait(120) == 2
    finally:
        process.kill()
    *before, last = log.read_text().splitlines()
    assert all(" INFO " in line or "native kernels cannot be used" in line for line in before)
    assert last.startswith("sensorium: ")
    return last


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["./nowhere"], "nowhere"),
        (["{demo}", "--task", "classify"], "classify"),
        (["{demo}", "--chat-template", "{{{{ unclosed"], "chat template"),
        (["{demo}", "--allowed-local-media-path", "./nowhere"], "nowhere"),
        (["{demo}", "--mm-processor-kwargs", '{{"wrong": 1}}'], "wrong"),
        (["{demo}", "--kv-cache-memory", "1KiB"], "KV cache"),
        (["{demo}", "--max-model-len", "100000"], "32768"),
        (["{empty}"], "config.json"),
    ],
)
def test_a_start_that_cannot_work_is_one_line(tmp_path: Path, argv: list[str], words: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"demo": ROOT / "src" / "sensorium" / "demo", "empty": tmp_path / "empty"}
    assert words in refused(tmp_path, *(word.format(**places) for word in argv), "--port", "0")


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in refused(tmp_path, "--port", port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly_and_whole(tmp_path: Path, number: signal.Signals) -> None:
    with server.running(tmp_path) as found:
        processes = family(found.process.pid)
        assert len(processes) >= 2
        assert httpx.get(f"{found.url}/livez").status_code == 200
        found.process.send_signal(number)
        assert found.process.wait(120) in (0, 130)
        deadline_s = time.monotonic() + 5
        while any(Path(f"/proc/{pid}/exe").exists() for pid in processes) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not [pid for pid in processes if Path(f"/proc/{pid}/exe").exists()]
        assert "Traceback" not in found.text()


def test_a_signal_ends_it_while_templates_run(tmp_path: Path) -> None:
    """Its own and a request's: loops that say nothing and never end."""
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    own = "{% if messages[0].content == 'loop' %}" + loops + "{% endif %}{{ messages[0].content }}"
    argv = ("--chat-template", own, "--allow-request-chat-template", "--drain-timeout-s", "1")
    with server.running(tmp_path, *argv) as found, ThreadPoolExecutor(4) as threads:

        def ask(content: str, **fields: str) -> None:
            with suppress(httpx.TransportError):
                body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **fields}
                httpx.post(f"{found.url}/v1/chat/completions", json=body, timeout=60)

        asked = [threads.submit(ask, "loop"), threads.submit(ask, "hello", chat_template=loops)]
        deadline_s = time.monotonic() + 30
        while len(rendering(found.process.pid)) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.2)  # it imports, and then it has the job
        processes = family(found.process.pid)
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(120) == 0
        for one in asked:
            one.result(20)
        until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in processes))
        assert "Traceback" not in found.text()


def rendering(pid: int) -> list[bytes]:
    """Commands of the server's processes for templates: one for its own, one for those of requests."""
    lines = {Path(f"/proc/{one}/cmdline").read_bytes() for one in family(pid)}
    return [line for line in lines if b"render_worker" in line]


def test_a_signal_while_loading_ends_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = server.start(log, "--port", "0")
    time.sleep(0.6)
    processes = family(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) in (0, 130, 143, -signal.SIGTERM)
    deadline_s = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/exe").exists() for pid in processes) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not [pid for pid in processes if Path(f"/proc/{pid}/exe").exists()]


def test_a_pasted_command_means_what_it_meant(tmp_path: Path) -> None:
    with server.running(
        tmp_path,
        "--dtype",
        "float",
        "--pipeline-parallel-size",
        "1",
        "--enforce-eager",
        "-O3",
        "--swap-space",
        "4",
        "--hf-overrides",
        '{"max_position_embeddings": 640}',
        "--override-generation-config",
        '{"temperature": 0}',
        "--media-io-kwargs",
        '{"video": {"num_frames": 4}}',
        "--runner",
        "generate",
    ) as found:
        log = found.text()
        for flag in ("--pipeline-parallel-size", "--enforce-eager", "-O", "--swap-space"):
            assert f"{flag} changes nothing here" in log
        assert "in float32, up to 640 tokens" in log  # the engine's word
        with httpx.Client(base_url=found.url, timeout=60) as http:
            assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 640
            body = {"prompt": "A red", "max_tokens": 8}
            said = {http.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(4)}
            assert len(said) == 1  # greedy by default
            refused = http.post("/v1/embeddings", json={"input": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_task")


def test_a_thread_that_never_ends_does_not_keep_the_process() -> None:
    code = (
        "import threading, time\nfrom sensorium.cli.serve import end_without_threads\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\nend_without_threads(3, 0.2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 3
