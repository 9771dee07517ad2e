"""How a checkpoint's hidden states become a vector, read from its own files. Torch-free.

sentence-transformers repositories say it in `modules.json` and the folders it names; type names changed over its
versions, so only their last component counts. Without these files encoders pool the first token and decoders the
last, normalised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sensorium.errors import CheckpointError

PoolingKind = Literal["last", "cls", "mean", "max", "mean_sqrt_len", "weighted_mean"]

_MODES: dict[str, PoolingKind] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_FLAGS: dict[str, PoolingKind] = {  # in the order in which their vectors are joined
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
POOLINGS: tuple[PoolingKind, ...] = get_args(PoolingKind)
"""Values of --pooling beside auto."""
_SENTENCE, _TOKENS = "sentence_embedding", "token_embeddings"
_SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize", "LogitScore", "Dropout", "MultiVectorMask")
_ANYWHERE = ("Dropout", "MultiVectorMask")
"""They change no vector. A LogitScore is a reranker's (`rerankers`), a MultiVectorMask says which vectors count
(`late_interaction`)."""
ACTIVATIONS: dict[str, str] = {
    "Identity": "identity",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Softmax": "softmax",
}
"""Classes of torch.nn that a repository may name -> our activation. Looked up, never imported."""


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """A `Dense` module: `folder` holds model.safetensors or pytorch_model.bin with `linear.weight` [out, in]."""

    folder: Path
    activation: str
    bias: bool
    residual: bool = False  # adds its input, through `residual.weight` [out, in] where the sizes differ


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """Several kinds are concatenated, in sentence-transformers' order."""

    kinds: tuple[PoolingKind, ...]
    normalize: bool
    dense: tuple[DenseSpec, ...] = ()
    max_seq_length: int | None = None
    lower_case: bool = False
    is_stated: bool = True  # whether the checkpoint or the operator says how to pool
    include_prompt: bool = True  # whether the tokens of a prompt before the text are pooled
    is_per_token: bool = False  # whether nothing is pooled: every token has its vector (late interaction)


def activation_name(path: str) -> str:
    """`torch.nn.modules.linear.Identity` -> `identity`; anything outside the table is a CheckpointError."""
    name = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or name not in ACTIVATIONS:
        raise CheckpointError(
            f"activation '{path}' is not supported (supported: torch.nn's {', '.join(sorted(ACTIVATIONS))})"
        )
    return ACTIVATIONS[name]


def read_pooling(folder: Path, default: PoolingKind, wanted: str = "auto") -> PoolingSpec:
    """The checkpoint's own pooling, or `default` with normalisation where it says nothing. `wanted` is --pooling."""
    chosen = next((kind for kind in POOLINGS if kind == wanted), None)
    modules = _json(folder / "modules.json")
    if modules is None:
        return PoolingSpec((chosen or default,), normalize=True, is_stated=chosen is not None)
    kinds: tuple[PoolingKind, ...] | None = None
    dense: list[DenseSpec] = []
    normalize, include_prompt, max_seq_length, lower_case = False, True, None, False
    chain = _in_order(folder, modules)
    named = {kind for kind, _ in chain}
    is_per_token = "Pooling" not in named and bool(named & {"Dense", "MultiVectorMask"})
    for kind, path in chain:
        if kind == "Transformer":
            settings = sentence_config(path) or sentence_config(folder)
            max_seq_length, lower_case = settings.get("max_seq_length"), bool(settings.get("do_lower_case"))
        elif kind == "Pooling":
            kinds, include_prompt = _kinds(path)
        elif kind == "Dense":
            dense.append(_dense(path, _TOKENS if is_per_token else _SENTENCE))
        elif kind == "Normalize":
            normalize = True
    is_stated = chosen is not None or kinds is not None or is_per_token
    if is_per_token and "MultiVectorMask" not in named:  # PyLate's, which does that itself
        normalize = True
    kinds = (chosen,) if chosen is not None else kinds or (default,)
    return PoolingSpec(
        kinds, normalize, tuple(dense), max_seq_length, lower_case, is_stated, include_prompt, is_per_token
    )


def sentence_config(folder: Path) -> dict[str, Any]:
    """Settings of a `Transformer` module, whose file was once named after the model; {} if there is none."""
    found = next((folder / name for name in _SENTENCE_CONFIGS if (folder / name).is_file()), None)
    settings = None if found is None else _json(found)
    if settings is not None and not isinstance(settings, dict):
        raise CheckpointError(f"{found.name if found else ''} must be a JSON object")
    return settings or {}


def stated_max_length(folder: Path, tokenizer_config: Mapping[str, Any]) -> int | None:
    """The least number of tokens to which sentence-transformers would cut a text of this folder, if one is told.

    Its version 6 saves it nowhere but in `tokenizer_config.json`, where other tokenizers have a very large number.
    """
    settings = sentence_config(folder)
    told = [settings.get("max_seq_length"), tokenizer_config.get("model_max_length")]
    for name in ("processor_kwargs", "tokenizer_args"):
        nested = settings.get(name)
        told.append(nested.get("model_max_length") if isinstance(nested, dict) else None)
    numbers = [int(one) for one in told if isinstance(one, int | float) and not isinstance(one, bool) and one >= 1]
    return min(numbers, default=None)


def _in_order(folder: Path, modules: Any) -> list[tuple[str, Path]]:
    """(kind, folder) of every module, which must come in the one order that is computed here."""
    if not isinstance(modules, list) or not all(isinstance(one, dict) and "type" in one for one in modules):
        raise CheckpointError("modules.json is not a list of modules")
    found = []
    for module in modules:
        name = str(module["type"])
        if name.rpartition(".")[2] not in _ORDER:
            raise CheckpointError(
                f"modules.json names '{name}', which is not supported (supported: {', '.join(_ORDER)})"
            )
        found.append((name.rpartition(".")[2], _inside(folder, str(module.get("path", "")))))
    kinds = [kind for kind, _ in found if kind not in _ANYWHERE]
    repeated = [kind for kind in ("Transformer", "Pooling", "Normalize") if kinds.count(kind) > 1]
    if kinds != sorted(kinds, key=_ORDER.index) or repeated:
        raise CheckpointError(
            f"modules.json chains {' -> '.join(kinds)}, which is not supported "
            "(supported: Transformer, Pooling, any number of Dense, Normalize)"
        )
    return found


def module_folder(folder: Path, kind: str) -> Path | None:
    """Of the first module of this kind, if modules.json has one."""
    modules = _json(folder / "modules.json")
    found = [] if modules is None else _in_order(folder, modules)
    return next((path for named, path in found if named == kind), None)


def _inside(folder: Path, path: str) -> Path:
    """A module's folder; names in a checkpoint's files never lead out of it."""
    target = (folder / path).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise CheckpointError(f"modules.json names the folder '{path}', which is outside the checkpoint")
    return folder / path


def _kinds(path: Path) -> tuple[tuple[PoolingKind, ...], bool]:
    """The poolings of a module, and whether prompts take part in them."""
    settings = _json(path / "config.json")
    if settings is None:
        raise CheckpointError(f"{path.name}/config.json is missing, though modules.json names it")
    mode, include_prompt = settings.get("pooling_mode"), settings.get("include_prompt", True) is not False
    if mode is not None:
        names = [mode] if isinstance(mode, str) else list(mode)
        unknown = [name for name in names if name not in _MODES]
        if unknown:
            raise CheckpointError(f"{path.name}/config.json: pooling_mode '{unknown[0]}' is not supported")
        return tuple(_MODES[name] for name in names), include_prompt
    kinds = tuple(kind for flag, kind in _FLAGS.items() if settings.get(flag))
    if not kinds:
        raise CheckpointError(f"{path.name}/config.json switches no pooling mode on")
    return kinds, include_prompt


def _dense(path: Path, features: str) -> DenseSpec:
    settings = _json(path / "config.json")
    if settings is None:
        raise CheckpointError(f"{path.name}/config.json is missing, though modules.json names it")
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, features):
            raise CheckpointError(f"{path.name}/config.json: {key} '{settings[key]}' is not supported")
    activation = activation_name(settings.get("activation_function") or "torch.nn.modules.activation.Tanh")
    return DenseSpec(path, activation, bool(settings.get("bias", True)), bool(settings.get("use_residual", False)))


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from None
