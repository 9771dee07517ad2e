"""Ends a request's work early, for whatever reason: its client has gone, its time is up, the server stops.

One mechanism for all of them: the work runs inside a timeout whose end is moved to now, and leaves with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType

from sensorium.api.transport.asgi import ClientGone, Receive
from sensorium.errors import RequestTimeoutError, UnavailableError


class InFlightRequests:
    """Every request in progress; what draining waits for and aborting ends."""

    def __init__(self) -> None:
        self._open: set[InFlightRequest] = set()
        self.draining = False
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, receive: Receive, timeout_s: float | None) -> InFlightRequest:
        """`timeout_s` None: as long as it takes."""
        return InFlightRequest(self, receive, timeout_s)

    def add(self, request: InFlightRequest) -> None:
        self._open.add(request)
        self._empty.clear()

    def remove(self, request: InFlightRequest) -> None:
        self._open.discard(request)
        if not self._open:
            self._empty.set()

    async def drain(self, timeout_s: float) -> None:
        """Let in nothing new, wait for what is there; what is left at the end is told so and ended."""
        self.draining = True
        if self._open and timeout_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), timeout_s)
        self.abort()

    def abort(self) -> None:
        self.draining = True
        for request in tuple(self._open):
            error = UnavailableError("The server is shutting down.")
            error.code = "server_shutting_down"
            request.end(error)


class InFlightRequest:
    """`async with` around a request's work. Whoever reads the body must have read all of it before."""

    def __init__(self, requests: InFlightRequests, receive: Receive, timeout_s: float | None) -> None:
        self._requests = requests
        self._receive = receive
        self._timeout_s = timeout_s
        self._timeout = asyncio.timeout(timeout_s)
        self._reason: Exception = RequestTimeoutError("The request took too long.")
        if timeout_s is not None:
            self._reason = RequestTimeoutError(f"The request took longer than {timeout_s:g} seconds.")
        self._ended = False

    def end(self, reason: Exception) -> None:
        """Cancel the work; it leaves with `reason`. Only the first call counts."""
        if self._ended or self._timeout.expired():
            return
        self._ended = True
        self._reason = reason
        self._timeout.reschedule(asyncio.get_running_loop().time())

    def progressed(self) -> None:
        """The time that it may take begins anew: for work in parts, of which each has a bound and one is done."""
        if self._timeout_s is None or self._ended or self._timeout.expired():
            return
        self._reason = RequestTimeoutError(f"A part of the request took longer than {self._timeout_s:g} seconds.")
        self._timeout.reschedule(asyncio.get_running_loop().time() + self._timeout_s)

    async def __aenter__(self) -> InFlightRequest:
        if self._requests.draining:
            raise UnavailableError("The server is shutting down.", retry_after_s=10.0)
        await self._timeout.__aenter__()
        self._requests.add(self)
        self._watch = asyncio.ensure_future(self._until_gone())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._watch.cancel()
        self._requests.remove(self)
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise self._reason from None

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end(ClientGone())
