"""Runs one planned step on the device: towers, embedding, decoder, logits, sampler. Knows tensors, not schedules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.engine.batch import Batch, BatchBuilder, MediaSlice, StepInput
from sensorium.engine.drafts import Tokens, sample_after_drafts
from sensorium.engine.encoder_cache import EncoderCache
from sensorium.engine.encoding import Encodings
from sensorium.engine.faults import Faults
from sensorium.engine.masks import Masks
from sensorium.engine.sampler import Sampler, logprobs
from sensorium.engine.scheduler import Plan
from sensorium.engine.sequence import Sequence
from sensorium.kernels.context import KVCache, LayerRows, NeededStates
from sensorium.models.base import Model
from sensorium.models.cache import attends_to_media
from sensorium.pooling.pooler import Pooler
from sensorium.types import MediaFeatures, PoolingTask

LOGPROB_ROWS = 64  # prompt positions whose logits exist at the same time

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
    ) -> None:
        self._model = model
        self._attends_to_media = attends_to_media(model.cache_groups())
        self._cache = cache
        self._builder = builder
        self._sampler = sampler
        self._masks = masks
        self._encoder = encoder
        self._device = device
        self._poolers = dict(poolers or {})
        self._faults = faults or Faults()
        self.encodings = Encodings(model, encoder, self._tensors, is_device_lost, self._faults)

    # One step

    def launch(self, plan: Plan) -> Pending:
        """Begin to compute a step. An accelerator is at it when this returns, a CPU is through with the layers."""
        self._faults.hit("step")
        batch = self._builder.build(plan)
        self._masks.begin(batch.sampled)
        batch.inputs.context.needed_states = self._needed_states(plan)
        if plan.prefills:  # only they are pooled
            batch.inputs.context.unseen = _unseen(batch.sequences)
        if self._attends_to_media:
            self._add_memories(batch)
        hidden = self._compute(batch.inputs)
        return Pending(lambda: self._finish(plan, batch, hidden))

    @torch.inference_mode()
    def _compute(self, step: StepInput) -> Tensor:
        """Hidden states of all tokens of a step: [tokens, hidden]."""
        hidden = self._model.embed(step.token_ids, step.token_types)
        step.context.layer_rows = self._place_media(step.media, hidden)
        step.context.token_ids = step.token_ids
        return self._model.forward(hidden, step.positions, self._cache, step.context)

    @torch.inference_mode()
    def _finish(self, plan: Plan, batch: Batch, hidden: Tensor) -> StepResult:
        if batch.inputs.sampled_rows is None:
            return StepResult(batch.sampled, self._sample(hidden, batch))
        vectors = self._finish_prefills(plan, batch, hidden)
        if not batch.sampled:
            return StepResult([], Tokens([], {}, set()), vectors)
        return StepResult(batch.sampled, self._sample(hidden[batch.inputs.sampled_rows], batch), vectors)

    def _place_media(self, media: list[MediaSlice], hidden: Tensor) -> LayerRows | None:
        """Write towers' rows into the embeddings [tokens, hidden]; returns what they have for later layers."""
        size, tokens, values = hidden.shape[1], [], []
        for one in media:
            rows = self._encoder.rows(one.key)[one.row : one.row + one.end - one.start]
            hidden[one.start : one.end] = rows[:, :size]
            if self._model.deepstack:
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
                self._add_prompt_logprobs(seq, hidden[start : start + count], seq.sampling.prompt_logprobs)
        return vectors

    def _add_memories(self, batch: Batch) -> None:
        """What the sequences' media are to encoder-decoders, and whose attention to it is asked for."""
        sequences, context = batch.sequences, batch.inputs.context
        context.memories = [self._encoder.rows(seq.item_keys[item]) for seq in sequences for item in seq.memories]
        for index, seq in enumerate(sequences):
            if seq.request.pooling is not None and seq.request.pooling.task == "align":
                context.aligned[index] = []

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

    def _sample(self, hidden: Tensor, batch: Batch) -> Tokens:
        logits = self._model.logits(hidden)  # [rows, vocab]
        self._faults.hit("sample")
        sequences = batch.sampled
        first = logits[: len(sequences)] if batch.drafts else logits
        tokens = Tokens.of(self._sampler.sample(first, sequences, batch.ahead), batch.ahead)
        sample_after_drafts(self._sampler, logits, sequences, batch.drafts, tokens)
        return tokens

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

    def _add_prompt_logprobs(self, seq: Sequence, hidden: Tensor, num_top: int) -> None:
        """Logprobs of the prompt tokens that follow those of a chunk; a resumed sequence has them already."""
        first = max(seq.num_computed, len(seq.prompt_logprobs) - 1)
        last = min(seq.num_computed + len(hidden), seq.num_prompt - 1)
        for start in range(first, last, LOGPROB_ROWS):
            end = min(start + LOGPROB_ROWS, last)
            logits = self._model.logits(hidden[start - seq.num_computed : end - seq.num_computed]).float()
            targets = seq.tokens[start + 1 : end + 1].tolist()
            seq.prompt_logprobs.extend(logprobs(logits, targets, [num_top] * len(targets)))

    def _tensors(self, features: MediaFeatures) -> dict[str, Tensor]:
        return {name: self._tensor(array) for name, array in features.arrays.items()}

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        if not array.flags.writeable:
            array = array.copy()
        return torch.from_numpy(array).to(self._device)


def _unseen(sequences: list[Sequence]) -> list[int] | None:
    """Tokens at each sequence's end that nobody attends to; None where there are none."""
    unseen = [0 if seq.request.pooling is None else seq.request.pooling.unseen_tokens for seq in sequences]
    return unseen if any(unseen) else None


def is_device_lost(error: BaseException) -> bool:
    """Whether the accelerator's context is gone, so that only a new process can go on."""
    return isinstance(error, torch.AcceleratorError)
