"""From forms that requests ask for to grammars that compile: tried in processes of their own, the latest are kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from dataclasses import asdict
from functools import partial

from sensorium.config import PROMPT_MEMORY_BYTES
from sensorium.errors import GrammarError, OverloadedError, RateLimitError, UnavailableError
from sensorium.prompt.forms import Form
from sensorium.prompt.schema_faults import costly_part
from sensorium.system.nursery import Nursery
from sensorium.types import Grammar, Vocabulary
from sensorium.workers.connection import JobFailed, Reply, TurnMissed, Unanswered
from sensorium.workers.crew import Crew, Size
from sensorium.workers.frames import JOB, RESULT, bytes_frame, record_frame
from sensorium.workers.process import WorkerProcess

WORKERS = Size(1, 3, turn_s=5.0, total_s=8.0)
CPU_S = 4.0  # of one job
MEMORY_BYTES = 512 << 20  # beyond what a worker has after its imports
LEAST_MEMORY_BYTES = 32 << 20
PART = 0.35  # of the memory for prompts; the rest is for templates
MAX_REPLY_BYTES = 16 << 20
MAX_KEPT = 256
MAX_KEPT_CHARS = 4 << 20  # of the grammars that are kept, together


class GrammarPool:
    """Of one model. `vocabulary` is None where its tokens have no bytes: then no answer can be held to a form."""

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        vocab_size: int,
        *,
        cpu_s: float = CPU_S,
        size: Size = WORKERS,
        memory_bytes: int = PROMPT_MEMORY_BYTES,
        nursery: Nursery | None = None,
    ) -> None:
        """`memory_bytes` are the flag --prompt-memory. `nursery` is where workers come from that share what they
        import."""
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        size, each = size.within(int(PART * memory_bytes), MEMORY_BYTES, LEAST_MEMORY_BYTES)
        start = partial(WorkerProcess.start, "sensorium.prompt.grammar_worker", each, cpu_s, nursery=nursery)
        self._crew = Crew(start, size, max_reply_bytes=MAX_REPLY_BYTES)
        self._kept: OrderedDict[bytes, Grammar] = OrderedDict()
        self._kept_chars = 0
        self._asking: dict[bytes, asyncio.Future[Reply]] = {}  # jobs that have no answer yet

    @property
    def pids(self) -> list[int]:
        return self._crew.pids

    async def held(self, form: Form | None, tenant: bytes = b"") -> Grammar | None:
        """`grammar_of` where there is a form."""
        return None if form is None else await self.grammar_of(form, tenant)

    async def grammar_of(self, form: Form, tenant: bytes = b"") -> Grammar:
        """A grammar that compiles. GrammarError names the field of the form and says what is wrong.

        What is kept is a tenant's own: the time would tell which forms another one asks for."""
        if self._vocabulary is None:
            raise GrammarError("Structured output is not available for this model's tokenizer.", param=form.param)
        form.check_size()
        job = json.dumps({"form": asdict(form) | {"param": ""}, "names": self._names(form)}).encode()
        key = hashlib.sha256(len(tenant).to_bytes(4, "big") + tenant + job).digest()
        found = self._kept.get(key)
        if found is None:
            found = await self._compiled(form, job, key, tenant)
            self._keep(key, found)
        self._kept.move_to_end(key)
        return found

    def _names(self, form: Form) -> dict[str, object]:
        """The tokens that a grammar names, maybe."""
        if self._vocabulary is None or form.kind not in ("lark", "grammar") or "<" not in form.source:
            return {"texts": [], "vocab_size": 0}
        named = [text for _, text, _ in self._vocabulary.added if text in form.source]
        return {"texts": named, "vocab_size": self._vocab_size}

    async def _compiled(self, form: Form, job: bytes, key: bytes, tenant: bytes) -> Grammar:
        try:
            kind, body = await self._asked(job, key, tenant)
        except Unanswered as failure:
            raise _failure(failure, form) from None
        reply = json.loads(body)
        if kind == RESULT:
            return Grammar(reply["kind"], reply["source"])
        raise _refused(form, form.param + reply["path"], reply["reason"])

    async def _asked(self, job: bytes, key: bytes, tenant: bytes) -> Reply:
        """What a worker answers. Requests of a tenant for the same form, as batches have them, are one job: they would
        take its turns from one another until those that come last miss theirs."""
        asked = self._asking.get(key)
        if asked is None:
            asked = asyncio.ensure_future(self._crew.ask(record_frame(JOB, {}) + bytes_frame(job), tenant))
            self._asking[key] = asked
            asked.add_done_callback(lambda task: self._done(key, task))
        return await asyncio.shield(asked)  # whoever gives up does so for itself

    def _done(self, key: bytes, task: asyncio.Future[Reply]) -> None:
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # if nobody has waited for it, nobody need be told

    def _keep(self, key: bytes, grammar: Grammar) -> None:
        if key in self._kept:
            return
        self._kept[key] = grammar
        self._kept_chars += len(grammar.source)
        while len(self._kept) > MAX_KEPT or (len(self._kept) > 1 and self._kept_chars > MAX_KEPT_CHARS):
            _, oldest = self._kept.popitem(last=False)
            self._kept_chars -= len(oldest.source)

    async def aclose(self) -> None:
        await self._crew.aclose()


def either(first: Grammar, second: Grammar) -> Grammar:
    """What is of one form or the other."""
    parts = "".join(f"{name}: {nested(one)}\n" for name, one in (("first", first), ("second", second)))
    return Grammar("lark", f"start: first | second\n{parts}")


def nested(grammar: Grammar) -> str:
    """A grammar as a part of a rule of Lark."""
    return f"%json {grammar.source}" if grammar.kind == "json" else f"%lark {{\n{grammar.source}\n}}"


def _refused(form: Form, param: str, reason: str) -> GrammarError:
    code = "invalid_json_schema" if form.kind == "json" else None
    return GrammarError(f"`{param}` {reason}.", param=param, code=code)


def _failure(failure: Unanswered, form: Form) -> Exception:
    if isinstance(failure, JobFailed):
        reason = "is too complex: compiling it takes too much time or memory"
        part = costly_part(form.source) if form.kind == "json" else ""
        return _refused(form, form.param, f"{reason}; {part}" if part else reason)
    if isinstance(failure, TurnMissed):
        if failure.by_key:
            return RateLimitError("Too many grammars of this key are being compiled: wait for some of their answers.")
        return OverloadedError("Too many grammars are being compiled.")
    return UnavailableError("The grammar could not be compiled in time.")
