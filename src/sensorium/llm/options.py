"""Keyword arguments of `LLM` -> the options of `sensorium serve`: every flag by its name, other servers' included."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from typing import Any

from sensorium.cli.main import parser, serve_options
from sensorium.config import ServeOptions
from sensorium.errors import StartupError

_ONLY_HTTP = {"host", "port", "uds", "api_key", "allowed_origins", "root_path"}


def options_of(model: str | None, arguments: Mapping[str, Any]) -> ServeOptions:
    """StartupError for a name or a value that the flags do not have."""
    for name in _ONLY_HTTP & arguments.keys():
        raise StartupError(f"LLM: {name} is for a server; there is none here")
    words = ["serve", *([model] if model is not None else [])]
    for name, value in arguments.items():
        words += _words(name, value)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return serve_options(parser().read(words), {})
    except SystemExit:
        line = said.getvalue().strip().removeprefix("sensorium serve: ").partition(" (see ")[0]
        raise StartupError(f"LLM: {line}") from None


def _words(name: str, value: Any) -> Iterator[str]:
    flag = f"--{name.replace('_', '-')}"
    match value:
        case None:
            return
        case True:
            yield flag
        case False:
            yield f"--no-{flag.removeprefix('--')}"
        case dict():
            yield from (flag, json.dumps(value))
        case list() | tuple():
            yield from (flag, *map(str, value))
        case _:
            yield from (flag, str(value))
