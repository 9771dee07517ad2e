"""A GGUF file as a model folder: the configs and the tokenizer that it holds are written out once, beside links to it.

Everything else then reads it as any other checkpoint. What lies beside the file (tokenizer.json, …) is taken in place
of what the file says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium import __version__
from sensorium.checkpoint.gguf_config import config_of, generation_of, memory_part, pooling_of
from sensorium.checkpoint.gguf_file import GgufFile, read_gguf, read_gguf_set
from sensorium.checkpoint.gguf_metadata import Metadata
from sensorium.checkpoint.gguf_names import DENSE_TENSORS
from sensorium.checkpoint.gguf_tokenizer import chat_templates, tokenizer_of, with_token
from sensorium.checkpoint.gguf_tower_configs import missing_token
from sensorium.checkpoint.gguf_towers import goes_with, projector_of, rows_of, template_with_media
from sensorium.checkpoint.own_cache import own_cache, writable
from sensorium.checkpoint.pair_templates import template_of_places
from sensorium.errors import CheckpointError, StartupError

SUFFIX = ".gguf"
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
_PROJECTOR = "mmproj"
_TOWER = "tower.gguf"  # what its link is called in a folder that is made here
_log = logging.getLogger(__name__)
_OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class GgufDescription:
    """What `sensorium info` tells of a file. `types`: how many weights are stored as what."""

    architecture: str
    parts: int
    file_bytes: int
    weights: int
    types: Mapping[str, int]
    stored_bytes: int  # of the tensors, with those of the tower
    memory_bytes: int  # of the weights once they are loaded
    context_length: int
    tower: Path | None  # the projector beside it that is taken

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.file_bytes / max(self.weights, 1)


def describe(path: Path) -> GgufDescription:
    """CheckpointError if it is not a GGUF file of a family that is served."""
    files = read_gguf_set(path)
    config = config_of(files)
    tensors = [tensor for file in files for tensor in file.tensors]
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[tensor.kind.name] += math.prod(tensor.shape)
    stored, tower = sum(tensor.nbytes for tensor in tensors), _tower(files[0], None)
    return GgufDescription(
        architecture=config["architectures"][0],
        parts=len(files),
        file_bytes=sum(file.path.stat().st_size for file in files),
        weights=sum(types.values()),
        types=dict(types.most_common()),
        stored_bytes=stored + sum(tensor.nbytes for tensor in (tower.tensors if tower else ())),
        memory_bytes=int(stored * memory_part(tensors)),
        context_length=config["max_position_embeddings"],
        tower=None if tower is None else tower.path,
    )


def gguf_in(folder: Path) -> Path | None:
    """The model's file in a folder that has no other weights, the first part of several; None if there is none.
    StartupError if there are several models."""
    if any(any(folder.glob(pattern)) for pattern in _OTHER_WEIGHTS) or _is_whole(folder):
        return None
    found = sorted(file for file in folder.glob(f"*{SUFFIX}") if not file.name.lower().startswith(_PROJECTOR))
    models = [file for file in found if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(models) > 1:
        names = ", ".join(file.name for file in models[:5])
        raise StartupError(f"{folder} has several GGUF files: name one of them ({names})")
    return models[0] if models else None


def _is_whole(folder: Path) -> bool:
    """Whether the folder has all that a model folder needs beside its weights, as those have that are made here."""
    return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def gguf_folder(path: Path, cache: Path | None = None, mmproj: Path | None = None) -> Path:
    """A model folder for the file, made at its first use. `mmproj`: the file of its tower; None: the only one beside
    it, if there is one. CheckpointError says what is wrong with a file."""
    path = path.absolute()
    beside = [path.parent / name for name in _BESIDE if (path.parent / name).is_file()]
    files = read_gguf_set(path)
    tower = _tower(files[0], mmproj)
    parts = [file.path for file in files] + ([] if tower is None else [tower.path])
    name = f"{path.name.removesuffix(SUFFIX)}-{_digest(parts + beside)}"
    cache = cache or own_cache("gguf")
    if cache is not None and _is_whole(cache / name):
        return cache / name
    contents = _contents(files, tower)
    try:
        cache = writable(cache, "what is read from a GGUF file's header")
        made = Path(tempfile.mkdtemp(dir=cache))
        try:
            _write(made, contents, files, beside)
            if tower is not None:
                (made / _TOWER).symlink_to(tower.path)
            with suppress(OSError):  # another process was faster
                made.rename(cache / name)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise StartupError(f"{path.name}: its configuration cannot be written: {error.strerror}") from None
    return cache / name


def _tower(first: GgufFile, mmproj: Path | None) -> GgufFile | None:
    """The tower of a model: the file that is named, or the only one of its folder, where both go together."""
    if mmproj is not None:
        if not mmproj.is_file():
            raise StartupError(f"--mmproj: no such file: {mmproj}")
        return read_gguf(mmproj.absolute())
    found = [one for one in first.path.parent.glob(f"*{SUFFIX}") if one.name.lower().startswith(_PROJECTOR)]
    if len(found) != 1:
        if found:
            _log.warning(
                "%s has %d projectors beside it, of which none is taken: name one with --mmproj",
                first.path.name,
                len(found),
            )
        return None
    tower = read_gguf(found[0].absolute())
    return tower if goes_with(Metadata((first,)), Metadata((tower,))) else None


def _digest(files: list[Path]) -> str:
    stated = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((__version__, stated)).encode()).hexdigest()[:16]


def _contents(files: tuple[GgufFile, ...], tower: GgufFile | None = None) -> dict[str, str]:
    """Text by file name."""
    first = files[0]
    config = config_of(files, tower)
    tokenizer, tokenizer_config = tokenizer_of(first)
    jsons: dict[str, Any] = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation_of(first.metadata),
    }
    pooling = pooling_of(Metadata(files))
    if pooling is not None:
        jsons |= _sentence_files(pooling, Metadata(files))
    templates = chat_templates(first.metadata)
    pairs = templates.pop("rerank", None)
    if pairs is not None and config.get("num_labels"):
        templates["default"] = template_of_places(pairs)
    if tower is not None:
        rows, whole = rows_of(Metadata((tower,))), Metadata((tower,))
        jsons["preprocessor_config.json"] = {key: one for row in rows for key, one in row.preprocessor(whole).items()}
        tokenizer = with_token(tokenizer, missing_token(Metadata(files), projector_of(Metadata((tower,)))))
        templates = {
            name: one for name, one in templates.items() if all(row.template or row.modality in one for row in rows)
        }
        if (spoken := template_with_media(Metadata(files), config)) is not None:
            templates.setdefault("default", spoken)
    texts = {name: json.dumps(value, indent=1) for name, value in jsons.items()}
    for name, template in templates.items():
        if not name.replace("_", "").isalnum():
            raise CheckpointError(f"{first.path.name}: a chat template with the name {name!r} is not supported")
        texts["chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"] = template
    return {**texts, "tokenizer.json": tokenizer}


def _sentence_files(pooling: str, meta: Metadata) -> dict[str, Any]:
    """As sentence-transformers writes them. Vectors are normalised, which GGUF does not say."""
    dense = [(f"{number}_Dense", f"dense_{number}.weight") for number in (2, 3)]
    denses = [path for path, name in dense if name in meta.tensors]
    paths = [("Transformer", ""), ("Pooling", "1_Pooling"), *(("Dense", path) for path in denses)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate([*paths, ("Normalize", f"{len(paths)}_Normalize")])
    ]
    flags = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    settings = {f"pooling_mode_{flag}": kind == pooling for kind, flag in flags.items()}
    size = meta.number("embedding_length")
    linear = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    return {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": size, **settings},
        **{f"{path}/config.json": linear for path in denses},
    }


def _write(folder: Path, contents: Mapping[str, str], files: tuple[GgufFile, ...], beside: list[Path]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for file in beside:
        shutil.copyfile(file, folder / file.name)
    for one in files:
        for name in DENSE_TENSORS:
            if any(tensor.name == name for tensor in one.tensors):  # its layer is a module with a file of its own
                (folder / f"{name[6]}_Dense" / f"{name}{SUFFIX}").symlink_to(one.path)
        (folder / f"{one.path.name.removesuffix(SUFFIX)}{SUFFIX}").symlink_to(one.path)
