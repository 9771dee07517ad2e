"""Large requests on their way to the engine: in parts, which tenants take in turn, so that nobody's small message waits
until somebody's images are through.

What is sent whole arrives in order. A request in parts may be overtaken; if it is taken back, the engine never sees it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sensorium.ipc import messages
from sensorium.ipc.messages import Buffer, ProtocolError

PART_BYTES = 256 * 1024


@dataclass(slots=True, eq=False)
class _Transfer:
    id: int
    size: int
    parts: deque[memoryview] = field(default_factory=deque)
    is_begun: bool = False


def _cut(view: memoryview) -> Iterator[memoryview]:
    return (view[start : start + PART_BYTES] for start in range(0, len(view), PART_BYTES))


class Outgoing:
    """What waits to be written."""

    def __init__(self) -> None:
        self._whole: deque[Buffer] = deque()
        self._large: dict[bytes, deque[_Transfer]] = {}  # by tenant, the next one's first

    def __bool__(self) -> bool:
        return bool(self._whole or self._large)

    def add(self, frames: Buffer) -> None:
        self._whole.extend(_cut(memoryview(frames)))

    def add_request(self, request_id: int, pieces: Sequence[Buffer], turn: bytes) -> None:
        """To be sent in parts. `pieces` as `messages.encode_request` makes them."""
        views = [memoryview(piece) for piece in pieces]
        views[0] = views[0][messages.HEAD_BYTES :]
        transfer = _Transfer(request_id, sum(map(len, views)))
        for view in views:
            transfer.parts.extend(_cut(view))
        self._large.setdefault(turn, deque()).append(transfer)

    def take_back(self, request_id: int) -> bool:
        """Whether a request was still on its way."""
        for turn, queue in self._large.items():
            for transfer in queue:
                if transfer.id != request_id:
                    continue
                queue.remove(transfer)
                if not queue:
                    del self._large[turn]
                if transfer.is_begun:
                    self.add(messages.encode_drop(request_id))
                return True
        return False

    def next(self) -> tuple[Buffer, ...]:
        """The next bytes, about `PART_BYTES`; none of what comes later may come between them."""
        if self._whole:
            return (self._whole.popleft(),)
        turn, queue = next(iter(self._large.items()))
        transfer = queue[0]
        if not transfer.is_begun:
            transfer.is_begun = True
            return (messages.encode_begin(transfer.id, transfer.size),)
        part = transfer.parts.popleft()
        del self._large[turn]
        if not transfer.parts:
            queue.popleft()
        if queue:
            self._large[turn] = queue  # behind the others
        return messages.part_head(transfer.id, len(part)), part

    def clear(self) -> None:
        self._whole.clear()
        self._large.clear()


class Arriving:
    """The engine's side: requests of which parts have arrived."""

    def __init__(self) -> None:
        self._views: dict[int, memoryview] = {}  # the whole, and what of it is still to come
        self._missing: dict[int, memoryview] = {}

    def begin(self, payload: memoryview) -> None:
        request_id, size = messages.decode_begin(payload)
        if request_id in self._views:
            raise ProtocolError(f"request {request_id} is sent twice at a time")
        self._views[request_id] = self._missing[request_id] = memoryview(bytearray(size))

    def fill(self, request_id: int, size: int, receive: Callable[[memoryview], None]) -> memoryview | None:
        """Take in the next part. Returns the whole payload if it was the last."""
        missing = self._missing.get(request_id)
        if missing is None or len(missing) < size:
            raise ProtocolError(f"a part of {size} bytes of request {request_id}, which takes no such part")
        receive(missing[:size])
        self._missing[request_id] = missing[size:]
        if len(missing) > size:
            return None
        del self._missing[request_id]
        return self._views.pop(request_id)

    def drop(self, payload: memoryview) -> None:
        request_id = messages.decode_drop(payload)
        self._views.pop(request_id, None)
        self._missing.pop(request_id, None)
