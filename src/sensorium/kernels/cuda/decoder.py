"""The layers of a decoder by these kernels: ten launches a layer of a decode step, products included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels.backend import (
    Activation,
    BranchParts,
    DecoderLayerParts,
    PackedWeight,
    RoutedParts,
    StateParts,
    TokenRowsParts,
)
from sensorium.kernels.context import AttentionContext, KVCache, LayerCache, StateCache
from sensorium.kernels.cuda.attention import Arrivals, paged_attention, refusal
from sensorium.kernels.cuda.experts import CudaExperts, choose, gate_and_up_of
from sensorium.kernels.cuda.norms import Summands, add_rms_norm, branching_norms, gated, rms_norm, token_gates
from sensorium.kernels.cuda.rope import can_rotate, can_write, rotate_and_write
from sensorium.kernels.cuda.states import mixed_tokens
from sensorium.kernels.cuda.states import takes as takes_state
from sensorium.kernels.reference import PlainLinear


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What all layers have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    eps: float
    activation: Activation
    norm_offset: float
    norms_whole_qk: bool = False


class CudaDecoder:
    """See `DecoderStack`."""

    scales_queries = True

    __slots__ = ("_arrivals", "_final_norm", "_joined", "_layers", "_shape", "_widths")

    def __init__(
        self, layers: Sequence[DecoderLayerParts], final_norm: Tensor, shape: DecoderShape, arrivals: Arrivals
    ) -> None:
        self._layers, self._final_norm, self._shape, self._arrivals = list(layers), final_norm, shape, arrivals
        self._widths = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        pairs = [
            *((one.routed.router, one.routed.shared_gate) for one in layers if one.routed is not None),
            *(
                (one.qkv, one.state.delta.gates)
                for one in layers
                if one.state is not None and one.state.delta is not None
            ),
        ]
        joined = {(id(first), id(second)): _joined(first, second) for first, second in pairs}
        self._joined = {key: one for key, one in joined.items() if one is not None}

    def __call__(
        self,
        hidden: Tensor,
        rotations: Sequence[tuple[Tensor, Tensor]],
        cache: KVCache,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Raises ValueError where the cache is of a kind that the kernels do not write."""
        eps, offset, last = self._shape.eps, self._shape.norm_offset, self._layers[-1]
        residual = hidden.clone()  # norms add to it in place
        x = rms_norm(hidden, self._layers[0].input_norm, eps, offset)
        made: Tensor | Summands = x
        after: Tensor | None = None  # a norm of what the layer before gave, which goes with the next one
        factor: Tensor | None = None  # and what multiplies their sum
        for index, (layer, own) in enumerate(zip(self._layers, cache, strict=True)):
            if index:
                x, residual = add_rms_norm(made, residual, layer.input_norm, eps, offset, after, None, factor)
            if layer.state is None:
                x = self._attended(layer, x, rotations[layer.rotation], own, context)
            else:
                x = self._kept(layer, layer.state, x, own, context)
            if layer is last and rows is not None:
                x, residual = x[rows], residual[rows]
            made, residual = self._fed(layer, layer.o(x), residual)
            after, factor = layer.after_norm, layer.factor
            if layer.token_rows is not None:
                made, residual = self._with_rows(layer, layer.token_rows, made, residual, index, context)
                after = layer.token_rows.norm
        normed, _ = add_rms_norm(made, residual, self._final_norm, eps, offset, after, None, factor)
        return normed if rows is None else torch.empty_like(hidden).index_copy_(0, rows, normed)

    def _with_rows(
        self,
        layer: DecoderLayerParts,
        parts: TokenRowsParts,
        made: Tensor | Summands,
        residual: Tensor,
        index: int,
        context: AttentionContext,
    ) -> tuple[Tensor, Tensor]:
        """(what a layer adds of the tokens themselves, the sum before it)"""
        if context.token_rows is None or layer.after_norm is None or isinstance(made, Summands):
            raise ValueError("a layer that adds rows of the tokens was not given any")
        gates, total = token_gates(
            made, residual, layer.after_norm, parts.gate, context.token_rows[index], self._shape.eps,
            self._shape.activation,
        )  # fmt: skip
        return parts.projection(gates), total

    def _fed(self, layer: DecoderLayerParts, x: Tensor, residual: Tensor) -> tuple[Tensor | Summands, Tensor]:
        """(what is made of the sum of the residual and x, what attention gave; that sum)"""
        routed, norm = layer.routed, layer.attended_norm
        if routed is not None and routed.branches is not None and norm is not None:
            weights = (layer.mlp_norm, routed.branches.experts_norm, routed.branches.router_norm)
            states = branching_norms(x, residual, norm, weights, self._shape.eps)
            return self._branched(routed, routed.branches, *states), residual
        wide: Tensor | None = None
        if routed is not None and routed.exact_router is not None:
            wide = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        x, residual = add_rms_norm(x, residual, layer.mlp_norm, self._shape.eps, self._shape.norm_offset, norm, wide)
        return self._mixed(layer, x, wide), residual

    def _branched(
        self, routed: RoutedParts, branches: BranchParts, x: Tensor, experts_x: Tensor, router_x: Tensor
    ) -> Summands:
        """Of an MLP of x and experts beside it."""
        chosen, weights = choose(
            routed.router(router_x), routed.per_token, renormalizes=routed.renormalizes, scale=routed.scale,
            factors=branches.shares,
        )  # fmt: skip
        norms = branches.experts_after, branches.mlp_after
        if not isinstance(routed.experts, CudaExperts):
            given = routed.experts(experts_x, chosen, weights)
            shared = self._mlp(routed.shared_gate_up, routed.shared_down, x)
            return Summands(given.float().unsqueeze(1), shared, norms=norms)
        expert = routed.experts.shareable(routed.shared_gate_up, routed.shared_down)
        sums = routed.experts.summands(experts_x, chosen, weights, expert, x)
        if expert is None:
            sums = replace(sums, shared=self._mlp(routed.shared_gate_up, routed.shared_down, x))
        return replace(sums, norms=norms)

    def _mixed(self, layer: DecoderLayerParts, x: Tensor, wide: Tensor | None) -> Tensor | Summands:
        """What the MLP, or what stands in its place, makes of states [tokens, hidden]; `wide`: the same in float32."""
        routed = layer.routed
        if routed is None and layer.token_rows is not None and layer.gate_up is not None and layer.down is not None:
            return layer.down(gate_and_up_of(x, layer.gate_up, self._shape.activation))
        if routed is None:
            return self._mlp(layer.gate_up, layer.down, x)
        logits, gate = self._scores(routed, x, wide)
        chosen, weights = choose(
            logits, routed.per_token, renormalizes=routed.renormalizes, scale=routed.scale,
            correction=routed.correction, groups=routed.groups, groups_per_token=routed.groups_per_token,
        )  # fmt: skip
        if not isinstance(routed.experts, CudaExperts):
            out = routed.experts(x, chosen, weights)
            if routed.shared_gate_up is None:
                return out
            shared = self._mlp(routed.shared_gate_up, routed.shared_down, x)
            return out.add_(shared if gate is None else shared.mul_(gate.sigmoid_()))
        expert = routed.experts.shareable(routed.shared_gate_up, routed.shared_down)
        sums = routed.experts.summands(x, chosen, weights, expert)
        if routed.shared_gate_up is None:
            return sums
        return Summands(
            sums.parts, self._mlp(routed.shared_gate_up, routed.shared_down, x) if expert is None else sums.shared, gate
        )

    def _scores(self, routed: RoutedParts, x: Tensor, wide: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(logits of the experts, the number [tokens, 1] that scales what all tokens take)"""
        if wide is not None and routed.exact_router is not None:
            gate = None if routed.shared_gate is None else routed.shared_gate(x)
            return functional.linear(wide, routed.exact_router), gate
        return (
            (routed.router(x), None) if routed.shared_gate is None else self._both(routed.router, routed.shared_gate, x)
        )

    def _mlp(self, gate_up: PackedWeight | None, down: PackedWeight | None, x: Tensor) -> Tensor:
        if gate_up is None or down is None:
            raise ValueError("a layer has neither an MLP nor experts")
        return down(gated(gate_up(x), self._shape.activation))

    def _kept(
        self, layer: DecoderLayerParts, state: StateParts, x: Tensor, cache: object, context: AttentionContext
    ) -> Tensor:
        """Of a layer with a state: [tokens, hidden] -> [tokens, out]"""
        if not isinstance(cache, StateCache):
            raise ValueError("a layer with a state was given a cache without one")
        if state.delta is None:
            return mixed_tokens(state, layer.qkv(x), None, cache, context.runs)
        projected, gates = self._both(layer.qkv, state.delta.gates, x)
        return mixed_tokens(state, projected, gates, cache, context.runs)

    def _both(self, first: Callable[[Tensor], Tensor], second: PackedWeight, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two products of the same states, which are one where they can be."""
        joined = self._joined.get((id(first), id(second)))
        if joined is None:
            return first(x), second(x)
        width = joined.weight.shape[0] - second.weight.shape[0] if isinstance(second, PlainLinear) else 0
        both = joined(x)
        return both[:, :width], both[:, width:]

    def _attended(
        self,
        layer: DecoderLayerParts,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: object,
        context: AttentionContext,
    ) -> Tensor:
        """[tokens, hidden] -> [tokens, heads * head_dim]"""
        if not isinstance(cache, LayerCache):
            raise ValueError("a layer of attention was given a cache without keys")
        shape, own = self._shape, context.by_table(cache.table)
        q, k, v, gates = self._separate(layer, layer.qkv(x))
        reason = refusal(q, cache.keys, cache.values)
        if reason is not None or not can_rotate(q, k, *rotation) or not can_write(k, v, cache.keys, cache.values):
            raise ValueError(f"no kernel for {reason or 'such a cache'}")
        norms = None if layer.q_norm is None else (layer.q_norm, layer.q_norm if layer.k_norm is None else layer.k_norm)
        scales = None if context.query_scales is None else context.query_scales.flatten()
        q = rotate_and_write(
            q, k, v, *rotation, norms, shape.eps, shape.norm_offset, cache, own.slots, is_paired=layer.is_paired,
            norms_whole=shape.norms_whole_qk and norms is not None, norms_values=layer.norms_values,
            writes=layer.shape is None or layer.shape.kinds != "q", scales=scales,
        )  # fmt: skip
        visible = context.visible if layer.media_both_ways else None
        out = paged_attention(
            q, cache.keys, cache.values, own, shape.scale, self._arrivals, layer.sliding_window, visible, layer.sinks,
            gates,
        )  # fmt: skip
        return out.view(x.shape[0], -1)

    def _separate(self, layer: DecoderLayerParts, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values, and the gates behind queries. Of a layer without keys queries stand for them."""
        shape, (heads, *others) = self._shape, self._widths
        if layer.shape is not None:
            parts = qkv.view(len(qkv), -1, layer.shape.head_dim)
            kv_heads = layer.shape.num_kv_heads
            q, k = parts[:, :heads], parts[:, heads : heads + kv_heads]
            if layer.shape.kinds == "q":
                return q, q[:, :kv_heads], q[:, :kv_heads], None
            return q, k, parts[:, heads + kv_heads :] if layer.shape.kinds == "qkv" else k, None
        widths = [2 * heads if layer.is_gated else heads, *others]
        q, k, v = torch.split(qkv.view(len(qkv), -1, shape.head_dim), widths, dim=1)
        if not layer.is_gated:
            return q, k, v, None
        q, gates = q.view(len(qkv), heads, 2, shape.head_dim).unbind(2)  # each behind its query
        return q, k, v, gates


def _joined(first: object, second: object) -> PlainLinear | None:
    """Two weights of the same states as one, if they can be. Both become views of it: there is no other copy."""
    if not (isinstance(first, PlainLinear) and isinstance(second, PlainLinear)):
        return None
    if first.weight.dtype is not second.weight.dtype or not (first.bias is second.bias is None):
        return None
    joined = torch.cat([first.weight, second.weight])
    first.weight, second.weight = joined[: len(first.weight)], joined[len(first.weight) :]
    return PlainLinear(joined)


def can_stack(layers: Sequence[DecoderLayerParts], final_norm: Tensor, shape: DecoderShape) -> bool:
    """Whether the kernels take such layers, with a cache of any kind."""
    norms = [
        norm
        for one in layers
        for norm in (one.input_norm, one.q_norm, one.k_norm, one.attended_norm, one.mlp_norm, one.after_norm)
        if norm is not None
    ]
    branches = [one.routed.branches for one in layers if one.routed is not None and one.routed.branches is not None]
    norms += [norm for one in branches for norm in (one.experts_norm, one.experts_after, one.mlp_after)]
    own = [(one.shape.head_dim, one.shape.num_kv_heads) for one in layers if one.shape is not None]
    heads = own or [(shape.head_dim, shape.num_kv_heads)]
    return (
        bool(layers)
        and all(size % 4 == 0 and shape.num_heads % kv_heads == 0 for size, kv_heads in heads)
        and all(norm.dtype is final_norm.dtype and norm.is_contiguous() for norm in norms)
        and all(one.state is None or takes_state(one.state) for one in layers)
        and all(one.routed is None or one.token_rows is None for one in layers)
        and all((one.q_norm is None) == (one.k_norm is None) or one.shape is not None for one in layers)
    )
