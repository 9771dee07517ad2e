"""Refuses work before it costs anything: per engine by sequences and prompt tokens, per API key by requests.

Everything counted here is given back when the request ends, however it ends. What is refused is told when to come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TypeVar

from sensorium.errors import BodyTooLargeError, OverloadedError, RateLimitError

Result = TypeVar("Result")
MAX_REST_S = 0.2


class Admission:
    """The admission limit of one engine: at most `max_sequences` computing or waiting, and `max_prompt_tokens` of
    prompts with them.

    A single request larger than that is let in when nobody else is there, so that it can ever be answered.
    """

    def __init__(
        self, max_sequences: int, max_prompt_tokens: Callable[[], int], on_refusal: Callable[[str], None]
    ) -> None:
        self._max_sequences = max_sequences
        self._max_prompt_tokens = max_prompt_tokens  # known once the engine is ready
        self._on_refusal = on_refusal
        self.sequences = 0
        self.prompt_tokens = 0

    def admit(self, sequences: int) -> Permit:
        """Take a permit before tokenizing or fetching anything."""
        if self.sequences and self.sequences + sequences > self._max_sequences:
            self._on_refusal("queue_full")
            raise OverloadedError("The server is busy: too many requests are waiting. Try again later.")
        self.sequences += sequences
        return Permit(self, sequences)

    def add_prompt_tokens(self, tokens: int) -> None:
        if self.prompt_tokens and self.prompt_tokens + tokens > self._max_prompt_tokens():
            self._on_refusal("queue_full_tokens")
            raise OverloadedError("The server is busy: too many prompt tokens are waiting. Try again later.")
        self.prompt_tokens += tokens


class Permit:
    """What one request holds of an `Admission` while it is open."""

    __slots__ = ("_admission", "_prompt_tokens", "_sequences")

    def __init__(self, admission: Admission, sequences: int) -> None:
        self._admission = admission
        self._sequences = sequences
        self._prompt_tokens = 0

    def add_prompt_tokens(self, tokens: int) -> None:
        self._admission.add_prompt_tokens(tokens)
        self._prompt_tokens += tokens

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.sequences -= self._sequences
        self._admission.prompt_tokens -= self._prompt_tokens


class PendingBytes:
    """All bodies in memory together: what is being received, parsed or turned into prompts.

    `on_empty` is called whenever the last of them is gone, with the bytes of all since the time before.
    """

    def __init__(
        self,
        max_bytes: int,
        on_refusal: Callable[[str], None],
        on_empty: Callable[[int], None] = lambda size_bytes: None,
    ) -> None:
        self._max_bytes = max_bytes
        self._on_refusal = on_refusal
        self._on_empty = on_empty
        self._since_empty = 0
        self._parser = ThreadPoolExecutor(1, "parser")
        self._rests_until = 0.0  # of the thread's
        self.total = 0

    async def in_turn(self, work: Callable[[], Result]) -> Result:
        """Do the work on a body off the event loop, one body at a time: what it takes for a moment is taken once.

        Parsing holds the interpreter's lock until it is done. Between two bodies the event loop has it for as long as
        the first one took, so that a request which it turns to several times waits once."""
        return await asyncio.get_running_loop().run_in_executor(self._parser, partial(self._after_rest, work))

    def _after_rest(self, work: Callable[[], Result]) -> Result:
        time.sleep(max(self._rests_until - time.monotonic(), 0.0))
        begun = time.monotonic()
        try:
            return work()
        finally:
            now = time.monotonic()
            self._rests_until = now + min(now - begun, MAX_REST_S)

    def open(self) -> PendingBody:
        return PendingBody(self)

    def add(self, size_bytes: int, held_bytes: int = 0) -> None:
        """`held_bytes` has the same request already. Alone it would never fit: BodyTooLargeError."""
        if held_bytes + size_bytes > self._max_bytes:
            raise BodyTooLargeError(f"The body is larger than {self._max_bytes} bytes.")
        if self.total + size_bytes > self._max_bytes:
            self._on_refusal("memory")
            raise OverloadedError("The server is busy: too many large requests are in progress. Try again later.")
        self.total += size_bytes
        self._since_empty += size_bytes

    def remove(self, size_bytes: int) -> None:
        self.total -= size_bytes
        if size_bytes and not self.total:
            self._on_empty(self._since_empty)
            self._since_empty = 0


class PendingBody:
    """One request's part of `PendingBytes`, until its prompt is made."""

    __slots__ = ("_pending", "_size_bytes")

    def __init__(self, pending: PendingBytes) -> None:
        self._pending = pending
        self._size_bytes = 0

    def add(self, size_bytes: int) -> None:
        self._pending.add(size_bytes, self._size_bytes)
        self._size_bytes += size_bytes

    async def in_turn(self, work: Callable[[], Result]) -> Result:
        return await self._pending.in_turn(work)

    def release(self) -> None:
        size_bytes, self._size_bytes = self._size_bytes, 0
        self._pending.remove(size_bytes)

    def __enter__(self) -> PendingBody:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class KeyLimiter:
    """At most so many requests of one API key at a time. Without keys everybody shares none, and there is no limit."""

    def __init__(self, max_per_key: int, on_refusal: Callable[[str], None]) -> None:
        self._max_per_key = max_per_key
        self._on_refusal = on_refusal
        self._open: dict[bytes, int] = {}

    @contextmanager
    def enter(self, tenant: bytes) -> Iterator[None]:
        if not tenant:
            yield
            return
        count = self._open.get(tenant, 0)
        if count >= self._max_per_key:
            self._on_refusal("key_concurrency")
            raise RateLimitError(f"This API key has {count} requests in flight already; wait until some have ended.")
        self._open[tenant] = count + 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]
