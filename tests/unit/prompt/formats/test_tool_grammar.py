"""`tool_choice` as a grammar: what it lets pass, what it refuses, and that the scanner reads whatever it lets pass."""

from __future__ import annotations

import time

import pytest
from support.grammars import GrammarBench
from support.output_formats import NAMES, WRITERS, named, read, tool

from sensorium.prompt.formats.base import OutputFormat, ToolChoice

WEATHER = {
    "city": {"type": "string"},
    "days": {"type": "integer", "minimum": 1, "maximum": 16},
    "unit": {"enum": ["C", "F"]},
    "live": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    "more": {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "names": {"type": "array", "items": {"type": "string"}}},
        "required": ["ok"],
        "additionalProperties": False,
    },
    "near": {"$ref": "#/$defs/Place"},
}
SCHEMA = {
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
}
TOOLS = [
    tool("get_weather", WEATHER, schema=SCHEMA, strict=True),
    tool("get_time", schema={"additionalProperties": False}),
    {"type": "function", "function": {"name": "search"}},
]
ROME = {
    "city": "Rome",
    "days": 3,
    "unit": "C",
    "live": True,
    "more": {"ok": True, "names": ["a", "b"]},
    "near": {"x": 1},
}
REQUIRED = ToolChoice("required")


def written(form: OutputFormat, choice: ToolChoice, *, parallel: bool = True, reasoning: bool = False) -> str:
    found = form.tool_grammar(TOOLS, choice, parallel=parallel, reasoning=reasoning)
    assert found is not None
    return found


def bench_of(name: str, *, special: bool) -> tuple[GrammarBench, OutputFormat]:
    """A vocabulary that has the format's markers as tokens, or spells them."""
    is_token = special or name == "harmony"
    markers = [mark for mark in named(name, "think").markers if mark[0] in "<[" and mark[-1] in ">]"]
    bench = GrammarBench(markers if is_token else ())
    return bench, named(name, "harmony" if name == "harmony" else "think", bench.tokens)


BOTH = pytest.mark.parametrize(
    ("name", "special"),
    [(name, special) for name in NAMES for special in (False, True) if special or name != "harmony"],
)


@BOTH
def test_required_lets_calls_pass_as_models_write_them(name: str, special: bool) -> None:
    bench, form = bench_of(name, special=special)
    grammar = written(form, REQUIRED)
    end = "<|call|>" if name == "harmony" else ""
    for calls in ([("get_weather", ROME)], [("get_weather", {"city": "", "unit": "F"})], [("get_time", {})]):
        assert bench.accepts(grammar, WRITERS[name](calls) + end), calls
    if name != "harmony":
        assert bench.accepts(grammar, WRITERS[name]([("get_time", {}), ("get_weather", ROME)]))


@BOTH
def test_required_refuses_anything_else(name: str, special: bool) -> None:
    bench, form = bench_of(name, special=special)
    grammar = written(form, REQUIRED)
    assert not bench.allows(grammar, "It is sunny.")
    for calls in (
        [("get_whether", {})],
        [("get_weather", {"city": "Rome", "unit": "K"})],
        [("get_weather", {"unit": "C"})],
        [("get_weather", {"city": "Rome", "days": 99, "unit": "C"})],
        [("get_weather", {"city": "Rome", "unit": "C", "other": 1})],
        [("get_time", {"zone": "CET"})],
    ):
        assert not bench.accepts(grammar, WRITERS[name](calls) + "<|call|>" * (name == "harmony")), calls


@BOTH
def test_named_is_one_call_of_this_tool(name: str, special: bool) -> None:
    bench, form = bench_of(name, special=special)
    grammar = written(form, ToolChoice("named", ("get_weather",)))
    end = "<|call|>" if name == "harmony" else ""
    one = ("get_weather", {"city": "Rome", "unit": "C"})
    assert bench.accepts(grammar, WRITERS[name]([one]) + end)
    assert not bench.accepts(grammar, WRITERS[name]([("get_time", {})]) + end)
    assert not bench.accepts(grammar, WRITERS[name]([one, one]) + end)
    several = written(form, REQUIRED, parallel=False)
    assert bench.accepts(several, WRITERS[name]([one]) + end)
    assert not bench.accepts(several, WRITERS[name]([one, one]) + end)


@BOTH
def test_auto_holds_calls_to_strict_tools_and_leaves_text_free(name: str, special: bool) -> None:
    bench, form = bench_of(name, special=special)
    grammar = form.tool_grammar(TOOLS, ToolChoice("auto"), parallel=True, reasoning=False)
    if name in ("llama_json", "pythonic"):
        assert grammar is None  # nothing tells a call from text
        return
    assert grammar is not None
    text = 'It is sunny: {"a": 1}.\n'
    final = "<|channel|>final<|message|>" if name == "harmony" else ""
    end = "<|call|>" if name == "harmony" else ""
    assert bench.accepts(grammar, final + text)
    call = WRITERS[name]([("get_weather", {"city": "Rome", "unit": "C"})]) + end
    assert bench.accepts(grammar, call if name == "harmony" else f"{text}{call} So.")
    assert not bench.accepts(grammar, WRITERS[name]([("get_weather", {"city": "Rome", "unit": "K"})]) + end)
    assert not bench.accepts(grammar, WRITERS[name]([("get_whether", {})]) + end)
    assert bench.accepts(grammar, WRITERS[name]([("search", {"any": "thing"})]) + end)


@BOTH
def test_what_a_grammar_lets_pass_is_read_back(name: str, special: bool) -> None:
    bench, form = bench_of(name, special=special)
    grammar = written(form, REQUIRED)
    for seed in range(2):
        text = bench.sampled(grammar, seed)
        if text is None:
            continue
        found = read(form, text, tools=TOOLS)
        assert found.calls, text
        for called, arguments in found.parsed:
            assert called in ("get_weather", "get_time", "search"), text
            assert isinstance(arguments, dict)
            if called == "get_weather":
                assert isinstance(arguments["city"], str)
                assert arguments["unit"] in ("C", "F")
                assert set(arguments) <= set(WEATHER)
                assert type(arguments.get("days", 1)) is int


def test_auto_is_free_where_no_tool_is_strict() -> None:
    lax = [tool("f"), tool("g")]
    form = named("hermes")
    assert form.tool_grammar(lax, ToolChoice("auto"), parallel=True, reasoning=False) is None
    assert form.tool_grammar(lax, ToolChoice("none"), parallel=True, reasoning=False) is None
    only = form.tool_grammar(lax, ToolChoice("auto", ("f",)), parallel=True, reasoning=False)
    bench = GrammarBench()
    assert only is not None
    assert bench.accepts(only, WRITERS["hermes"]([("f", {"a": 1})]))
    assert not bench.accepts(only, WRITERS["hermes"]([("g", {})]))


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_may_stand_in_front(special: bool) -> None:
    bench, form = bench_of("hermes", special=special)
    call = WRITERS["hermes"]([("get_time", {})])
    grammar = written(form, REQUIRED, reasoning=True)
    for text in (f"<think>\nA?\n</think>\n\n{call}", f"A?</think>{call}", call):
        assert bench.accepts(grammar, text), text
    assert not bench.accepts(grammar, f"<think>A?</think>B.{call}")
    assert not bench.accepts(written(form, REQUIRED), f"<think>A?</think>{call}")


def test_harmony_may_think_and_speak_before_it_calls() -> None:
    bench, form = bench_of("harmony", special=True)
    call = WRITERS["harmony"]([("get_time", {})]) + "<|call|>"
    before = "<|channel|>analysis<|message|>A?<|end|><|start|>assistant"
    assert bench.accepts(written(form, REQUIRED), before + call)
    assert not bench.accepts(written(form, REQUIRED), before + "<|channel|>final<|message|>B.")
    assert bench.accepts(written(form, ToolChoice("auto")), before + "<|channel|>final<|message|>B.")


def test_raw_values_cannot_write_tags() -> None:
    bench, form = bench_of("qwen_xml", special=False)
    grammar = written(form, ToolChoice("named", ("get_weather",)))
    start = "<tool_call>\n<function=get_weather>\n<parameter=city>\n"
    assert bench.allows(grammar, start + "a <b> </function \n")
    assert not bench.allows(grammar, start + "a</function>")
    assert not bench.allows(grammar, start + "a<parameter=x>")


@pytest.mark.parametrize("name", NAMES)
def test_schemas_that_refer_to_themselves_have_bounded_grammars(name: str) -> None:
    node = {"type": "object", "properties": {f"k{one}": {"$ref": "#/$defs/N"} for one in range(12)}}
    unions = {"anyOf": [{"$ref": "#/$defs/U"}] * 40}
    hostile = tool(
        "f", {"a": {"$ref": "#/$defs/N"}, "b": {"$ref": "#/$defs/U"}}, schema={"$defs": {"N": node, "U": unions}}
    )
    begin = time.process_time()
    grammar = named(name).tool_grammar([hostile], REQUIRED, parallel=True, reasoning=False)
    assert grammar is not None
    assert len(grammar) < 300_000
    assert time.process_time() - begin < 5
