"""Media that wait for the towers at the same time, shared out among the ranks: all have whole towers, and each encodes
some of the items.

Rank 0 leads, a piece at a time, as it does alone: it says that all go on, computes a piece of its own, and waits for
the others. So towers take no more time between two steps than rank 0's queue gives them. Rows come back over the
socket: a tower that fails fails its items, and no rank is left in the midst of a collective.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sensorium.engine.encoding import Encode
from sensorium.engine.leader import Leader
from sensorium.ipc import ranks as wire
from sensorium.models.base import Steps
from sensorium.types import MediaFeatures, Modality

_DTYPES = {str(one).removeprefix("torch."): one for one in (torch.float32, torch.bfloat16, torch.float16)}


def shared_out(rows: Sequence[int], size: int) -> list[list[int]]:
    """Which items each rank encodes, so that all have about as many rows; ranks with nothing to do are left away."""
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for item in sorted(range(len(rows)), key=lambda one: -rows[one]):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += rows[item]
    return [share for share in shares if share]


class _Part:
    """What one rank encodes of a job."""

    def __init__(self, steps: Steps[list[Tensor]]) -> None:
        self._steps = steps
        self.macs = 0  # multiply-adds of the next piece
        self.outputs: list[Tensor] | None = None  # once all pieces are computed

    def advance(self) -> None:
        if self.outputs is None:
            try:
                self.macs = next(self._steps)
            except StopIteration as end:
                self.macs, self.outputs = 0, end.value


class SharedTowers:
    """Rank 0's side."""

    def __init__(self, encode: Encode, leader: Leader, device: torch.device) -> None:
        self._encode = encode
        self._leader = leader
        self._device = device
        self._numbers = itertools.count(1)  # of jobs

    def encoding(self, kind: Modality, items: Sequence[MediaFeatures]) -> Steps[list[Tensor]]:
        """As `Model.encoding`. RuntimeError names a rank whose tower failed."""
        own_items, *others = shared_out([one.num_rows for one in items], self._leader.size)
        if not others:
            return (yield from self._encode(kind, items))
        number, outputs = next(self._numbers), dict[int, Tensor]()
        busy = dict(enumerate(others, 1))
        try:
            for rank, share in busy.items():
                self._leader.send_to(rank, wire.encode_media(number, kind, [items[one] for one in share]))
            own = _Part(self._encode(kind, [items[one] for one in own_items]))
            while True:
                macs = self._advance(own, busy, outputs)
                if not busy and own.outputs is not None:
                    break
                yield macs
                for rank in busy:
                    self._leader.send_to(rank, wire.encode_advance(number))
        finally:
            for rank in busy:  # the job failed, or nobody wants it any more
                self._leader.send_to(rank, wire.encode_forget(number))
        outputs.update(zip(own_items, own.outputs, strict=True))
        return [outputs[one] for one in range(len(items))]

    def _advance(self, own: _Part, busy: dict[int, list[int]], outputs: dict[int, Tensor]) -> int:
        """A piece of every rank; takes those who are through out of `busy`. Returns the largest next piece."""
        error: Exception | None = None
        try:
            own.advance()
        except Exception as caught:
            error = caught  # the others answer nevertheless
        most = own.macs
        for rank, share in list(busy.items()):
            answer = self._leader.encoded(rank)
            most = max(most, answer.macs)
            if answer.error:
                del busy[rank]
                error = error or RuntimeError(f"rank {rank}: {answer.error}")
            elif not answer.macs:
                del busy[rank]
                outputs.update(zip(share, self._rows(answer), strict=True))
        if error is not None:
            raise error
        return most

    def _rows(self, answer: wire.Encoded) -> Iterable[Tensor]:
        for codes in answer.rows:
            yield torch.from_numpy(codes.copy()).view(_DTYPES[answer.dtype]).to(self._device)


class FollowedTowers:
    """A follower's side."""

    def __init__(self, encode: Encode, is_lost: Callable[[BaseException], bool], send: Callable[[bytes], object]):
        """`is_lost`: whether an error is this process's end, and not just its items'."""
        self._encode, self._is_lost, self._send = encode, is_lost, send
        self._parts: dict[int, _Part] = {}

    def begin(self, payload: memoryview) -> None:
        number, kind, items = wire.decode_media(payload)
        self._parts[number] = _Part(self._encode(kind, items))
        self._advance(number)

    def advance(self, payload: memoryview) -> None:
        self._advance(wire.decode_job(payload))

    def forget(self, payload: memoryview) -> None:
        self._parts.pop(wire.decode_job(payload), None)

    def _advance(self, number: int) -> None:
        part, error = self._parts[number], ""
        try:
            part.advance()
        except Exception as caught:
            if self._is_lost(caught):
                raise
            error = f"{type(caught).__name__}: {caught}"
        outputs = part.outputs or []
        if error or part.outputs is not None:
            del self._parts[number]
        dtype = str(outputs[0].dtype).removeprefix("torch.") if outputs else ""
        self._send(wire.encode_rows(wire.Encoded(part.macs, error, dtype, [_codes(one) for one in outputs])))


def _codes(rows: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[rows, bytes]"""
    return rows.cpu().contiguous().view(torch.uint8).numpy()
