"""What a backend of kernels offers: `reference` in torch, `cpu` in C++. A new device is one more of these.

Shapes: x [tokens, hidden]; q [tokens, heads, head_dim] and k, v [tokens, kv_heads, head_dim], which may be strided
views of one fused projection; cos and sin float32 [tokens, rotated / 2], half-rotation (NeoX) layout; caches
[blocks, kv_heads, block_size, head_dim].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensorium.errors import StartupError

if TYPE_CHECKING:
    from sensorium.kernels.context import AttentionContext, KVCache, Segments

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh", "clamped_swiglu"]
"""The last one is only `gated`: GPT-OSS's product of a gate of at most 7 and an up of -7 to 7, plus 1."""


@dataclass(frozen=True, slots=True)
class BlockForm:
    """A type of GGUF's blocks: so many weights in so many bytes."""

    weights: int
    nbytes: int

    def row_bytes(self, in_features: int) -> int:
        """ValueError if the inputs are no whole blocks."""
        if in_features % self.weights:
            raise ValueError(f"blocks of {self.weights} weights do not fill rows of {in_features}")
        return in_features // self.weights * self.nbytes


MAPPED_BYTES = 512 * 1024 * 1024  # of a checkpoint; packing a smaller one takes little time, and it computes faster
BLOCK_FORMS: Mapping[str, BlockForm] = {
    "Q4_0": BlockForm(32, 18),
    "Q4_1": BlockForm(32, 20),
    "Q5_0": BlockForm(32, 22),
    "Q5_1": BlockForm(32, 24),
    "Q8_0": BlockForm(32, 34),
    "Q2_K": BlockForm(256, 84),
    "Q3_K": BlockForm(256, 110),
    "Q4_K": BlockForm(256, 144),
    "Q5_K": BlockForm(256, 176),
    "Q6_K": BlockForm(256, 210),
    "IQ4_NL": BlockForm(32, 18),
    "IQ4_XS": BlockForm(256, 136),
    "NF4": BlockForm(32, 18),
    "FP4": BlockForm(32, 18),
}
"""Those that are multiplied as they are, in the order of native/blocks.h. The last two are no types of GGUF: codes of
bitsandbytes with the fields of IQ4_NL, half of a block of 64 each."""

Blocks = tuple[tuple[int, str], ...]
"""Of a weight in blocks how many rows have which form, one behind the other."""


class MappedBlocks(NamedTuple):
    """Rows of a weight, all of one form, where a mapped file has them."""

    first_row: int
    kind: str
    rows: Tensor  # uint8 [n, bytes of a row]
    release: Callable[[], None] = lambda: None  # gives their pages back, once they have been copied


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a weight is quantised. `group`: inputs that share a scale of int4 or fp8; 0, of fp8: all.

    `floats`: codes are numbers. Of four bits mxfp4, E2M1 in groups of 32 whose scales are powers of two: such codes are
    taken as they are stored, floats are not quantised so. Of eight bits fp8, which is e4m3. `blocks`: GGUF's, taken as
    they are stored; the other fields say nothing then."""

    bits: Literal[4, 8]
    group: int = 64
    floats: bool = False
    blocks: Blocks = ()

    def __post_init__(self) -> None:
        if self.is_fp8:
            if self.group not in (0, 32, 64, 128, 256):
                raise StartupError(f"there is no kernel for fp8 weights in groups of {self.group}")
            return
        if self.floats and (self.bits, self.group) != (4, 32):
            raise StartupError(f"mxfp4 weights have 4 bits in groups of 32, not {self.bits} in groups of {self.group}")
        if self.bits == 4 and (self.group % 8 or not 8 <= self.group <= 256):
            raise StartupError(
                f"there is no kernel for 4-bit weights in groups of {self.group}: it must be a multiple of 8 up to 256"
            )

    @property
    def is_fp8(self) -> bool:
        return self.floats and self.bits == 8

    def scaled_together(self, in_features: int) -> int:
        """How many of a weight's inputs share a scale."""
        if self.bits == 8:
            return self.group if self.is_fp8 and self.group else in_features
        return self.group


FP8 = Quantization(8, 0, floats=True)


class PackedWeight(Protocol):
    """A linear layer's weight [out, in] and bias in the layout that its kernel reads."""

    @property
    def nbytes(self) -> int: ...

    @property
    def mapped_bytes(self) -> int:
        """Part of `nbytes` that is a memory-mapped file."""
        ...

    def fill(self, first_row: int, rows: Tensor) -> None:
        """Copy rows [n, in] of the weight to `first_row`. Every row must be filled once."""
        ...

    def set_bias(self, bias: Tensor | None) -> None:
        """Copy the bias [out]."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias: [.., in] -> [.., out]"""
        ...

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(self(x)), fused where the kernel can."""
        ...

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """self(x) + other [.., out], which is not changed; fused where the kernel can."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """Weight rows [n, in] of output indices int64 [n] (tied embeddings use one copy)."""
        ...


class QuantizedWeight(PackedWeight, Protocol):
    """A quantised weight. `fill` quantises."""

    def fill_codes(self, first_row: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Copy rows that are quantised already to `first_row`.

        `codes` uint8 [n, in]: 0 to 15 (int4), the signed value + 128 (int8), the byte of an e4m3 number (fp8), or E2M1
        (mxfp4: the sign is the highest of four bits). `scales` [n, groups], of mxfp4 uint8, the exponent of two plus
        127. `zeros` [n, groups]: what int4 codes are counted from, kept as float16 (default 8); all rows have them or
        none.
        """
        ...


class BlockWeight(PackedWeight, Protocol):
    """A weight in blocks, which is not filled by `fill`."""

    def fill_blocks(self, first_row: int, blocks: Tensor) -> None:
        """Copy rows uint8 [n, bytes of a row], all of one form, to `first_row`."""
        ...


class CachedWeight(QuantizedWeight, Protocol):
    """A quantised weight of a named layout (`Backend.quantized_layout`), which the disk cache can keep."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that `Backend.cached_linear` takes; only of a weight filled by `fill`, without a bias."""
        ...


@dataclass(frozen=True, slots=True)
class BranchParts:
    """Norms of experts that stand beside an MLP, which is `RoutedParts.shared_gate_up` and `shared_down`: each of the
    two and the router take states of a norm of their own, and what the two give is normed before it is added up."""

    experts_norm: Tensor
    router_norm: Tensor  # float32; the MLP's is `DecoderLayerParts.mlp_norm`
    experts_after: Tensor
    mlp_after: Tensor
    shares: Tensor  # float32 [experts], what each expert's weight is multiplied by


@dataclass(frozen=True, slots=True)
class RoutedParts:
    """What stands in the place of an MLP: a router [experts, hidden], experts of which each token takes `per_token`,
    and perhaps one more that all tokens take, scaled by the sigmoid of `shared_gate` [1, hidden] if there is one."""

    router: Callable[[Tensor], Tensor]
    experts: Experts
    per_token: int
    renormalizes: bool  # see `Backend.choose`
    scale: float
    shared_gate_up: PackedWeight | None = None
    shared_down: PackedWeight | None = None
    shared_gate: PackedWeight | None = None
    correction: Tensor | None = None  # float32 [experts], of sigmoids that choose: see `models.experts.choose`
    groups: int = 1  # of experts, of which each token takes from the best `groups_per_token`
    groups_per_token: int = 1
    exact_router: Tensor | None = None  # float32 [experts, hidden], the router's weight if it takes states in float32
    branches: BranchParts | None = None


@dataclass(frozen=True, slots=True)
class DeltaParts:
    """What makes a gated delta net of a convolution, see `Backend.delta_rule`, `delta_gates` and `norm_gated`."""

    gates: PackedWeight  # [2 * value_heads, hidden]
    rate: Tensor  # float32 [value_heads]; bias: the same
    bias: Tensor
    norm: Tensor  # [value_dim]
    eps: float
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    takes_turns: bool  # the value heads of all key heads in turn, else each key head's together


@dataclass(frozen=True, slots=True)
class StateParts:
    """What mixes a layer's tokens in attention's place: a gated short convolution, or a gated delta net."""

    taps: Tensor  # [channels, taps]
    bias: Tensor | None  # [channels]
    delta: DeltaParts | None


@dataclass(frozen=True, slots=True)
class TokenRowsParts:
    """What a layer adds of the tokens themselves, behind its MLP: projection(activation(gate(x)) * rows of the tokens),
    normed, where the rows are `AttentionContext.token_rows`."""

    gate: PackedWeight  # [size, hidden]
    projection: PackedWeight  # [hidden, size]
    norm: Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of a layer that differs from others in more than what it sees."""

    head_dim: int
    num_kv_heads: int
    kinds: str  # of "qkv" those that its first product gives: "qk", keys are values too; "q", another layer's are read


@dataclass(frozen=True, slots=True)
class DecoderLayerParts:
    """What one Llama-like decoder layer is made of: weights of norms and of linear layers. Where something else mixes
    its tokens, `qkv` is the projection before that and `o` the one behind it."""

    input_norm: Tensor
    qkv: PackedWeight
    q_norm: Tensor | None  # over each head
    k_norm: Tensor | None
    o: PackedWeight
    mlp_norm: Tensor  # before the MLP
    gate_up: PackedWeight | None  # None of a layer that routes
    down: PackedWeight | None
    sliding_window: int | None
    attended_norm: Tensor | None = None  # of what `o` gives, before it is added; after_norm: of what `down` gives
    after_norm: Tensor | None = None
    media_both_ways: bool = False  # sees as far as `AttentionContext.visible` says
    rotation: int = 0  # number of its cos and sin
    routed: RoutedParts | None = None
    sinks: Tensor | None = None  # float32 [heads], see `Backend.paged_attention`
    is_gated: bool = False  # each query has its gate behind it, by whose sigmoid what it attends to is multiplied
    state: StateParts | None = None
    is_paired: bool = False  # a head's dimensions are rotated in pairs; keys are cached with the first of each in front
    shape: LayerShape | None = None  # None: the decoder's
    norms_values: bool = False  # each head by itself, without weights
    token_rows: TokenRowsParts | None = None
    factor: Tensor | None = None  # [1], of the states behind the layer

    @property
    def is_plain(self) -> bool:
        """Whether nothing of it is Gemma 4's."""
        return self.shape is None and not self.norms_values and self.token_rows is None and self.factor is None


class DecoderStack(Protocol):
    """All layers of a decoder in one call."""

    scales_queries: bool
    """Whether it minds `AttentionContext.query_scales`."""

    def __call__(
        self,
        hidden: Tensor,
        rotations: Sequence[tuple[Tensor, Tensor]],
        cache: KVCache,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden] -> the same after all layers and the last norm. `rotations`: pairs of cos and sin.

        `rows` int64 [n], ascending: the tokens whose states are needed, others are undefined.
        """
        ...


@dataclass(frozen=True, slots=True)
class Draws:
    """How the tokens of rows are drawn: arrays [rows]. A row takes one number of a counter-based stream."""

    seeds: NDArray[np.uint64]
    indices: NDArray[np.uint64]  # of the token in its output
    top_p: NDArray[np.float64]  # 1: all
    temperature: NDArray[np.float32]  # 0 or less: the token of the highest logit
    least: NDArray[np.float32]  # the logarithm of min_p; minus infinity: all
    top_k: NDArray[np.int32]  # 0: all


class RowDraws(NamedTuple):
    """Which rows get tokens on a CPU, and how: arrays [n]. Nothing is filtered."""

    rows: NDArray[np.int64]
    temperatures: NDArray[np.float32]  # 0: the first token of the highest logit
    uniforms: NDArray[np.float64]  # in [0, 1)
    masks: NDArray[np.uint32] | None = None  # [n, words], the tokens that count


FEW_FORCED = 16
"""Tokens that a grammar forces at once, and that a native call takes: one less."""


class GrammarFunctions(NamedTuple):
    """Addresses of the grammar library's functions, in the order of native/kernels.h."""

    validate: int
    compute_mask: int
    consume: int
    consume_many: int
    forced: int
    is_stopped: int
    is_error: int


class HeldRow(NamedTuple):
    """A row of logits that is held to a grammar, as native/kernels.h has it."""

    row: int
    seed: int
    place: int  # of the token in its output
    matcher: int  # address
    on_time: int  # address of the bits of all tokens but those that come where there is nothing else; 0: of all
    slot: int


class Taken(NamedTuple):
    """What came of a token that a grammar took."""

    failed: bool
    stopped: bool
    forced: list[int]  # that were taken, too
    is_more: bool  # at least `FEW_FORCED` are forced, and none was taken


@dataclass(frozen=True, slots=True)
class LowRank:
    """What one adapter adds to one linear layer: x -> wide[k] (narrow x) for rows [first, first + n) of its output; to
    a layer that is split over ranks, this rank's part of that."""

    narrow: Tensor  # [ranks of all parts, in]
    parts: list[tuple[int, Tensor]]  # (first row, wide [n, rank]), in the order of their ranks

    @property
    def nbytes(self) -> int:
        return self.narrow.nbytes + sum(wide.nbytes for _, wide in self.parts)


class TokenGroups:
    """A step's tokens by adapter, for all of its layers."""

    __slots__ = ("rows", "tiles")

    def __init__(self, rows: Sequence[Tensor | None]) -> None:
        """Of each adapter its tokens, int64 [n], none in two of them; None: all of them."""
        self.rows = rows
        self.tiles: tuple[Tensor, Tensor, int] | None = None  # what kernels make of them


@dataclass(frozen=True, slots=True)
class Edits:
    """What requests ask of the logits of rows: biases, then penalties, then a mask, then a grammar's.

    Row i's part of a list is [starts[i], starts[i + 1]); there a token stands once. A mask is a row of bits, those of
    the first 32 tokens in the first number, the first token's the lowest.
    """

    bias_starts: NDArray[np.int32]  # [rows + 1]
    biased: NDArray[np.int32]  # [n], tokens
    biases: NDArray[np.float32]  # [n], added; minus infinity forbids
    seen_starts: NDArray[np.int32]  # [rows + 1]
    seen: NDArray[np.int32]  # [m], tokens of prompt and output
    said: NDArray[np.float32]  # [m], how often each stands in the output
    repetition: NDArray[np.float32]  # [rows], over what was seen; 1: none
    frequency: NDArray[np.float32]  # [rows], for each time a token was said
    presence: NDArray[np.float32]  # [rows], for tokens that were said
    masks: NDArray[np.uint32]  # [masks, words]
    narrowed: NDArray[np.int32]  # [rows], the mask of tokens that the request allows; -1: all
    held: NDArray[np.int32]  # [rows], the mask of what the grammar allows; -1: there is none
    strict: NDArray[np.int32]  # [rows], the one that goes before it, with less; as `held` where there is none

    @classmethod
    def none(cls, rows: int, vocab_size: int) -> Edits:
        """Nothing is asked for."""
        starts, empty = np.zeros(rows + 1, np.int32), np.empty(0, np.int32)
        zeros, unmasked = np.zeros(rows, np.float32), np.full(rows, -1, np.int32)
        masks = np.empty((0, -(-vocab_size // 32)), np.uint32)
        none = empty.view(np.float32)
        return cls(
            starts, empty, none, starts, empty, none, zeros + 1, zeros, zeros, masks, unmasked, unmasked, unmasked
        )

    @property
    def has_lists(self) -> bool:
        """Whether there is anything but masks."""
        return len(self.biased) + len(self.seen) > 0

    def without_grammars(self) -> Edits:
        return replace(self, held=np.full_like(self.held, -1), strict=np.full_like(self.strict, -1))

    def arrays(self) -> list[NDArray[np.generic]]:
        """In the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


class Experts(Protocol):
    """The MLPs of a routed layer."""

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden]; chosen int64 [tokens, k], the experts of each token, all different; weights float32
        [tokens, k] -> the weighted sum of what they give [tokens, hidden], experts in ascending order.

        Only the weights of chosen experts are read. A token's result does not depend on the other tokens, as far as
        products of rows do not."""
        ...


class Backend(Protocol):
    """Kernels for some dtypes on one kind of device. All are right for any CPU or GPU tensor that `supports` accepts.

    There is no call once per step yet: what a step needs is in its `AttentionContext`, whose tensors `engine.batch`
    builds once for all layers.
    """

    def describe(self) -> str:
        """For the log and `sensorium info`."""
        ...

    def supports(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether its kernels are meant for tensors and weights of this kind."""
        ...

    def empty_linear(
        self, out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device
    ) -> PackedWeight:
        """A weight [out, in] to be filled."""
        ...

    def empty_quantized(
        self,
        out_features: int,
        in_features: int,
        quantization: Quantization,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> QuantizedWeight:
        """A quantised weight [out, in] to be filled; x and the result have `dtype`."""
        ...

    def empty_blocks(
        self, out_features: int, in_features: int, blocks: Blocks, *, dtype: torch.dtype, device: torch.device
    ) -> BlockWeight:
        """A weight [out, in] in blocks to be filled; x and the result have `dtype`."""
        ...

    def mapped_linear(
        self, parts: Sequence[tuple[int, Tensor]], out_features: int, in_features: int
    ) -> PackedWeight | None:
        """A weight over memory-mapped rows [n, in] at (first row, rows), not copied; None where copying is faster."""
        ...

    def mapped_blocks(self, parts: Sequence[MappedBlocks], out_features: int, in_features: int) -> PackedWeight | None:
        """A weight over memory-mapped blocks, not copied; None where copying is faster."""
        ...

    def maps_blocks(self, kind: str) -> bool:
        """Whether `mapped_blocks` takes blocks of this form."""
        ...

    def quantized_layout(self) -> str | None:
        """Names the layout of quantised weights; None if the disk cache cannot keep it."""
        ...

    def cached_linear(
        self, kept: Mapping[str, Tensor], out_features: int, in_features: int, quantization: Quantization
    ) -> QuantizedWeight:
        """Wraps tensors from another weight's `parts()` (same layout) without copying.

        Raises ValueError on a shape or dtype mismatch, KeyError if a tensor is missing.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """`offset` is added to the weight, without rounding between."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual). The sum may be written into `residual`."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor: ...

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """Elementwise. The result may be written into `x`."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[tokens, 2 * n], gates first -> silu(gate) * up [tokens, n]"""
        ...

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """[tokens, 2 * n], gates first -> activation(gate) * up [tokens, n]"""
        ...

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the first 2 * cos.shape[-1] dimensions of every head. q and k may be rotated in place."""
        ...

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        """Caches of k's dtype, or int8 [blocks, kv_heads, block_size, cache_width]."""
        ...

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        context: AttentionContext,
        scale: float,
        sliding_window: int | None = None,
        visible: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each sequence's new tokens to its cached ones, their own included; grouped queries.

        With a window, position p sees p - sliding_window + 1 .. p. `visible` int32 [tokens]: of its sequence's keys a
        token sees the first so many instead of those up to its own, the window's lower end staying where it is.
        `sinks` float32 [heads]: a score that takes part in each query's softmax, and has no value.
        """
        ...

    def varlen_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None = None
    ) -> Tensor:
        """Attention in both directions inside each run of `lengths` tokens, never across; grouped queries.

        With a window, a token sees as many others on either side of itself.
        """
        ...

    def heard_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], heard: list[int], scale: float
    ) -> Tensor:
        """`varlen_attention` where all of a run see its first `heard` tokens, at least one, and nobody the others."""
        ...

    def query_step(self, q: Tensor) -> int:
        """Queries that `run_attention` takes at a time, or a multiple of it, or all that remain if they are more."""
        ...

    def run_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`varlen_attention` of one run, for consecutive ones of its queries: q [n, heads, head_dim], k and v of all
        its tokens. The numbers are those of all queries at once, to the last bit."""
        ...

    def experts(
        self, gate_up: Sequence[PackedWeight], down: Sequence[PackedWeight], activation: Activation
    ) -> Experts | None:
        """Of each expert, gate and up [2 * inner, hidden] and down [hidden, inner]; None where a weight has a layout
        that is not taken."""
        ...

    def choose(self, logits: Tensor, per_token: int, *, renormalizes: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Router logits [tokens, experts] -> (the experts with the largest ones int64, their weights float32), [tokens,
        per_token] each. Of equal logits the first counts as larger. Weights are the softmax over all experts, with
        `renormalizes` over those that are chosen, times `scale`."""
        ...

    def add_low_rank(self, out: Tensor, x: Tensor, additions: Sequence[LowRank | None], groups: TokenGroups) -> None:
        """To `out` [tokens, out], the product of x [tokens, in], in place what each group's adapter adds for its
        tokens; None: nothing. `out` may be float32, to be added up with what other ranks have."""
        ...

    def edit(self, logits: Tensor, raw: Tensor, edits: Edits) -> None:
        """Float32 logits [rows, vocab], in place. `raw` are the same numbers, which stay, or `logits` itself where
        grammars are all that is asked for.

        Of a grammar's two masks the first counts that leaves a row any token. Where none does, the row's raw logits
        are held to the grammar, and all else is given up. Nothing is read from the device.
        """
        ...

    def draw(self, logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor] | None:
        """float32 logits [rows, vocab] -> (token ids int64 [rows], highest logits float32 [rows]), with the meaning of
        `engine.sampler`; None where there is no kernel for it. A row that has no highest finite logit gets any token.
        Nothing is read from the device."""
        ...

    def draw_rows(self, logits: NDArray[np.float32], draws: RowDraws) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """On a CPU, of some rows of logits [rows, vocab]: the tokens that are drawn [n], and the highest logits of what
        is left [n]. A row with no finite logit left gets token 0."""
        ...

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, states: Tensor, segments: Segments, *, silu: bool = False
    ) -> Tensor:
        """Of every channel by itself the weighted sum of a token and those before it in its sequence, and of that, with
        `silu`, the activation. x [tokens, channels]; weight [channels, taps], the last tap is the token's own; bias
        [channels]; states [slots, taps - 1, channels], the last rows of x before a run -> [tokens, channels]"""
        ...

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, learned: Tensor, states: Tensor, segments: Segments
    ) -> Tensor:
        """Of each head a memory M [key_dim, value_dim], which every token changes and then reads: M fades to
        e^decay M, learns k (learned (v - M^T k))^T and gives M^T q. q and k [tokens, key_heads, key_dim] are first made
        of length one, q then divided by the root of it; v [tokens, value_heads, value_dim]; each key head serves as
        many value heads next to each other; decay and learned float32 [tokens, value_heads]; states float32 [slots,
        value_heads, key_dim, value_dim] -> what is read [tokens, value_heads, value_dim]"""
        ...

    def delta_gates(self, gates: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """gates [tokens, 2 * heads], what each head learns with before what it keeps; rate and bias float32 [heads] ->
        (-e^rate softplus(kept + bias), sigmoid(learned)), float32 [tokens, heads]: `decay` and `learned` of
        `delta_rule`"""
        ...

    def norm_gated(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [tokens, heads, n], each head normed by itself; z [tokens, heads * n] -> silu(z) * norm(x), like z"""
        ...

    def decoder_stack(
        self,
        layers: Sequence[DecoderLayerParts],
        final_norm: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        eps: float,
        activation: Activation,
        norm_offset: float,
        norms_whole_qk: bool,
    ) -> DecoderStack | None:
        """All layers as one call, the numbers those of kernel by kernel; None where that is not supported."""
        ...
