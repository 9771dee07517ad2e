"""The engine process: `python -m sensorium.engine.loop --fd N`. Messages in, steps, messages out.

A step that fails ends the requests of that step and nothing else; a lost device ends the process, and the client starts
another one. The process lives exactly as long as its socket: end of file means that the parent is gone.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import socket
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING

from sensorium.engine.faults import VARIABLE, Faults
from sensorium.engine.torch_modules import postpone_unused
from sensorium.errors import StartupError
from sensorium.ipc import messages
from sensorium.ipc.channel import Channel
from sensorium.ipc.liveness import BEAT_S, Pulse
from sensorium.ipc.messages import Kind, ProtocolError, StepOutputs
from sensorium.system.collector import no_collection
from sensorium.system.malloc import forget_code, trim
from sensorium.types import (
    STEP_TOKENS,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    TokenLogprob,
    Vocabulary,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sensorium.config import EngineConfig
    from sensorium.engine.constraint import Constraint
    from sensorium.engine.grammars import Grammars
    from sensorium.engine.leader import Leader
    from sensorium.engine.loading import Engine
    from sensorium.engine.runner import StepResult
    from sensorium.engine.scheduler import Plan
    from sensorium.engine.sequence import Sequence
    from sensorium.models.adapters import Adapter

STATS_INTERVAL_S = 0.25
PROGRESS_INTERVAL_S = 0.05
REST_S = 2.0  # without a request; the next one finds a little less in memory
MAX_FAILED_SHAPES = 256
STEP_FAILED = "The engine failed while it computed this request."
NO_ADAPTER = "The adapter of this request is not loaded."
NOT_FINITE = "The model's output for this request is not a number."
MEDIA_FAILED = "The model failed to encode the media of this request."
TORCH_ENVIRONMENT = {"MKL_CBWR": "AUTO,STRICT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
MASK_ENVIRONMENT = {"RUST_MIN_STACK": str(16 * 1024**2)}  # of the threads that compute grammars' masks

logger = logging.getLogger("sensorium.engine")


class Core:
    """The step loop around one loaded engine."""

    def __init__(self, engine: Engine, channel: Channel, faults: Faults, pulse: Pulse | None = None) -> None:
        self._engine = engine
        self._pulse = pulse or Pulse(channel.beat, 0.0)  # one that is not started watches nothing
        self._scheduler = engine.scheduler
        self._runner = engine.runner
        self._channel = channel
        self._faults = faults
        self._steps = 0
        self._step_seconds = 0.0
        self._step_tokens = 0
        self._steps_by_tokens = [0] * (len(STEP_TOKENS) + 1)
        self._encoder_seconds = 0.0
        self._stats_due = 0.0
        self._vocabulary: Vocabulary | None = None
        self._failed_shapes: set[tuple[int, ...]] = set()
        self._refused = StepOutputs()
        self._is_torn = True  # memory, since the last rest
        self._adapters: dict[int, Adapter] = {}  # of requests that are not with the scheduler yet

    @cached_property
    def _grammars(self) -> Grammars:
        """With the library, whose import takes a tenth of a second, from the first request that needs it on."""
        from sensorium.engine.grammars import Grammars

        made = Grammars(self._engine.vocab_size, self._channel.wake)
        made.vocabulary = self._vocabulary
        return made

    @property
    def _num_compiling(self) -> int:
        """Requests that wait for their grammars."""
        return self._grammars.num_waiting if "_grammars" in vars(self) else 0

    def run(self) -> None:
        if self._engine.warming is not None:
            self._engine.warming.start(self._channel.wake)
        while self.turn():
            pass

    def has_work(self) -> bool:
        return self._scheduler.has_work() or self._num_compiling > 0

    def turn(self) -> bool:
        """Messages, then one step. False when the client said goodbye."""
        idle = not self._scheduler.has_work()
        if idle:
            self._send_stats()
        self._engine.take_kernels()
        has_work = self._engine.has_idle_work
        frames = self._channel.poll(wait=idle and not has_work, patience_s=REST_S if self._is_torn else None)
        if idle and not frames:
            self._pulse.begin(slow=True)
            if has_work:
                self._engine.idle_work()
            elif self._is_torn:
                self._rest()
            self._pulse.end()
        self._pulse.begin()
        for kind, payload in frames:
            if not self._take(kind, payload):
                return False
        self._add_prepared()
        if self._refused:
            self._send(self._refused)
            self._refused = StepOutputs()
        if self._scheduler.has_work():
            self._is_torn = True
            started = monotonic()
            self._step()
            now = monotonic()
            self._steps += 1
            self._step_seconds = now - started
            self._pulse.begin()
            self._engine.pack_some()
            if now >= self._stats_due:
                self._send_stats()
        self._pulse.end()
        return True

    def _rest(self) -> None:
        """Give back what loading and steps have left: memory that is free in between, and code that ran once."""
        self._is_torn = False
        trim()
        forget_code()

    def _take(self, kind: int, payload: memoryview) -> bool:
        if kind == Kind.REQUEST:
            self._add(messages.decode_request(payload))
        elif kind == Kind.ABORT:
            for request_id in messages.decode_abort(payload):
                self._scheduler.abort(request_id)
                self._adapters.pop(request_id, None)
                if self._num_compiling:
                    self._grammars.abort(request_id)
        elif kind == Kind.LOAD_ADAPTER:
            self._load_adapter(*messages.decode_load_adapter(payload))
        elif kind == Kind.UNLOAD_ADAPTER:
            self._engine.adapters.unload(messages.decode_unload_adapter(payload))
        elif kind == Kind.VOCABULARY:
            self._vocabulary = messages.decode_vocabulary(payload)
        elif kind == Kind.SHUTDOWN:
            return False
        elif kind != Kind.WAKE:
            raise ProtocolError(f"message of kind {kind}")
        return True

    def _load_adapter(self, number: int, folder: str) -> None:
        self._pulse.begin(slow=True)
        error = self._engine.adapters.load(number, folder)
        self._pulse.end()
        self._channel.send(messages.encode_adapter(number, error, self._engine.adapters.nbytes(number)))

    def _add(self, request: EngineRequest) -> None:
        if request.adapter:
            adapter = self._engine.adapters.find(request.adapter)
            if adapter is None:
                self._refused.add(EngineOutput(request.id, finish_reason="error", error=NO_ADAPTER))
                return
            self._adapters[request.id] = adapter
        grammar = None if request.sampling is None else request.sampling.grammar
        if grammar is None:
            self._queue(request)
        elif (prepared := self._grammars.prepare(request, grammar)) is not None:
            self._queue_prepared(request, prepared)

    def _add_prepared(self) -> None:
        """Queue the requests whose grammars are compiled."""
        if not self._num_compiling:
            return
        for request, prepared in self._grammars.take():
            self._queue_prepared(request, prepared)

    def _queue_prepared(self, request: EngineRequest, prepared: Constraint | str) -> None:
        """With what holds it to its grammar, or refused."""
        if isinstance(prepared, str):
            self._adapters.pop(request.id, None)
            self._refused.add(EngineOutput(request.id, finish_reason="error", error=prepared))
        else:
            self._queue(request, prepared)

    def _queue(self, request: EngineRequest, constraint: Constraint | None = None) -> None:
        refusal = self._scheduler.add(request, constraint, self._adapters.pop(request.id, None))
        if refusal is not None:
            self._refused.add(refusal)

    # One step: schedule, towers, forward and sample, take the results

    def _step(self) -> None:
        outputs = StepOutputs()
        self._encode(outputs)
        self._guess()
        self._pulse.begin()
        plan, ended = self._scheduler.schedule()
        computed_s = 0.0
        outputs.extend(ended)
        if plan.encode:
            self._runner.encodings.add(plan.encode)
        if plan:
            self._count(sum(count for _, count in plan.work))
            self._pulse.begin(self._engine.work_of(plan))
            started = monotonic()
            with self._runner.computing():
                parts = self._compute(plan, outputs)
            if self._engine.lookup is not None:
                self._engine.lookup.observe(plan, monotonic() - started)
            for part, result in parts:
                self._take_results(part, result, outputs)
            computed_s = monotonic() - started
            self._engine.check_memory(sum(count for _, count in plan.work))
        if self._runner.encodings:
            self._runner.encodings.step_took({seq.request.turn for seq in plan.sequences()}, computed_s)
        self._pulse.end()
        self._faults.hit("send")
        self._send(outputs)

    def _count(self, tokens: int) -> None:
        self._step_tokens += tokens
        self._steps_by_tokens[bisect_left(STEP_TOKENS, tokens)] += 1

    def _compute(self, plan: Plan, outputs: StepOutputs) -> list[tuple[Plan, StepResult]]:
        """Run a plan. If that fails, its requests fail; if its shape has failed before, only those that fail alone."""
        try:
            pending = self._runner.launch(plan)
            if self._runner.overlaps and (coming := self._scheduler.foreseen(plan)):
                self._runner.prepare(coming)
            return [(plan, pending.result())]
        except Exception as error:
            self._raise_if_lost(error)
            logger.error("a step failed: %d decodes, %d prompts", len(plan.decodes), len(plan.prefills), exc_info=error)
        shape = (len(plan.decodes), *(count for _, count in plan.chunks))
        sequences = plan.sequences()
        if shape not in self._failed_shapes or len(sequences) == 1:
            if len(self._failed_shapes) >= MAX_FAILED_SHAPES:
                self._failed_shapes.clear()
            self._failed_shapes.add(shape)
            outputs.extend(self._scheduler.fail(seq, STEP_FAILED) for seq in sequences)
            return []
        results = []
        for part in plan.singles():
            try:
                results.append((part, self._runner.launch(part).result()))
            except Exception as error:
                self._raise_if_lost(error)
                outputs.extend(self._scheduler.fail(seq, STEP_FAILED) for seq in part.sequences())
        return results

    def _raise_if_lost(self, error: Exception) -> None:
        from sensorium.engine.runner import is_device_lost

        if is_device_lost(error) or self._runner.is_torn:
            raise error

    def _guess(self) -> None:
        """What the draft model says of the sequences that decode. If it fails they go on without it."""
        drafting = self._engine.drafting
        if drafting is None or not self._scheduler.decoding:
            return
        self._pulse.begin()
        try:
            with self._runner.computing():
                drafting.think(self._scheduler.decoding)
        except Exception as error:
            self._raise_if_lost(error)
            logger.error("the draft model failed, and is not asked again", exc_info=error)
            drafting.give_up()

    def _encode(self, outputs: StepOutputs) -> None:
        """A little of what the towers have to do."""
        if not self._runner.encodings:
            return
        started = monotonic()
        failed = self._runner.encodings.run(self._pulse.begin)
        self._encoder_seconds += monotonic() - started
        if failed:
            outputs.extend(self._scheduler.drop_failed_items(failed, MEDIA_FAILED))

    def _take_results(self, plan: Plan, result: StepResult, outputs: StepOutputs) -> None:
        """Advance every sequence of a computed plan and add what it gained to `outputs`."""
        scheduler = self._scheduler
        for seq in plan.decodes:
            scheduler.advance(seq, 1)
        for seq, _ in plan.drafted:  # `commit` says how many drafts were right
            scheduler.advance(seq, 1)
        for seq, count in plan.prefills:
            scheduler.advance(seq, count)
        gained = result.tokens
        for i, (seq, token_ids) in enumerate(zip(result.sequences, gained.token_ids, strict=True)):
            if i in gained.failed:
                outputs.add(scheduler.fail(seq, (seq.constraint and seq.constraint.error) or NOT_FINITE))
            else:
                self._commit(seq, token_ids, gained.logprobs.get(i), outputs)
        for seq, _ in plan.prefills:
            vectors = result.vectors.get(seq.id)
            if vectors is not None:
                scheduler.finish(seq)
                outputs.add(_full_output(seq, [], "stop", [], vectors))

    def _commit(
        self, seq: Sequence, token_ids: list[int], logprobs: list[TokenLogprob] | None, outputs: StepOutputs
    ) -> None:
        before = seq.num_tokens
        reason = self._scheduler.commit(seq, token_ids)
        if reason is None and before > seq.num_prompt and logprobs is None:
            for token_id in token_ids:
                outputs.add_token(seq.id, token_id)
        else:
            taken = seq.num_tokens - before
            outputs.add(_full_output(seq, token_ids[:taken], reason, (logprobs or [])[:taken]))

    # Out

    def _send(self, outputs: StepOutputs) -> None:
        if outputs:
            self._pulse.end()
            self._channel.send(messages.encode_outputs(outputs))

    def _send_stats(self) -> None:
        scheduler, encoder, prefixes = self._scheduler, self._engine.encoder, self._engine.prefixes
        lookup = self._engine.lookup
        self._pulse.end()
        self._channel.send(
            messages.encode_stats(
                EngineStats(
                    running=scheduler.num_running,
                    waiting=len(scheduler.waiting) + self._num_compiling,
                    deferred=self._num_compiling,
                    kv_blocks=scheduler.pool.num_blocks,
                    kv_blocks_free=scheduler.pool.num_free,
                    prefix_queries=prefixes.queries,
                    prefix_hits=prefixes.hits,
                    encoder_queries=encoder.queries,
                    encoder_hits=encoder.hits,
                    encoder_bytes=encoder.size_bytes,
                    encoder_seconds=self._encoder_seconds,
                    preemptions=scheduler.preemptions,
                    steps=self._steps,
                    step_seconds=self._step_seconds,
                    step_tokens=self._step_tokens,
                    steps_by_tokens=tuple(self._steps_by_tokens),
                    drafts=lookup.num_drafts if lookup else 0,
                    draft_tokens=lookup.num_draft_tokens if lookup else 0,
                    accepted_tokens=lookup.num_accepted_tokens if lookup else 0,
                    accepted_by_place=tuple(lookup.accepted_by_place) if lookup else (),
                )
            )
        )
        self._stats_due = monotonic() + STATS_INTERVAL_S


def _full_output(
    seq: Sequence,
    token_ids: list[int],
    reason: FinishReason | None,
    logprobs: list[TokenLogprob],
    vectors: list[NDArray[np.float32]] | None = None,
) -> EngineOutput:
    """Tokens, or vectors, with all that belongs to them; the first ones bring what is known of the prompt."""
    is_first = seq.num_outputs == len(token_ids)
    scores_prompt = seq.sampling is not None and seq.sampling.prompt_logprobs is not None
    return EngineOutput(
        seq.id,
        tuple(token_ids),
        reason,
        token_ids[-1] if reason == "stop" and token_ids and token_ids[-1] in seq.stop_ids else None,
        tuple(logprobs),
        tuple(seq.prompt_logprobs) if is_first and scores_prompt else (),
        seq.cached_tokens if is_first else 0,
        vectors[0] if vectors else None,
        queue_s=seq.started_s - seq.arrived_s if is_first else 0.0,
        prefill_s=monotonic() - seq.started_s if is_first else 0.0,
        preemptions=0 if reason is None else seq.num_preemptions,
        others=tuple(vectors[1:]) if vectors else (),
    )


class _Report:
    """Progress of loading, told at most every `PROGRESS_INTERVAL_S`, but every end of a phase."""

    def __init__(self, channel: Channel, pulse: Pulse) -> None:
        self._channel = channel
        self._pulse = pulse
        self._due = 0.0

    def __call__(self, phase: str, fraction: float) -> None:
        self._pulse.begin(slow=True)
        now = monotonic()
        if now >= self._due or fraction in (0.0, 1.0):
            self._channel.send(messages.encode_progress(phase, fraction))
            self._due = now + PROGRESS_INTERVAL_S


class _Imports:
    """A thread that imports torch and all that uses it while the main one waits for the configuration."""

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine-imports", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with no_collection():
                import sensorium.engine.loading  # noqa: F401
        except Exception as error:
            self._error = error

    def wait(self) -> Callable[..., Engine]:
        """`load_engine`. Raises what the import has raised: a second one would tell of its remains."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        from sensorium.engine.loading import load_engine

        return load_engine


def serve(sock: socket.socket, faults: Faults, imports: _Imports | None = None) -> int:
    """Load what the first frame asks for and step until told to stop. Returns the exit code."""
    channel = Channel(sock)
    try:
        kind, payload = channel.receive()
    except EOFError:  # nothing is to be loaded after all
        return 0
    if kind != Kind.CONFIG:
        raise ProtocolError("the first message is not the configuration")
    config = messages.decode_config(payload)
    channel.start()
    leader = None
    if config.tensor_parallel_size > 1:
        leader = _lead(config, channel)
    pulse = Pulse(channel.beat, config.hang_after_s) if leader is None else _pulse_of(leader, channel, config)
    pulse.start()
    try:
        return _load_and_run(config, channel, pulse, faults, leader, imports)
    finally:
        if leader is not None:
            leader.close()


def _lead(config: EngineConfig, channel: Channel) -> Leader:
    """With the followers started, which import what they need while this process does."""
    from sensorium.engine.leader import Leader, start_followers

    followers = [(one.socket, one.process.pid) for one in start_followers(config.tensor_parallel_size)]
    return Leader(config, followers, tell=lambda text: channel.send(messages.encode_lost(text)))


def _pulse_of(leader: Leader, channel: Channel, config: EngineConfig) -> Pulse:
    """Followers are looked at with every beat, and given up before this process gives up itself."""

    def beat() -> None:
        channel.beat()
        leader.look()

    return Pulse(beat, config.hang_after_s + 3 * BEAT_S, leader.blame_hanging)


def _load_and_run(
    config: EngineConfig,
    channel: Channel,
    pulse: Pulse,
    faults: Faults,
    leader: Leader | None,
    imports: _Imports | None,
) -> int:
    report = _Report(channel, pulse)
    report("imports", 0.0)
    try:
        load_engine = (imports or _Imports()).wait()  # imports torch: the client hears of us before that
        engine = load_engine(config, progress=report, faults=faults, leader=leader)
    except StartupError as error:
        channel.send(messages.encode_fatal(error.message))
        return 2
    except MemoryError:
        channel.send(messages.encode_fatal("not enough memory to load the model"))
        return 2
    except Exception as error:
        logger.exception("the model could not be loaded")
        channel.send(messages.encode_fatal(f"the model could not be loaded: {described(error)}"))
        return 1
    gc.collect()
    gc.freeze()  # what is loaded stays, as what is imported does
    pulse.end()
    channel.send(messages.encode_ready(engine.ready))
    core = Core(engine, channel, faults, pulse)
    try:
        core.run()
    except Exception as error:
        logger.exception("the engine cannot go on")
        if leader is not None:
            leader.blame_failed()
        channel.send(messages.encode_fatal(f"the engine stopped: {described(error)}"))
        return 1
    return 0


def described(error: BaseException) -> str:
    """One line for the operator."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def set_torch_environment() -> None:
    """What torch's libraries read before their first product; what the operator has set stays.

    Without the first MKL's float32 products differ in their last bit with the number of threads; it costs nothing. The
    others bound what oneDNN keeps of every shape that it has met, up to 1,024 of half a megabyte: a step whose number
    of rows is new takes 0.4 ms longer for each size of weight.
    """
    for name, value in (TORCH_ENVIRONMENT | MASK_ENVIRONMENT).items():
        os.environ.setdefault(name, value)


def prepare_process() -> None:
    """What is to be so before anything is imported."""
    # The parent decides when this process ends; signals to the whole group or service are the parent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s engine: %(message)s", stream=sys.stderr)
    set_torch_environment()
    postpone_unused()


def serve_at(sock: socket.socket, imports: _Imports | None = None) -> int:
    return serve(sock, Faults(os.environ.get(VARIABLE, "")), imports)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the server")
    arguments = parser.parse_args()
    prepare_process()
    return serve_at(socket.socket(fileno=arguments.fd), _Imports())


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # nothing to tear down that the system does not, and it is quicker
