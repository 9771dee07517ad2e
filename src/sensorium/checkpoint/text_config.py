"""A decoder's shape and rotary positions: both dialects of config.json -> `TextConfig`, every default resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sensorium.checkpoint.decoders import DECODERS, DecoderDefaults, RoutingDefaults
from sensorium.checkpoint.families import Family
from sensorium.checkpoint.state_layers import StateSpec, state_layers
from sensorium.checkpoint.values import epsilon, indices, number, numbers, positive_int, unsupported
from sensorium.errors import CheckpointError

_ROPE_KINDS: Mapping[str, str] = {
    "default": "default",
    "mrope": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "proportional": "proportional",
    "longrope": "longrope",
    "su": "longrope",
}

_LAYER_TYPES = ("full_attention", "sliding_attention")

# No key says them:
_OF_THE_FAMILY = ("norms_whole_qk", "norm_offset", "has_sublayer_norms", "has_sinks", "pairs_rope", "norms_values")

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "tanh": "tanh",
}
"""What configurations call an activation -> the kernels' name of it."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions. `kind`: default, linear, dynamic, yarn, llama3, proportional or longrope ("su");
    `mrope_section`: M-RoPE."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None
    beta_fast: float = 32.0  # yarn: turns per context above which a frequency is kept, and
    beta_slow: float = 1.0  # below which it is divided by `factor`
    mscale: float = 0.0  # yarn: where both are given, they make the attention factor
    mscale_all_dim: float = 0.0
    truncate: bool = True  # yarn: whether the border dimensions are whole numbers
    partial: float = 1.0  # part of head_dim that is rotated
    query_beta: float = 0.0  # queries grow by the logarithm of the original contexts before them: see `query_scales`
    mrope_section: tuple[int, ...] = ()  # frequencies per axis (time, height, width), contiguous or
    mrope_interleaved: bool = False  # the axes in turn, what is left over the first one's


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How the tokens of one layer see each other."""

    rope: RopeConfig
    scale: float  # of a query's product with a key
    window: int | None = None
    """Keys that a token sees, its own included; where attention goes both ways, on either side of it. None: all."""
    media_both_ways: bool = False  # a media item's tokens see all of it, and all before it that the window reaches
    # Where layers differ in shape (Gemma 4); elsewhere 0, and the `TextConfig`'s count.
    head_dim: int = 0
    num_kv_heads: int = 0
    intermediate_size: int = 0
    source: int | None = None  # the layer whose keys and values it reads; None: its own
    keys_are_values: bool = False  # one product gives both
    state: StateSpec | None = None  # what the layer has in attention's place: the rest then says nothing


@dataclass(frozen=True, slots=True)
class Routing:
    """Experts, in the place of the MLP, of which every token takes some."""

    layers: tuple[int, ...]  # that have them; the others have an MLP
    num_experts: int
    per_token: int
    expert_size: int  # intermediate size of one
    shared_size: int = 0  # of the one that all tokens take besides; 0: there is none
    renormalizes: bool = True  # weights of a token's experts add up to 1
    shared_is_gated: bool = True  # by a number of each token
    has_correction: bool = False
    """Weights are sigmoids. Experts with the highest sums of sigmoid and stored correction are chosen, out of the
    `groups_per_token` groups whose two best sums add up to the most."""
    groups: int = 1
    groups_per_token: int = 1
    scale: float = 1.0  # of the weights
    has_biases: bool = False  # router and experts
    is_clamped: bool = False  # experts clamp gate and up: see `Activation` of the kernels


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A Llama-like decoder's shape, every default resolved."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig  # of the layers that see everything, which is what a sequence's length is bounded by
    max_len: int  # tokens of the longest sequence
    layers: tuple[AttentionSpec, ...]
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # bias of q, k, v
    output_bias: bool = False  # bias of o_proj
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm on every head of q and k
    norms_whole_qk: bool = False  # OLMoE: on all heads together
    hidden_act: str = "silu"  # a name of `ACTIVATIONS`
    norm_offset: float = 0.0  # added to the weights of all norms: Gemma's are stored around 0
    norms_values: bool = False  # Gemma 4: on every head, without weights
    has_sublayer_norms: bool = False  # Gemma: attention and MLP are normed again before they are added
    pairs_rope: bool = False  # GLM: what is rotated together stands side by side, not half a head apart
    has_sinks: bool = False  # GPT-OSS: a score of each head takes part in the softmax, and has no value
    embedding_scale: float = 1.0
    logit_cap: float | None = None  # logits become cap * tanh(logits / cap)
    gates_attention: bool = False  # what is attended to is multiplied by the sigmoid of a second half of the queries
    layer_embedding_size: int = 0  # Gemma 4: of embeddings that every layer has of its own, in one table
    layer_vocab_size: int = 0  # rows of that table
    routing: Routing | None = None
    is_causal: bool = True  # False: every token sees the whole prompt, and nothing is generated
    has_head: bool = True  # False: neither stored nor tied, so the model cannot generate

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def long_context_from(self) -> int | None:
        """LongRoPE: longer sequences take the long factors, all their tokens. None: there is no such border."""
        original = self.rope.original_max_positions
        return original if self.rope.kind == "longrope" and original < self.max_position_embeddings else None

    @property
    def stretched_from(self) -> int | None:
        """Dynamic rope: in longer sequences frequencies depend on the length. None: there is no such border."""
        stated = self.max_position_embeddings
        return stated if self.rope.kind == "dynamic" and self.max_len > stated else None


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's part of config.json: nested in multimodal configs, but flat in the hub's Qwen2-VL."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def read_text_config(config: dict[str, Any], family: Family) -> TextConfig:
    """The decoder's shape in config.json. CheckpointError names the key that cannot be served."""
    text = text_part(config)
    model_type = str(text.get("model_type", family.text_model_type if text is not config else None))
    if (decoder := DECODERS.get(model_type)) is None:
        raise unsupported("text model_type", model_type, DECODERS)
    text = _renamed(text, decoder)
    num_heads, num_kv_heads, head_dim = _heads(text, decoder)
    max_positions = positive_int(text, "max_position_embeddings", decoder.max_positions)
    rope = _rope(text, decoder, "full_attention", decoder.theta, max_positions, head_dim)
    max_len = max_positions if decoder.states_stretched_length else _stretched(rope, max_positions)
    layers = _layers(text, decoder, rope, max_len, head_dim, has_media=bool(family.modalities))
    bias = decoder.reads_attention_bias and bool(text.get("attention_bias"))
    return TextConfig(
        model_type=model_type,
        vocab_size=positive_int(text, "vocab_size", decoder.vocab_size),
        hidden_size=positive_int(text, "hidden_size", decoder.hidden_size),
        intermediate_size=_inner_size(text, decoder),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=epsilon(text, "rms_norm_eps", decoder.rms_norm_eps),
        rope=rope,
        max_len=max_len,
        layers=layers,
        tie_word_embeddings=_is_tied(config, text, decoder),
        attention_bias=(decoder.qkv_bias and bool(text.get("qkv_bias", True))) or bias,
        output_bias=bias,
        qk_norm=_has_qk_norm(text, decoder),
        mlp_bias=decoder.reads_mlp_bias and bool(text.get("mlp_bias", False)),
        hidden_act=_activation(text),
        embedding_scale=positive_int(text, "hidden_size", decoder.hidden_size) ** (0.5 * decoder.scales_embeddings),
        logit_cap=_logit_cap(text) if decoder.caps_logits else None,
        routing=None if decoder.routing is None else _routing(text, decoder, decoder.routing, len(layers)),
        gates_attention=decoder.gates_attention and bool(text.get("attn_output_gate", True)),
        is_causal=_is_causal(text) and bool(config.get("is_causal", True)),
        **{name: getattr(decoder, name) for name in _OF_THE_FAMILY},
        **(_layer_embeddings(text, decoder) if decoder.shapes_differ else {}),
    )


def _routing(text: dict[str, Any], decoder: DecoderDefaults, own: RoutingDefaults, num_layers: int) -> Routing | None:
    """None where no layer has experts."""
    if own.switch and not text.get(own.switch):
        return None
    key = "num_experts" if text.get("num_experts") is not None else "num_local_experts"
    if text.get(key) == 0:
        return None
    num_experts = positive_int(text, key, own.num_experts)
    per_token = positive_int(text, "num_experts_per_tok", own.per_token)
    if per_token > num_experts:
        name = decoder.names.get("num_experts_per_tok", "num_experts_per_tok")
        raise CheckpointError(f"config.json: {name} {per_token} is more than the {num_experts} experts")
    layers = _routed_layers(text, own, num_layers)
    if not layers:
        return None
    size = positive_int(text, "intermediate_size", decoder.intermediate_size)
    if own.expert_size is not None:
        size = positive_int(text, "moe_intermediate_size", own.expert_size)
    shared_size = own.shared_size and positive_int(text, "shared_expert_intermediate_size", own.shared_size)
    if own.shared_count:
        shared_size = int(number(text, "n_shared_experts", own.shared_count)) * size
    renormalizes = own.renormalizes
    return Routing(
        layers=layers,
        num_experts=num_experts,
        per_token=per_token,
        expert_size=size,
        shared_size=shared_size,
        shared_is_gated=not own.shared_count,
        renormalizes=bool(text.get("norm_topk_prob", False)) if renormalizes is None else renormalizes,
        has_biases=own.has_biases,
        is_clamped=own.is_clamped and _is_clamped(text),
        **(_correction(text, num_experts, per_token) if own.has_correction else {}),
    )


def _routed_layers(text: dict[str, Any], own: RoutingDefaults, num_layers: int) -> tuple[int, ...]:
    if own.dense_layers is not None:
        return tuple(range(int(number(text, "first_k_dense_replace", own.dense_layers)), num_layers))
    every, dense = positive_int(text, "decoder_sparse_step", 1), indices(text, "mlp_only_layers") or ()
    return tuple(i for i in range(num_layers) if i not in dense and (i + 1) % every == 0)


def _correction(text: dict[str, Any], num_experts: int, per_token: int) -> dict[str, Any]:
    """How experts are chosen by corrected sigmoids. CheckpointError if the groups are none."""
    groups, taken = positive_int(text, "n_group", 1), positive_int(text, "topk_group", 1)
    in_group, rest = divmod(num_experts, groups)
    if groups > 1 and (rest or in_group < 2 or taken > groups or per_token > taken * in_group):
        raise CheckpointError(
            f"config.json: n_group {groups} and topk_group {taken} do not go with {num_experts} experts, "
            f"of which a token takes {per_token}"
        )
    scale = number(text, "routed_scaling_factor", 1.0)
    return {"has_correction": True, "groups": groups, "groups_per_token": taken, "scale": scale}


def _has_qk_norm(text: dict[str, Any], decoder: DecoderDefaults) -> bool:
    if decoder.norms_whole_qk and text.get("clip_qkv") is not None:
        raise unsupported("clip_qkv", text["clip_qkv"], ("null",))
    return decoder.qk_norm and text.get("use_qk_norm") is not False


def _is_clamped(text: dict[str, Any]) -> bool:
    """True: the kernels have the one clamped product that is published."""
    for key, known in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if number(text, key, known) != known:
            raise unsupported(key, text[key], (str(known),))
    return True


def _layer_embeddings(text: dict[str, Any], decoder: DecoderDefaults) -> dict[str, Any]:
    """The sizes of their table. Null and 0 mean that there are no such embeddings."""
    key = "hidden_size_per_layer_input"
    return {
        "layer_embedding_size": positive_int(text, key, 256) if text.get(key, 256) else 0,
        "layer_vocab_size": positive_int(text, "vocab_size_per_layer_input", decoder.vocab_size),
    }


def _renamed(text: dict[str, Any], decoder: DecoderDefaults) -> dict[str, Any]:
    """A config that has names of its own, in those of this module, with the values of keys that it leaves out."""
    kept = {key: value for key, value in text.items() if key not in decoder.names}
    own = {key: text[name] for key, name in decoder.names.items() if name in text}
    older = {key: text[name] for key, name in decoder.aliases.items() if text.get(name) is not None}
    given = {**kept, **own, **older}
    return {**given, **{key: value for key, value in decoder.preset.items() if given.get(key) is None}}


def _inner_size(text: dict[str, Any], decoder: DecoderDefaults) -> int:
    """Of an MLP; LFM2's are two thirds of what is stated, rounded up to a multiple."""
    size = positive_int(text, "intermediate_size", decoder.intermediate_size)
    if not decoder.adjusts_width or not text.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    if text.get("block_ffn_dim_multiplier", 1.0) is None:
        return size
    multiple = positive_int(text, "block_multiple_of", 256)
    return -(-int(number(text, "block_ffn_dim_multiplier", 1.0) * size) // multiple) * multiple


def _activation(text: dict[str, Any]) -> str:
    activation = str(text.get("hidden_act") or "silu")
    if activation not in ACTIVATIONS:
        raise unsupported("hidden_act", activation, ACTIVATIONS)
    return activation


def _logit_cap(text: dict[str, Any]) -> float | None:
    return None if text.get("final_logit_softcapping") is None else number(text, "final_logit_softcapping", 0.0)


def _heads(text: dict[str, Any], decoder: DecoderDefaults) -> tuple[int, int, int]:
    """(heads, key-value heads, elements of a head)."""
    hidden_size = positive_int(text, "hidden_size", decoder.hidden_size)
    num_heads = positive_int(text, "num_attention_heads", decoder.num_heads)
    num_kv_heads = positive_int(text, "num_key_value_heads", decoder.num_kv_heads or num_heads)
    head_dim = positive_int(text, "head_dim", decoder.head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"config.json: {num_heads} heads do not divide among {num_kv_heads} key-value heads")
    return num_heads, num_kv_heads, head_dim


def _is_causal(text: dict[str, Any]) -> bool:
    """Embedders on decoders say in one of two ways that their attention goes both ways."""
    return bool(text.get("is_causal", True)) and text.get("use_bidirectional_attention") not in (True, "all")


def _is_tied(config: dict[str, Any], text: dict[str, Any], decoder: DecoderDefaults) -> bool:
    """Whether the head's rows are the embeddings'. Of multimodal configs either level may say so, and the other one may
    hold the default, false. A head that is stored and differs is kept all the same: see `loading.resolve_head`."""
    levels = (config,) if decoder.is_tied_outside else (config, text)
    return any(bool(level.get("tie_word_embeddings", False)) for level in levels)


def _layers(
    text: dict[str, Any], decoder: DecoderDefaults, rope: RopeConfig, max_len: int, head_dim: int, *, has_media: bool
) -> tuple[AttentionSpec, ...]:
    """How each layer attends. `rope` is that of layers without a window."""
    num_layers = positive_int(text, "num_hidden_layers", decoder.num_layers)
    scale = head_dim**-0.5
    if decoder.scale is not None:
        scale = decoder.scale
    if decoder.query_scalar is not None:
        scale = number(text, "query_pre_attn_scalar", decoder.query_scalar) ** -0.5
    full = AttentionSpec(rope, scale)
    windowed = replace(full, window=_window(text, decoder, max_len))
    if decoder.local_theta is not None:
        theta = number(text, "rope_local_base_freq", decoder.local_theta)
        without = {**text, "rope_theta": None}  # which is the full layers'
        local = _rope(without, decoder, "sliding_attention", theta, rope.original_max_positions, head_dim)
        windowed = replace(windowed, rope=local)
    layers = tuple(windowed if one else full for one in _windowed_layers(text, decoder, num_layers))
    if decoder.state_layer is not None:
        kept = zip(layers, state_layers(text, decoder, num_layers), strict=True)
        return tuple(replace(layer, state=state) for layer, state in kept)
    if decoder.shapes_differ:
        return _shaped(text, decoder, layers, has_media=has_media)
    if has_media and decoder.media_both_ways:
        return tuple(replace(layer, media_both_ways=True) for layer in layers)
    return layers


def _window(text: dict[str, Any], decoder: DecoderDefaults, max_len: int) -> int | None:
    """The window of layers that have one. One that no sequence outgrows is none."""
    if text.get("sliding_window", decoder.sliding_window) is None:  # null is not the default
        return None
    if decoder.window_is_optional and not text.get("use_sliding_window", False):  # transformers then writes 0
        return None
    window = positive_int(text, "sliding_window", decoder.sliding_window)
    if decoder.window_covers_both_sides and not _is_causal(text):
        window //= 2
    return None if window >= max_len else window


def _windowed_layers(text: dict[str, Any], decoder: DecoderDefaults, num_layers: int) -> list[bool]:
    """Of each layer whether it has the window."""
    if decoder.window_is_optional and not text.get("use_sliding_window", False):
        return [False] * num_layers
    kinds = text.get("layer_types")
    if decoder.full_every is None and not decoder.window_is_optional:
        return [True] * num_layers
    if isinstance(kinds, list) and (decoder.full_every is not None or len(kinds) == num_layers):
        _check_layer_types(kinds, num_layers)
        last = not decoder.shapes_differ and kinds[-1] == "sliding_attention"
        return [*(kind == "sliding_attention" for kind in kinds[:-1]), last]
    if decoder.full_every is not None:
        every = positive_int(text, "sliding_window_pattern", decoder.full_every)
        return [
            (index + 1) % every != 0 and not (decoder.shapes_differ and index + 1 == num_layers)
            for index in range(num_layers)
        ]
    first = int(number(text, "max_window_layers", decoder.max_window_layers))
    return [decoder.has_window(index, first) for index in range(num_layers)]


def _shaped(
    text: dict[str, Any], decoder: DecoderDefaults, layers: Sequence[AttentionSpec], *, has_media: bool
) -> tuple[AttentionSpec, ...]:
    """With each layer's own shape. Layers without a window have heads of their own kind, the last layers read the keys
    and values of the last one of their kind before them."""
    is_windowed = _windowed_layers(text, decoder, len(layers))
    inner = positive_int(text, "intermediate_size", decoder.intermediate_size)
    num_own = len(layers) - int(number(text, "num_kv_shared_layers", 0))
    made = []
    for index, (layer, windowed) in enumerate(zip(layers, is_windowed, strict=True)):
        source = None
        if index >= num_own:
            source = next((i for i in range(num_own - 1, -1, -1) if is_windowed[i] is windowed), None)
            if source is None:
                raise CheckpointError("config.json: num_kv_shared_layers leaves no layer of each kind to read from")
        _, num_kv_heads, head_dim = _heads({**text, **_layer_heads(text, index, windowed=windowed)}, decoder)
        own = replace(
            layer,
            media_both_ways=has_media and windowed and text.get("use_bidirectional_attention") == "vision",
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            intermediate_size=2 * inner if source is not None and text.get("use_double_wide_mlp") else inner,
            source=source,
            keys_are_values=bool(text.get("attention_k_eq_v")) and not windowed,
        )
        made.append(own)
    return tuple(made)


def _layer_heads(text: dict[str, Any], index: int, *, windowed: bool) -> dict[str, Any]:
    """The keys of heads that a layer has in place of the config's: in the hub's dialect one shape for all layers
    without a window, in today's an object for each layer that differs."""
    stated = text.get("per_layer_config")
    if stated is None:
        heads = text.get("num_global_key_value_heads") if text.get("attention_k_eq_v") else None
        full = {"head_dim": positive_int(text, "global_head_dim", 512), "num_key_value_heads": heads}
        return {} if windowed else {key: value for key, value in full.items() if value is not None}
    own = stated.get(str(index), {}) if isinstance(stated, dict) else None
    if not isinstance(own, dict) or not own.keys() <= {"head_dim", "num_key_value_heads"}:
        raise CheckpointError(
            f"config.json: per_layer_config of layer {index} may say head_dim and num_key_value_heads"
        )
    return own


def _check_layer_types(kinds: list[Any], num_layers: int) -> None:
    unknown = [kind for kind in kinds if kind not in _LAYER_TYPES]
    if unknown:
        raise unsupported("layer type", unknown[0], _LAYER_TYPES)
    if len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}")


def _rope_settings(text: dict[str, Any], decoder: DecoderDefaults, layer_type: str) -> dict[str, Any]:
    """What config.json says of rotary positions, of layers of this type where types differ.

    Old dialect: rope_scaling{type|rope_type}, which is of layers without a window; new one: rope_parameters, with an
    object for each type where they differ.
    """
    stated, scaling = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    if not (isinstance(stated, dict) and isinstance(scaling, dict)):
        raise CheckpointError("config.json: rope_scaling must be an object")
    if decoder.local_theta is None:
        return stated or scaling
    if stated and not stated.keys() & set(_LAYER_TYPES):
        raise CheckpointError(f"config.json: rope_parameters must have an object for each of {', '.join(_LAYER_TYPES)}")
    own = stated.get(layer_type) or {}
    if not isinstance(own, dict):
        raise CheckpointError(f"config.json: rope_parameters.{layer_type} must be an object")
    return {**own, **scaling} if layer_type == "full_attention" else own


def _rope(
    text: dict[str, Any], decoder: DecoderDefaults, layer_type: str, theta: float, max_positions: int, head_dim: int
) -> RopeConfig:
    """Rotary positions of layers of this type. `theta` counts where the config does not say one."""
    settings = _rope_settings(text, decoder, layer_type)
    one_type = {**text, "rope_parameters": settings, "rope_scaling": None}
    sections, interleaved = decoder.mrope_section, decoder.mrope_interleaved
    return read_rope(one_type, theta, max_positions, head_dim, sections, interleaved=interleaved)


def _scaling(text: dict[str, Any]) -> dict[str, Any]:
    stated = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(stated, dict):
        raise CheckpointError("config.json: rope_scaling must be an object")
    return stated


def read_rope(
    text: dict[str, Any],
    theta: float,
    max_positions: int,
    head_dim: int,
    mrope_section: tuple[int, ...] = (),
    *,
    interleaved: bool = False,
) -> RopeConfig:
    """Old dialect: rope_theta and rope_scaling{type|rope_type}; new one: rope_parameters with everything. `theta` and
    `mrope_section` are the family's own, and whether axes take turns."""
    scaling = _scaling(text)
    name = scaling.get("rope_type") or scaling.get("type") or "default"
    if (kind := _ROPE_KINDS.get(str(name))) is None:
        raise unsupported("rope type", name, _ROPE_KINDS)
    key = "original_max_position_embeddings"  # the outer one counts where both are there, as in transformers
    original = positive_int(text if text.get(key) else scaling, key, max_positions)
    rope = RopeConfig(
        theta=number(scaling, "rope_theta", number(text, "rope_theta", theta)),
        kind=kind,
        factor=number(scaling, "factor", max_positions / original),
        low_freq_factor=number(scaling, "low_freq_factor", 1.0),
        high_freq_factor=number(scaling, "high_freq_factor", 4.0),
        original_max_positions=original,
        short_factor=numbers(scaling, "short_factor"),
        long_factor=numbers(scaling, "long_factor"),
        attention_factor=None if scaling.get("attention_factor") is None else number(scaling, "attention_factor", 1.0),
        beta_fast=number(scaling, "beta_fast", 0.0) or 32.0,
        beta_slow=number(scaling, "beta_slow", 0.0) or 1.0,
        mscale=number(scaling, "mscale", 0.0),
        mscale_all_dim=number(scaling, "mscale_all_dim", 0.0),
        truncate=bool(scaling.get("truncate", True)),
        query_beta=number(scaling, "llama_4_scaling_beta", 0.0),
        partial=number(scaling, "partial_rotary_factor", number(text, "partial_rotary_factor", 1.0)),
        mrope_section=tuple(int(x) for x in numbers(scaling, "mrope_section")) or mrope_section,
        mrope_interleaved=interleaved,
    )
    _check_rope(rope, int(head_dim * rope.partial) // 2)
    return rope


def _check_rope(rope: RopeConfig, frequencies: int) -> None:
    if frequencies <= 0 or rope.theta <= 0 or rope.factor <= 0 or rope.partial > 1:
        raise CheckpointError(
            "config.json: rope theta, factor and rotated dimensions must be positive, and no more than all"
        )
    if rope.kind == "yarn" and (min(rope.beta_fast, rope.beta_slow) <= 0 or rope.theta == 1):
        raise CheckpointError("config.json: beta_fast and beta_slow of yarn must be positive, and rope_theta not 1")
    if rope.kind == "dynamic" and frequencies < 2:
        raise CheckpointError("config.json: dynamic rope needs more than two rotated dimensions")
    if rope.kind == "longrope" and not len(rope.short_factor) == len(rope.long_factor) == frequencies:
        raise CheckpointError(f"config.json: longrope needs short_factor and long_factor of {frequencies} numbers each")
    sections = rope.mrope_section
    if rope.mrope_interleaved:
        if len(sections) != 3 or min(sections) < 0:
            raise CheckpointError(f"config.json: mrope_section {list(sections)} must be three numbers of at least 0")
    elif sections and (sum(sections) != frequencies or min(sections) < 0):
        raise CheckpointError(f"config.json: mrope_section {list(sections)} must add up to {frequencies}")


def _stretched(rope: RopeConfig, max_positions: int) -> int:
    """Tokens of the longest sequence. linear and dynamic stretch the stated positions, yarn the original ones, which
    may be all that is stated (Qwen2.5's documented setting); the other kinds state the stretched number."""
    if rope.kind == "linear":
        return int(max_positions * rope.factor)
    if rope.kind == "dynamic":
        return max(max_positions, int(max_positions * rope.factor))
    if rope.kind == "yarn":
        return max(max_positions, int(rope.original_max_positions * rope.factor))
    return max_positions
