"""Models on this machine: what one is and takes (`info MODEL`), which there are (`list`), fetching one (`pull`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sensorium.checkpoint.configs import Checkpoint, open_checkpoint
from sensorium.checkpoint.families import FAMILIES
from sensorium.checkpoint.gguf import describe
from sensorium.checkpoint.hub import resolve, text_model_of
from sensorium.checkpoint.ollama import is_ollama_store, ollama_models
from sensorium.checkpoint.ranks import sizes
from sensorium.checkpoint.values import read_json
from sensorium.cli.serve import LoadingBar, loading_bar
from sensorium.config import EngineConfig, ListConfig, PullConfig
from sensorium.errors import CheckpointError, StartupError
from sensorium.prompt.builtin import folder_names, is_embedder_name
from sensorium.serving.tasks import task_text
from sensorium.startup.catalog import CONFIG_FILE, folders_of_models
from sensorium.startup.drafts import open_draft
from sensorium.startup.fit import CACHE_PART, ENGINE_BASE_BYTES, LEAST_CACHE_BYTES, engine_plan
from sensorium.startup.model import DEMO_FOLDER
from sensorium.system.memory import free_memory_bytes
from sensorium.units import size_text

QUANTIZATIONS = ("auto", "int8", "int4")
MOST_SHOWN = 8  # devices that a model is shared by
INT8_SCALE_BYTES = 4  # of a cached row in int8


def find_checkpoint(model: str) -> Checkpoint:
    """Of a folder, a GGUF file or a hub repository that is on this machine; `demo` is the built-in model."""
    folder = DEMO_FOLDER if model == "demo" else resolve(model, fetch=False)
    named = text_model_of(folder)
    return open_checkpoint(folder, resolve(named, fetch=False) if named else None)


def find_draft(name: str, model: Checkpoint) -> Checkpoint:
    """A model that guesses for another one. StartupError if it cannot."""
    return open_draft(name, find_checkpoint(name).folder, model, EngineConfig(""))


def model_rows(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """What it is and does. Of its weights no more is read than where they are."""
    family, files = checkpoint.family, (*checkpoint.weight_files, *checkpoint.text_weight_files)
    stored = checkpoint.dtype if checkpoint.quantization is None else checkpoint.quantization.title
    yield "model", f"{family.title} ({checkpoint.architecture})"
    yield "folder", str(checkpoint.folder)
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    yield "files", f"{size_text(sum(file.stat().st_size for file in files))} in {count}, {stored}"
    yield from _weight_rows(checkpoint)
    yield "takes", ", ".join(("text", *sorted(family.modalities)))
    yield "can", "; ".join(task_text(_task(one), compares=_compares(checkpoint)) for one in family.tasks)
    if family.lacks:
        yield "cannot", family.lacks
    yield "context", f"{checkpoint.max_model_len} tokens"
    yield "vocabulary", f"{checkpoint.vocab_size} tokens"


def _weight_rows(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Of quantised weights how many there are, and the bits that each takes with its part of scales and zeros."""
    if checkpoint.quantization is None or checkpoint.quantization.layout == "gguf":
        return
    from sensorium.weights.checkpoint_files import stored_tensors  # imports torch
    from sensorium.weights.joining import join
    from sensorium.weights.stored_codes import StoredCodes

    try:
        found = join(stored_tensors(checkpoint.weight_files), checkpoint.quantization)
    except (CheckpointError, OSError):  # whoever loads it says what is wrong with its files
        return
    quantised = [one for one in found if isinstance(one, StoredCodes)]
    count = sum(math.prod(one.shape) for one in found)
    if not count or not quantised:
        return
    inner = 8 * sum(one.nbytes for one in quantised) / sum(math.prod(one.shape) for one in quantised)
    bits = 8 * sum(one.nbytes for one in found) / count
    yield "weights", f"{count / 1e6:,.1f} million, {bits:.2f} bits each; quantised ones {inner:.2f}, scales included"


def _compares(checkpoint: Checkpoint) -> bool:
    """Whether its vectors are for that, as far as its files and its name say."""
    is_called_so = is_embedder_name(folder_names(checkpoint.folder))
    return "generate" not in checkpoint.family.tasks or checkpoint.embedding.is_stated or is_called_so


def _task(name: str) -> str:
    return "token_classify" if name == "reward" else name


def memory_rows(
    checkpoint: Checkpoint, free_bytes: int | None = None, draft: Checkpoint | None = None
) -> Iterator[tuple[str, str]]:
    """What it takes: its cache for each token, and its weights at each quantisation; with those of a model that guesses
    for it."""
    free = free_memory_bytes() if free_bytes is None else free_bytes
    both = (checkpoint,) if draft is None else (checkpoint, draft)
    token_bytes = sum(cache_bytes_per_token(one, "auto") for one in both)
    if token_bytes:
        whole = size_text(token_bytes * checkpoint.max_model_len)
        small = size_text(sum(cache_bytes_per_token(one, "int8") for one in both))
        yield "KV cache", f"{size_text(token_bytes)} a token ({small} in int8), {whole} for the whole context"
    yield "free memory", size_text(free)
    for name in QUANTIZATIONS if checkpoint.quantization is None else QUANTIZATIONS[:1]:
        weights = engine_plan(EngineConfig("", quantization=name), checkpoint, None, draft=draft).weight_bytes
        title = "as stored" if name == "auto" else name
        yield f"  {title}", f"about {size_text(weights)} of weights: {_fits(checkpoint, weights, token_bytes, free)}"
    if draft is None:  # which a model that is shared by devices does without
        yield from _rank_rows(checkpoint, token_bytes)


def _rank_rows(checkpoint: Checkpoint, token_bytes: int) -> Iterator[tuple[str, str]]:
    """What each device has where several share the model."""
    text = checkpoint.text
    for size in sizes(checkpoint)[1:]:
        if text is not None and size <= MOST_SHOWN:
            copies = max(size // text.num_kv_heads, 1)  # of each head of keys and values
            cache = f" and {size_text(token_bytes * copies // size)} of KV cache a token" if token_bytes else ""
            weights = engine_plan(EngineConfig("", tensor_parallel_size=size), checkpoint, None).weight_bytes
            yield f"  {size} devices", f"about {size_text(weights // size)} of weights{cache} on each"


def _fits(checkpoint: Checkpoint, weight_bytes: int, token_bytes: int, free_bytes: int) -> str:
    left = free_bytes - weight_bytes - ENGINE_BASE_BYTES
    if left < (LEAST_CACHE_BYTES if token_bytes else 0):
        return "does not fit here"
    if not token_bytes:
        return "fits here"
    tokens = min(left // CACHE_PART // token_bytes, EngineConfig("").max_num_seqs * checkpoint.max_model_len)
    longest = min(tokens, checkpoint.max_model_len)
    return f"fits here, with {tokens} tokens of KV cache and prompts of up to {longest}"


def cache_bytes_per_token(checkpoint: Checkpoint, kv_cache_dtype: str) -> int:
    """Keys and values of the layers that attend; 0 for a model without a KV cache. A window may keep less."""
    text = checkpoint.text
    if text is None or not text.is_causal:
        return 0
    element_bytes = 4 if checkpoint.dtype == "float32" else 2
    total = 0
    for layer in text.layers:
        if layer.source is None and layer.state is None:
            heads, size = layer.num_kv_heads or text.num_kv_heads, layer.head_dim or text.head_dim
            row_bytes = size + INT8_SCALE_BYTES if kv_cache_dtype == "int8" else size * element_bytes
            total += 2 * heads * row_bytes
    return total


# The models that there are


def list_models(config: ListConfig) -> int:
    """The command: a line for each model of the hub's cache, or of a folder."""
    found = list(_in_folder(Path(config.models_dir)) if config.models_dir else _in_hub(config.download_dir))
    if not found:
        print("no models are here; `sensorium pull MODEL` fetches one")
        return 0
    rows = [("MODEL", "SIZE", "WHAT IT IS"), *found]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, size, what in rows:
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {what}")
    return 0


def _in_folder(root: Path) -> Iterator[tuple[str, str, str]]:
    if not root.is_dir():
        raise StartupError(f"--models-dir {root}: there is no such folder")
    for folder in folders_of_models(root):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        yield folder.relative_to(root).as_posix(), size_text(size), _what(folder)
    for one in ollama_models(root) if is_ollama_store(root) else []:
        yield one.name, size_text(one.file_bytes), _what_file(one.file)


def _in_hub(download_dir: str | None) -> Iterator[tuple[str, str, str]]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cached = scan_cache_dir(download_dir)
    except CacheNotFound:
        return
    for one in sorted(cached.repos, key=lambda one: one.repo_id):
        if one.repo_type == "model":
            newest = max(one.revisions, key=lambda revision: revision.last_modified, default=None)
            what = "nothing of it yet" if newest is None else _what(newest.snapshot_path)
            yield one.repo_id, size_text(one.size_on_disk), what


def _what_file(file: Path) -> str:
    """Of a GGUF file."""
    try:
        found = describe(file)
    except CheckpointError as error:
        return f"not served: {error.message}"
    return f"{found.architecture} in GGUF, {found.context_length} tokens"


def _what(folder: Path) -> str:
    """In a few words, whether or not it is served."""
    stated = read_json(folder / CONFIG_FILE) or {}
    names = stated.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if name not in FAMILIES:
        return f"{name or 'no config.json'}: not served"
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        return f"{FAMILIES[name].title}: {error.message}"
    return f"{checkpoint.family.title}, {checkpoint.max_model_len} tokens"


def pull(model: str, config: PullConfig) -> int:
    """The command: fetch what is missing of a hub repository, and the language model that it may name."""
    with loading_bar() as show:
        folder = _fetched(model, config, show)
        named = text_model_of(folder)
        if named:
            _fetched(named, replace(config, revision=None), show)
    print(folder)
    return 0


def _fetched(model: str, config: PullConfig, show: LoadingBar) -> Path:
    return resolve(model, config.revision, config.download_dir, on_progress=lambda part: show("fetching", part, model))
