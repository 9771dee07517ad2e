"""Media that towers are computing: a piece at a time between the steps of the decoder, tenants in turn.

Time is shared among tenants, not among media: whoever has used least goes on. A small image does not wait until
another tenant's large ones are through. Nor do tokens of tenants who have nothing here: towers take no more time than
steps with such tokens do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.engine.encoder_cache import EncoderCache
from sensorium.engine.faults import Faults
from sensorium.engine.sequence import ItemKey, Wanted
from sensorium.models.base import Model, Steps
from sensorium.types import MediaFeatures, Modality

SLICE_S = 0.1  # of towers between two steps of the decoder; a piece that has begun is finished
GATHERING_S = 1.0
"""The same where sequences attend to what the towers give and nobody else waits: the windows of a recording are soonest
decoded when all of them are there, as a step takes little longer for eight of them than for one."""

logger = logging.getLogger(__name__)

Encode: TypeAlias = Callable[[Modality, Sequence[MediaFeatures]], Steps[list[Tensor]]]
"""Rows of each item, piece by piece."""


@dataclass(slots=True)
class _Job:
    """Media of one tenant and kind that go through the tower together."""

    kind: Modality
    items: dict[ItemKey, MediaFeatures]
    steps: Steps[list[Tensor]] | None = None  # None: not begun
    macs: int = 0  # multiply-adds of its next piece


class Encodings:
    """The towers' queue. Rows go to the encoder cache, where `add`'s items must be reserved."""

    def __init__(
        self,
        encode: Encode,
        cache: EncoderCache[Tensor],
        is_lost: Callable[[BaseException], bool],
        faults: Faults,
        *,
        gathers: bool = False,
    ) -> None:
        """`gathers`: sequences attend to the towers' outputs from their first token on."""
        self._encode = encode
        self._cache = cache
        self._is_lost = is_lost
        self._faults = faults
        self._gathers = gathers
        self._is_alone = False  # no token of a tenant who has nothing here was computed in the last step
        self._jobs: dict[bytes, list[_Job]] = {}  # by tenant
        self._used_s: dict[bytes, float] = {}  # of the tenants that have jobs
        self._owed_s = 0.0  # to tenants that have none
        self._ran_s = 0.0  # since the last step

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, items: Mapping[ItemKey, Wanted]) -> None:
        jobs: dict[tuple[bytes, Modality], _Job] = {}
        for key, (turn, features) in items.items():
            jobs.setdefault((turn, features.kind), _Job(features.kind, {})).items[key] = features
        for (tenant, _), job in jobs.items():
            if tenant not in self._jobs:
                self._used_s[tenant] = min(self._used_s.values(), default=0.0)
            self._jobs.setdefault(tenant, []).append(job)

    @torch.inference_mode()
    def run(self, begin: Callable[[float], None]) -> set[ItemKey]:
        """Compute for about `SLICE_S`, or `GATHERING_S`; `begin` hears of every piece's multiply-adds. Returns items
        that failed."""
        failed: set[ItemKey] = set()
        if self._owed_s > 0:
            return failed
        most_s = GATHERING_S if self._gathers and self._is_alone else SLICE_S
        now = started = monotonic()
        while self._jobs and now - started < most_s:
            tenant = min(self._jobs, key=self._used_s.__getitem__)
            job = self._jobs[tenant][0]
            if not any(self._cache.is_awaited(key) for key in job.items):
                self._drop(tenant, job)  # whoever wanted them has left
                continue
            failed |= self._advance(tenant, job, begin)
            before, now = now, monotonic()
            if tenant in self._used_s:
                self._used_s[tenant] += now - before
        self._ran_s = now - started
        return failed

    def step_took(self, turns: Iterable[bytes], seconds: float) -> None:
        """A step for these tenants was computed."""
        self._is_alone = all(turn in self._jobs for turn in turns)
        self._owed_s = 0.0 if self._is_alone else max(self._owed_s + self._ran_s - seconds, 0.0)
        self._ran_s = 0.0

    def _advance(self, tenant: bytes, job: _Job, begin: Callable[[float], None]) -> set[ItemKey]:
        """One piece. Somebody's image may break a group: then each goes alone."""
        try:
            if job.steps is None:
                self._faults.hit("tower")
                job.steps = self._encode(job.kind, list(job.items.values()))
                job.macs = next(job.steps)
            begin(job.macs)
            job.macs = next(job.steps)
            return set()
        except StopIteration as end:
            error = self._fill(job, end.value)
        except Exception as caught:
            if self._is_lost(caught):
                raise
            error = caught
        self._drop(tenant, job)
        if error is None:
            return set()
        logger.error("the %s tower failed", job.kind, exc_info=error)
        if len(job.items) == 1:
            return set(job.items)
        for key, features in job.items.items():
            self.add({key: Wanted(tenant, features)})
        return set()

    def _fill(self, job: _Job, outputs: list[Tensor]) -> Exception | None:
        for features, rows in zip(job.items.values(), outputs, strict=True):
            if len(rows) != features.num_rows:
                return ValueError(f"the {job.kind} tower returned {len(rows)} rows instead of {features.num_rows}")
        for key, rows in zip(job.items, outputs, strict=True):
            if self._cache.is_awaited(key):
                # A copy where rows are a view of the whole group's output, which would live as long as any of them.
                self._cache.fill(key, rows.clone() if len(outputs) > 1 else rows)
        return None

    def _drop(self, tenant: bytes, job: _Job) -> None:
        jobs = self._jobs[tenant]
        jobs.remove(job)
        if not jobs:
            del self._jobs[tenant], self._used_s[tenant]


def encode_alone(
    model: Model, device: torch.device, kind: Modality, items: Sequence[MediaFeatures]
) -> Steps[list[Tensor]]:
    """`model.encoding` of what requests bring."""
    return model.encoding(kind, [{name: _tensor(array, device) for name, array in one.arrays.items()} for one in items])


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Signed integers say how pixels or samples lie: models read them as numbers, and so they stay here."""
    there = torch.from_numpy(array if array.flags.writeable else array.copy())
    return there if array.dtype.kind == "i" else there.to(device)
