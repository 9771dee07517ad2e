"""Checkpoint and configuration -> everything that a step needs, and what the client is told about it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sensorium import __version__, kernels
from sensorium.checkpoint.configs import Checkpoint, open_checkpoint
from sensorium.checkpoint.lengths import context_length
from sensorium.checkpoint.pooling import sentence_config
from sensorium.checkpoint.quantization import StoredQuantization
from sensorium.checkpoint.ranks import FLAG, check_ranks
from sensorium.config import DRAFT_FLAG, EngineConfig
from sensorium.engine.adapters import Adapters
from sensorium.engine.batch import BatchBuilder, Spare
from sensorium.engine.block_pool import BlockPool
from sensorium.engine.cache_layout import CacheLayout, by_place, make_states
from sensorium.engine.draft_model import DraftModel
from sensorium.engine.drafting import Drafting
from sensorium.engine.encoder_cache import EncoderCache
from sensorium.engine.faults import Faults
from sensorium.engine.graphs import Capture, CudaCapture, Graphs, graph_sizes
from sensorium.engine.leader import Leader
from sensorium.engine.lookup import PromptLookup
from sensorium.engine.masks import Masks
from sensorium.engine.memory import (
    StepMemory,
    available_for_cache,
    encoder_cache_bytes,
    encoder_row_bytes,
    graph_bytes,
    size_cache,
    size_states,
)
from sensorium.engine.prefix_cache import PrefixCache
from sensorium.engine.runner import Runner
from sensorium.engine.sampler import Sampler
from sensorium.engine.scheduler import Budget, Plan, Scheduler
from sensorium.engine.staging import Staging, staging_bytes
from sensorium.engine.state_slots import StateSlots
from sensorium.engine.tables import BlockTables
from sensorium.engine.warming import Warming
from sensorium.errors import CheckpointError, StartupError
from sensorium.ipc.ranks import CacheSize
from sensorium.kernels import MAPPED_BYTES, Quantization
from sensorium.kernels.context import KVCache
from sensorium.kernels.cpu.blocks import MappedBlockLinear
from sensorium.kernels.cpu.linear import MappedLinear
from sensorium.kernels.gpu import begin, gpu_kernels
from sensorium.kernels.reference import quantized
from sensorium.kernels.reference.attention import GATHER_ELEMENTS
from sensorium.kernels.reference.fp8 import E4M3
from sensorium.kernels.transfers import is_asynchronous
from sensorium.models.base import Model
from sensorium.models.cache import CacheGroup, KeyValueGroup, attends_to_media, paged, states
from sensorium.models.decoder import SelfAttention
from sensorium.models.layers import Linear
from sensorium.models.loading import load_model, packed_weights, weight_bytes
from sensorium.parallel.ranks import Ranks
from sensorium.system import cgroups
from sensorium.types import EngineReady
from sensorium.units import MiB
from sensorium.weights.disk_cache import QuantizedCopy

SMALL_MODEL_BYTES = 64 * MiB  # of weights: what a core reads in the time that waking another one may take

logger = logging.getLogger(__name__)
BATCHED_TOKENS, CPU_BATCHED_TOKENS = 2048, 512  # of one step, unless the operator says otherwise
KEPT_STEPS = 1  # as many tokens as a step computes are kept of prompts that were pooled: they seldom come again
STEP_MACS = 2**32  # of prompts' attention in a step on a CPU: a fifth of a second at 20 G a second
CPU_ENCODER_ROWS = 256

Mapped: TypeAlias = MappedLinear | MappedBlockLinear
"""Weights where a mapped file has them, until they are packed."""
"""Tower rows of one step on a CPU: about an image of 448 x 448. More of them together are no faster there, and whoever
came first, or is decoding, would wait for all."""


@dataclass(slots=True)
class Engine:
    """One loaded model, ready to step. The loop around it is `core`."""

    scheduler: Scheduler
    runner: Runner
    prefixes: PrefixCache
    encoder: EncoderCache[Tensor]
    ready: EngineReady
    adapters: Adapters
    mapped: list[Mapped] = field(default_factory=list)  # not copied yet; the draft model's, too
    work: tuple[float, float] = (0.0, 0.0)  # multiply-adds of a token, and for each key that it sees
    vocab_size: int = 0  # width of the logits
    lookup: PromptLookup | None = None
    drafting: Drafting | None = None  # `lookup`, where a draft model is behind it
    writing: Iterator[None] | None = None  # of a copy of the weights, piece by piece
    warming: Warming | None = None  # of kernels that are being compiled
    captures: bool = False  # whether graphs are made of decodes, as soon as there is time
    step_memory: StepMemory | None = None  # of a GPU, until a large step has shown it

    @property
    def has_idle_work(self) -> bool:
        """Whether there is something to do while no request is running."""
        return bool(self.mapped) or self.writing is not None or (self.captures and self.runner.can_capture)

    def work_of(self, plan: Plan) -> float:
        """Multiply-adds of a step, about: of every token with all weights, and of its attention."""
        per_token, per_key = self.work
        return sum(count * (per_token + per_key * (seq.num_computed + count)) for seq, count in plan.work)

    def idle_work(self) -> None:
        """A little of what makes this start, or the next one, faster."""
        if self.mapped:
            self.pack_some()
        elif self.captures and self.runner.can_capture:
            self.runner.capture_one()
        elif self.writing is not None and next(self.writing, self) is self:
            self.writing = None

    def check_memory(self, tokens: int) -> None:
        """After a step of so many tokens."""
        if self.step_memory is not None and self.step_memory.is_known_after(tokens):
            self.step_memory = None

    def take_kernels(self) -> None:
        """Between two steps: go on with the kernels that another process has compiled, if it has."""
        if self.warming is None or not self.warming.is_over:
            return
        warming, self.warming = self.warming, None
        if warming.has_succeeded:
            gpu_kernels().switch()
            logger.info("decoders compute with %s", gpu_kernels().current.describe())
            self.runner.forget_kernels()
            self.captures = warming.can_capture
        if self.captures:
            self.runner.capture_one()

    def pack_some(self) -> bool:
        """Give one layer's weights the layout that computes fastest. False when all have it."""
        if not self.mapped:
            return False
        try:
            self.mapped.pop().pack()
        except (MemoryError, RuntimeError) as error:  # torch says the first with the second
            logger.warning("no memory for packed weights, they stay in the page cache: %s", error)
            self.mapped.clear()
        return True


def opened(config: EngineConfig) -> Checkpoint:
    """What `config.model` is."""
    text_model = Path(config.text_model) if config.text_model else None
    return replace(open_checkpoint(Path(config.model), text_model, config.hf_overrides), pooling=config.pooling)


@dataclass(frozen=True, slots=True)
class LoadedPart:
    """A model with its weights, or the part of it that a rank has."""

    model: Model
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    copy: QuantizedCopy | None  # to be written, if it is not whole


def load_engine(
    config: EngineConfig,
    *,
    progress: Callable[[str, float], None] | None = None,
    faults: Faults | None = None,
    leader: Leader | None = None,
) -> Engine:
    """Load `config.model` and size everything around it; `leader` tells the other ranks of its steps. StartupError says
    in one line what is wrong."""
    started = monotonic()
    report = progress or (lambda phase, fraction: None)
    if faults is not None:
        faults.hit("load")
    draft = load_draft(config) if config.draft_model else None  # first: threads are as the model itself needs them
    part = load_part(config, ranks=None if leader is None else leader.ranks, report=report)
    device = part.device
    check_pooling(part.model, part.checkpoint)
    report("cache", 0.0)
    compiles = device.type != "cpu" and gpu_kernels().is_compiling
    engine = build_engine(
        part.model,
        part.checkpoint,
        config,
        device,
        part.dtype,
        started=started,
        faults=faults,
        capture=CudaCapture() if compiles else None,
        leader=leader,
        draft=draft,
    )
    engine.warming = warming_of(engine, config, device) if compiles else None
    if part.copy is not None and not part.copy.is_whole:
        engine.writing = part.copy.write()
    report("cache", 1.0)
    return engine


def load_part(
    config: EngineConfig,
    *,
    ranks: Ranks | None = None,
    report: Callable[[str, float], None] = lambda phase, fraction: None,
) -> LoadedPart:
    """The weights, on the device that they are computed on. StartupError says in one line what is wrong."""
    checkpoint = opened(config)
    check_ranks(checkpoint, 1 if ranks is None else ranks.size)
    device = choose_device(config.device, ranks)
    quantization = choose_quantization(config, checkpoint.quantization, device)
    is_quantized = quantization is not None or checkpoint.quantization is not None
    dtype = choose_dtype(config.dtype, checkpoint.dtype, device, is_quantized=is_quantized)
    if dtype == torch.float16 and checkpoint.family.overflows_float16:
        raise StartupError(
            f"float16 cannot hold the activations of {checkpoint.architecture}: use --dtype bfloat16 or float32"
        )
    if device.type == "cpu":
        own = default_threads(checkpoint) // (1 if ranks is None else ranks.size)
        torch.set_num_threads(config.threads or max(own, 1))
    copy = None if quantization is None else find_copy(config, checkpoint, quantization, dtype, device, ranks)
    if device.type != "cpu" and ranks is None:  # which would not switch together
        begin(device)
    model = load_model(
        checkpoint,
        dtype=dtype,
        device=device,
        quantization=quantization,
        quantize_towers=config.quantize_towers,
        memory_mapped=config.map_weights,
        copy=copy,
        progress=lambda part: report("weights", part),
        ranks=ranks,
    )
    return LoadedPart(model, checkpoint, device, dtype, copy)


def load_draft(config: EngineConfig) -> LoadedPart:
    """The draft model, with weights and cache of the same kind. StartupError names the flag."""
    if choose_device(config.device).type != "cpu":
        raise StartupError(f"{DRAFT_FLAG} is offered on a CPU only: leave it out, or use --device cpu")
    stored = open_checkpoint(Path(config.draft_model), None).quantization
    own = replace(
        config,
        model=config.draft_model,
        text_model="",
        hf_overrides={},
        pooling="auto",
        quantize_towers=False,
        quantized_cache="",
        quantization=config.quantization if stored is None and config.quantization in ("int8", "int4") else "auto",
    )
    try:
        return load_part(own)
    except (CheckpointError, StartupError) as error:
        raise StartupError(f"{DRAFT_FLAG} {config.draft_model}: {error.message}") from None


def warming_of(engine: Engine, config: EngineConfig, device: torch.device) -> Warming:
    """What compiles an engine's kernels; it is not started."""
    major, minor = torch.cuda.get_device_capability(device)
    ready = engine.ready
    return Warming(config, 10 * major + minor, ready.dtype, ready.kv_bytes, ready.max_model_len)


def check_pooling(model: Model, checkpoint: Checkpoint) -> None:
    """Say where the pooling of an embedder is a guess. StartupError if --pooling has nothing to pool."""
    if checkpoint.pooling != "auto" and "embed" not in model.poolers:
        raise StartupError(f"--pooling {checkpoint.pooling}: this model makes no embeddings")
    spec = checkpoint.embedding
    if "embed" in model.poolers and "classify" not in model.poolers and not model.generates and not spec.is_stated:
        token = "last" if spec.kinds == ("last",) else "first"
        logger.warning(
            "no file of the checkpoint says how its embeddings are pooled: they are the %s token's states, "
            "normalised; --pooling says otherwise",
            token,
        )
    if "embed" in model.poolers and "message" in (sentence_config(checkpoint.folder).get("modality_config") or {}):
        logger.warning(
            "sentence-transformers embeds the texts of this checkpoint as chats: send them as `messages`; "
            "`input` is embedded without the chat template"
        )


def find_copy(
    config: EngineConfig,
    checkpoint: Checkpoint,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks | None = None,
) -> QuantizedCopy | None:
    """Where a large checkpoint's quantised weights are kept between starts, if they are."""
    files = [*checkpoint.weight_files, *checkpoint.text_weight_files]
    layout = kernels.quantized_layout(dtype, device)
    if not config.quantized_cache or layout is None or sum(file.stat().st_size for file in files) < MAPPED_BYTES:
        return None
    made_how: tuple[object, ...] = (__version__, layout, quantization, config.quantize_towers, checkpoint.architecture)
    if ranks is not None:
        made_how = (*made_how, ranks.rank, ranks.size)
    try:
        folder = Path(config.quantized_cache).expanduser()
        return QuantizedCopy(folder, [checkpoint.folder / "config.json", *files], made_how)
    except (OSError, RuntimeError) as error:  # the latter: there is no home folder
        logger.warning("quantised weights cannot be kept in %s: %s", config.quantized_cache, error)
        return None


def build_engine(
    model: Model,
    checkpoint: Checkpoint,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    started: float | None = None,
    faults: Faults | None = None,
    capture: Capture | None = None,
    leader: Leader | None = None,
    draft: LoadedPart | None = None,
) -> Engine:
    """Everything around a model that is already there, or around rank 0's part of it. With `capture` decodes become
    graphs; `draft` guesses tokens."""
    started = monotonic() if started is None else started
    groups, poolers, vocab_size = model.cache_groups(), model.poolers, checkpoint.vocab_size
    tokens = config.max_num_batched_tokens or default_batched_tokens(model, device)
    part = LoadedPart(model, checkpoint, device, dtype, None)
    if draft is not None:
        _check_draft(part, draft, config)
    is_staged = leader is None and (device.type != "cpu" or capture is not None)  # else steps are sent from the CPU
    graph_rows = graph_sizes(config.max_num_seqs)[-1] if capture is not None and model.generates else 0
    cache = _make_cache(part, config, tokens, int(is_staged), leader, draft, graph_rows)
    encoder = _encoder_cache(model, groups, config, device, dtype)
    budget = _budget(model, groups, checkpoint, config, cache, tokens, device)
    prefixes = _prefix_cache(part, config, cache, budget, None if model.generates else KEPT_STEPS * tokens)
    drafting = None if draft is None else _make_drafting(part, draft, config, cache, tokens, faults)
    lookup = drafting or _make_lookup(model, config, cache)
    tasks: dict[str, bool] = {task: one.all_tokens for task, one in poolers.items()}
    scheduler = Scheduler(budget, prefixes.pool, prefixes, encoder, tasks, lookup)
    runner = _make_runner(part, config, cache, budget, encoder, capture, faults, leader, is_staged=is_staged)
    ready = _ready(part, config, cache, budget.tables().capacity(cache.num_blocks, cache.max_len), started, draft)
    work = (2.0 * ready.weight_bytes, 16.0 * key_elements(groups))  # not too little
    adapters, mapped = Adapters(model, dtype, device, leader), mapped_weights(model)
    mapped += [] if draft is None else mapped_weights(draft.model)
    engine = Engine(scheduler, runner, prefixes, encoder, ready, adapters, mapped, work, vocab_size, lookup, drafting)
    if is_asynchronous(device):
        engine.step_memory = StepMemory.begin(device, bytes_beside_cache(part, config, tokens, graph_rows), tokens)
    return engine


def _prefix_cache(
    part: LoadedPart, config: EngineConfig, cache: _Cache, budget: Budget, kept_tokens: int | None = None
) -> PrefixCache:
    """`kept_tokens`: how many that no sequence uses are kept before memory that was never used is touched."""
    tables = budget.tables()
    return PrefixCache(
        BlockPool(cache.num_blocks, None if kept_tokens is None else tables.needed(kept_tokens)),
        tables,
        _identity(part.checkpoint, config, part.dtype),
        enabled=config.enable_prefix_caching and bool(cache.layers),
        stretched_from=part.model.stretched_from,
        states=StateSlots(cache.num_slots) if cache.num_slots else None,
    )


def _make_runner(
    part: LoadedPart,
    config: EngineConfig,
    cache: _Cache,
    budget: Budget,
    encoder: EncoderCache[Tensor],
    capture: Capture | None,
    faults: Faults | None,
    leader: Leader | None,
    *,
    is_staged: bool,
) -> Runner:
    model, device, vocab_size, graphs = part.model, part.device, part.checkpoint.vocab_size, None
    if capture is not None and model.generates and cache.layers:
        graphs = Graphs(config.max_num_seqs, vocab_size, device, capture)
    spare = Spare(cache.num_blocks, cache.num_slots) if is_staged else None
    builder = _batch_builder(model, budget, device if leader is None else torch.device("cpu"), spare)
    masks = Masks(config.max_num_seqs, vocab_size)
    return Runner(
        model,
        cache.layers,
        builder,
        Sampler(config.seed, masks, device),
        encoder,
        device,
        masks=masks,
        poolers=model.poolers,
        faults=faults,
        graphs=graphs,
        leader=leader,
    )


def _encoder_cache(
    model: Model, groups: list[CacheGroup], config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> EncoderCache[Tensor]:
    text = model.checkpoint.text
    row_width = (1 + model.deepstack) * (text.hidden_size if text else model.row_size)
    size = encoder_cache_bytes(config, device, groups, dtype)
    return EncoderCache(size, encoder_row_bytes(groups, row_width, dtype))


def _batch_builder(model: Model, budget: Budget, device: torch.device, spare: Spare | None) -> BatchBuilder:
    """Arrays go to the device together where there is something spare for their padding."""
    capacity = staging_bytes(budget.max_num_batched_tokens, budget.max_num_seqs, len(budget.windows), budget.axes)
    return BatchBuilder(
        budget.max_num_seqs,
        -(-budget.max_model_len // budget.block_size) if budget.has_cache else 0,
        budget.block_size,
        budget.axes,
        device,
        marks_long=model.long_context_from is not None,
        stretched_from=model.stretched_from,
        media_both_ways=model.media_both_ways,
        num_tables=len(budget.windows),
        has_states=bool(states(model.cache_groups())),
        staging=None if spare is None else Staging(capacity, device),
        spare=spare,
    )


def _make_lookup(model: Model, config: EngineConfig, cache: _Cache) -> PromptLookup | None:
    """None with states: one that a wrong guess has changed could not be taken back."""
    if not config.speculative_tokens or not model.generates:
        return None
    if cache.num_slots:
        logger.info("--speculative-tokens: nothing is guessed, because layers of this model keep states")
        return None
    return PromptLookup(config.speculative_tokens)


def _check_draft(part: LoadedPart, draft: LoadedPart, config: EngineConfig) -> None:
    """StartupError says in one line why the one model cannot guess for the other."""
    groups, own = part.model.cache_groups(), draft.model.cache_groups()
    if not part.model.generates or attends_to_media(groups):
        raise StartupError(f"{DRAFT_FLAG} guesses text: {part.checkpoint.architecture} writes none of its own")
    if states(groups):
        raise StartupError(
            f"{DRAFT_FLAG}: nothing is guessed for {part.checkpoint.architecture}, whose layers keep states that a "
            "wrong guess would change"
        )
    if not draft.model.generates or not own or states(own) or attends_to_media(own):
        raise StartupError(
            f"{DRAFT_FLAG} {config.draft_model}: {draft.checkpoint.architecture} cannot guess; a language model can, "
            "all of whose layers keep keys and values"
        )


def _make_drafting(
    part: LoadedPart, draft: LoadedPart, config: EngineConfig, cache: _Cache, tokens: int, faults: Faults | None
) -> Drafting:
    """A draft model with a cache of its own, for as many tokens as the model's."""
    own = _make_draft_cache(draft, config, cache, tokens)
    budget = _budget(draft.model, draft.model.cache_groups(), draft.checkpoint, config, own, tokens, draft.device)
    model = DraftModel(
        draft.model,
        own.layers,
        _batch_builder(draft.model, budget, draft.device, None),
        _prefix_cache(draft, config, own, budget),
        Sampler(config.seed, device=draft.device),
        budget,
        part.checkpoint.vocab_size,
        faults,
    )
    return Drafting(config.speculative_tokens, model, tokens)


def _make_draft_cache(draft: LoadedPart, config: EngineConfig, cache: _Cache, tokens: int) -> _Cache:
    """In the memory that the model's cache has left for it. It gives back nothing that windows have passed: guesses are
    taken back."""
    longest = min(draft.checkpoint.max_model_len, draft.model.long_context_from or cache.max_len, cache.max_len)
    cache_dtype = choose_cache_dtype(config.kv_cache_dtype, draft.dtype, draft.device, has_cache=True)
    layout = CacheLayout.of(paged(draft.model.cache_groups()), config.block_size, cache_dtype, max_len=longest)
    tables = BlockTables(layout.windows, config.block_size, tokens)
    most = config.max_num_seqs * tables.blocks(longest) * len(layout.windows)
    num_blocks = min(cache.draft_bytes // layout.block_bytes, most)
    layers = by_place(layout.make(num_blocks, draft.device))
    return _Cache(layers, num_blocks, longest, num_blocks * layout.block_bytes, layout.windows)


class _Cache(NamedTuple):
    layers: KVCache  # empty for models without a cache
    num_blocks: int
    max_len: int  # tokens of the longest sequence
    size_bytes: int
    windows: tuple[int | None, ...] = (None,)  # of a sequence's block tables
    num_slots: int = 0  # of states
    followers_bytes: tuple[int, ...] = ()  # of the weights of ranks 1 and up
    draft_bytes: int = 0  # that are left for a draft model's cache


def _make_cache(
    part: LoadedPart,
    config: EngineConfig,
    tokens: int,
    spare: int,
    leader: Leader | None,
    draft: LoadedPart | None,
    graph_rows: int,
) -> _Cache:
    """For sequences as long as there is memory for. `tokens`: of the largest step; `spare`: blocks and slots of states
    beside those that sequences get; `draft` has a cache of as many tokens in the same memory; `graph_rows`: sequences
    of the largest graph."""
    groups = part.model.cache_groups()
    wanted = wanted_length(config, part.checkpoint)
    cache_dtype = choose_cache_dtype(config.kv_cache_dtype, part.dtype, part.device, has_cache=bool(groups))
    followers = [] if leader is None else leader.loaded()
    followers_bytes = tuple(one.weight_bytes for one in followers)
    if not groups:
        if leader is not None:
            leader.meet(part.device, CacheSize(0, 0))
        return _Cache([], 0, wanted, 0, followers_bytes=followers_bytes)
    layout = CacheLayout.of(paged(groups), config.block_size, cache_dtype, max_len=wanted)
    tables = BlockTables(layout.windows, config.block_size, tokens)
    rooms = [room_of_rank(part, config, None if leader is None else leader.ranks, tokens, graph_rows)]
    available = min(rooms + [one.available_bytes for one in followers])
    draft_bytes = 0 if draft is None else int(available * _draft_share(part, draft, config))
    available -= draft_bytes
    slot_bytes = sum(group.slot_bytes(part.dtype) for group in states(groups))
    num_slots = size_states(config, tables, layout.block_bytes, slot_bytes, wanted, available)
    state_bytes = num_slots * slot_bytes
    num_blocks, max_len = size_cache(config, tables, layout.block_bytes, wanted, available - state_bytes)
    size = CacheSize(num_blocks + spare, num_slots + spare)
    layers = cache_of_rank(part, config, size)
    if leader is not None:
        leader.meet(part.device, size)
    size_bytes = num_blocks * layout.block_bytes + state_bytes
    return _Cache(layers, num_blocks, max_len, size_bytes, layout.windows, num_slots, followers_bytes, draft_bytes)


def _draft_share(part: LoadedPart, draft: LoadedPart, config: EngineConfig) -> float:
    """Which part of the cache's memory a draft model needs for as many tokens as the model has."""
    own, whole = (_token_bytes(one, config) for one in (draft, part))
    return own / (own + whole)


def _token_bytes(part: LoadedPart, config: EngineConfig) -> int:
    dtype = choose_cache_dtype(config.kv_cache_dtype, part.dtype, part.device, has_cache=True)
    return sum(group.token_bytes(dtype) for group in paged(part.model.cache_groups()))


def room_of_rank(
    part: LoadedPart, config: EngineConfig, ranks: Ranks | None, tokens: int | None = None, graph_rows: int = 0
) -> int:
    """Bytes of KV cache that there is memory for, where the weights are. `tokens`: of the largest step; `graph_rows`:
    sequences of the largest graph."""
    model, device = part.model, part.device
    tokens = tokens or config.max_num_batched_tokens or default_batched_tokens(model, device)
    taken = bytes_beside_cache(part, config, tokens, graph_rows)
    mapped_bytes = mapped_weight_bytes(model)  # the system counts them as free memory
    return available_for_cache(config, device, taken, mapped_bytes, 1 if ranks is None else ranks.size)


def bytes_beside_cache(part: LoadedPart, config: EngineConfig, tokens: int, graph_rows: int) -> int:
    """What steps of so many tokens, graphs of so many sequences and towers' rows take of a GPU; 0 on a CPU, whose cache
    leaves most of its memory."""
    model = part.model
    if part.device.type == "cpu":
        return 0
    cache_dtype = choose_cache_dtype(
        config.kv_cache_dtype, part.dtype, part.device, has_cache=bool(model.cache_groups())
    )
    taken = activation_bytes(model, tokens, cache_dtype)
    if model.modalities:
        taken += encoder_cache_bytes(config, part.device, model.cache_groups(), part.dtype)
    if graph_rows:
        states_of = [activation_bytes(model, rows, cache_dtype) for rows in (0, graph_rows)]  # kernels gather nothing
        taken += graph_bytes(graph_rows, part.checkpoint.vocab_size, states_of[1] - states_of[0])
    return taken


def cache_of_rank(part: LoadedPart, config: EngineConfig, size: CacheSize) -> KVCache:
    """What all layers keep, with the heads that are here; empty where they keep nothing."""
    groups = part.model.cache_groups()
    if not groups:
        return []
    cache_dtype = choose_cache_dtype(config.kv_cache_dtype, part.dtype, part.device, has_cache=True)
    wanted = wanted_length(config, part.checkpoint)
    layout = CacheLayout.of(paged(groups), config.block_size, cache_dtype, max_len=wanted)
    made = make_states(states(groups), size.num_slots, part.dtype, part.device)
    return by_place(layout.make(size.num_blocks, part.device), made)


def _budget(
    model: Model,
    groups: list[CacheGroup],
    checkpoint: Checkpoint,
    config: EngineConfig,
    cache: _Cache,
    tokens: int,
    device: torch.device,
) -> Budget:
    return Budget(
        config.max_num_seqs,
        tokens,
        (CPU_ENCODER_ROWS if device.type == "cpu" else tokens) * config.tensor_parallel_size,
        cache.max_len,
        config.block_size,
        bool(cache.layers),
        max(1, len(checkpoint.text.rope.mrope_section)) if checkpoint.text else 1,
        model.generates,
        model.long_context_from,
        attends_to_media(groups),
        max_pairs(model, device),
        model.media_both_ways,
        cache.windows,
    )


def _ready(
    part: LoadedPart, config: EngineConfig, cache: _Cache, kv_tokens: int, started: float, draft: LoadedPart | None
) -> EngineReady:
    poolers, weights = part.model.poolers, (weight_bytes(part.model), *cache.followers_bytes)
    draft_bytes = 0 if draft is None else weight_bytes(draft.model)
    return EngineReady(
        max_model_len=cache.max_len,
        kv_tokens=kv_tokens,
        block_size=config.block_size,
        weight_bytes=sum(weights) + draft_bytes,
        kv_bytes=cache.size_bytes * len(weights) + cache.draft_bytes,
        load_seconds=monotonic() - started,
        device=part.device.type,
        dtype=str(part.dtype).removeprefix("torch."),
        tasks=(*((part.model.task,) if part.model.generates else ()), *poolers),
        embedding_size=poolers["embed"].size if "embed" in poolers else 0,
        token_size=poolers["token_embed"].size if "token_embed" in poolers else 0,
        rank_weight_bytes=weights,
    )


def key_elements(groups: list[CacheGroup]) -> int:
    """Elements of one token's keys in all layers."""
    layers = ((len(group.layers) + len(group.shared)) * group.num_kv_heads * group.head_dim for group in paged(groups))
    return sum(layers)


def wanted_length(config: EngineConfig, checkpoint: Checkpoint) -> int:
    """Tokens of the longest sequence, before memory is looked at."""
    longest, wanted = checkpoint.max_model_len, config.max_model_len
    if wanted is not None and wanted > longest:
        logger.warning(
            "--max-model-len %d is more than the checkpoint's %d positions, which are served; rope_scaling "
            "in config.json (yarn, dynamic, linear) makes them more",
            wanted,
            longest,
        )
    return context_length(longest, wanted)


def mapped_weight_bytes(model: Model) -> int:
    return sum(weight.mapped_bytes for weight in packed_weights(model))


def mapped_weights(model: Model) -> list[Mapped]:
    """Memory-mapped weights, first layers last."""
    return [weight for weight in reversed(list(packed_weights(model))) if isinstance(weight, Mapped)]


def activation_bytes(model: Model, tokens: int, cache_dtype: torch.dtype) -> int:
    """The model's own bound, and what the reference implementation of quantised kernels dequantises at a time."""
    dequantised = [
        quantized.activation_bytes(tokens, module.in_features)
        for module in model.modules()
        if isinstance(module, Linear) and isinstance(getattr(module, "packed", None), quantized.QuantizedLinear)
    ]
    gathered = 0
    if cache_dtype.itemsize == 1:
        groups = [group for group in model.cache_groups() if isinstance(group, KeyValueGroup)]
        widest = max((group.num_kv_heads * group.head_dim for group in groups), default=0)
        longest = model.checkpoint.max_model_len * widest
        gathered = 5 * max(GATHER_ELEMENTS, longest)  # bytes, and floats of them
    return model.activation_bytes(tokens) + max(dequantised, default=0) + gathered


def choose_device(wanted: str, ranks: Ranks | None = None) -> torch.device:
    """Every rank has a GPU of its own."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        if ranks is None:
            return torch.device("cuda")
        if ranks.size > torch.cuda.device_count():
            raise StartupError(f"{FLAG} {ranks.size}: torch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(ranks.rank)
        return torch.device("cuda", ranks.rank)
    if wanted == "cuda":
        raise StartupError("--device cuda: torch sees no CUDA device (use --device cpu or auto)")
    return torch.device("cpu")


def choose_quantization(
    config: EngineConfig, stored: StoredQuantization | None, device: torch.device
) -> Quantization | None:
    """What to quantise to while loading; None: leave the weights as they are stored."""
    wanted = config.quantization
    if wanted == "fp8" and stored is None:
        if device.type == "cpu":
            raise StartupError(
                "--quantization fp8: a CPU has no kernels for it; int8 takes as little there and is nearer"
            )
        return kernels.FP8
    if wanted in ("int8", "int4"):
        return Quantization(8) if wanted == "int8" else Quantization(4, config.quantization_group_size)
    layout = "plain numbers" if stored is None else stored.layout
    if wanted not in ("auto", layout):
        raise StartupError(
            f"--quantization {wanted}: the checkpoint's weights are stored as {layout}; leave the flag "
            "out, or let int8 or int4 quantise them while loading"
        )
    if config.quantize_towers:
        raise StartupError("--quantize-towers goes with --quantization int8, int4 or fp8")
    return None


def choose_cache_dtype(wanted: str, dtype: torch.dtype, device: torch.device, *, has_cache: bool) -> torch.dtype:
    if wanted == "auto":
        return dtype
    if not has_cache:
        raise StartupError(f"--kv-cache-dtype {wanted}: an encoder has no KV cache")
    if wanted == "fp8" and device.type == "cpu":
        raise StartupError(
            "--kv-cache-dtype fp8: a CPU has no kernels for it; int8 takes as little there and is nearer"
        )
    return E4M3 if wanted == "fp8" else torch.int8


def choose_dtype(wanted: str, stored: str, device: torch.device, *, is_quantized: bool = False) -> torch.dtype:
    name = stored if wanted == "auto" else wanted
    if wanted == "auto" and device.type == "cpu" and (name == "float16" or is_quantized):
        name = "bfloat16"  # CPUs compute it faster, and it does not overflow; kernels for codes take nothing else
    if wanted == "auto" and name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        name = "float16"
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def default_threads(checkpoint: Checkpoint) -> int:
    """All cores, but one thread for a model whose step is shorter than the wait for a second one to be scheduled.

    Measured: two threads, sharing two cores with the HTTP process and a client, made such a step 3 to 20 times slower.
    """
    stored = sum(file.stat().st_size for file in checkpoint.weight_files)
    return 1 if stored < SMALL_MODEL_BYTES else usable_cores()


def default_batched_tokens(model: Model, device: torch.device) -> int:
    """Fewer where a step of many tokens takes seconds: answers that are being written wait for it, and prompts that
    came together would all be ready as late as the last.

    Measured, 2B on two cores: of eight prompts at once the middle one's first token came after 8.1 s, with 2048 in a
    step after 9.3.
    """
    if device.type == "cpu" and model.generates and weight_bytes(model) >= SMALL_MODEL_BYTES:
        return CPU_BATCHED_TOKENS
    return BATCHED_TOKENS


def max_pairs(model: Model, device: torch.device) -> int | None:
    """Pairs of a token and one that it attends to in a step; None where there is no need of a bound. 2048 tokens at the
    end of a long prompt take a small model seconds, for which every other answer would wait."""
    if device.type != "cpu" or not model.cache_groups():
        return None
    per_pair = sum(
        2 * layer.attention.num_heads * layer.head_dim for layer in model.modules() if isinstance(layer, SelfAttention)
    )
    return STEP_MACS // per_pair if per_pair else None


def usable_cores() -> int:
    """Cores that this process may run on, within the quotas and sets of all control groups around it."""
    here = len(os.sched_getaffinity(0))
    return min(here, cgroups.cores() or here)


def _identity(checkpoint: Checkpoint, config: EngineConfig, dtype: torch.dtype) -> bytes:
    """What cached keys and values depend on beside the prompt."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.weight_files]
    weights = (config.quantization, config.quantization_group_size, config.quantize_towers, config.kv_cache_dtype)
    return hashlib.sha256(
        repr((str(checkpoint.folder), checkpoint.architecture, str(dtype), weights, files)).encode()
    ).digest()
