"""Whatever a model writes: the same deltas for every way to cut it, no marker in what clients see, no exception, and
calls that were written come back."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.output_formats import NAMES, WRITERS, named, pieces, read

from sensorium.prompt.formats.catalogue import SYNTAXES, THINKING
from sensorium.prompt.formats.xml_calls import XmlCalls

EXAMPLES = settings(max_examples=6, deadline=None)
WAYS_TO_THINK = ["none", *THINKING]
JUNK = [
    '{"name": "get_weather", "arguments": {"city": "',
    '"}}',
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    "'",
    "(",
    ")",
    "=",
    ",",
    ":",
    ";",
    "\n",
    " ",
    "get_weather",
    "get_time",
    "get_time()",
    "[get_weather(city=",
    "True",
    "1.5e3",
    "\\u00",
    "é😀",
    "</tool_ca",
    "<|",
    "<",
    "```json\n",
    "```",
    " to=functions.get_time",
    "analysis",
    "final",
    "commentary",
]


def soup(name: str, thinking: str) -> st.SearchStrategy[str]:
    """Markers, pieces of calls and letters in any order."""
    form = named(name, thinking)
    words = st.one_of(st.sampled_from([*form.markers, *JUNK]), st.text(max_size=4))
    whole = st.sampled_from([WRITERS[name]([("get_weather", {"city": "Zü"})]), WRITERS[name]([("get_time", {})])])
    return st.lists(st.one_of(words, whole), max_size=14).map("".join)


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(data=st.data(), thinking=st.sampled_from(WAYS_TO_THINK), complete=st.booleans())
def test_the_answer_does_not_depend_on_its_pieces(
    name: str, data: st.DataObject, thinking: str, complete: bool
) -> None:
    form = named(name, thinking)
    text = data.draw(soup(name, thinking))
    tail = data.draw(st.sampled_from(["", form.reasoning_start, "<|start|>assistant"]))
    whole = read(form, text, tail=tail, complete=complete)
    assert read(form, list(text), tail=tail, complete=complete) == whole
    ends = data.draw(st.lists(st.integers(0, max(len(text), 1)), max_size=5))
    assert read(form, pieces(text, ends), tail=tail, complete=complete) == whole
    if complete:
        assert all(arguments for _, arguments in whole.calls)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)
TEXTS = st.text(max_size=20) | st.sampled_from(['"}</tool', "a\\n\"'", "]}", "null", "12"])


def arguments(strings: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "city": strings,
            "days": st.integers(-(10**9), 10**9),
            "live": st.booleans(),
            "tags": st.lists(strings, max_size=2),
            "more": st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), VALUES, max_size=2),
        },
    )


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(data=st.data())
def test_calls_that_a_model_writes_come_back(name: str, data: st.DataObject) -> None:
    """Between text, in pieces. Raw values have no way to write their own end."""
    form = named(name)
    is_raw = name in ("gemma4", "functiongemma") or isinstance(SYNTAXES.get(name), XmlCalls)
    strings = TEXTS.map(lambda text: re.sub(r"[<｜\n\r]", "", text)) if is_raw else TEXTS
    calls: list[Any] = data.draw(
        st.lists(
            st.one_of(st.tuples(st.just("get_weather"), arguments(strings)), st.just(("get_time", {}))),
            min_size=1,
            max_size=3,
        )
    )
    text = WRITERS[name](calls)
    ends = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    found = read(form, pieces(text, ends))
    assert (found.parsed, found.text) == (calls, "")


@pytest.mark.parametrize("name", sorted({*SYNTAXES} - {"llama_json", "pythonic"}))
@EXAMPLES
@given(data=st.data(), before=st.text("ab .\n", max_size=6), after=st.text("ab .\n", max_size=6))
def test_no_marker_reaches_the_client(name: str, data: st.DataObject, before: str, after: str) -> None:
    """Of text, reasoning and a call, with ends that nothing began."""
    form = named(name, "think")
    loose = st.sampled_from(["", "</think>", *SYNTAXES[name].closes])
    call = WRITERS[name]([("get_weather", {"city": "Rome"})])
    text = f"<think>{before}</think>{data.draw(loose)}{before}{call}{data.draw(loose)}{after}"
    found = read(form, text)
    assert found.parsed == [("get_weather", {"city": "Rome"})]
    assert not any(mark in found.text + found.reasoning for mark in form.markers)
    assert found.text.split() == f"{before}\n{after}".split()
    assert found.reasoning == before.strip()


@EXAMPLES
@given(soup("harmony", "none"))
def test_no_marker_of_harmony_reaches_the_client(text: str) -> None:
    found = read(named("harmony"), text)
    assert not any(mark in found.text + found.reasoning for mark in named("harmony").markers)
