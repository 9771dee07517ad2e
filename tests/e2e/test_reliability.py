"""What the server does when its parts fail or its clients leave (R-numbers in docs: safety), with the real engine."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support import checkpoints, pictures
from support.live import Live, check_error, engine_of, events, live, raw, status_of, until

from sensorium.engine.faults import VARIABLE
from sensorium.kernels.cpu import native
from sensorium.system.processes import family

CHAT = "/v1/chat/completions"
STREAMS = 8


@contextmanager
def faulty(folder: Path, faults: str, *argv: str, warm: bool = False, tracebacks: bool = True) -> Iterator[Live]:
    """A server whose engine stumbles. Counting of passes begins with the first request."""
    os.environ[VARIABLE] = faults
    try:
        with live(folder, *argv, warm=warm, tracebacks=tracebacks) as found:
            del os.environ[VARIABLE]
            yield found
    finally:
        os.environ.pop(VARIABLE, None)


def image_of(width: int = 84) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(pictures.encoded(pictures.photo(width, 56))).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def body(place: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"question {place} " * (place + 1)}],
        "temperature": 0,
        "max_tokens": 40,
        "ignore_eos": True,
        **fields,
    }


def stream(server: Live, fields: dict[str, Any]) -> tuple[int, str]:
    """Status and whole text of a stream; a broken one ends where it broke."""
    text = ""
    with (
        httpx.Client(base_url=server.url, timeout=60) as http,
        http.stream("POST", CHAT, json={**fields, "stream": True}) as reply,
    ):
        for piece in reply.iter_text():
            text += piece
        return reply.status_code, text


def together(server: Live, bodies: list[dict[str, Any]]) -> list[Future[tuple[int, str]]]:
    threads = ThreadPoolExecutor(len(bodies))
    futures = [threads.submit(stream, server, one) for one in bodies]
    threads.shutdown(wait=False)
    return futures


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in found if event.get("choices"))


def answers(server: Live, place: int = 0) -> str:
    """A plain answer, which must come."""
    reply = server.post(CHAT, body(place))
    assert reply.status_code == 200, reply.text
    content: str = reply.json()["choices"][0]["message"]["content"]
    return content


def test_r1_r19_a_failed_step_fails_its_requests_only(tmp_path: Path) -> None:
    with faulty(tmp_path, "step:sleep:1:2,step:raise:12") as server:
        futures = together(server, [body(place) for place in range(STREAMS)])
        failed = 0
        for future in futures:
            status, text = future.result(60)
            found = events(text)
            assert status == 200
            if "error" in found[-1]:
                failed += 1
                assert found[-1]["error"]["code"] == "engine_error"
                assert len(found) > 1
            else:
                assert found[-1]["choices"][0]["finish_reason"] == "length"
        assert failed >= STREAMS - 1
        assert answers(server)
        assert engine_of(server.server.process.pid) == server.engine_pid
        until(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
        assert server.metric("vllm:request_success_total", finished_reason="error") == failed


def test_r20_r2_r8_failures_at_the_start_and_in_towers(tmp_path: Path) -> None:
    with faulty(tmp_path, "step:raise:1,step:raise:2,sample:raise:1,tower:raise:1,tower:sleep:3:1") as server:
        for fields in ({"stream": True}, {}, {"stream": True}):  # nothing was said yet: a status, no stream
            check_error(server.post(CHAT, body(**fields)), status=500, code="engine_error")

        alone = [answers(server, place) for place in range(STREAMS - 1)]
        futures = together(server, [body(place) for place in range(STREAMS - 1)])
        shown = body(messages=[{"role": "user", "content": [image_of()]}])
        check_error(server.post(CHAT, shown), status=500, code="engine_error")
        assert [text_of(events(future.result(60)[1])) for future in futures] == alone
        assert server.post(CHAT, shown).status_code == 200

        connection = start_request(server, body(messages=[{"role": "user", "content": [image_of(112)]}]))
        time.sleep(0.4)
        connection.close()  # while the tower computes
        until(lambda: server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 0)
        until(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
        assert answers(server) == alone[0]
        assert engine_of(server.server.process.pid) == server.engine_pid


def test_r3_numbers_that_are_none_stay_with_their_request(tmp_path: Path) -> None:
    """A token whose embedding is no number poisons its own request, also where its blocks are used again."""
    poison = 65
    checkpoints.make_llama(tmp_path / "model", tie_word_embeddings=False)
    tensors = checkpoints.read_weights(tmp_path / "model")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][poison] = torch.nan
    checkpoints.write_weights(tmp_path / "model", tensors)
    with live(
        tmp_path,
        str(tmp_path / "model"),
        "--dtype",
        "float32",
        "--no-enable-prefix-caching",
        kv_cache_memory="64KiB",
        tracebacks=True,
    ) as server:

        def ask(prompt: list[int]) -> httpx.Response:
            return server.post(
                "/v1/completions",
                {
                    "prompt": prompt,
                    "max_tokens": 20,
                    "temperature": 0,
                    "ignore_eos": True,
                    "logit_bias": {str(poison): -100},
                },
            )

        good = [[70 + place] * (3 + 5 * place) for place in range(7)]
        alone = [ask(prompt).json()["choices"][0]["text"] for prompt in good]
        for _ in range(2):
            with ThreadPoolExecutor(STREAMS) as threads:
                bad = threads.submit(ask, [70] * 30 + [poison] + [70] * 30)
                assert [reply.json()["choices"][0]["text"] for reply in threads.map(ask, good)] == alone
            check_error(bad.result(), status=500, code="engine_error")
        assert [ask(prompt).json()["choices"][0]["text"] for prompt in good] == alone
        server.check_unharmed()


def test_r4_a_killed_engine_comes_back(tmp_path: Path) -> None:
    with live(tmp_path) as server:
        futures = together(server, [body(place, max_tokens=20_000) for place in range(STREAMS)])
        until(lambda: server.metric("vllm:num_requests_running") == STREAMS)
        os.kill(server.engine_pid, signal.SIGKILL)
        begin = time.monotonic()
        for future in futures:
            _, text = future.result(120)
            assert events(text)[-1]["error"]["code"] == "unavailable"
        assert time.monotonic() - begin < 90
        seen = set()
        while (status := server.http.get("/readyz").status_code) != 200:
            seen.add(status)
            assert server.http.get("/livez").status_code == 200
            if status == 503:
                reply = server.post(CHAT, body())
                if reply.status_code == 200:  # it became ready between the two questions
                    break
                check_error(reply, status=503, code="unavailable")
            time.sleep(0.05)
            assert time.monotonic() - begin < 200
        assert seen <= {503}
        assert server.http.get("/readyz").status_code == 200
        assert answers(server)
        server.engine_pid = engine_of(server.server.process.pid)
        server.rss_bytes = server.resident()
        server.check_unharmed()
        assert not [
            pid
            for pid in family(server.server.process.pid)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        ]


def test_a_killed_rank_is_named_and_all_come_back(tmp_path: Path) -> None:
    with live(tmp_path, "--tensor-parallel-size", "2", tracebacks=True) as server:
        alone, follower = answers(server), follower_of(server.engine_pid)
        assert server.metric("sensorium:rank_weight_bytes", rank="1") > 0
        futures = together(server, [body(place, max_tokens=20_000) for place in range(STREAMS)])
        until(lambda: server.metric("vllm:num_requests_running") == STREAMS)
        os.kill(follower, signal.SIGKILL)
        for future in futures:
            error = events(future.result(120)[1])[-1]["error"]
            assert error["code"] == "unavailable"
            assert "rank 1 of 2 has ended" in error["message"]
        until(lambda: server.http.get("/readyz").status_code == 200)
        assert "rank 1 of 2 has ended" in server.server.text()
        assert answers(server) == alone

        engine = engine_of(server.server.process.pid)
        follower = follower_of(engine)
        os.kill(follower, signal.SIGSTOP)  # it hears no end of file, and must go nevertheless
        os.kill(engine, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{follower}/exe").exists())


def test_a_stopped_rank_is_named_and_all_come_back(tmp_path: Path) -> None:
    with live(tmp_path, "--tensor-parallel-size", "2", "--hang-after-s", "5") as server:
        alone, follower = answers(server), follower_of(server.engine_pid)
        futures = together(server, [body(place, max_tokens=20_000) for place in range(STREAMS)])
        until(lambda: server.metric("vllm:num_requests_running") == STREAMS)
        os.kill(follower, signal.SIGSTOP)
        for future in futures:
            error = events(future.result(120)[1])[-1]["error"]
            assert error["code"] == "unavailable"
            assert "rank 1 of 2 has given no sign of life" in error["message"]
        until(lambda: server.http.get("/readyz").status_code == 200)
        assert not Path(f"/proc/{follower}/exe").exists()
        assert answers(server) == alone


def follower_of(engine_pid: int) -> int:
    return next(one for one in family(engine_pid) if b"engine.follower" in Path(f"/proc/{one}/cmdline").read_bytes())


def test_an_engine_that_keeps_dying_ends_the_server(tmp_path: Path) -> None:
    with faulty(tmp_path, "step:exit:*") as server:
        begin = time.monotonic()
        while server.server.process.poll() is None:
            try:
                reply = server.post(CHAT, body())
                assert reply.status_code == 503, reply.text
            except httpx.TransportError:
                pass
            assert time.monotonic() - begin < 400
            time.sleep(0.1)
        assert server.server.process.returncode not in (0, None)


# Room


def test_r6_requests_that_can_never_fit(tmp_path: Path) -> None:
    """The context shrinks to what the cache holds, and what is longer is refused at once."""
    with live(tmp_path, kv_cache_memory="1280KiB") as server:
        context = server.http.get("/v1/models").json()["data"][0]["max_model_len"]
        assert context < 32768
        check_error(server.complete([5] * (context + 1)), code="context_length_exceeded", param="prompt")
        check_error(server.complete([5] * 10, max_tokens=context), code="context_length_exceeded")
        reply = server.complete([5] * 10, max_tokens=context - 10, ignore_eos=True)
        assert reply.json()["usage"]["completion_tokens"] == context - 10
        server.check_unharmed()


def test_r5_room_for_two_and_a_half(tmp_path: Path) -> None:
    """Eight requests of 200 tokens and room for 512.

    Equal to the last bit where the kernels are ours: torch's bfloat16 products round differently with the number of
    rows, its float32 products by so little that no token changes.
    """
    dtype, memory = ("auto", "1280KiB") if native.available() else ("float32", "2560KiB")
    with live(tmp_path, "--max-model-len", "256", "--dtype", dtype, kv_cache_memory=memory) as server:
        bodies = [body(place, max_tokens=150) for place in range(STREAMS)]
        alone = [server.post(CHAT, one).json()["choices"][0]["message"]["content"] for one in bodies]
        futures = together(server, bodies)
        assert [text_of(events(future.result(60)[1])) for future in futures] == alone
        until(lambda: server.metric("vllm:num_preemptions_total") > 0)  # counters follow a moment later
        server.check_unharmed()


def test_a_full_queue_says_so_at_once(tmp_path: Path) -> None:
    with live(tmp_path, "--max-num-seqs", "2", "--max-waiting", "2") as server:
        futures = together(server, [body(place, max_tokens=1200) for place in range(4)])
        until(lambda: server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 4)
        for path, fields in ((CHAT, body()), ("/v1/completions", {"prompt": "a", "n": 2})):
            reply = server.post(path, fields)
            check_error(reply, status=503, code="overloaded")
            assert int(reply.headers["retry-after"]) >= 1
        assert server.http.get("/readyz").status_code == 200
        assert [status for status, _ in (future.result(200) for future in futures)] == [200] * 4
        assert server.metric("vllm:admission_rejections_total") == 2
        server.check_unharmed()


# Clients that leave


def start_request(server: Live, fields: dict[str, Any], path: str = CHAT) -> socket.socket:
    data = json.dumps(fields).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % (path.encode(), len(data))
        + data
    )
    return connection


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


LONG = {"max_tokens": 30_000}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("demo"), "--allowed-media-domains", "127.0.0.1", "localhost") as found:
        yield found


@pytest.mark.parametrize(
    "fields",
    [LONG, {**LONG, "stream": True}, {**LONG, "n": 4}, {**LONG, "n": 4, "stream": True}],
    ids=["plain", "stream", "n", "n stream"],
)
@pytest.mark.parametrize("leave", [reset, socket.socket.close], ids=["reset", "close"])
def test_r8_a_client_that_leaves(demo: Live, fields: dict[str, Any], leave: Any) -> None:
    running = fields.get("n", 1)
    connection = start_request(demo, body(**fields))
    until(lambda: demo.metric("vllm:num_requests_running") == running)
    if fields.get("stream"):
        assert b"data:" in connection.recv(4096)
    leave(connection)
    demo.check_unharmed()


def test_r8_a_client_that_leaves_during_a_download(demo: Live) -> None:
    with socket.create_server(("127.0.0.1", 0)) as site:
        site.settimeout(20)
        url = f"http://127.0.0.1:{site.getsockname()[1]}/slow.png"
        connection = start_request(
            demo, body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
        )
        download, _ = site.accept()
        download.settimeout(20)
        assert download.recv(4096)
        connection.close()
        assert download.recv(4096) == b""  # nobody waits for it any more
        download.close()
    demo.check_unharmed()


def test_r9_two_hundred_clients_that_leave(demo: Live) -> None:
    def visit(place: int) -> None:
        connection = start_request(demo, body(place % 5, stream=place % 3 > 0, **LONG))
        if place % 3 == 1:
            connection.recv(300)
        (reset if place % 2 else socket.socket.close)(connection)

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(visit, range(200)))
    demo.check_unharmed()
    assert "never retrieved" not in demo.server.text()


# Shutting down


def test_r13_streams_end_before_the_server_does(tmp_path: Path) -> None:
    with live(tmp_path, "--drain-timeout-s", "120") as server:  # without the native kernels it takes a minute
        futures = together(server, [body(place, max_tokens=400) for place in range(STREAMS)])
        until(lambda: server.metric("vllm:num_requests_running") == STREAMS)
        server.server.process.send_signal(signal.SIGTERM)
        until(lambda: status_of(raw(server.port, b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")) == 503)
        reply = server.post(CHAT, body())
        check_error(reply, status=503, code="unavailable")
        assert int(reply.headers["retry-after"]) >= 1
        for future in futures:
            status, text = future.result(120)
            assert status == 200
            assert events(text)[-1]["choices"][0]["finish_reason"] == "length"
        assert server.server.process.wait(20) == 0


@pytest.mark.parametrize(("signals", "code"), [((signal.SIGTERM, signal.SIGTERM), 0), ((signal.SIGINT,), 130)])
def test_r14_stopping_at_once(tmp_path: Path, signals: tuple[signal.Signals, ...], code: int) -> None:
    with live(tmp_path) as server:
        processes = family(server.server.process.pid)
        futures = together(server, [body(place, **LONG) for place in range(2)])
        until(lambda: server.metric("vllm:num_requests_running") == 2)
        for number in signals:
            server.server.process.send_signal(number)
            time.sleep(0.3)
        assert server.server.process.wait(20) == code
        for future in futures:
            assert events(future.result(20)[1])[-1]["error"]["code"] == "server_shutting_down"
        until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in processes))


def test_r15_streams_longer_than_the_drain(tmp_path: Path) -> None:
    with live(tmp_path, "--drain-timeout-s", "0.5") as server:
        futures = together(server, [body(place, **LONG) for place in range(2)])
        until(lambda: server.metric("vllm:num_requests_running") == 2)
        server.server.process.send_signal(signal.SIGTERM)
        assert server.server.process.wait(20) == 0
        for future in futures:
            assert events(future.result(20)[1])[-1]["error"]["code"] == "server_shutting_down"


# Text


def test_r18_stop_strings_at_every_boundary(demo: Live) -> None:
    """Every piece of an answer as stop string: what comes before it is all that is said, streamed or not."""
    whole = answers(demo)
    pieces = {whole[start : start + length] for start in range(0, len(whole), 3) for length in (1, 2, 5, 9)} - {""}
    for piece in sorted(pieces)[:60]:
        if "\ufffd" in piece or len(piece.encode()) > 256:
            continue
        for extra in ({}, {"include_stop_str_in_output": True}):
            end = whole.index(piece) + (len(piece) if extra else 0)
            found = demo.post(CHAT, body(stop=piece, **extra)).json()["choices"][0]
            assert (found["message"]["content"], found["finish_reason"], found["stop_reason"]) == (
                whole[:end],
                "stop",
                piece,
            )
            streamed = events(demo.post(CHAT, body(stop=[piece, "\0never"], stream=True, **extra)).text)
            assert text_of(streamed) == whole[:end]
    demo.check_unharmed()


def test_r17_one_seed_one_answer(demo: Live) -> None:
    """Whatever else is in the batch and wherever in it the request stands."""
    fields = body(seed=7, temperature=1.3, top_p=0.9, top_k=50, max_tokens=24)
    stop = threading.Event()

    def crowd(place: int) -> None:
        while not stop.is_set():
            demo.post(CHAT, body(place, max_tokens=5 + place, temperature=1.0))

    threads = [threading.Thread(target=crowd, args=(place,)) for place in range(5)]
    for thread in threads:
        thread.start()
    try:
        found = {demo.post(CHAT, fields).json()["choices"][0]["message"]["content"] for _ in range(20)}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(found) == 1
    assert demo.post(CHAT, {**fields, "seed": 8}).json()["choices"][0]["message"]["content"] not in found
