"""Runs one planned step on the device: towers, embedding, decoder, logits, sampler. Knows tensors, not schedules."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.engine.batch import Batch, BatchBuilder, MediaSlice, StepInput
from sensorium.engine.drafts import Tokens, sample_after_drafts
from sensorium.engine.encoder_cache import EncoderCache
from sensorium.engine.encoding import Encode, Encodings, encode_alone
from sensorium.engine.faults import Faults
from sensorium.engine.graphs import Graphs
from sensorium.engine.leader import Leader
from sensorium.engine.masks import Masks
from sensorium.engine.sampler import Sampler, logprobs
from sensorium.engine.scheduler import Plan
from sensorium.engine.sequence import Sequence
from sensorium.engine.shared_towers import SharedTowers
from sensorium.engine.step_messages import frame_of, moved, share_media
from sensorium.kernels.context import KVCache, LayerRows, NeededStates
from sensorium.kernels.transfers import to_device
from sensorium.models.adapters import Adapter, StepAdapters
from sensorium.models.base import Model
from sensorium.models.cache import attends_to_media
from sensorium.pooling.pooler import Pooler
from sensorium.types import PoolingTask

LOGPROB_ROWS = 64  # prompt positions whose logits exist at the same time

_adapter = attrgetter("adapter")

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepResult:
    """`sequences[i]` gained `tokens.token_ids[i]`; pooled sequences have what each of their
    tasks made by id."""

    sequences: list[Sequence]
    tokens: Tokens
    vectors: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that was launched. Until `result` is called the next may be prepared, but not launched."""

    result: Callable[[], StepResult]
    """Waits for the step; raises what it failed with."""


class Runner:
    """Use it in the mode that `computing` gives: entering that takes as long as a small operation, so it is not done in
    every method."""

    computing = torch.inference_mode

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        builder: BatchBuilder,
        sampler: Sampler,
        encoder: EncoderCache[Tensor],
        device: torch.device,
        *,
        masks: Masks,
        poolers: Mapping[PoolingTask, Pooler] | None = None,
        faults: Faults | None = None,
        graphs: Graphs | None = None,
        leader: Leader | None = None,
    ) -> None:
        """`graphs`: where decodes are captured, by and by: `capture_one`. `leader` tells the other ranks, where the
        model has some."""
        self._graphs = graphs
        builder.pads_to = self._padding
        self._model = model
        self._leader = leader
        self.is_torn = False  # in, or failed in, what all ranks do together
        self._attends_to_media = attends_to_media(model.cache_groups())
        self._cache = cache
        self._builder = builder
        self._sampler = sampler
        self._masks = masks
        self._encoder = encoder
        self._device = device
        self._poolers = dict(poolers or {})
        self._faults = faults or Faults()
        self._prepared: Batch | None = None
        self.overlaps = device.type != "cpu"  # whether there is time for `prepare`: a CPU computes in `launch`
        encode: Encode = functools.partial(encode_alone, model, device)
        if leader is not None:
            encode = SharedTowers(encode, leader, device).encoding
        self.encodings = Encodings(encode, encoder, is_device_lost, self._faults, gathers=self._attends_to_media)

    # One step

    def launch(self, plan: Plan) -> Pending:
        """Begin to compute a step. An accelerator is at it when this returns, a CPU is through with the layers."""
        self._faults.hit("step")
        batch = self._batch(plan)
        self._masks.begin(batch.sampled, may_ask=self._device.type == "cpu")
        context = batch.inputs.context
        context.adapters = adapters = self._adapters(batch)
        if plan.prefills:
            context.unseen = _unseen(batch.sequences)  # only they are pooled
        if adapters is None:
            context.needed_states = self._needed_states(plan)
        if self._attends_to_media:
            self._add_memories(batch)
        if self._leader is not None:
            self._tell(self._leader, batch)
        self._builder.send()
        logits = self._replayed(batch)
        if logits is None:
            hidden = self._compute(batch.inputs)
            self.is_torn = self.is_torn and bool(batch.sampled)  # then all have its logits to compute
            if batch.padded is not None:
                hidden = hidden[: len(batch.sequences)]
            if not self._samples_early(plan, batch):
                return Pending(lambda: self._finish(plan, batch, hidden))
            rows = batch.inputs.sampled_rows
            logits = self._logits(hidden if rows is None else hidden[rows])
        elif not self._samples_early(plan, batch):
            return Pending(lambda: self._sample(logits, batch))
        return self._sampling(logits, batch)

    def _samples_early(self, plan: Plan, batch: Batch) -> bool:
        """Whether all of a step can be launched at once: on an accelerator, where no host has work in between."""
        if not self.overlaps or self._leader is not None or batch.drafts or not batch.sampled:
            return False
        if any(seq.sampling is None or seq.sampling.prompt_logprobs is not None for seq, _ in plan.prefills):
            return False
        return not batch.ahead and not any(seq.constraint for seq in batch.sampled)

    def _sampling(self, logits: Tensor, batch: Batch) -> Pending:
        self._faults.hit("sample")
        finish = self._sampler.start(logits, batch.sampled)
        return Pending(lambda: StepResult(batch.sampled, Tokens.of(finish())))

    def _padding(self, decodes: list[Sequence]) -> int | None:
        """How many sequences the graph of these decodes has; None where none computes them."""
        if self._graphs is None or self._attends_to_media:
            return None
        if any(map(_adapter, decodes)):
            _say_uncaptured()
            return None
        return self._graphs.padded(len(decodes))

    def _replayed(self, batch: Batch) -> Tensor | None:
        """The logits of a step that a graph computes; None of one that has to be computed here."""
        if self._graphs is None or batch.padded is None:
            return None
        graph = self._graphs.find(batch.padded)
        if graph is None or not graph.reads(batch.inputs):
            return None
        graph.replay()
        return self._graphs.logits[: len(batch.sequences)]

    @property
    def can_capture(self) -> bool:
        """Whether there are graphs to be made yet."""
        return self._graphs is not None and self._graphs.missing

    @property
    def captures_all(self) -> bool:
        """Whether there are graphs for all numbers of sequences."""
        return self._graphs is not None and self._graphs.is_whole

    def capture_one(self) -> None:
        """Make the next graph. Nothing may be launched and not resolved."""
        if self._graphs is not None:
            self._prepared = None
            with self.computing():
                self._graphs.add(self._builder.blank, self._decode)

    def forget_kernels(self) -> None:
        """Others compute from the next step on."""
        self._model.forget_kernels()
        if self._graphs is not None:
            self._graphs.drop()

    def _decode(self, step: StepInput, logits: Tensor) -> None:
        """All of a step of decodes that a graph holds, into `logits` float32 [seqs, vocab]."""
        logits.copy_(self._model.logits(self._compute(step)))

    def _tell(self, leader: Leader, batch: Batch) -> None:
        """The other ranks, who compute the step, and the logits of what is sampled, without being told again."""
        frame, rows = frame_of(batch.inputs), batch.inputs.sampled_rows
        self.is_torn = True
        leader.send(frame)
        if batch.sampled:
            leader.logits(None if rows is None else rows.numpy())
        batch.inputs = moved(batch.inputs, self._device)

    def prepare(self, decodes: list[Sequence]) -> None:
        """Lay out the next step while one computes, as `Scheduler.foreseen` says what it will be. It is used if that is
        what is launched next."""
        self._prepared = self._builder.prepare(decodes)

    def _batch(self, plan: Plan) -> Batch:
        prepared, self._prepared = self._prepared, None
        if prepared is None or plan.chunks or prepared.sequences != plan.decodes:
            return self._builder.build(plan)
        if prepared.inputs.context.context_lens != [seq.num_tokens for seq in plan.decodes]:
            return self._builder.build(plan)
        self._builder.add_tokens(prepared)
        return prepared

    def _compute(self, step: StepInput) -> Tensor:
        """Hidden states of all tokens of a step: [tokens, hidden]."""
        self._builder.gather_tables(step)
        hidden = self._model.embed(step.token_ids, step.token_types)
        if step.media:
            rows = self._place_media(step.media, hidden)
            if self._leader is not None:
                num_tokens = sum(one.end - one.start for one in step.media)
                hidden, rows = share_media(self._leader.ranks, hidden, self._model.deepstack, num_tokens, rows)
            step.context.layer_rows = rows
        step.context.token_ids = step.token_ids
        return self._model.forward(hidden, step.positions, self._cache, step.context)

    def _finish(self, plan: Plan, batch: Batch, hidden: Tensor) -> StepResult:
        rows = batch.inputs.sampled_rows
        if rows is None:
            return self._sample(self._logits(hidden), batch)
        logits = self._logits(hidden[rows]) if batch.sampled else None
        vectors = self._finish_prefills(plan, batch, hidden)
        if logits is None:
            return StepResult([], Tokens([], {}, set()), vectors)
        return self._sample(logits, batch, vectors)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab]; all ranks compute them."""
        logits = self._model.logits(hidden)
        self.is_torn = False
        return logits

    def _place_media(self, media: list[MediaSlice], hidden: Tensor) -> LayerRows | None:
        """Write towers' rows into the embeddings [tokens, hidden]; returns what they have for later layers."""
        size, tokens, values = hidden.shape[1], [], []
        for one in media:
            rows = self._encoder.rows(one.key)[one.row : one.row + one.end - one.start]
            hidden[one.start : one.end] = rows[:, :size]
            if rows.shape[1] > size:  # of images and videos of a model that has deep rows; audio has none
                tokens.append(torch.arange(one.start, one.end, device=self._device))
                values.append(rows[:, size:].reshape(len(rows), -1, size))
        return LayerRows(torch.cat(tokens), torch.cat(values)) if tokens else None

    def _finish_prefills(self, plan: Plan, batch: Batch, hidden: Tensor) -> dict[int, list[NDArray[np.float32]]]:
        """Logprobs of prompts, and of prompts that are pooled the vectors, by request."""
        vectors: dict[int, list[NDArray[np.float32]]] = {}
        before = len(plan.decodes) + len(plan.drafted)
        for index, ((seq, count), start) in enumerate(zip(plan.prefills, batch.starts[before:], strict=True), before):
            if seq.sampling is None:
                states = hidden[start : start + count]
                if layers := batch.inputs.context.aligned.get(index):
                    states = torch.cat(layers).transpose(0, 1).flatten(1)  # [tokens, heads * rows]
                pooled = self._pool(seq, states)
                if pooled:
                    vectors[seq.id] = pooled
            elif seq.sampling.prompt_logprobs is not None:
                self._add_prompt_logprobs(seq, hidden, start, count, seq.sampling.prompt_logprobs)
        return vectors

    def _add_memories(self, batch: Batch) -> None:
        """What the sequences' media are to encoder-decoders, and whose attention to it is asked for."""
        sequences, context = batch.sequences, batch.inputs.context
        context.memories = [self._encoder.rows(seq.item_keys[item]) for seq in sequences for item in seq.memories]
        for index, seq in enumerate(sequences):
            if seq.request.pooling is not None and seq.request.pooling.task == "align":
                context.aligned[index] = []

    def _adapters(self, batch: Batch) -> StepAdapters | None:
        """Which tokens of the step are whose; the other ranks are told from the CPU."""
        if not any(map(_adapter, batch.sequences)):
            return None
        rows: dict[Adapter, list[int]] = {}
        ends = [*batch.starts[1:], len(batch.inputs.token_ids)]
        for seq, start, end in zip(batch.sequences, batch.starts, ends, strict=True):
            if seq.adapter is not None:
                rows.setdefault(seq.adapter, []).extend(range(start, end))
        parts = {one: np.array(own, np.int64) for one, own in rows.items() if len(own) < ends[-1]}
        there = to_device(list(parts.values()), self._device if self._leader is None else torch.device("cpu"))
        own_rows = dict(zip(parts, there, strict=True))
        return StepAdapters([(one, own_rows.get(one)) for one in rows])

    def _needed_states(self, plan: Plan) -> NeededStates:
        """The least that this step's requests read of what the model can leave away."""
        if plan.drafted:
            return "all"
        if self._model.partial_states == "first" and not plan.decodes:
            asked = [seq.request.pooling for seq, _ in plan.prefills]
            if all(
                params is not None
                and not params.prompt_tokens
                and all(self._poolers[task].first_only for task in params.tasks)
                for params in asked
            ):
                return "first"
        if self._model.partial_states == "last" and all(self._reads_last(seq) for seq, _ in plan.prefills):
            return "last"
        return "all"

    def _reads_last(self, seq: Sequence) -> bool:
        if seq.sampling is not None:
            return seq.sampling.prompt_logprobs is None
        params = seq.request.pooling
        return params is not None and not any(self._poolers[task].all_tokens for task in params.tasks)

    def _sample(
        self, logits: Tensor, batch: Batch, vectors: dict[int, list[NDArray[np.float32]]] | None = None
    ) -> StepResult:
        """Of logits [rows, vocab], in the order of `StepInput.sampled_rows`."""
        self._faults.hit("sample")
        sequences = batch.sampled
        first = logits[: len(sequences)] if batch.drafts else logits
        tokens = Tokens.of(self._sampler.sample(first, sequences, batch.ahead), batch.ahead)
        sample_after_drafts(self._sampler, logits, sequences, batch.drafts, tokens)
        return StepResult(sequences, tokens, vectors or {})

    def _pool(self, seq: Sequence, hidden: Tensor) -> list[NDArray[np.float32]]:
        """Keep the hidden states of a chunk; with the last one, what each of the request's tasks makes of them."""
        params = seq.request.pooling
        if params is None:
            raise ValueError("neither sampled nor pooled")
        poolers = [self._poolers[task] for task in params.tasks]
        needs_all = any(pooler.all_tokens for pooler in poolers)
        if seq.num_computed + len(hidden) < seq.num_tokens:
            if needs_all and sum(map(len, seq.hidden)) == seq.num_computed:  # else kept by a step that failed
                seq.hidden.append(hidden.clone())
            return []
        if needs_all and seq.hidden:
            hidden = torch.cat([*seq.hidden, hidden])
        ids = seq.tokens[: seq.num_tokens]
        made = [pooler(hidden if pooler.all_tokens else hidden[-1:], params, ids) for pooler in poolers]
        return [one.float().cpu().numpy() for one in made]

    def _add_prompt_logprobs(self, seq: Sequence, hidden: Tensor, place: int, count: int, num_top: int) -> None:
        """Logprobs of the prompt tokens that follow those of a chunk, whose `count` states begin at `place`; a resumed
        sequence has them already."""
        first = max(seq.num_computed, len(seq.prompt_logprobs) - 1)
        last = min(seq.num_computed + count, seq.num_prompt - 1)
        for start in range(first, last, LOGPROB_ROWS):
            end = min(start + LOGPROB_ROWS, last)
            shift = place - seq.num_computed
            if self._leader is not None:
                self.is_torn = True
                self._leader.logits(np.arange(start + shift, end + shift))
            logits = self._logits(hidden[start + shift : end + shift]).float()
            targets = seq.tokens[start + 1 : end + 1].tolist()
            seq.prompt_logprobs.extend(logprobs(logits, targets, [num_top] * len(targets)))


def _unseen(sequences: list[Sequence]) -> list[int] | None:
    """Tokens at each sequence's end that nobody attends to; None where there are none."""
    unseen = [0 if seq.request.pooling is None else seq.request.pooling.unseen_tokens for seq in sequences]
    return unseen if any(unseen) else None


@functools.cache
def _say_uncaptured() -> None:
    logger.warning("steps with LoRA adapters are not replayed as graphs: who has which adapter changes what they start")


def is_device_lost(error: BaseException) -> bool:
    """Whether the accelerator's context is gone, so that only a new process can go on."""
    return isinstance(error, torch.AcceleratorError)
