"""Write the parts of the documentation that would rot: the tables of flags and of models, the page of models.

    python tools/generate_docs.py [--check]

Tables stand between `<!-- begin NAME -->` and `<!-- end NAME -->`; what is between is never edited by hand. With
--check nothing is written and the exit code is 1 when a table is not current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from model_page import section

from sensorium.api.routes import ROUTES
from sensorium.checkpoint.families import FAMILIES, Family
from sensorium.cli.flags import Flag, flags_of
from sensorium.cli.main import SERVE_GROUPS
from sensorium.cli.other_flags import ACCEPTED, REFUSED, RENAMED
from sensorium.config import (
    BatchConfig,
    BenchConfig,
    ChatConfig,
    DeployConfig,
    ListConfig,
    ModelBenchConfig,
    PsConfig,
    PullConfig,
    StatusConfig,
    StopConfig,
)

ROOT = Path(__file__).parents[1]
ENDPOINTS = {
    "generate": ("/v1/chat/completions", "/v1/completions"),
    "transcribe": ("/v1/audio/transcriptions", "/v1/audio/translations"),
    "embed": ("/v1/embeddings",),
    "token_embed": ("/pooling", "/score", "/rerank"),
    "classify": ("/classify",),
    "token_classify": ("/pooling",),
    "reward": ("/pooling",),
    "score": ("/score", "/rerank"),
}


def flag_table(config: type) -> str:
    rows = ["| flag | value | default | what it does |", "|---|---|---|---|"]
    for flag in flags_of(config):
        rows.append(f"| `{written(flag)}` | {value(flag)} | {default(flag)} | {cell(flag.help)} |")
    return "\n".join(rows)


def written(flag: Flag) -> str:
    return f"{flag.option}` / `--no-{flag.option[2:]}" if flag.is_switch else flag.option


def value(flag: Flag) -> str:
    if flag.choices:
        return code(flag.choices)
    text = f"`{flag.value}`" if flag.value else ""
    return text + (" …" if flag.many else ", repeatable" if flag.repeat else "")


def default(flag: Flag) -> str:
    return f"`{flag.default_text}`" if flag.default_text else ""


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def all_flags() -> str:
    groups: list[tuple[str, type]] = [(f"serve: {title.lower()}", config) for title, config in SERVE_GROUPS]
    groups += [
        ("run-batch", BatchConfig),
        ("deploy ray", DeployConfig),
        ("status", StatusConfig),
        ("bench serve", BenchConfig),
        ("bench throughput, latency, startup", ModelBenchConfig),
        ("chat", ChatConfig),
        ("list", ListConfig),
        ("pull", PullConfig),
        ("ps", PsConfig),
        ("stop", StopConfig),
    ]
    return "\n\n".join([*(f"## {title}\n\n{flag_table(config)}" for title, config in groups), others()])


def others() -> str:
    """What becomes of other servers' flags, those of one reason on one line."""
    rows = ["## Flags of other servers", "", "| flag | what it is here |", "|---|---|"]
    told = {name: f"`{' '.join(ours)}`" for name, ours in RENAMED.items()}
    told |= {
        name: "accepted" + (f" with {code(flag.values)}" if flag.values else "") + f": {flag.why}"
        for name, flag in ACCEPTED.items()
    }
    told |= {name: f"refused: {why}" for name, why in REFUSED.items()}
    for meaning in dict.fromkeys(told.values()):
        rows.append(f"| {code(name for name, what in told.items() if what == meaning)} | {cell(meaning)} |")
    return "\n".join(rows)


def model_table() -> str:
    """One row per title that something can be asked of; a family may be written by several architecture names."""
    rows = ["| model | `architectures` | takes | answers at |", "|---|---|---|---|"]
    for title, names in titles().items():
        family = FAMILIES[names[0]]
        if answers := code(endpoints(family)):
            rows.append(f"| {title} | {code(names)} | {', '.join(('text', *family.modalities))} | {answers} |")
    return "\n".join(rows)


def model_page() -> str:
    """Of every row what it takes, its memory and its flags."""
    return "\n\n".join(section(title, names, endpoints(FAMILIES[names[0]])) for title, names in titles().items())


def titles() -> dict[str, list[str]]:
    """The registry's titles, and the architectures that have each."""
    found: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        found.setdefault(family.title, []).append(name)
    return found


def endpoints(family: Family) -> list[str]:
    """Where a family's tasks are answered, as far as the server has the route."""
    served = {route.path for route in ROUTES}
    return [path for task in family.tasks for path in ENDPOINTS[task] if path in served]


def code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "flags": ("docs/flags.md", all_flags),
    "models": ("README.md", model_table),
    "shapes": ("docs/models.md", model_page),
}


def generate() -> dict[Path, str]:
    """Every file with generated parts, and what it should contain."""
    contents: dict[Path, str] = {}
    for name, (file, table) in TABLES.items():
        path = ROOT / file
        text = contents.get(path) or path.read_text()
        pieces = re.split(rf"<!-- begin {name} -->.*?<!-- end {name} -->", text, flags=re.DOTALL)
        if len(pieces) != 2:
            raise SystemExit(f"{file} needs one pair of markers for {name}")
        before, after = pieces
        contents[path] = f"{before}<!-- begin {name} -->\n\n{table()}\n\n<!-- end {name} -->{after}"
    return contents


def main(*, check: bool) -> int:
    stale = {path: text for path, text in generate().items() if path.read_text() != text}
    for path, text in stale.items():
        if check:
            print(f"{path.relative_to(ROOT)} is not current: run `make docs`")
        else:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
