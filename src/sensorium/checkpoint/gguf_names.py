"""What GGUF calls tensors -> what checkpoints call them, and how its writers changed their contents.

A row for every architecture; nothing is guessed from tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sensorium.errors import CheckpointError

_HEADS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_DECODER = {
    **_HEADS,
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = {**_DECODER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_SANDWICHED = {
    **_DECODER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_AFTER_ATTENTION = {**_DECODER, "post_attention_norm": "post_attention_layernorm"}
_GLM4 = {
    **_DECODER,
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_up_exps": "mlp.experts.{}.gate_up_proj",
    **{f"ffn_{name}_exps": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
    **{f"ffn_{name}.{{}}": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},  # of older files
    **{f"ffn_{name}_shexp": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_SHORT_CONVS = {f"shortconv.{name}": f"conv.{name}" for name in ("conv", "in_proj", "out_proj")}
_DELTA_NETS = {
    **_AFTER_ATTENTION,
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
}
_GEMMA4 = {
    **_SANDWICHED,
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps": "experts.{}.gate_up_proj",
    **{f"ffn_{name}_exps": f"experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
_DECODER_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SCORED_OUTER = {**_DECODER_OUTER, "cls.output": "score"}
_GEMMA4_OUTER = {
    **_DECODER_OUTER,
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_BERT = {
    **{f"attn_{one}": f"attention.self.{name}" for one, name in (("q", "query"), ("k", "key"), ("v", "value"))},
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_BERT_OUTER = {
    "token_embd": "embeddings.word_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "cls": "classifier.dense",
    "cls.output": "classifier.out_proj",
}
_NOMIC_BERT = {
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.out_proj",
    "attn_output_norm": "norm1",
    "ffn_up": "mlp.fc11",
    "ffn_gate": "mlp.fc12",
    "ffn_down": "mlp.fc2",
    "layer_output_norm": "norm2",
}
_MODERN_BERT = {
    "attn_norm": "attn_norm",
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.Wo",
    "ffn_norm": "mlp_norm",
    "ffn_up": "mlp.Wi",
    "ffn_down": "mlp.Wo",
}
_MODERN_BERT_OUTER = {
    "token_embd": "embeddings.tok_embeddings",
    "token_embd_norm": "embeddings.norm",
    "output_norm": "final_norm",
    "cls": "head.dense",
    "cls.norm": "head.norm",
    "cls.output": "classifier",
}
CONFIG_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Numbers that belong into config.json."""
DENSE_TENSORS = ("dense_2.weight", "dense_3.weight")
"""Linear layers behind the pooling, modules of their own in a model folder."""
_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)")
_SUFFIXED = re.compile(r"(.+)\.(weight|bias)")
_NUMBERED = re.compile(r"(.+)\.(\d{1,4})")


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """`general.architecture`. `model_type` and `architecture` are config.json's; `base` is the one without a head,
    `classifier` the one with classes or a score.

    `blocks` and `outer` are names without their suffix (weight, bias), or whole ones that get none; "{}" is an
    expert's number."""

    architecture: str
    model_type: str
    base: str | None = None
    classifier: str | None = None
    blocks: Mapping[str, str] = field(default_factory=lambda: _DECODER)
    outer: Mapping[str, str] = field(default_factory=lambda: _DECODER_OUTER)
    layer: str = "model.layers.{}."
    permutes_heads: bool = False  # rows of q and k are stored in the order of interleaved rotation
    pairs_heads: bool = False  # of what is rotated, rows of pairs are stored as two halves
    tower: str = ""  # whose text it is, which is served with its projector's file alone
    norm_offset: float = 0.0  # what writers added to the weights of norms
    plain_norms: tuple[str, ...] = ()  # ends of the names of those that they left alone


_LLAMA = GgufArchitecture("LlamaForCausalLM", "llama", "LlamaModel", permutes_heads=True)
_QWEN2 = GgufArchitecture("Qwen2ForCausalLM", "qwen2", "Qwen2Model")
_QWEN3 = GgufArchitecture(
    "Qwen3ForCausalLM", "qwen3", "Qwen3Model", "Qwen3ForSequenceClassification", outer=_SCORED_OUTER
)
_ROUTED = {**_DECODER, **_EXPERTS}
_QWEN3_MOE = GgufArchitecture("Qwen3MoeForCausalLM", "qwen3_moe", blocks=_ROUTED)
_QWEN3_5 = GgufArchitecture(
    "Qwen3_5ForCausalLM", "qwen3_5_text", blocks=_DELTA_NETS, norm_offset=1.0, plain_norms=("linear_attn.norm.weight",)
)
_GEMMA3 = GgufArchitecture("Gemma3ForCausalLM", "gemma3_text", blocks=_SANDWICHED, norm_offset=1.0)
ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": _LLAMA,
    "mistral3": replace(_LLAMA, architecture="MistralForCausalLM", model_type="mistral", base="MistralModel"),
    "qwen2": _QWEN2,
    "qwen2vl": _QWEN2,
    "qwen2moe": GgufArchitecture("Qwen2MoeForCausalLM", "qwen2_moe", blocks=_ROUTED),
    "qwen3": _QWEN3,
    "qwen3vl": _QWEN3,
    "qwen3moe": _QWEN3_MOE,
    "qwen3vlmoe": _QWEN3_MOE,
    "qwen35": _QWEN3_5,
    "qwen35moe": replace(_QWEN3_5, model_type="qwen3_5_moe_text", blocks={**_DELTA_NETS, **_EXPERTS}),
    "glm4": GgufArchitecture(
        "Glm4vForConditionalGeneration",
        "glm4v_text",
        blocks=_GLM4,
        pairs_heads=True,
        tower="GLM-4.1V, GLM-4.6V-Flash and GLM-OCR",
    ),
    "paddleocr": GgufArchitecture("PaddleOCRVLForConditionalGeneration", "paddleocr_vl_text", tower="PaddleOCR-VL"),
    "gemma": GgufArchitecture("GemmaForCausalLM", "gemma", "GemmaModel", norm_offset=1.0),
    "olmoe": GgufArchitecture("OlmoeForCausalLM", "olmoe", blocks=_ROUTED),
    "gpt-oss": GgufArchitecture(
        "GptOssForCausalLM", "gpt_oss", blocks={**_AFTER_ATTENTION, **_EXPERTS, "attn_sinks.weight": "self_attn.sinks"}
    ),
    "glm4moe": GgufArchitecture("Glm4MoeForCausalLM", "glm4_moe", blocks={**_AFTER_ATTENTION, **_EXPERTS}),
    "phi3": GgufArchitecture("Phi3ForCausalLM", "phi3", blocks=_FUSED),
    "lfm2": GgufArchitecture(
        "Lfm2ForCausalLM",
        "lfm2",
        blocks={**_DECODER, **_SHORT_CONVS},
        outer={**_DECODER_OUTER, "token_embd_norm": "model.norm"},
    ),
    "gemma3": _GEMMA3,
    "gemma-embedding": replace(_GEMMA3, architecture="Gemma3TextModel", base="Gemma3TextModel"),
    "gemma4": GgufArchitecture("Gemma4ForCausalLM", "gemma4_text", blocks=_GEMMA4, outer=_GEMMA4_OUTER),
    "bert": GgufArchitecture(
        "BertModel",
        "bert",
        "BertModel",
        "RobertaForSequenceClassification",
        blocks=_BERT,
        outer=_BERT_OUTER,
        layer="encoder.layer.{}.",
    ),
    "nomic-bert": GgufArchitecture(
        "NomicBertModel",
        "nomic_bert",
        "NomicBertModel",
        blocks=_NOMIC_BERT,
        outer={**_BERT_OUTER, "token_embd_norm": "emb_ln"},
        layer="encoder.layers.{}.",
    ),
    "modern-bert": GgufArchitecture(
        "ModernBertModel",
        "modernbert",
        "ModernBertModel",
        "ModernBertForSequenceClassification",
        blocks=_MODERN_BERT,
        outer=_MODERN_BERT_OUTER,
        layer="layers.{}.",
    ),
}
_MIXTRAL = replace(_LLAMA, architecture="MixtralForCausalLM", model_type="mixtral", base=None, blocks=_ROUTED)


def gguf_architecture(metadata: Mapping[str, Any]) -> GgufArchitecture:
    """The row of a file. CheckpointError if its architecture is not served. Mixtral is a Llama with experts."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF files of the architecture {str(name)[:80]!r} are not supported; "
            f"supported are {', '.join(ARCHITECTURES)}. "
            "Serve the checkpoint that the file was made of, with --quantization int4 or int8"
        )
    found = ARCHITECTURES[name]
    experts = metadata.get(f"{name}.expert_count")
    return _MIXTRAL if found is _LLAMA and isinstance(experts, int) and experts else found


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None of those outside of layers."""
    match = _LAYER.fullmatch(name)
    return None if match is None else int(match[1])


def checkpoint_name(name: str, architecture: GgufArchitecture) -> str:
    """A tensor's name in checkpoints, with "{}" for the number of an expert where it holds all of them; one that is not
    known stays as it is, and is then an unexpected one."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return _renamed(name, architecture.outer) or name
    own = _renamed(match[2], architecture.blocks)
    return name if own is None else architecture.layer.replace("{}", str(int(match[1]))) + own


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    if name in names:
        return names[name]
    match = _SUFFIXED.fullmatch(name)
    if match is None:
        return None
    base, suffix = match[1], match[2]
    if base in names:
        return f"{names[base]}.{suffix}"
    match = _NUMBERED.fullmatch(base)
    if match is not None and f"{match[1]}.{{}}" in names:
        return f"{names[f'{match[1]}.{{}}'].replace('{}', str(int(match[2])))}.{suffix}"
    return None


def permuted_heads(name: str, architecture: GgufArchitecture) -> Literal["q", "kv"] | None:
    """Whether the tensor's rows are those of heads in another order, and of which heads."""
    if not (architecture.permutes_heads or architecture.pairs_heads) or layer_of(name) is None:
        return None
    return {"attn_q": "q", "attn_k": "kv"}.get(name.split(".")[2])  # type: ignore[return-value]
