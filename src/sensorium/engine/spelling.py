"""A tokenizer in a process of its own: `python -m sensorium.engine.spelling`. It says what each token's bytes are, and
afterwards how texts are written in tokens, which is asked for where a grammar forces one.

Opening a tokenizer of 150,000 tokens takes the grammar library a second, in which it holds its interpreter's lock: here
nobody waits for it. The process ends with its standard input.
"""

from __future__ import annotations

import logging
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
from llguidance import LLTokenizer
from numpy.typing import NDArray

from sensorium.system.malloc import trim
from sensorium.system.priority import end_first, stand_back
from sensorium.types import Vocabulary

MAX_KEPT = 4096  # texts
_LENGTH = struct.Struct("<Q")
_log = logging.getLogger("sensorium.engine")


class Wanted(msgspec.Struct):
    """The first message."""

    vocabulary: Vocabulary
    vocab_size: int


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The bytes of all tokens one after the other; those of control tokens begin with 0xFF, which no text has."""

    lengths: NDArray[np.uint32]
    joined: bytes


class Speller:
    """The process as its parent sees it. What is asked again is remembered; any thread may ask."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        """Returns at once; the `table` is to be taken before anything is spelled."""
        self._wanted = msgspec.msgpack.encode(Wanted(vocabulary, vocab_size))
        self._lock = threading.Lock()
        self._kept: dict[bytes, list[int]] = {}
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def table(self) -> TokenTable:
        """OSError if the process is gone."""
        lengths = np.frombuffer(self._get(), np.uint32)
        return TokenTable(lengths, self._get())

    def spelled(self, text: bytes) -> list[int]:
        """A text of valid UTF-8 as tokens. A process that is gone is started again, which takes a second; OSError if
        that does not help."""
        with self._lock:
            found = self._kept.get(text)
            if found is None:
                try:
                    found = self._asked(text)
                except OSError:
                    _log.warning("the process that has the tokenizer of grammars has ended: it is started again")
                    self.close()
                    self._process = self._start()
                    self.table()
                    found = self._asked(text)
                if len(self._kept) >= MAX_KEPT:
                    self._kept.clear()
                self._kept[text] = found
            return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "sensorium.engine.spelling"]
        made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        stand_back(made.pid)
        if made.stdin is not None:
            with suppress(OSError):  # who reads from it will see
                _put(made.stdin, self._wanted)
        return made

    def _asked(self, text: bytes) -> list[int]:
        if self._process.stdin is None:
            raise OSError("no pipe")
        _put(self._process.stdin, text)
        found: list[int] = np.frombuffer(self._get(), np.uint32).tolist()
        return found

    def _get(self) -> bytes:
        found = None if self._process.stdout is None else _get(self._process.stdout)
        if found is None:
            raise BrokenPipeError("the process has ended")
        return found


def _put(pipe: IO[bytes], message: bytes) -> None:
    whole = memoryview(_LENGTH.pack(len(message)) + message)
    while whole:
        whole = whole[pipe.write(whole) :]


def _get(pipe: IO[bytes]) -> bytes | None:
    """The next message; None at the end."""
    head = _exactly(pipe, _LENGTH.size)
    return None if head is None else _exactly(pipe, _LENGTH.unpack(head)[0])


def _exactly(pipe: IO[bytes], size: int) -> bytes | None:
    parts = []
    while size:
        part = pipe.read(size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def plain_tokenizer(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """The library's tokenizer without what makes masks fast. `vocab_size` is the width of the logits."""
    raw = msgspec.json.decode(Path(vocabulary.file).read_bytes(), type=dict[str, msgspec.Raw])
    added = [
        {
            "id": token_id,
            "content": text,
            "special": is_special,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for token_id, text, is_special in vocabulary.added
        if token_id < vocab_size
    ]
    nothing = msgspec.Raw(b"null")
    whole = {**raw, "truncation": nothing, "padding": nothing, "post_processor": nothing, "added_tokens": added}
    text = msgspec.json.encode(whole).decode()
    return LLTokenizer(text, n_vocab=vocab_size, eos_token=ends_within(vocabulary, vocab_size) or None, slices=[])


def ends_within(vocabulary: Vocabulary, vocab_size: int) -> list[int]:
    """The end tokens that have a logit."""
    return [token for token in vocabulary.ends if token < vocab_size]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it ends
    end_first()
    with open(0, "rb", buffering=0) as inward, open(1, "wb", buffering=0) as outward:
        first = _get(inward)
        if first is None:
            return
        wanted = msgspec.msgpack.decode(first, type=Wanted)
        tokenizer = plain_tokenizer(wanted.vocabulary, wanted.vocab_size)
        table = table_of(tokenizer)
        _put(outward, table.lengths.tobytes())
        _put(outward, table.joined)
        del table
        trim()  # half of what there is was needed to come here
        while (text := _get(inward)) is not None:
            _put(outward, np.array(tokenizer.tokenize_bytes(text), np.uint32).tobytes())


def table_of(tokenizer: LLTokenizer) -> TokenTable:
    tokens = [
        b"\xff" * tokenizer.is_special_token(token) + tokenizer.decode_bytes([token])
        for token in range(tokenizer.vocab_size)
    ]
    return TokenTable(np.array([len(token) for token in tokens], np.uint32), b"".join(tokens))


if __name__ == "__main__":
    main()
