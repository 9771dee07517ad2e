"""Command-line flags made from config dataclasses: one field, one flag, and the field's metadata is the help text.

Reads no environment and knows no command; `cli.py` puts the pieces together. A wrong value, an unknown flag and a
vLLM flag that is not offered each end in one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")

_UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4,
          "kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")
_MODALITIES = ("image", "video", "audio")

# Flags of vLLM that people bring along. Known by name so that the answer says what to do, not just "unknown".
FOREIGN_FLAGS = {
    "--model": "give the model as the first argument: sensorium serve MODEL",
    "--tensor-parallel-size": "models are not split over devices; leave it out",
    "--pipeline-parallel-size": "models are not split over devices; leave it out",
    "--data-parallel-size": "start several servers behind a proxy instead",
    "--enforce-eager": "nothing is compiled at start; leave it out",
    "--compilation-config": "nothing is compiled at start; leave it out",
    "--skip-mm-profiling": "no dummy media are ever run; leave it out",
    "--swap-space": "preempted requests are computed again, not swapped; leave it out",
    "--kv-cache-memory-bytes": "it is called --kv-cache-memory",
    "--load-format": "safetensors and pytorch_model.bin are told apart by name; leave it out",
    "--tokenizer": "the checkpoint's own tokenizer is used; leave it out",
    "--tokenizer-mode": "the checkpoint's own tokenizer is used; leave it out",
    "--enable-auto-tool-choice": "tool calls are not offered yet",
    "--tool-call-parser": "tool calls are not offered yet",
    "--reasoning-parser": "reasoning output is not offered yet",
    "--enable-lora": "LoRA adapters are not offered yet",
    "--lora-modules": "LoRA adapters are not offered yet",
    "--speculative-config": "speculative decoding is not offered",
    "--enable-chunked-prefill": "prefill is always chunked; leave it out",
    "--no-enable-chunked-prefill": "prefill is always chunked; set --max-num-batched-tokens instead",
    "--trust-request-mm-kwargs": "it is called --allow-request-mm-kwargs",
    "--uvicorn-log-level": "leave it out; --disable-log-requests quietens the log",
    "--ssl-keyfile": "put a reverse proxy in front for TLS",
    "--ssl-certfile": "put a reverse proxy in front for TLS",
}


def parse_size(text: str) -> int:
    """`256MiB`, `4GB` or plain bytes -> bytes."""
    match = _SIZE.fullmatch(text.strip())
    scale = _UNITS.get(match.group(2).lower() or "b") if match else None
    if match is None or scale is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 256MiB, 4GB or a number of bytes")
    return int(float(match.group(1)) * scale)


def parse_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON; write something like '{{\"name\": 1}}'") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object; write something like '{{\"name\": 1}}'")
    return value


def parse_counts(text: str) -> dict[str, int]:
    """`image=2,video=1` or `{"image": 2}` -> {"image": 2, ...}."""
    if text.lstrip().startswith("{"):
        pairs = [(name, json.dumps(value)) for name, value in parse_json(text).items()]
    else:
        pairs = [(name.strip(), value.strip()) for name, _, value in (part.partition("=") for part in text.split(","))]
    for name, value in pairs:
        if name not in _MODALITIES or not value.isdecimal():
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a count of image, video or audio; write image=2,video=1 or '{{\"image\": 2}}'")
    return {name: int(value) for name, value in pairs}


def parse_extent(text: str) -> tuple[int, int]:
    """`448x336` -> (448, 336); `448` is a square."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and (height or width).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a width and height; write 448x336")
    return int(width), int(height or width)


def parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def parse_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


_BY_NAME: dict[str, tuple[Callable[[str], Any], str]] = {
    "size": (parse_size, "SIZE"), "counts": (parse_counts, "COUNTS"), "json": (parse_json, "JSON"),
    "extent": (parse_extent, "WxH")}
_BY_TYPE: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (parse_int, "N"), float: (parse_float, "X"), bool: (str, "")}


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag, as the parser and the generated documentation see it."""

    field: str
    option: str  # --with-dashes
    help: str
    default: Any
    value: str  # SIZE, N, TEXT, …; empty for switches
    parse: Callable[[str], Any]
    choices: tuple[str, ...] = ()
    repeat: bool = False  # may be given several times, one value each
    many: bool = False  # takes several values

    @property
    def is_switch(self) -> bool:
        return not self.value

    @property
    def default_text(self) -> str:
        """The default as a user would write it; empty where there is none."""
        if self.default is None or self.default in ((), {}, ""):
            return ""
        if self.is_switch:
            return "on" if self.default else "off"
        if isinstance(self.default, tuple):
            return "x".join(map(str, self.default))
        return size_text(self.default) if self.value == "SIZE" else str(self.default)


def size_text(size_bytes: int) -> str:
    """1048576 -> 1MiB: exact, in the largest binary unit that divides it."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size_bytes and size_bytes % 1024**power == 0:
            return f"{size_bytes // 1024**power}{unit}"
    return str(size_bytes)


def flags_of(config: type) -> tuple[Flag, ...]:
    """The flags of a config dataclass: every field that has help text, in order."""
    hints = typing.get_type_hints(config)
    return tuple(_flag(field, hints[field.name]) for field in dataclasses.fields(config) if "help" in field.metadata)


def _flag(field: dataclasses.Field[Any], hint: Any) -> Flag:
    meta = field.metadata
    parse, value = _BY_NAME[meta["parse"]] if "parse" in meta else _BY_TYPE.get(_scalar(hint), (str, "TEXT"))
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return Flag(
        field=field.name, option="--" + field.name.replace("_", "-"), help=meta["help"], default=default, value=value,
        parse=_bounded(parse, meta.get("min", 0 if value in ("N", "X", "SIZE") else None), meta.get("max")),
        choices=tuple(meta.get("choices", ())), repeat=bool(meta.get("repeat")), many=meta.get("nargs") == "+")


def _scalar(hint: Any) -> type:
    """`int | None` -> int, `tuple[str, ...]` -> str, `dict[...]` -> dict."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    origin = typing.get_origin(hint) or hint
    return origin if isinstance(origin, type) else str


def _bounded(parse: Callable[[str], Any], low: float | None, high: float | None) -> Callable[[str], Any]:
    if low is None and high is None:
        return parse

    def checked(text: str) -> Any:
        number = parse(text)
        if (low is not None and number < low) or (high is not None and number > high):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {span}")
        return number

    return checked


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and, for an unknown flag, the nearest known one."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        line = re.sub(r"^argument (\S+?)(?:/\S+)?: ", r"\1: ", message)
        self.exit(2, f"{self.prog}: {line} (see {self.prog} --help)\n")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command line written with dashes or underscores; what is left over is an error with advice."""
        found, extras = self.parse_known_args(dashes(argv))
        if extras:
            command = getattr(found, "parser", self)
            command.error(command.unknown(extras[0]))
        return found

    def unknown(self, text: str) -> str:
        option = text.partition("=")[0]
        if not option.startswith("-"):
            return f"unexpected argument {text!r}"
        if option in FOREIGN_FLAGS:
            return f"{option} is a vLLM flag that is not offered here: {FOREIGN_FLAGS[option]}"
        near = difflib.get_close_matches(option, [o for o in self._option_string_actions if o.startswith("--")], n=1)
        return f"unknown flag {option}" + (f"; did you mean {near[0]}?" if near else "")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def dashes(argv: Iterable[str]) -> list[str]:
    """`--max_model_len=8` -> `--max-model-len=8`; values stay as they are."""
    result: list[str] = []
    for index, word in enumerate(items := list(argv)):
        if word == "--":
            return result + items[index:]
        name, equals, value = word.partition("=")
        result.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return result


def add_flags(parser: argparse.ArgumentParser, title: str, config: type) -> None:
    """Add a group of flags. Only flags that were given appear in the namespace, so defaults stay the dataclass's."""
    group = parser.add_argument_group(title)
    for flag in flags_of(config):
        text = flag.help.replace("%", "%%")
        if flag.default_text and "default" not in flag.help.lower():
            text += f" (default: {flag.default_text})"
        if flag.is_switch:
            group.add_argument(flag.option, dest=flag.field, action=argparse.BooleanOptionalAction, help=text,
                               default=argparse.SUPPRESS)
            continue
        more: dict[str, Any] = {"action": "append"} if flag.repeat else {}
        if flag.many:
            more = {"action": "extend", "nargs": "+"}
        group.add_argument(flag.option, dest=flag.field, type=flag.parse, choices=flag.choices or None, help=text,
                           metavar=None if flag.choices else flag.value, default=argparse.SUPPRESS, **more)


def build(config: type[Config], found: argparse.Namespace, **fixed: Any) -> Config:
    """The config that a parsed command line describes."""
    given = {flag.field: getattr(found, flag.field) for flag in flags_of(config) if hasattr(found, flag.field)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return config(**{**given, **fixed})
