"""The process that is started before the command line is read: who gets it, and how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sensorium import __main__ as command
from sensorium.ipc import ahead


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that only wait for the end of their socket."""
    wait = "import socket, sys; socket.socket(fileno=int(sys.argv[-1])).recv(1)"

    def start(words: list[str], **options: object) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-S", "-c", wait, words[-1]], **options)  # type: ignore[call-overload]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(ahead, "_waiting", [])


def end(started: ahead.Started) -> None:
    process, ours = started
    ours.close()
    assert process.wait(20) == 0


def test_the_first_one_gets_it(quick: None) -> None:
    ahead.start_ahead()
    ahead.start_ahead()
    ((waiting, _),) = ahead._waiting
    first, second = ahead.take(), ahead.take()
    assert first[0] is waiting and second[0] is not waiting
    end(first)
    end(second)


def test_one_that_has_ended_is_not_handed_out(quick: None) -> None:
    ahead.start_ahead()
    dead, _ = ahead._waiting[0]
    dead.kill()
    dead.wait()
    started = ahead.take()
    assert started[0] is not dead
    end(started)


def test_one_that_nobody_needs_ends(quick: None) -> None:
    ahead.discard()
    ahead.start_ahead()
    process, _ = ahead._waiting[0]
    ahead.discard()
    assert process.returncode is not None and ahead._waiting == []


def test_an_engine_that_is_told_nothing_ends_without_a_word() -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "from sensorium.ipc.ahead import start_engine as s; p, _ = s(); _.close(); exit(p.wait())",
        ],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["serve"], True),
        (["serve", "model", "--port", "1"], True),
        (["serve", "--help"], False),
        (["serve", "--config=a.toml"], False),
        (["serve", "--models-dir", "a"], False),
        (["serve", "model", "--lazy"], False),
        (["chat"], False),
        ([], False),
    ],
)
def test_what_looks_like_one_model(words: list[str], expected: bool) -> None:
    assert command._starts_engine(words) is expected
