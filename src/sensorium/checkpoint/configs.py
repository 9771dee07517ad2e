"""A checkpoint's files, read without torch: where they are, what the configs say, in one dialect.

Both the HTTP process and the engine process start from `open_checkpoint`. It accepts the hub's config dialect and the
one that transformers writes today; everything after it sees only the dataclasses below. Nothing remote is executed:
`auto_map` is never read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sensorium.checkpoint.families import FAMILIES
from sensorium.checkpoint.pooling import stated_max_length
from sensorium.checkpoint.quantization import StoredQuantization, read_quantization
from sensorium.errors import CheckpointError, StartupError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions. `kind`: default, linear, dynamic, yarn, llama3 or longrope ("su"); `mrope_section`: M-RoPE."""

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
    mrope_section: tuple[int, ...] = ()  # frequencies per axis (time, height, width), contiguous


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A Llama-like decoder's shape, every default resolved."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # bias of q, k, v
    output_bias: bool = False  # bias of o_proj
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm on every head of q and k
    sliding_window: int | None = None  # None: full attention
    hidden_act: str = "silu"  # a name of `ACTIVATIONS`
    windowed_layers: tuple[int, ...] | None = None  # layers that have the window; None: all
    is_causal: bool = True  # False: every token sees the whole prompt, and nothing is generated
    has_head: bool = True  # False: neither stored nor tied, so the model cannot generate

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return _stretched(self.rope, self.max_position_embeddings)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model folder. The raw JSON dictionaries are there for the family's own processor and tower."""

    folder: Path
    architecture: str  # config.json's architectures[0]
    config: dict[str, Any]  # config.json; of Qwen2.5-Omni the thinker's part
    preprocessor: dict[str, Any]  # preprocessor_config.json (or processor_config.json's image part), {} if absent
    generation: dict[str, Any]  # generation_config.json, {} if absent
    tokenizer_config: dict[str, Any]  # {} if absent
    chat_template: str | None  # chat_template.jinja, chat_template.json or tokenizer_config's
    text: TextConfig | None  # None for encoder-only models
    dtype: str  # as stored: bfloat16, float16 or float32
    max_model_len: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]  # generation_config's eos, else config's, and what the family adds
    weight_files: tuple[Path, ...]  # *.safetensors or pytorch_model*.bin, in index order
    video_preprocessor: dict[str, Any] = field(default_factory=dict)  # the same for videos, {} if absent
    text_weight_files: tuple[Path, ...] = ()  # of the second repository, whose tensors yield to the first's
    quantization: StoredQuantization | None = None  # how the weights are stored, if not as plain numbers
    pooling: str = "auto"  # --pooling: what the operator says in place of the folder's files


@dataclass(frozen=True, slots=True)
class _Family:
    """Defaults of a text config's class, for configs that leave keys out (LLaVA's says little but the vocabulary)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None
    max_positions: int
    rms_norm_eps: float = 1e-6
    theta: float = 10000.0
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    window_is_optional: bool = False  # only with `use_sliding_window`, from layer `max_window_layers` on
    max_window_layers: int = 28


_LLAMA = _Family(32000, 4096, 11008, 32, 32, None, 2048)
_QWEN2_VL = _Family(
    152064,
    8192,
    29568,
    80,
    64,
    8,
    32768,
    rms_norm_eps=1e-5,
    theta=1e6,
    qkv_bias=True,
    sliding_window=4096,
    window_is_optional=True,
    max_window_layers=80,
)
_QWEN2_5_OMNI = _Family(
    152064, 3584, 18944, 28, 28, 4, 32768, theta=1e6, qkv_bias=True, sliding_window=32768, window_is_optional=True
)
_PHI3 = _Family(32064, 3072, 8192, 32, 32, None, 4096, rms_norm_eps=1e-5)
_QWEN2 = _Family(151936, 4096, 22016, 32, 32, 32, 32768, qkv_bias=True, sliding_window=4096, window_is_optional=True)
_TEXT_FAMILIES: Mapping[str, _Family] = {
    "llama": _LLAMA,
    "mistral": _Family(32000, 4096, 14336, 32, 32, 8, 131072, sliding_window=4096),
    "qwen2": _QWEN2,
    "qwen3": _Family(
        151936, 4096, 22016, 32, 32, 32, 32768, head_dim=128, qk_norm=True, sliding_window=4096, window_is_optional=True
    ),
    "phi3": _PHI3,
    "phi3_v": _PHI3,
    "minicpmv": _QWEN2,
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_omni_text": _QWEN2_5_OMNI,
}
_ROPE_KINDS: Mapping[str, str] = {
    "default": "default",
    "mrope": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
}
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
_DTYPES = ("bfloat16", "float16", "float32")
_STOP_TOKENS = frozenset(
    {"</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"}
)  # special tokens that end a turn or a text in every family that has them; some generation_configs forget them
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
    }
)  # config.json may leave them out
_HUB_PATTERNS = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken", "*.safetensors")
_HUB_IGNORED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*.onnx", "coreml/*")
NO_GGUF = "which is not served; take the checkpoint that it was made of, with --quantization int4 or int8"
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def resolve(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """A local folder as it is, else the hub repository's snapshot: every file of one commit."""
    folder = Path(model)
    if model.startswith("~/"):
        folder = Path(os.path.expanduser(model))  # noqa: PTH111 - Path's raises without a home
    if model and folder.is_dir():
        return folder
    if model.endswith(".gguf"):
        raise StartupError(f"{model} is a GGUF file, {NO_GGUF}")
    if not _HUB_ID.fullmatch(model):
        raise StartupError(f"no such folder: {model}")
    snapshot = _snapshot(model, revision, download_dir, _HUB_PATTERNS)
    if not any(snapshot.glob("*.safetensors")):
        # The folder is named after the commit: the second call cannot get files of another one.
        snapshot = _snapshot(model, snapshot.name, download_dir, ("pytorch_model*.bin", "pytorch_model.bin.index.json"))
    return snapshot


def _snapshot(model: str, revision: str | None, download_dir: str | None, patterns: tuple[str, ...]) -> Path:
    import httpx
    from huggingface_hub import errors, snapshot_download

    what = f"{model} (revision {revision})" if revision else model
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=list(patterns),
                ignore_patterns=list(_HUB_IGNORED),
            )
        )
    except errors.GatedRepoError as error:
        raise StartupError(f"{what}: the hub must grant you access to it first (then `hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise StartupError(f"{what}: the repository has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise StartupError(f"{what}: neither a local folder nor a repository that the hub shows you") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise StartupError(f"{what}: not a local folder, not downloaded yet, and the hub cannot be reached") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StartupError(f"{what}: cannot be downloaded: {reason[0]}") from error


def text_model_of(folder: Path) -> str | None:
    """The second repository that a checkpoint takes its language model from (Ultravox), if it names one."""
    named = (_read_json(folder / "config.json") or {}).get("text_model_id")
    return named if isinstance(named, str) and named else None


def open_checkpoint(
    folder: Path, text_folder: Path | None = None, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint:
    """Read the configs of a model folder and find its weights. CheckpointError says in one line what is wrong.

    `text_folder` is where the language model is if the checkpoint brings none of its own, `overrides` are values in the
    place of config.json's (--hf-overrides).
    """
    config = _read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json: not a model folder")
    config = _thinker(config)
    tokenizer_config = _read_json(folder / "tokenizer_config.json") or {}
    generation = _read_json(folder / "generation_config.json") or {}
    second: tuple[Path, ...] = ()
    if text_folder is not None:
        config = {**config, "text_config": _language_model(text_folder)}
        second = _weight_files(text_folder)
        generation = {**(_read_json(text_folder / "generation_config.json") or {}), **generation}
    config = _overridden(config, overrides)
    architecture = _architecture(config)
    text_dict = _text_dict(config)
    is_encoder = FAMILIES[architecture].is_encoder
    text = None if is_encoder else _text_config(text_dict, config)
    vocab_size = _positive_int(text_dict, "vocab_size", None) if text is None else text.vocab_size
    return Checkpoint(
        folder=folder,
        architecture=architecture,
        config=config,
        preprocessor=_preprocessor(folder),
        generation=generation,
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(folder, tokenizer_config),
        text=text,
        dtype=_dtype(config, text_dict),
        max_model_len=_max_len(folder, config, text, tokenizer_config),
        vocab_size=vocab_size,
        stop_token_ids=_stop_token_ids(
            (generation, config, text_dict), _special_tokens(folder, tokenizer_config), vocab_size
        ),
        weight_files=_weight_files(folder),
        video_preprocessor=_video_preprocessor(folder),
        text_weight_files=second,
        quantization=_quantization(folder, config, text_dict),
    )


def _overridden(config: dict[str, Any], overrides: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """config.json with other values: a nested config's one by one, anything else as a whole.

    What a decoder reads goes where the decoder's part is. A name that neither the file nor we know is refused: the
    model would be computed without it.
    """
    found = dict(config)
    for name, value in overrides.items():
        nested = found.get(name)
        if isinstance(nested, dict) and isinstance(value, dict) and name.endswith("_config"):
            found[name] = _overridden(nested, value, f"{path}{name}.")
        elif name == "thinker_config" and isinstance(value, dict):  # which is what is left of its config by now
            found = _overridden(found, value, f"{path}{name}.")
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


def _read_json(path: Path) -> dict[str, Any] | None:
    """The file's object, or None if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config.json names no architecture (`architectures`)")
    if names[0] not in FAMILIES:
        raise CheckpointError(f"architecture {names[0]} is not supported; supported are {', '.join(FAMILIES)}")
    return names[0]


def _thinker(config: dict[str, Any]) -> dict[str, Any]:
    """Of a Qwen2.5-Omni repository the part that writes text; the one that speaks is not served."""
    nested = config.get("thinker_config")
    if not isinstance(nested, dict):
        return config
    outer = {
        key: config[key]
        for key in ("dtype", "torch_dtype", "quantization_config", "compression_config")
        if key in config
    }
    text = {"model_type": "qwen2_5_omni_text", **(nested.get("text_config") or {})}
    return {
        "tie_word_embeddings": False,
        **outer,
        **nested,
        "text_config": text,
        "architectures": config.get("architectures"),
    }


def _quantization(folder: Path, config: dict[str, Any], text: dict[str, Any]) -> StoredQuantization | None:
    """config.json's, the decoder's own part of it, or the file that quantisers once wrote beside it."""
    for source in (config, text):
        for name in ("quantization_config", "compression_config"):
            if source.get(name):
                return read_quantization(source[name])
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        stated = _read_json(folder / name)
        if stated is not None:
            return read_quantization({"quant_method": method, **stated})
    return None


def _text_dict(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's part of config.json: nested in multimodal configs, but flat in the hub's Qwen2-VL."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _dtype(config: dict[str, Any], text: dict[str, Any]) -> str:
    for source in (config, text):
        value = source.get("dtype") or source.get("torch_dtype")
        if value is not None:
            name = str(value).removeprefix("torch.")
            if name not in _DTYPES:
                raise _unsupported("dtype", name, _DTYPES)
            return name
    return "float32"


def _unsupported(what: str, value: object, supported: Iterable[str]) -> CheckpointError:
    return CheckpointError(f"config.json: {what} {value!r} is not supported; supported are {', '.join(supported)}")


def _positive_int(source: dict[str, Any], key: str, default: int | None) -> int:
    value = source.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _number(source: dict[str, Any], key: str, default: float) -> float:
    value = source.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {key} must be a number, not {value!r}")
    return float(value)


def _numbers(source: dict[str, Any], key: str) -> tuple[float, ...]:
    value = source.get(key) or []
    if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
        raise CheckpointError(f"config.json: {key} must be a list of numbers")
    return tuple(float(x) for x in value)


def _text_config(text: dict[str, Any], config: dict[str, Any]) -> TextConfig:
    model_type = text.get("model_type", "llama" if text is not config else None)
    family = _TEXT_FAMILIES.get(str(model_type))
    if family is None:
        raise _unsupported("text model_type", model_type, _TEXT_FAMILIES)
    activation = str(text.get("hidden_act") or "silu")
    if activation not in ACTIVATIONS:
        raise _unsupported("hidden_act", activation, ACTIVATIONS)
    hidden_size = _positive_int(text, "hidden_size", family.hidden_size)
    num_heads = _positive_int(text, "num_attention_heads", family.num_heads)
    num_kv_heads = _positive_int(text, "num_key_value_heads", family.num_kv_heads or num_heads)
    head_dim = _positive_int(text, "head_dim", family.head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"config.json: {num_heads} heads do not divide among {num_kv_heads} key-value heads")
    max_positions = _positive_int(text, "max_position_embeddings", family.max_positions)
    num_layers = _positive_int(text, "num_hidden_layers", family.num_layers)
    rope = _rope(text, family, max_positions, head_dim)
    window, windowed_layers = _sliding_window(text, family, num_layers, _stretched(rope, max_positions))
    bias = bool(text.get("attention_bias", False)) and str(model_type) in ("llama", "qwen3")
    return TextConfig(
        model_type=str(model_type),
        vocab_size=_positive_int(text, "vocab_size", family.vocab_size),
        hidden_size=hidden_size,
        intermediate_size=_positive_int(text, "intermediate_size", family.intermediate_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=_number(text, "rms_norm_eps", family.rms_norm_eps),
        rope=rope,
        tie_word_embeddings=_is_tied(config, text),
        attention_bias=family.qkv_bias or bias,
        output_bias=bias,
        mlp_bias=bool(text.get("mlp_bias", False)) and str(model_type) == "llama",
        qk_norm=family.qk_norm,
        sliding_window=window,
        hidden_act=activation,
        windowed_layers=windowed_layers,
        is_causal=_is_causal(text),
    )


def _is_causal(text: dict[str, Any]) -> bool:
    """Embedders on decoders say in one of two ways that their attention goes both ways."""
    return bool(text.get("is_causal", True)) and text.get("use_bidirectional_attention") is not True


def _is_tied(config: dict[str, Any], text: dict[str, Any]) -> bool:
    """Whether the head's rows are the embeddings'. Of multimodal configs either level may say so, and the other one may
    hold the default, false; only Omni's `text_config` has another default. A head that is stored and differs is kept
    all the same: see `weights.resolve_head`."""
    levels = (config,) if text.get("model_type") == "qwen2_5_omni_text" else (config, text)
    return any(bool(level.get("tie_word_embeddings", False)) for level in levels)


def _sliding_window(
    text: dict[str, Any], family: _Family, num_layers: int, max_len: int
) -> tuple[int | None, tuple[int, ...] | None]:
    """(window, the layers that have it). A window that no sequence outgrows is none."""
    if family.window_is_optional and not text.get("use_sliding_window", False):
        return None, None
    if text.get("sliding_window", family.sliding_window) is None:  # null is not the default
        return None, None
    window = _positive_int(text, "sliding_window", family.sliding_window)
    if window >= max_len:
        return None, None
    if not family.window_is_optional:
        return window, None
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return window, tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return window, tuple(range(int(_number(text, "max_window_layers", family.max_window_layers)), num_layers))


def _rope(text: dict[str, Any], family: _Family, max_positions: int, head_dim: int) -> RopeConfig:
    """Old dialect: rope_theta and rope_scaling{type|rope_type}; new one: rope_parameters with everything."""
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError("config.json: rope_scaling must be an object")
    name = scaling.get("rope_type") or scaling.get("type") or "default"
    kind = _ROPE_KINDS.get(str(name))
    if kind is None:
        raise _unsupported("rope type", name, _ROPE_KINDS)
    partial = _number(scaling, "partial_rotary_factor", _number(text, "partial_rotary_factor", 1.0))
    attention_factor = scaling.get("attention_factor")
    key = "original_max_position_embeddings"  # the outer one counts where both are there, as in transformers
    original = _positive_int(text if text.get(key) else scaling, key, max_positions)
    sections = tuple(int(x) for x in _numbers(scaling, "mrope_section"))
    rope = RopeConfig(
        theta=_number(scaling, "rope_theta", _number(text, "rope_theta", family.theta)),
        kind=kind,
        factor=_number(scaling, "factor", max_positions / original),
        low_freq_factor=_number(scaling, "low_freq_factor", 1.0),
        high_freq_factor=_number(scaling, "high_freq_factor", 4.0),
        original_max_positions=original,
        short_factor=_numbers(scaling, "short_factor"),
        long_factor=_numbers(scaling, "long_factor"),
        attention_factor=None if attention_factor is None else _number(scaling, "attention_factor", 1.0),
        beta_fast=_number(scaling, "beta_fast", 0.0) or 32.0,
        beta_slow=_number(scaling, "beta_slow", 0.0) or 1.0,
        mscale=_number(scaling, "mscale", 0.0),
        mscale_all_dim=_number(scaling, "mscale_all_dim", 0.0),
        truncate=bool(scaling.get("truncate", True)),
        partial=partial,
        mrope_section=sections,
    )
    frequencies = int(head_dim * partial) // 2
    if frequencies <= 0 or rope.theta <= 0 or rope.factor <= 0:
        raise CheckpointError("config.json: rope theta, factor and rotated dimensions must be positive")
    if kind == "dynamic" and frequencies < 2:
        raise CheckpointError("config.json: dynamic rope needs more than two rotated dimensions")
    if kind == "longrope" and not len(rope.short_factor) == len(rope.long_factor) == frequencies:
        raise CheckpointError(f"config.json: longrope needs short_factor and long_factor of {frequencies} numbers each")
    if sections and (sum(sections) != frequencies or min(sections) < 0):
        raise CheckpointError(f"config.json: mrope_section {list(sections)} must add up to {frequencies}")
    return rope


def _language_model(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json: not a language model's folder")
    return _text_dict(config)


def _max_len(folder: Path, config: dict[str, Any], text: TextConfig | None, tokenizer_config: dict[str, Any]) -> int:
    """Positions that the model has, or less where the files of an encoder or of sentence-transformers say less."""
    positions = _encoder_len(config) if text is None else text.max_len
    if text is not None and not (folder / "modules.json").is_file():
        return positions
    return min(positions, stated_max_length(folder, tokenizer_config) or positions)


def _encoder_len(config: dict[str, Any]) -> int:
    """An encoder's position table, without the rows that RoBERTa leaves unused."""
    default = 8192 if config.get("model_type") == "modernbert" else 512
    positions = _positive_int(config, "max_position_embeddings", default)
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        pad = config.get("pad_token_id")
        positions -= (1 if pad is None else int(pad)) + 1
    return positions


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


def _preprocessor(folder: Path) -> dict[str, Any]:
    own = _read_json(folder / "preprocessor_config.json")
    return _processor_part(folder, "image_processor") if own is None else own


def _video_preprocessor(folder: Path) -> dict[str, Any]:
    own = _read_json(folder / "video_preprocessor_config.json")
    return _processor_part(folder, "video_processor") if own is None else own


def _processor_part(folder: Path, name: str) -> dict[str, Any]:
    nested = (_read_json(folder / "processor_config.json") or {}).get(name)
    return nested if isinstance(nested, dict) else {}


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'chat_template.jinja'} cannot be read: {error}") from error
    template = (_read_json(folder / "chat_template.json") or {}).get("chat_template")
    if template is None:
        template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _stop_token_ids(
    sources: Iterable[dict[str, Any]], special: list[tuple[int, str]], vocab_size: int
) -> tuple[int, ...]:
    """The first source's end tokens, and every special token of `_STOP_TOKENS`."""
    stops: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        if value is not None:
            stops = [value] if isinstance(value, int) else list(value)
            break
    if not all(isinstance(x, int) for x in stops):
        raise CheckpointError("eos_token_id must be an integer or a list of integers")
    stops += [i for i, content in special if content in _STOP_TOKENS]
    return tuple(dict.fromkeys(i for i in stops if 0 <= i < vocab_size))


def _special_tokens(folder: Path, tokenizer_config: dict[str, Any]) -> list[tuple[int, str]]:
    decoder = tokenizer_config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return [(int(i), str(t.get("content"))) for i, t in decoder.items() if i.isdecimal() and isinstance(t, dict)]
    try:
        with (folder / "tokenizer.json").open(encoding="utf-8") as file:
            head = file.read(1 << 20)  # added tokens stand before the vocabulary; the whole file takes long to parse
    except (OSError, ValueError):
        return []
    match = re.search(r'"added_tokens"\s*:\s*(?=\[)', head)
    if match is None:
        return []
    try:
        tokens, _ = json.JSONDecoder().raw_decode(head, match.end())
    except ValueError:
        return []
    return [(t["id"], t["content"]) for t in tokens if isinstance(t, dict) and {"id", "content"} <= t.keys()]


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """safetensors before pickles, an index before a single file. Names in an index stay inside the folder."""
    for name, suffix in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        index = _read_json(folder / f"{name}.index.json")
        if index is not None:
            return _indexed_files(folder, f"{name}.index.json", index, suffix)
        if (folder / name).is_file():
            return (folder / name,)
    only = list(folder.glob("*.safetensors"))
    if len(only) == 1:  # quantisers once named it after their settings
        return (only[0],)
    if any(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder} has nothing but GGUF weights, {NO_GGUF}")
    raise CheckpointError(f"{folder} has no weights (model.safetensors or pytorch_model.bin, or their index)")


def _indexed_files(folder: Path, index_name: str, index: dict[str, Any], suffix: str) -> tuple[Path, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_name} has no weight_map")
    files = []
    for name in dict.fromkeys(weight_map.values()):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(f"{index_name} names a strange file: {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index_name} names {name}, which is not there")
        files.append(folder / name)
    return tuple(files)
