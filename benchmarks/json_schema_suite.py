"""What answers held to a schema may be, by the official test suite: `python benchmarks/json_schema_suite.py FOLDER`.

FOLDER is a checkout of JSON-Schema-Test-Suite. Every schema of the drafts is compiled as a request's would be, or is
refused by name; every instance is then written as an answer. One that is not valid and would be allowed is wrong, and
ends this with status 1; a valid one that is not allowed is a form that is held to more than was asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llguidance import LLMatcher

from sensorium.prompt.forms import Form
from sensorium.prompt.grammar_check import LIMITS, FormRefused, Names, byte_tokenizer, checked

DRAFTS = ("draft4", "draft6", "draft7", "draft2019-09", "draft2020-12")


def groups(folder: Path, drafts: list[str]) -> Iterator[tuple[str, Any]]:
    """(file, schema with its tests)"""
    for draft in drafts:
        for file in sorted((folder / "tests" / draft).glob("*.json")):
            for group in json.loads(file.read_bytes()):
                yield f"{draft}/{file.name}", group


def grammar_of(schema: Any) -> str:
    """FormRefused if answers cannot be held to it."""
    if isinstance(schema, dict):
        schema = {key: value for key, value in schema.items() if key != "$schema"}  # names other dialects
    _, source = checked(Form("json", json.dumps(schema), ""), Names())
    return f'{{"grammars": [{{"json_schema": {source}}}]}}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTS))
    found = parser.parse_args()
    counts, reasons, wrong = Counter[str](), Counter[str](), list[str]()
    tokenizer = byte_tokenizer(Names())
    for file, group in groups(found.folder, found.drafts):
        try:
            grammar = grammar_of(group["schema"])
        except FormRefused as refused:
            counts["schemas refused"] += 1
            reasons[refused.reason] += 1
            continue
        counts["schemas held to"] += 1
        for test in group["tests"]:
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
            text = json.dumps(test["data"], ensure_ascii=False).encode()
            is_allowed = matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()
            counts[f"{'valid' if test['valid'] else 'invalid'} and {'' if is_allowed else 'not '}allowed"] += 1
            if is_allowed and not test["valid"]:
                wrong.append(f"{file}: {group['description']}: {test['description']}")
    for name, count in (*sorted(counts.items()), *reasons.most_common()):
        print(f"{count:6} {name}")
    sys.exit("\n".join(["wrong:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
