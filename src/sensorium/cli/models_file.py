"""`sensorium serve --config models.toml`: the server's flags, and a table [models.NAME] of flags for each model."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sensorium.cli.flags import flags_of, words_of
from sensorium.cli.other_flags import ACCEPTED, REFUSED, RENAMED
from sensorium.config import EngineConfig, Limits, LoadConfig, ServeOptions, ServePlan, ServerConfig
from sensorium.errors import StartupError

MODELS, MODEL, ALIASES = "models", "model", "aliases"
_OF_MODELS = {
    "served_model_name",
    "limit_mm_per_prompt",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "chat_template",
    "tool_call_parser",
    "reasoning_parser",
    "generation_config",
    "override_generation_config",
    "matryoshka_dimensions",
    "embed_in_chunks",
    "max_embed_len",
}
"""Of the server's flags those that each model may have of its own."""
_FLAGS = {flag.field: flag for config in (LoadConfig, EngineConfig, ServerConfig, Limits) for flag in flags_of(config)}
_MODEL_FLAGS = {flag.field for config in (LoadConfig, EngineConfig) for flag in flags_of(config)} | _OF_MODELS
_SERVER_FLAGS = _FLAGS.keys() - _MODEL_FLAGS
_ONLY_ONE = {"served_model_name", "pinned"}
Read = Callable[[Sequence[str], str], ServeOptions]
"""Of the words of a command line, and where they stand for errors."""


def read_models_file(path: str, typed: Sequence[str], read: Read) -> ServePlan:
    """`typed` are the command line's flags, which count more than the file's. StartupError says what is wrong where."""
    found = _parsed(Path(path))
    tables = found.pop(MODELS, {})
    _check_spellings(path, found)
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise StartupError(f'{path}: models are tables: [models.NAME], with `model = "folder or hub id"`')
    _check(path, found, _MODEL_FLAGS | _SERVER_FLAGS - _ONLY_ONE)
    top = list(_words(found))
    common = read(["serve", *top, *typed], path)

    def read_model(words: Sequence[str], where: str) -> ServeOptions:
        return read(["serve", *words, *typed], where)

    models = [_model(f"{path}: [models.{name}]", name, table, read_model, top) for name, table in tables.items()]
    if not models and common.server.models_dir is None:
        raise StartupError(f"{path} has no models: write a table [models.NAME] for each")
    return ServePlan(common, tuple(models))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise StartupError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"--config {path} is not TOML: {error}") from None


def _model(where: str, name: str, table: dict[str, Any], read: Read, top: list[str]) -> ServeOptions:
    _check_spellings(where, table)
    flags = {key.replace("-", "_"): value for key, value in table.items()}
    model, aliases = flags.pop(MODEL, name), flags.pop(ALIASES, [])
    if not isinstance(model, str):
        raise StartupError(f"{where}: model is a folder or a hub id, not {model!r}")
    if not isinstance(aliases, list) or not all(isinstance(one, str) and one.strip() for one in aliases):
        raise StartupError(f"{where}: aliases are a list of names, not {aliases!r}")
    _check(where, flags, _MODEL_FLAGS, elsewhere=_SERVER_FLAGS)
    options = read([model, *top, *_words(flags)], where)
    names = (*(options.server.served_model_name or (name,)), *aliases)
    return replace(options, server=replace(options.server, served_model_name=tuple(dict.fromkeys(names))))


def _check_spellings(where: str, table: Mapping[str, Any]) -> None:
    """StartupError if a key stands there with dashes and with underscores: one value would be lost."""
    written: dict[str, str] = {}
    for key in table:
        other = written.setdefault(key.replace("-", "_"), key)
        if other != key:
            raise StartupError(f"{where}: {other!r} and {key!r} are one key: leave one of them out")


def _words(flags: Mapping[str, Any]) -> Iterator[str]:
    for name, value in flags.items():
        flag = _FLAGS.get(name.replace("-", "_"))
        values = value if flag is not None and flag.repeat and isinstance(value, list) else [value]
        for one in values:
            yield from words_of(name, one)


def _check(where: str, flags: Mapping[str, Any], known: Collection[str], elsewhere: Collection[str] = ()) -> None:
    for key, value in flags.items():
        name, option = key.replace("-", "_"), "--" + key.replace("_", "-")
        if name in elsewhere:
            raise StartupError(f"{where}: {key} is the server's: write it at the top of the file")
        flag = _FLAGS.get(name)
        if value and isinstance(value, list) and flag is not None and not (flag.repeat or flag.many):
            raise StartupError(f"{where}: {key} takes one value, not a list")
        if name in known or option in ACCEPTED or option in REFUSED or option in RENAMED:
            continue
        of_tables = (MODEL, ALIASES) if elsewhere else (MODELS,)
        near = difflib.get_close_matches(name, [*of_tables, *known], n=1)
        raise StartupError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
