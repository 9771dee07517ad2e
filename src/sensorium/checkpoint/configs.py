"""A checkpoint's files, read without torch: where they are, what the configs say, in one dialect.

Both the HTTP process and the engine process start from `open_checkpoint`. It accepts the hub's config dialect and the
one that transformers writes today; everything after it sees only the dataclasses below. Nothing remote is executed:
`auto_map` is never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sensorium.checkpoint.families import Family, architecture_of, family_of
from sensorium.checkpoint.lengths import checkpoint_length
from sensorium.checkpoint.overrides import overridden
from sensorium.checkpoint.pair_templates import reads_pairs
from sensorium.checkpoint.pooling import PoolingSpec, read_pooling
from sensorium.checkpoint.quantization import StoredQuantization, read_quantization
from sensorium.checkpoint.rerankers import Recipe, ScoreTokens, recipe_of, score_tokens
from sensorium.checkpoint.text_config import TextConfig, read_text_config, text_part
from sensorium.checkpoint.tokens import read_chat_templates, stop_token_ids
from sensorium.checkpoint.values import check_counts, positive_int, read_json, unsupported
from sensorium.checkpoint.weight_files import find_weight_files
from sensorium.errors import CheckpointError

_DTYPES = ("bfloat16", "float16", "float32")
_OUTER_KEYS = ("dtype", "torch_dtype", "quantization_config", "compression_config")
"""What a config.json whose served part is nested says for that part too."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model folder. The raw JSON dictionaries are there for the family's own processor and tower."""

    folder: Path
    architecture: str  # config.json's architectures[0]; of a language model that only scores the classifier's
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
    audio_preprocessor: dict[str, Any] = field(
        default_factory=dict
    )  # the same for audio, in processor_config.json alone
    text_weight_files: tuple[Path, ...] = ()  # of the second repository, whose tensors yield to the first's
    quantization: StoredQuantization | None = None  # how the weights are stored, if not as plain numbers
    score_tokens: ScoreTokens | None = None  # of a reranker whose score is made of rows of its language head
    pooling: str = "auto"  # --pooling: what the operator says in place of the folder's files

    @property
    def decoder(self) -> TextConfig:
        """`text`, of models that cannot do without. CheckpointError if there is none."""
        if self.text is None:
            raise CheckpointError(f"{self.architecture} needs a decoder's configuration")
        return self.text

    @property
    def tool_template(self) -> str | None:
        """What chats that have tools are rendered by in place of `chat_template`, if there is such a one."""
        return read_chat_templates(self.folder, self.tokenizer_config).get("tool_use")

    @property
    def family(self) -> Family:
        """The registry's row of `architecture`."""
        return family_of(self.architecture)

    @property
    def embedding(self) -> PoolingSpec:
        """What embeddings are made of: as --pooling or the files say, else as models of this kind are pooled."""
        return read_pooling(self.folder, "last" if self.family.encoder is None else "cls", self.pooling)


def open_checkpoint(
    folder: Path, text_folder: Path | None = None, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint:
    """Read the configs of a model folder and find its weights. CheckpointError says in one line what is wrong.

    `text_folder` is where the language model is if the checkpoint brings none of its own, `overrides` are values in the
    place of config.json's (--hf-overrides).
    """
    stated = _required(folder, "a model folder")
    architecture = architecture_of({**stated, **overrides})
    family = family_of(architecture)
    config = _in_one_dialect(overridden(_resolved(stated, family, text_folder), overrides, family.nested_in), family)
    check_counts(config)
    recipe = recipe_of(folder, config)
    tokens = _score_tokens(folder, config, family, recipe)
    if tokens is not None:
        architecture = family.scored_as or architecture
        family, config = family_of(architecture), _scoring(config, len(tokens.kept))
    generation, tokenizer_config = _generation(folder, text_folder), read_json(folder / "tokenizer_config.json") or {}
    text_dict = text_part(config)
    text = None if family.encoder else read_text_config(config, family)
    vocab_size = text.vocab_size if text else _encoder_vocab_size(text_dict, family)
    return Checkpoint(
        folder=folder,
        architecture=architecture,
        config=config,
        generation=generation,
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(folder, tokenizer_config, family, recipe),
        text=text,
        dtype=_dtype(config, text_dict),
        max_model_len=checkpoint_length(folder, config, family, text, tokenizer_config),
        vocab_size=vocab_size,
        stop_token_ids=stop_token_ids(folder, tokenizer_config, (generation, config, text_dict), vocab_size),
        weight_files=find_weight_files(folder),
        **_preprocessors(folder),
        text_weight_files=find_weight_files(text_folder) if text_folder else (),
        quantization=_quantization(folder, config, text_dict),
        score_tokens=tokens,
    )


def _encoder_vocab_size(config: dict[str, Any], family: Family) -> int:
    return positive_int(config, "vocab_size", family.encoder.vocab_size if family.encoder else None)


def _required(folder: Path, what: str) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json: not {what}")
    return config


def _score_tokens(folder: Path, config: Mapping[str, Any], family: Family, recipe: Recipe | None) -> ScoreTokens | None:
    """A folder that is only known by its name is looked at only if it generates: a converted one has its own head."""
    generates = "generate" in family.tasks
    found = score_tokens(folder, config, recipe if generates or "is_original_qwen3_reranker" in config else None)
    if found is not None and generates and family.scored_as is None:
        raise CheckpointError(f"{family.title}: scores out of tokens of the language head are not supported")
    return found


def _scoring(config: dict[str, Any], labels: int) -> dict[str, Any]:
    """The config of a classifier with so many classes, whatever it said of others."""
    kept = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    return {**kept, "num_labels": labels}


def _chat_template(folder: Path, tokenizer_config: dict[str, Any], family: Family, recipe: Recipe | None) -> str | None:
    """The folder's; of a known reranker its own for pairs, where the folder has only what the base model left."""
    found = read_chat_templates(folder, tokenizer_config).get("default")
    if family.late is not None and family.chat_template is not None:
        return family.chat_template  # the base model's is not what its documents are written with
    return found if recipe is None or reads_pairs(found) else recipe.template


def _resolved(stated: dict[str, Any], family: Family, text_folder: Path | None) -> dict[str, Any]:
    """config.json's part that is served, with the language model's config where that is a repository of its own."""
    config, nested = stated, stated.get(family.nested_in)
    if isinstance(nested, dict):
        outer = {key: stated[key] for key in _OUTER_KEYS if key in stated}
        config = {**outer, **nested, "architectures": stated.get("architectures")}
        if "text_config" in nested or "vocab_size" not in nested:
            config["text_config"] = nested.get("text_config") or {}
    if text_folder is not None:
        config = {**config, "text_config": text_part(_required(text_folder, "a language model's folder"))}
    return config


def _in_one_dialect(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The decoder's part as `text_config`; an encoder's config.json under BERT's names too, where the family has its
    own. What CLIP's first dialect says of its towers beside their configs counts."""
    config = {**family.defaults, **config}
    version = family.text_versions.get(str(config.get("version")))
    config = config if version is None else {**config, "model_type": version}
    if family.encoder is None:
        return {**config, "text_config": config[family.text_in]} if family.text_in in config else config
    for name in ("text_config", "vision_config"):
        older = config.get(f"{name}_dict")
        if isinstance(older, dict):
            config = {**config, name: {**(config.get(name) or {}), **older}}
    return {**config, **{name: config[own] for name, own in family.encoder.names.items() if own in config}}


def _generation(folder: Path, text_folder: Path | None) -> dict[str, Any]:
    """generation_config.json; what it leaves out is taken from the language model's own repository."""
    folders = (folder,) if text_folder is None else (text_folder, folder)
    return {key: value for one in folders for key, value in (read_json(one / "generation_config.json") or {}).items()}


_QUANTIZER_FILES = (
    ("quantize_config.json", "gptq"),
    ("quant_config.json", "awq"),
    ("hf_quant_config.json", "modelopt"),
)


def _quantization(folder: Path, config: dict[str, Any], text: dict[str, Any]) -> StoredQuantization | None:
    """config.json's (MLX calls it `quantization`), the decoder's own part of it, or a quantiser's file beside it."""
    for source in (config, text):
        for name in ("quantization_config", "compression_config"):
            if source.get(name):
                return read_quantization(source[name])
        own = source.get("quantization")
        if isinstance(own, dict) and "group_size" in own:
            return read_quantization(own)
    for name, method in _QUANTIZER_FILES:
        stated = read_json(folder / name)
        if stated is not None:
            return read_quantization({"quant_method": method, **stated})
    return None


def _dtype(config: dict[str, Any], text: dict[str, Any]) -> str:
    for source in (config, text):
        value = source.get("dtype") or source.get("torch_dtype")
        if value is not None:
            name = str(value).removeprefix("torch.")
            if name not in _DTYPES:
                raise unsupported("dtype", name, _DTYPES)
            return name
    return "float32"


def _preprocessors(folder: Path) -> dict[str, Any]:
    return {
        "preprocessor": _preprocessor(folder, "preprocessor_config.json", "image_processor"),
        "video_preprocessor": _preprocessor(folder, "video_preprocessor_config.json", "video_processor"),
        "audio_preprocessor": _preprocessor(folder, None, "feature_extractor"),
    }


def _preprocessor(folder: Path, name: str | None, part: str) -> dict[str, Any]:
    """A preprocessor's own file, else its part of processor_config.json, else {}."""
    own = None if name is None else read_json(folder / name)
    nested = (read_json(folder / "processor_config.json") or {}).get(part) if own is None else own
    return nested if isinstance(nested, dict) else {}
