"""Keyword arguments of `LLM` -> the options of `sensorium serve`: every flag by its name, other servers' included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sensorium.cli.flags import words_of
from sensorium.cli.main import read_serve
from sensorium.config import ServeOptions
from sensorium.errors import StartupError

_ONLY_HTTP = {
    "host",
    "port",
    "metrics_port",
    "metrics_host",
    "uds",
    "api_key",
    "operator_key",
    "allowed_origins",
    "root_path",
    "models_dir",
    "memory",
    "load_wait_s",
    "lazy",
    "idle_unload_s",
    "pinned",
}


def options_of(model: str | None, arguments: Mapping[str, Any]) -> ServeOptions:
    """StartupError for a name or a value that the flags do not have."""
    for name in _ONLY_HTTP & arguments.keys():
        raise StartupError(f"LLM: {name} is for a server; there is none here")
    words = ["serve", *([model] if model is not None else [])]
    for name, value in arguments.items():
        words += words_of(name, value)
    return read_serve(words, "LLM")
