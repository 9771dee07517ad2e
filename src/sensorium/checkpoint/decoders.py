"""What configs of decoders leave out, by the `model_type` of the decoder's part: one row each. Torch-free."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class RoutingDefaults:
    """What configs of decoders with experts leave out, and which of their keys count."""

    num_experts: int
    per_token: int
    expert_size: int | None = None  # of `moe_intermediate_size`; None: there is no such key, it is intermediate_size
    shared_size: int = 0  # of `shared_expert_intermediate_size`; 0: there is no shared expert
    renormalizes: bool | None = None  # None: `norm_topk_prob` says it, which is false where it is not there
    has_biases: bool = False  # router and experts
    shared_count: int = 0  # of `n_shared_experts`, each as large as one that is chosen; 0: no such key
    dense_layers: int | None = None  # `first_k_dense_replace`, the first ones, which have an MLP; None: no such key
    has_correction: bool = False  # sigmoids in place of the softmax, and a stored correction of each: see `Routing`
    switch: str = ""  # a key that must be true; empty: there are experts in any case
    is_clamped: bool = False  # experts clamp gate and up: see `Activation` of the kernels


@dataclass(frozen=True, slots=True)
class DecoderDefaults:
    """What a decoder's configs leave out (LLaVA's says little but the vocabulary), and which of their keys count."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None  # None: as many as heads
    max_positions: int
    rms_norm_eps: float = 1e-6
    theta: float = 10000.0
    head_dim: int | None = None  # None: hidden_size / num_heads
    qkv_bias: bool = False
    qk_norm: bool = False
    norms_whole_qk: bool = False  # all heads of q, and all of k, together
    reads_attention_bias: bool = False  # others have the key `attention_bias` and ignore it
    reads_mlp_bias: bool = False  # the same of `mlp_bias`
    is_tied_outside: bool = False  # only the outer config says whether the head is tied: text_config's default is true
    sliding_window: int | None = None
    window_is_optional: bool = False  # only with `use_sliding_window`, in the layers that `has_window` says
    has_window: Callable[[int, int], bool] = operator.ge  # of a layer's index and `max_window_layers`
    max_window_layers: int = 28
    mrope_section: tuple[int, ...] = ()  # frequencies per axis (time, height, width)
    preset: Mapping[str, Any] = field(default_factory=dict)  # other keys' values where the config does not say
    names: Mapping[str, str] = field(default_factory=dict)
    """Keys of this module -> what such configs call them; the keys themselves then mean something else there."""
    full_every: int | None = None  # the others have the window, and rotary positions of their own with `local_theta`;
    local_theta: float | None = None  # `layer_types` or `sliding_window_pattern` may say otherwise
    window_covers_both_sides: bool = False  # where attention goes both ways: the number is of both sides together
    media_both_ways: bool = False  # media tokens see all of their item, in layers with a window or in all
    query_scalar: float | None = None  # `query_pre_attn_scalar`, whose root divides scores; None: that of head_dim
    scale: float | None = None  # of scores, where no key says it
    shapes_differ: bool = False  # layers differ in more than what they see: see `checkpoint.layer_shapes`
    states_stretched_length: bool = False  # `max_position_embeddings` is after linear scaling
    norm_offset: float = 0.0
    has_sublayer_norms: bool = False
    scales_embeddings: bool = False  # by the root of the hidden size
    caps_logits: bool = False  # reads `final_logit_softcapping`
    mrope_interleaved: bool = False  # axes take turns, frequency by frequency
    norms_values: bool = False  # heads of values, as those of keys are
    pairs_rope: bool = False  # rotated together are neighbours
    has_sinks: bool = False  # a score of each head takes part in the softmax
    routing: RoutingDefaults | None = None
    gates_attention: bool = False  # reads `attn_output_gate`
    state_every: int | None = None  # one layer of so many attends: `full_attention_interval`; its states are delta nets
    state_layer: str | None = None  # the layer type of those that keep a state: see `checkpoint.state_layers`
    aliases: Mapping[str, str] = field(default_factory=dict)  # keys -> their older names, which count where they are
    adjusts_width: bool = False  # reads `block_auto_adjust_ff_dim` and what belongs to it


_LLAMA = DecoderDefaults(32000, 4096, 11008, 32, 32, None, 2048, reads_attention_bias=True, reads_mlp_bias=True)
_MISTRAL = DecoderDefaults(32000, 4096, 14336, 32, 32, 8, 131072, sliding_window=4096)
_MINISTRAL3 = DecoderDefaults(
    131072,
    4096,
    14336,
    34,
    32,
    8,
    262144,
    1e-5,
    1e6,
    head_dim=128,
    preset={
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384},
            **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        }
    },
)
_QWEN2 = DecoderDefaults(
    151936, 4096, 22016, 32, 32, 32, 32768, qkv_bias=True, sliding_window=4096, window_is_optional=True
)
_QWEN3 = replace(_QWEN2, head_dim=128, qkv_bias=False, qk_norm=True, reads_attention_bias=True)
_QWEN3_ASR = replace(
    _QWEN3,
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    max_positions=65536,
    theta=1e6,
    preset={"tie_word_embeddings": True},
)
_QWEN3_MOE = replace(
    _QWEN3,
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=24,
    num_kv_heads=4,
    head_dim=None,
    has_window=lambda _, __: True,
    routing=RoutingDefaults(128, 8, 768),
)
_QWEN2_MOE = replace(
    _QWEN2,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    has_window=lambda index, end: index % 2 == 0 and index < end,
    routing=RoutingDefaults(60, 4, 1408, shared_size=5632),
)
_MIXTRAL = replace(
    _MISTRAL, rms_norm_eps=1e-5, theta=1e6, sliding_window=None, routing=RoutingDefaults(8, 2, renormalizes=True)
)
_OLMOE = DecoderDefaults(
    50304,
    2048,
    2048,
    16,
    16,
    None,
    4096,
    1e-5,
    reads_attention_bias=True,
    qk_norm=True,
    norms_whole_qk=True,
    routing=RoutingDefaults(64, 8),
)
_GPT_OSS = DecoderDefaults(
    201088,
    2880,
    2880,
    36,
    64,
    8,
    131072,
    1e-5,
    150000.0,
    head_dim=64,
    reads_attention_bias=True,
    sliding_window=128,
    full_every=2,
    has_sinks=True,
    preset={
        "attention_bias": True,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    routing=RoutingDefaults(128, 4, renormalizes=True, has_biases=True, is_clamped=True),
)
_GLM4_MOE = DecoderDefaults(
    151552,
    4096,
    10944,
    46,
    96,
    8,
    131072,
    1e-5,
    qkv_bias=True,
    qk_norm=True,
    names={"qkv_bias": "attention_bias", "num_experts": "n_routed_experts"},
    preset={"qkv_bias": False, "use_qk_norm": False, "norm_topk_prob": True, "partial_rotary_factor": 0.5},
    routing=RoutingDefaults(128, 8, 1408, shared_count=1, dense_layers=1, has_correction=True),
)
_GLM4V = DecoderDefaults(
    151552,
    4096,
    13696,
    40,
    32,
    2,
    32768,
    1e-5,
    qkv_bias=True,
    mrope_section=(8, 12, 12),
    has_sublayer_norms=True,
    pairs_rope=True,
    preset={"partial_rotary_factor": 0.5},
)
_GLM_OCR = replace(
    _GLM4V,
    vocab_size=59392,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=16,
    num_heads=16,
    num_kv_heads=8,
    max_positions=131072,
    head_dim=128,
    qkv_bias=False,
)
_GLM4V_MOE = replace(_GLM4_MOE, mrope_section=(8, 12, 12), preset={**_GLM4_MOE.preset, "qkv_bias": True})
_PADDLEOCR = DecoderDefaults(
    103424,
    1024,
    3072,
    18,
    16,
    2,
    131072,
    1e-5,
    5e5,
    head_dim=128,
    mrope_section=(16, 24, 24),
    reads_attention_bias=True,
    reads_mlp_bias=True,
    names={"attention_bias": "use_bias", "mlp_bias": "use_bias"},
    preset={"tie_word_embeddings": True},
)
_QWEN2_VL = DecoderDefaults(
    152064,
    8192,
    29568,
    80,
    64,
    8,
    32768,
    1e-5,
    1e6,
    qkv_bias=True,
    sliding_window=4096,
    window_is_optional=True,
    max_window_layers=80,
    mrope_section=(16, 24, 24),
)
_QWEN2_5_OMNI = DecoderDefaults(
    152064,
    3584,
    18944,
    28,
    28,
    4,
    32768,
    1e-6,
    1e6,
    qkv_bias=True,
    is_tied_outside=True,
    sliding_window=32768,
    window_is_optional=True,
    mrope_section=(16, 24, 24),
)
_WHISPER = DecoderDefaults(
    51865,
    384,
    1536,
    4,
    6,
    None,
    448,
    preset={"tie_word_embeddings": True, "hidden_act": "gelu"},
    names={
        "hidden_size": "d_model",
        "intermediate_size": "decoder_ffn_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "num_key_value_heads": "",
        "max_position_embeddings": "max_target_positions",
        "hidden_act": "activation_function",
    },
)
_QWEN3_VL = DecoderDefaults(
    151936,
    4096,
    22016,
    32,
    32,
    32,
    128000,
    theta=5e5,
    head_dim=128,
    qk_norm=True,
    reads_attention_bias=True,
    window_is_optional=True,
    mrope_section=(24, 20, 20),
    mrope_interleaved=True,
)
_QWEN3_VL_MOE = replace(
    _QWEN3_VL,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    head_dim=None,
    routing=RoutingDefaults(60, 4, 1408, renormalizes=True),
)
_QWEN3_OMNI_MOE = replace(
    _QWEN3_VL_MOE,
    vocab_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    max_positions=32768,
    theta=1e6,
    preset={"norm_topk_prob": True},
    routing=RoutingDefaults(128, 8, 768),
)
_PHI3 = DecoderDefaults(32064, 3072, 8192, 32, 32, None, 4096, rms_norm_eps=1e-5)
_GEMMA = DecoderDefaults(
    256000,
    3072,
    24576,
    28,
    16,
    16,
    8192,
    head_dim=256,
    reads_attention_bias=True,
    preset={"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    names={"hidden_act": "hidden_activation"},  # the first configs say "gelu" and mean its approximation
    norm_offset=1.0,
    scales_embeddings=True,
)
_GEMMA3 = DecoderDefaults(
    262208,
    2304,
    9216,
    26,
    8,
    4,
    131072,
    theta=1e6,
    head_dim=256,
    qk_norm=True,
    reads_attention_bias=True,
    sliding_window=4096,
    full_every=6,
    local_theta=1e4,
    window_covers_both_sides=True,
    media_both_ways=True,
    query_scalar=256,
    states_stretched_length=True,
    preset={"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    names={"hidden_act": "hidden_activation"},
    norm_offset=1.0,
    has_sublayer_norms=True,
    scales_embeddings=True,
    caps_logits=True,
)
_GEMMA4 = replace(
    _GEMMA3,
    vocab_size=262144,
    num_layers=30,
    sliding_window=512,
    media_both_ways=False,
    query_scalar=None,
    scale=1.0,
    shapes_differ=True,
    norm_offset=0.0,
    norms_values=True,
    names={**_GEMMA3.names, "num_experts_per_tok": "top_k_experts"},
    routing=RoutingDefaults(128, 8, 704, renormalizes=True, switch="enable_moe_block"),
    preset={
        **_GEMMA3.preset,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
)
_LFM2 = DecoderDefaults(
    65536,
    2560,
    12288,
    32,
    32,
    8,
    128000,
    theta=1e6,
    qk_norm=True,
    preset={"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    names={"rms_norm_eps": "norm_eps"},
    aliases={"tie_word_embeddings": "tie_embedding", "intermediate_size": "block_ff_dim"},
    state_layer="conv",
    adjusts_width=True,
)
_QWEN3_5 = DecoderDefaults(
    248320,
    4096,
    12288,
    32,
    16,
    4,
    32768,
    head_dim=256,
    qk_norm=True,
    reads_attention_bias=True,
    mrope_section=(11, 11, 10),
    mrope_interleaved=True,
    norm_offset=1.0,
    preset={"partial_rotary_factor": 0.25},
    gates_attention=True,
    state_layer="linear_attention",
    state_every=4,
)
_QWEN3_5_MOE = replace(
    _QWEN3_5,
    hidden_size=2048,
    num_layers=40,
    num_kv_heads=2,
    routing=RoutingDefaults(256, 8, 512, shared_size=512, renormalizes=True),
)

DECODERS: Mapping[str, DecoderDefaults] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral3": _MINISTRAL3,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_asr_text": _QWEN3_ASR,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "mixtral": _MIXTRAL,
    "olmoe": _OLMOE,
    "gpt_oss": _GPT_OSS,
    "glm4_moe": _GLM4_MOE,
    "glm4v_text": _GLM4V,
    "glm_ocr_text": _GLM_OCR,
    "glm4v_moe_text": _GLM4V_MOE,
    "paddleocr_vl": _PADDLEOCR,
    "paddleocr_vl_text": _PADDLEOCR,
    "phi3": _PHI3,
    "phi3_v": _PHI3,
    "minicpmv": _QWEN2,
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_5_omni_text": _QWEN2_5_OMNI,
    "whisper": _WHISPER,
    "gemma": _GEMMA,
    "gemma3_text": _GEMMA3,
    "gemma4_text": _GEMMA4,
    "lfm2": _LFM2,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "qwen3_vl_text": _QWEN3_VL,
    "qwen3_vl_moe_text": _QWEN3_VL_MOE,
    "qwen3_omni_moe_text": _QWEN3_OMNI_MOE,
}
"""By the `model_type` of the decoder's part of config.json, which is not the architecture's: LLaVA has several."""
