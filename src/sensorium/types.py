"""What crosses layers: frozen records of plain numbers, strings and numpy arrays. Imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Modality = Literal["image", "video", "audio"]
FinishReason = Literal["stop", "length", "abort", "error"]
INT32_MAX = 2**31 - 1
PoolingTask = Literal["embed", "classify", "token_embed", "token_classify", "sparse", "score", "align"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form that an answer must have, in llguidance's terms.

    `source` is a Lark grammar, a JSON schema as text, or a regular expression that the whole answer matches. It was
    checked when the request came in.
    """

    kind: Literal["lark", "json", "regex"]
    source: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the engine needs to know of a tokenizer whose tokens have bytes, to hold answers to a grammar.

    `file` is a tokenizer.json and `added` what stands beside its vocabulary: (id, text, whether it is a control token,
    which no text matches). `ends` are the tokens that end an answer; `lead` is how many spaces the decoder takes from
    the beginning of a text.
    """

    file: str
    added: tuple[tuple[int, str, bool], ...]
    ends: tuple[int, ...]
    lead: int = 0


@dataclass(frozen=True, slots=True)
class SpeechRules:
    """What the tokens of a transcript keep to (Whisper's rules), beside what is asked of any completion.

    `timestamps` is the id of the first timestamp, 0.00 s; those after it are 0.02 s apart. None: the transcript has no
    timestamps and no rules for them. Where it has, it begins with one of the first `max_initial`, they come in pairs
    but for the last, never go back, and one comes wherever all of them together are likelier than any text.
    """

    end: int  # the end token: ids below it are text
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()
    timestamps: int | None = None
    max_initial: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, with every default resolved and every bound checked by the API layer.

    `stop_token_ids` is the whole stop set: the model's own end tokens (unless `ignore_eos`) and the request's.
    None of them can be sampled before `min_tokens`. Stop *strings* are the HTTP process's business.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # [0, 1]
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # alternatives to report beside each sampled token; None is off
    prompt_logprobs: int | None = None  # the same for prompt tokens (completions with echo)
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias)
    logprob_token_ids: tuple[int, ...] = ()  # reported beside the alternatives, however unlikely; needs `logprobs`
    allowed_token_ids: tuple[int, ...] = ()  # nothing else is sampled; () is everything
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences whose last token is not sampled after the others
    grammar: Grammar | None = None
    rules: SpeechRules | None = None  # logprobs are then of what they leave


@dataclass(frozen=True, slots=True)
class PoolingParams:
    task: PoolingTask
    normalize: bool | None = None  # None: as the model says
    dimensions: int | None = None  # Matryoshka: cut before normalising
    activation: bool | None = None  # None: as the model says
    prompt_tokens: int = 0  # at the beginning, not to be pooled
    unseen_tokens: int = 0  # at the end: they attend to the others, and nobody to them
    also: tuple[PoolingTask, ...] = ()  # what else is made of the same states

    @property
    def tasks(self) -> tuple[PoolingTask, ...]:
        return (self.task, *self.also)


@dataclass(frozen=True, slots=True)
class MediaItem:
    """A decoded, bounded piece of media.

    `data` is uint8 [height, width, 3] for an image, uint8 [frames, height, width, 3] for a video and float32
    [samples] for audio. `key` is the sha256 of the framed content (kind, shape, dtype, bytes and, for a video, its
    timestamps; for audio, its rate).
    """

    kind: Modality
    data: NDArray[Any]
    key: bytes
    param: str = ""  # where it stands in the request, for error messages
    sample_rate: int = 0  # audio, Hz
    timestamps_s: tuple[float, ...] = ()  # video, one per frame
    duration_s: float = 0.0  # video, the whole clip's; 0 if unknown


@dataclass(frozen=True, slots=True)
class MediaFeatures:
    """What a tower eats for one media item. `key` identifies the tower's output: item key and processor settings."""

    kind: Modality
    key: bytes
    num_rows: int  # embedding rows that the tower will return
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """A run of placeholder tokens: prompt positions [offset, offset + length) take the item's rows from `row` on."""

    item: int  # index into Prompt.media
    offset: int
    length: int
    row: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with every placeholder expanded; spans are sorted by offset and do not overlap.

    `positions` is None for 0, 1, 2, …, else int32 [axes, tokens] (M-RoPE), or float32 where a video's times are no
    whole numbers. The token that follows the prompt stands at position `len(token_ids) + position_delta` on every axis.

    An item that no span names stands beside the tokens: every one of them attends to its rows (encoder-decoders).
    """

    token_ids: NDArray[np.int32]  # [tokens]
    media: tuple[MediaFeatures, ...] = ()
    spans: tuple[MediaSpan, ...] = ()
    positions: NDArray[np.int32] | NDArray[np.float32] | None = None
    position_delta: int | float = 0
    token_types: NDArray[np.int32] | None = None  # [tokens], segment ids of BERT pairs


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence for the engine; exactly one of `sampling` and `pooling` is set.

    `salt` says whose caches it uses, `turn` who takes turns with others.
    """

    id: int
    prompt: Prompt
    sampling: SamplingParams | None = None
    pooling: PoolingParams | None = None
    priority: int = 0  # lower runs first
    salt: bytes = b""
    turn: bytes = b""
    adapter: int = 0  # number of a LoRA adapter that was loaded before; 0: none


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one position: the chosen token, and the most likely ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one step gave one request.

    `finish_reason` is None while the request goes on. A stop token that ended the request is the last of
    `token_ids` and is named by `stop_token_id`. With `finish_reason="error"`, `error` says what a client may read.
    """

    id: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # with the first token, if asked for
    cached_tokens: int = 0  # prompt tokens served from the prefix cache; set with the first output
    vector: NDArray[np.float32] | None = None  # pooling: [dim], [tokens, dim], or [entries, 2] of (token id, weight)
    error: str = ""
    queue_s: float = 0.0  # from the request's arrival to its first step; set with the first output
    prefill_s: float = 0.0  # from there to the first output; set with it
    preemptions: int = 0  # with the last output
    others: tuple[NDArray[np.float32], ...] = ()  # pooling: of `PoolingParams.also`


STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Bounds of `EngineStats.steps_by_tokens`."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges and counters of one engine, sent with its outputs at most a few times a second."""

    running: int = 0
    waiting: int = 0  # also those that something else than room holds back
    deferred: int = 0  # of those: waiting for their grammar
    kv_blocks: int = 0
    kv_blocks_free: int = 0
    prefix_queries: int = 0  # tokens looked up, ever
    prefix_hits: int = 0  # tokens found, ever
    encoder_queries: int = 0
    encoder_hits: int = 0
    encoder_bytes: int = 0
    encoder_seconds: float = 0.0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0  # duration of the last step
    step_tokens: int = 0  # computed in all steps, ever
    steps_by_tokens: tuple[int, ...] = ()  # steps with at most so many tokens as STEP_TOKENS says; the last: with more
    drafts: int = 0  # guesses at a sequence's next tokens, ever
    draft_tokens: int = 0  # tokens of them
    accepted_tokens: int = 0  # those that were right
    accepted_by_place: tuple[int, ...] = ()  # the same by their place in a guess


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Sent once by the engine process when the model is loaded: what it can do and what it uses."""

    max_model_len: int
    kv_tokens: int  # capacity of the KV cache in tokens; 0 for encoder-only models
    block_size: int
    weight_bytes: int
    kv_bytes: int
    load_seconds: float
    device: str
    dtype: str
    tasks: tuple[str, ...] = ("generate",)
    embedding_size: int = 0
    token_size: int = 0  # of the vector of a token
    rank_weight_bytes: tuple[int, ...] = ()  # of each rank that has a part of the model; the caches are of one size
