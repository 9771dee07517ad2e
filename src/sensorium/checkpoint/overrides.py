"""`--hf-overrides`: config.json with other values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sensorium.errors import StartupError

_DECODER_KEYS = frozenset(
    {
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "max_position_embeddings",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "partial_rotary_factor",
        "head_dim",
        "original_max_position_embeddings",
        "attention_bias",
        "mlp_bias",
        "is_causal",
        "use_bidirectional_attention",
    }
)

_OVERRIDES = frozenset(
    {
        "architectures",
        "dtype",
        "torch_dtype",
        "eos_token_id",
        "is_matryoshka",
        "num_labels",
        "matryoshka_dimensions",
        "id2label",
        "label2id",
        "problem_type",
        "tie_word_embeddings",
        "quantization_config",
        "classifier_from_token",
        "method",
        "is_original_qwen3_reranker",
        "use_sep_token",
    }
)  # config.json may leave them out


def overridden(
    config: dict[str, Any], overrides: Mapping[str, Any], nested_in: str = "", path: str = ""
) -> dict[str, Any]:
    """config.json with other values: a nested config's one by one, anything else as a whole.

    What a decoder reads goes where the decoder's part is. A name that neither the file nor we know is refused: the
    model would be computed without it: StartupError. `nested_in` is the key that `config` was taken from, if it is only
    a part of config.json; the operator may name it or not.
    """
    found = dict(config)
    for name, value in overrides.items():
        nested = found.get(name)
        if isinstance(nested, dict) and isinstance(value, dict) and name.endswith("_config"):
            found[name] = overridden(nested, value, path=f"{path}{name}.")
        elif name == nested_in and isinstance(value, dict):
            found = overridden(found, value, path=f"{path}{name}.")
        elif name in _DECODER_KEYS:
            _set_decoder_key(found, name, value)
        elif name in found or name in _OVERRIDES:
            found[name] = value
        else:
            raise StartupError(f"--hf-overrides: {path}{name} is not in config.json and means nothing here")
    return found


def _set_decoder_key(config: dict[str, Any], name: str, value: Any) -> None:
    """In the decoder's part, in both dialects of rope: what is set replaces what the newer one says of it."""
    text = config
    if isinstance(config.get("text_config"), dict):
        text = config["text_config"] = dict(config["text_config"])
    text[name] = value
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and name in ("rope_theta", "partial_rotary_factor"):
        text["rope_parameters"] = {**rope, name: value}
    elif isinstance(rope, dict) and name == "rope_scaling":
        kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor", "mrope_section") if key in rope}
        text["rope_parameters"] = {**kept, **value} if isinstance(value, dict) else value or kept
