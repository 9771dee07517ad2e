"""Flags that are another server's way to say something: what they mean here, or a StartupError that says why nothing.

Runs in the HTTP process before the engine starts; torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.pooling import read_pooling
from sensorium.config import DRAFT_FLAG, MAX_SPECULATIVE_TOKENS, LoadConfig, ServeOptions, ServerConfig
from sensorium.errors import StartupError
from sensorium.types import Modality

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_POOLER_TASKS = {
    "embed": "embed",
    "token_embed": "embed",
    "classify": "classify",
    "token_classify": "reward",
    "score": "score",
    "encode": "auto",
    "reward": "reward",
}
_POOLING_NAMES = ("pooling_type", "seq_pooling_type")
_POOLINGS = {"CLS": "cls", "MEAN": "mean", "LAST": "last"}
_CHUNKS = ("enable_chunked_processing", "max_embed_len")
_HARMLESS_IN_POOLER = (("tok_pooling_type", "ALL"),)
_SAID_ELSEWHERE = {
    "dimensions": "requests say it",
    "use_activation": "requests say it",
    "normalize": "requests say it: `use_activation`",
    "softmax": "requests say it: `use_activation`",
    "activation": "requests say it: `use_activation`",
}
_OF_GUESSES = {
    *("method", "model", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"),
    *("disable_by_batch_size", "speculative_disable_by_batch_size"),
}
_LOOKUPS = (None, "ngram", "[ngram]")  # what vLLM has called prompt look-up in the place of a model
_IN_VIDEO = ("num_frames", "fps")
_HARMLESS_IN_MEDIA: Mapping[str, tuple[Any, ...]] = {
    "image_mode": ("RGB",),
    "video_backend": ("opencv", "pyav"),
    "backend": ("opencv", "pyav"),
    "frame_recovery": (False,),
}


def as_meant(options: ServeOptions, folder: Path, modalities: Collection[Modality]) -> ServeOptions:
    """The same options without other servers' words for `task`, `pooling` and `mm_processor_kwargs`.

    `folder` is the model's, which says whether embeddings are normalised.
    """
    settings = _processor_settings(options.server, "video" in modalities)
    pooler = options.load.pooler_config
    _check_pooler(pooler, folder)
    draft, guessed = _guesses(options.load, options.engine.speculative_tokens)
    return replace(
        options,
        load=replace(options.load, task=_task(options.load), draft_model=draft),
        engine=replace(options.engine, pooling=_pooling(options.engine.pooling, pooler), speculative_tokens=guessed),
        server=replace(_in_chunks(options.server, pooler), mm_processor_kwargs=settings),
    )


def _guesses(load: LoadConfig, default: int) -> tuple[str | None, int]:
    """(draft model, most tokens), as --speculative-config says it too. How guesses are found and when they pay is
    measured."""
    config = load.speculative_config
    named = config.get("model")
    draft = None if named in _LOOKUPS else named
    method = config.get("method", "ngram" if draft is None else "draft_model")
    if method not in ("ngram", "draft_model") or (method == "ngram") != (draft is None):
        raise StartupError(
            f"--speculative-config: {draft or method} is not offered as it stands; tokens are guessed from the prompt "
            '({"method": "ngram"}), or by a draft model ({"method": "draft_model", "model": "folder or hub id"})'
        )
    if unknown := config.keys() - _OF_GUESSES:
        raise StartupError(f"--speculative-config: {min(unknown)} is not known; leave it out")
    if draft is not None and load.draft_model not in (None, draft):
        raise StartupError(f"--speculative-config names the model {draft}, and {DRAFT_FLAG} {load.draft_model}")
    count = config.get("num_speculative_tokens", default)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_SPECULATIVE_TOKENS:
        raise StartupError(
            f"--speculative-config: num_speculative_tokens must be a number from 0 to {MAX_SPECULATIVE_TOKENS}"
        )
    return load.draft_model or draft, count


def _task(load: LoadConfig) -> str:
    """What --task, --runner, --convert and --pooler-config narrow to, if they agree."""
    convert = "auto" if load.convert == "none" else load.convert
    said = {
        "--task": load.task,
        "--runner": load.runner,
        "--convert": convert,
        "--pooler-config": _pooler_task(load.pooler_config),
    }
    said = {flag: task for flag, task in said.items() if task != "auto"}
    narrow = {task for task in said.values() if task != "pooling"}
    if len(narrow) > 1 or ("pooling" in said.values() and "generate" in narrow):
        raise StartupError(
            "these flags contradict each other: " + ", ".join(f"{flag} {task}" for flag, task in said.items())
        )
    return next(iter(narrow), "pooling" if said else "auto")


def _pooler_task(pooler: Mapping[str, Any]) -> str:
    task = pooler.get("task")
    if task is not None and task not in _POOLER_TASKS:
        raise StartupError(f"--pooler-config: task must be one of {', '.join(_POOLER_TASKS)}")
    return "auto" if task is None else _POOLER_TASKS[task]


def _pooling(pooling: str, pooler: Mapping[str, Any]) -> str:
    """What --pooling and --pooler-config say, if they agree."""
    for name in _POOLING_NAMES:
        given = pooler.get(name)
        if given is None:
            continue
        kind = _POOLINGS.get(str(given).upper())
        if kind is None:
            raise StartupError(
                f"--pooler-config: {name} {given} is not offered; {', '.join(_POOLINGS)} are, and a "
                "vector for every token by /pooling"
            )
        if pooling not in ("auto", kind):
            raise StartupError(f"--pooler-config: {name} {given} contradicts --pooling {pooling}")
        pooling = kind
    return pooling


def _in_chunks(server: ServerConfig, pooler: Mapping[str, Any]) -> ServerConfig:
    """With what --pooler-config says of texts that are longer than the context."""
    chunked, longest = (pooler.get(name) for name in _CHUNKS)
    if chunked is not None and not isinstance(chunked, bool):
        raise StartupError("--pooler-config: enable_chunked_processing must be true or false")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise StartupError("--pooler-config: max_embed_len must be a number of tokens")
    if longest is not None and not (chunked or server.embed_in_chunks):
        raise StartupError(
            "--pooler-config: max_embed_len goes with enable_chunked_processing; without it use --max-model-len"
        )
    return replace(
        server, embed_in_chunks=chunked or server.embed_in_chunks, max_embed_len=longest or server.max_embed_len
    )


def _check_pooler(pooler: Mapping[str, Any], folder: Path) -> None:
    """Refuse settings that ask for something else than what happens."""
    for name, value in pooler.items():
        if name in ("task", *_POOLING_NAMES, *_CHUNKS) or value is None or (name, value) in _HARMLESS_IN_POOLER:
            continue
        if (
            name in ("normalize", "use_activation")
            and isinstance(value, bool)
            and (value is read_pooling(folder, "last").normalize)
        ):
            continue
        raise StartupError(f"--pooler-config: {name} cannot be set; {_SAID_ELSEWHERE.get(name, 'leave it out')}")


def _processor_settings(server: ServerConfig, sees_videos: bool) -> dict[str, Any]:
    """--mm-processor-kwargs with what --media-io-kwargs says of videos, which is nothing to a model that sees none."""
    found = dict(server.mm_processor_kwargs)
    for kind, settings in server.media_io_kwargs.items():
        if kind not in ("image", "video", "audio") or not isinstance(settings, dict):
            raise StartupError('--media-io-kwargs must be settings by kind, such as {"video": {"num_frames": 40}}')
        for name, value in settings.items():
            if kind == "video" and name in _IN_VIDEO:
                if sees_videos and found.setdefault(name, value) != value:
                    raise StartupError(f"--media-io-kwargs and --mm-processor-kwargs both say {name}")
            elif value is not None and value not in _HARMLESS_IN_MEDIA.get(name, ()):
                raise StartupError(
                    f"--media-io-kwargs: {kind}.{name} is not offered; {', '.join(_IN_VIDEO)} of video are"
                )
    return found


def with_sampling_defaults(checkpoint: Checkpoint, server: ServerConfig) -> Checkpoint:
    """The checkpoint with the sampling defaults that --generation-config and --override-generation-config name.

    Its end tokens stay.
    """
    generation = dict(checkpoint.generation)
    if server.generation_config != "auto":
        generation = {name: value for name, value in generation.items() if name not in SAMPLING}
    if server.generation_config not in ("auto", "vllm"):
        stated = _generation_file(Path(server.generation_config))
        generation |= {name: value for name, value in stated.items() if name in SAMPLING}
    for name, value in server.override_generation_config.items():
        if name not in SAMPLING:
            raise StartupError(f"--override-generation-config: {name} cannot be set; these can: {', '.join(SAMPLING)}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise StartupError(f"--override-generation-config: {name} must be a number")
        generation[name] = value
    return replace(checkpoint, generation=generation)


def _generation_file(folder: Path) -> dict[str, Any]:
    try:
        stated = json.loads((folder / "generation_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise StartupError(f"--generation-config {folder}: no generation_config.json can be read there") from error
    return stated if isinstance(stated, dict) else {}
