"""Compiles grammars on a thread, while their requests wait and others are computed, and keeps the latest of them: a
request whose grammar is kept does not wait."""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from time import monotonic

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from sensorium.engine.constraint import Constraint
from sensorium.engine.matchers import VERSIONS, NativeMatcher, NativeTokenizer, library
from sensorium.engine.spelling import Speller, ends_within, plain_tokenizer
from sensorium.errors import GRAMMAR_NOT_COMPILED
from sensorium.types import EngineRequest, Grammar, Vocabulary

MAX_KEPT = 64  # compiled grammars
MAX_KEPT_CHARS = 4 * 1024**2  # of their sources together
LIMITS = LLParserLimits(step_lexer_fuel=100_000, max_items_in_row=16_000, verbose_errors=False)
STACK_BYTES = 64 * 1024**2
"""Of the compiling thread: eight times what the HTTP process's worker has, where every grammar was compiled first."""
SMALL_VOCABULARY = 4096
"""Tokens whose table the library builds in 30 ms: nobody shall wait longer for the interpreter's lock."""
NO_INTERFACE = (
    "the installed llguidance has no C interface that is known (%s has): answers wait while it opens the tokenizer"
)
NO_VOCABULARY = "Structured output is not available for this model's tokenizer."

logger = logging.getLogger("sensorium.engine")

Tokenizer = LLTokenizer | NativeTokenizer
Prepared = tuple[EngineRequest, "Constraint | str"]
"""A request and what holds it to its grammar, or why there is none."""
Key = tuple[bytes, str, str]
"""(a request's salt, a grammar's kind and source)"""
Compiled = LLMatcher | NativeMatcher | str
"""A grammar at its beginning, or why it has none."""


class Grammars:
    """`vocab_size` is the width of the logits. `wake` is called, by the thread, when something is ready to `take`.

    What the thread does not have to do is done at once: wherever it needs the interpreter's lock it waits for the step
    loop.
    """

    def __init__(self, vocab_size: int, wake: Callable[[], None]) -> None:
        self.vocabulary: Vocabulary | None = None
        self._vocab_size = vocab_size
        self._wake = wake
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._done: SimpleQueue[tuple[Key, Compiled]] = SimpleQueue()
        self._compiling: dict[Key, list[EngineRequest]] = {}
        self._waiting: dict[int, None] = {}  # ids of these requests, without those that were aborted
        self._kept: OrderedDict[Key, Compiled] = OrderedDict()
        self._tokenizer: Tokenizer | None = None  # of the thread
        self._speller: Speller | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def prepare(self, request: EngineRequest, grammar: Grammar) -> Constraint | str | None:
        """What a request is held to, or why it cannot be. None where its grammar has to be compiled: see `take`."""
        if self.vocabulary is None:
            return NO_VOCABULARY
        key = (request.salt, grammar.kind, grammar.source)
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return self._held(request, found, self.vocabulary)
        self._waiting[request.id] = None
        asking = self._compiling.setdefault(key, [])
        asking.append(request)
        if len(asking) == 1:
            usual = threading.stack_size(STACK_BYTES)  # for the thread that the first request starts
            self._thread.submit(self._prepare, key, grammar, self.vocabulary).add_done_callback(_log_failure)
            threading.stack_size(usual)
        return None

    def close(self) -> None:
        """End the process that large vocabularies have."""
        if self._speller is not None:
            speller, self._speller = self._speller, None
            speller.close()

    def abort(self, request_id: int) -> None:
        self._waiting.pop(request_id, None)

    def take(self) -> list[Prepared]:
        """The requests that are ready, but for those that were aborted."""
        found: list[Prepared] = []
        while self.vocabulary is not None:
            try:
                key, compiled = self._done.get_nowait()
            except Empty:
                break
            self._keep(key, compiled)
            for request in self._compiling.pop(key):
                if self._waiting.pop(request.id, 0) is None:
                    found.append((request, self._held(request, compiled, self.vocabulary)))
        return found

    def _held(self, request: EngineRequest, compiled: Compiled, vocabulary: Vocabulary) -> Constraint | str:
        if isinstance(compiled, str):
            return compiled
        stops = request.sampling.stop_token_ids if request.sampling is not None else ()
        late_ends = [token for token in vocabulary.ends if token < self._vocab_size and token not in stops]
        constraint = Constraint(compiled.deep_copy(), late_ends)
        return constraint.error or constraint

    def _keep(self, key: Key, compiled: Compiled) -> None:
        self._kept[key] = compiled
        while len(self._kept) > MAX_KEPT or (len(self._kept) > 1 and self._kept_chars() > MAX_KEPT_CHARS):
            self._kept.popitem(last=False)

    def _kept_chars(self) -> int:
        return sum(len(source) for _, _, source in self._kept)

    # The thread's part

    def _prepare(self, key: Key, grammar: Grammar, vocabulary: Vocabulary) -> None:
        compiled: Compiled = GRAMMAR_NOT_COMPILED
        try:
            compiled = self._compiled(grammar, vocabulary)
        finally:  # whatever the library raises, the requests must not wait for ever
            self._done.put((key, compiled))
            self._wake()

    def _compiled(self, grammar: Grammar, vocabulary: Vocabulary) -> Compiled:
        """At its beginning, with the first mask computed and what it forces spelled once: copies share the automaton
        that this has built."""
        if self._tokenizer is None:
            started = monotonic()
            self._tokenizer = self.open(vocabulary)
            logger.info("the tokenizer is ready for grammars after %.1f s", monotonic() - started)
        matcher = matcher_of(self._tokenizer, described(grammar, vocabulary.lead))
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            logger.warning("a grammar could not be compiled: %s", matcher.get_error()[:200])
            return GRAMMAR_NOT_COMPILED
        return Constraint(matcher.deep_copy()).error or matcher

    def open(self, vocabulary: Vocabulary) -> Tokenizer:
        """A large one is opened by a process of its own, and built here without the interpreter's lock."""
        native, ends = library(), ends_within(vocabulary, self._vocab_size)
        is_large = self._vocab_size > SMALL_VOCABULARY
        if native is None and is_large:
            logger.warning(NO_INTERFACE, " or ".join(VERSIONS))
        elif native is not None and ends and is_large:
            self._speller = Speller(vocabulary, self._vocab_size)
            try:
                return NativeTokenizer(native, self._speller.table(), ends, self._speller.spelled)
            except (OSError, ValueError) as error:
                logger.warning("a grammar's tokenizer is built in the engine, where answers wait for it: %s", error)
                self.close()
        return open_tokenizer(vocabulary, self._vocab_size)


def _log_failure(done: Future[None]) -> None:
    if (error := done.exception()) is not None:
        logger.error("a grammar could not be compiled", exc_info=error)


def described(grammar: Grammar, lead: int = 0) -> str:
    """A grammar as the library reads it. Before what it describes there may be the `lead` spaces that a tokenizer puts
    before a text."""
    if grammar.kind == "json":
        form = f'{{"name": "form", "json_schema": {grammar.source}}}'
    else:
        lark = grammar.source if grammar.kind == "lark" else f"start: /{regex_to_lark(grammar.source, '')}/"
        form = json.dumps({"name": "form", "lark_grammar": lark})
    if not lead:
        return f'{{"grammars": [{form}]}}'
    spaces = " ".join(['" "?'] * lead)
    whole = json.dumps({"name": "whole", "lark_grammar": f"start: {spaces} @form"})
    return f'{{"grammars": [{whole}, {form}]}}'


def open_tokenizer(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """The library's tokenizer, in two steps: each holds the interpreter's lock, for 0.9 and 0.5 s of a processor where
    there are 150,000 tokens, and others run between them."""
    return plain_tokenizer(vocabulary, vocab_size).with_slices(LLTokenizer.general_slices())


def matcher_of(tokenizer: Tokenizer, grammar: str) -> LLMatcher | NativeMatcher:
    """At the beginning of a grammar that is `described`."""
    if isinstance(tokenizer, NativeTokenizer):
        return tokenizer.matcher(grammar, LIMITS)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
