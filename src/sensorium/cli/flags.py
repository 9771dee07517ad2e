"""Command-line flags made from config dataclasses: one field, one flag, and the field's metadata is the help text.

Reads no environment and knows no command; `cli/main.py` puts the pieces together. A wrong value, an unknown flag and
another server's flag that is not offered each end in one line on stderr and exit code 2; what is accepted of others
leaves a line in `notes`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from sensorium.cli.other_flags import ACCEPTED, REFUSED, Accepted, in_our_words
from sensorium.config import Replicas
from sensorium.units import LETTERS, parse_size, size_flag

Config = TypeVar("Config")

_MODALITIES = ("image", "video", "audio")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.\-]*://[^/?#@\s,]+")
_REPLICAS = re.compile(r"(\d{1,5})(?:\.\.(\d{1,5}))?")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmg])|(\d+)([KMG]?)")


def parse_bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
                f"{text!r} is not a count of image, video or audio; write image=2,video=1 or '{{\"image\": 2}}'"
            )
    return {name: int(value) for name, value in pairs}


def parse_extent(text: str) -> tuple[int, int]:
    """`448x336` -> (448, 336); `448` is a square."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and (height or width).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a width and height; write 448x336")
    return int(width), int(height or width)


def parse_origins(text: str) -> str:
    """`https://a.example`, `*`, or a JSON list of them -> as browsers write them, separated by commas."""
    try:
        listed = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
    except ValueError:
        listed = [None]
    origins = [one.strip().lower().rstrip("/") if isinstance(one, str) else "" for one in listed]
    if not origins or not all(one == "*" or _ORIGIN.fullmatch(one) for one in origins):
        raise argparse.ArgumentTypeError(f"{text!r} is not an origin; write https://chat.example, with its port if any")
    return ",".join(origins)


def parse_adapter(text: str) -> str:
    """`NAME=PATH`, or vLLM's JSON of `name` and `path` -> NAME=PATH."""
    name, _, path = text.partition("=")
    if text.lstrip().startswith("{"):
        said = parse_json(text)
        name, path = str(said.get("name") or ""), str(said.get("path") or "")
    if not name.strip() or not path.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no adapter; write NAME=PATH")
    return f"{name.strip()}={path.strip()}"


def parse_replicas(text: str) -> Replicas:
    """`2` or `1..8`."""
    match = _REPLICAS.fullmatch(text.strip())
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 <= least <= most or most < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of replicas; write 2, or 1..8")
    return Replicas(least, most)


def parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def parse_tokens(text: str) -> int:
    """`4096`, `32k` (32,000) or `32K` (32,768), as vLLM reads them."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens; write 32768, 32K (the same) or 32k (32,000)"
        )
    decimal, small, whole, large = match.groups()
    return round(float(decimal) * LETTERS[small]) if small else int(whole) * LETTERS.get(large, 1)


def parse_tokens_or_auto(text: str) -> int | None:
    """The same, or None for `auto` and -1."""
    return None if text.strip().lower() in ("auto", "-1") else parse_tokens(text)


def parse_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


_BY_NAME: dict[str, tuple[Callable[[str], Any], str]] = {
    "size": (parse_bytes, "SIZE"),
    "origins": (parse_origins, "ORIGIN"),
    "adapter": (parse_adapter, "NAME=PATH"),
    "replicas": (parse_replicas, "N..N"),
    "counts": (parse_counts, "COUNTS"),
    "json": (parse_json, "JSON"),
    "extent": (parse_extent, "WxH"),
    "tokens": (parse_tokens, "TOKENS"),
    "tokens_or_auto": (parse_tokens_or_auto, "TOKENS"),
}
_BY_TYPE: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (parse_int, "N"),
    float: (parse_float, "X"),
    bool: (str, ""),
}


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
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of choices

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
        return size_flag(self.default) if self.value == "SIZE" else str(self.default)


def flags_of(config: type) -> tuple[Flag, ...]:
    """The flags of a config dataclass: every field that has help text, in order."""
    hints = typing.get_type_hints(config)
    return tuple(_flag(field, hints[field.name]) for field in dataclasses.fields(config) if "help" in field.metadata)


def _flag(field: dataclasses.Field[Any], hint: Any) -> Flag:
    meta = field.metadata
    parse, value = _BY_NAME[meta["parse"]] if "parse" in meta else _BY_TYPE.get(_scalar(hint), (str, "TEXT"))
    synonyms: dict[str, str] = meta.get("synonyms", {})
    if synonyms:
        parse = functools.partial(_first_name, synonyms)
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return Flag(
        field=field.name,
        option="--" + field.name.replace("_", "-"),
        help=meta["help"],
        default=default,
        value=value,
        parse=_bounded(parse, meta.get("min", 0 if value in ("N", "X", "SIZE", "TOKENS") else None), meta.get("max")),
        choices=tuple(meta.get("choices", ())),
        repeat=bool(meta.get("repeat")),
        many=meta.get("nargs") == "+",
        synonyms=synonyms,
    )


def _first_name(synonyms: Mapping[str, str], text: str) -> str:
    """What a choice is called here."""
    return synonyms.get(text.lower(), text)


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
        if number is not None and ((low is not None and number < low) or (high is not None and number > high)):
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
        line = re.sub(r": ignored explicit argument (.+)", r": it is on or off (true or false), not \1", line)
        self.exit(2, f"{self.prog}: {line} (see {self.prog} --help)\n")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command line written with dashes or underscores; what is left over is an error with advice."""
        words = dashes(argv)
        found, extras = self.parse_known_args(in_our_words(words) if _has_models(words) else words)
        if extras:
            command = getattr(found, "parser", self)
            command.error(command.unknown(extras[0]))
        return found

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """-O3 is -O 3, but -n is no beginning of -ngl: argparse abbreviates flags of one dash whatever it is told."""
        return [found for found in super()._get_option_tuples(option_string) if option_string.startswith(found[1])]

    def unknown(self, text: str) -> str:
        option = text.partition("=")[0]
        if not option.startswith("-"):
            return f"unexpected argument {text!r}"
        if option in REFUSED:
            return f"{option} is another server's flag that is not offered here: {REFUSED[option]}"
        ours = [
            name
            for name, action in self._option_string_actions.items()
            if name.startswith("--") and action.help is not argparse.SUPPRESS
        ]
        near = difflib.get_close_matches(option, ours, n=1)
        return f"unknown flag {option}" + (f"; did you mean {near[0]}?" if near else "")


class _Accept(argparse.Action):
    """Another server's flag that changes nothing here: a line in `notes`, unless its value asks for something."""

    def __init__(self, option_strings: Sequence[str], dest: str, accepted: Accepted, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kwargs)
        self._accepted = accepted

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        option, accepted = option_string or self.option_strings[0], self._accepted
        if accepted.values is not None and str(values).lower() not in accepted.values:
            parser.error(f"{option} {values} is not offered here ({' or '.join(accepted.values)} is): {accepted.why}")
        note = f"{option} changes nothing here: {accepted.why}"
        namespace.notes = [*getattr(namespace, "notes", ()), note]


NO_SHORT_NAMES: Mapping[str, str] = {}
_NARGS: Mapping[str, Any] = {"switch": 0, "value": None, "values": "+", "optional": "?"}


def add_accepted(parser: argparse.ArgumentParser) -> None:
    """Flags of other servers that are taken and change nothing. Help does not show them."""
    for option, accepted in ACCEPTED.items():
        names = [option]
        if accepted.takes == "switch" and option.startswith("--") and not option.startswith("--no-"):
            names += {f"--no-{option[2:]}"} - ACCEPTED.keys()
        parser.add_argument(*names, dest="notes", action=_Accept, accepted=accepted, nargs=_NARGS[accepted.takes])


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _has_models(words: Sequence[str]) -> bool:
    """Whether the command takes serve's flags, and so those of other servers."""
    if list(words[:1]) in (["serve"], ["run-batch"]) or list(words[:2]) == ["deploy", "ray"]:
        return True
    return list(words[:1]) == ["bench"] and words[1:2] != ["serve"]


def dashes(argv: Iterable[str]) -> list[str]:
    """`--max_model_len=8` -> `--max-model-len=8`; values stay as they are."""
    result: list[str] = []
    for index, word in enumerate(items := list(argv)):
        if word == "--":
            return result + items[index:]
        name, equals, value = word.partition("=")
        result.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return result


def add_flags(
    parser: argparse.ArgumentParser, title: str, config: type, short: Mapping[str, str] = NO_SHORT_NAMES
) -> None:
    """Add a group of flags. Only flags that were given appear in the namespace, so defaults stay the dataclass's.
    `short` has a second name of some fields' flags."""
    group = parser.add_argument_group(title)
    for flag in flags_of(config):
        text = flag.help.replace("%", "%%")
        if flag.default_text and "default" not in flag.help.lower():
            text += f" (default: {flag.default_text})"
        if flag.is_switch:
            group.add_argument(
                flag.option,
                dest=flag.field,
                action=argparse.BooleanOptionalAction,
                help=text,
                default=argparse.SUPPRESS,
            )
            continue
        more: dict[str, Any] = {"action": "append"} if flag.repeat else {}
        if flag.many:
            more = {"action": "extend", "nargs": "+"}
        group.add_argument(
            *filter(None, (short.get(flag.field), flag.option)),
            dest=flag.field,
            type=flag.parse,
            choices=flag.choices or None,
            help=text,
            metavar=None if flag.choices else flag.value,
            default=argparse.SUPPRESS,
            **more,
        )


def build(config: type[Config], found: argparse.Namespace, **fixed: Any) -> Config:
    """The config that a parsed command line describes."""
    given = {flag.field: getattr(found, flag.field) for flag in flags_of(config) if hasattr(found, flag.field)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return config(**{**given, **fixed})


def words_of(name: str, value: Any) -> Iterator[str]:
    """The words of a command line that set one flag to a value as JSON, TOML or Python has it; none for an empty list.
    Flag and value are one word, so that an error about the value names the flag."""
    flag = f"--{name.replace('_', '-')}"
    match value:
        case None | [] | ():
            return
        case True:
            yield flag
        case False:
            yield f"--no-{flag.removeprefix('--')}"
        case dict():
            yield f"{flag}={json.dumps(value)}"
        case [one] | (one,):
            yield f"{flag}={one}"
        case list() | tuple():
            yield from (flag, *map(str, value))
        case _:
            yield f"{flag}={value}"
