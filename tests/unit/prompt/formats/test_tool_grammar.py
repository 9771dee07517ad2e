"""`tool_choice` as a grammar: what it lets pass, what it refuses, and that the scanner reads whatever it lets pass."""

from __future__ import annotations

import time
from typing import Any, Literal

import pytest
from support.grammars import GrammarBench
from support.output_formats import NAMES, WRITERS, named, read, tool

from sensorium.errors import RequestError
from sensorium.prompt.formats.base import OutputFormat, Thinking, ToolChoice
from sensorium.types import Grammar

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


def written(form: OutputFormat, choice: ToolChoice, *, parallel: bool = True, thinking: Thinking = "off") -> str:
    found = form.tool_grammar(TOOLS, choice, parallel=parallel, thinking=thinking)
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
    right: list[list[tuple[str, Any]]] = [
        [("get_weather", ROME)],
        [("get_weather", {"city": "", "unit": "F"})],
        [("get_time", {})],
    ]
    for calls in right:
        assert bench.accepts(grammar, WRITERS[name](calls) + end), calls
    if name != "harmony":
        assert bench.accepts(grammar, WRITERS[name]([("get_time", {}), ("get_weather", ROME)]))


@BOTH
def test_required_refuses_anything_else(name: str, special: bool) -> None:
    bench, form = bench_of(name, special=special)
    grammar = written(form, REQUIRED)
    assert not bench.allows(grammar, "It is sunny.")
    wrong: list[list[tuple[str, Any]]] = [
        [("get_whether", {})],
        [("get_weather", {"city": "Rome", "unit": "K"})],
        [("get_weather", {"unit": "C"})],
        [("get_weather", {"city": "Rome", "days": 99, "unit": "C"})],
        [("get_weather", {"city": "Rome", "unit": "C", "other": 1})],
        [("get_time", {"zone": "CET"})],
    ]
    for calls in wrong:
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
    grammar = form.tool_grammar(TOOLS, ToolChoice("auto"))
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
    text = bench.sampled(grammar, seed=1)
    if text is None:
        return
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
    assert form.tool_grammar(lax, ToolChoice("auto")) is None
    assert form.tool_grammar(lax, ToolChoice("none")) is None
    only = form.tool_grammar(lax, ToolChoice("auto", ("f",)))
    bench = GrammarBench()
    assert only is not None
    assert bench.accepts(only, WRITERS["hermes"]([("f", {"a": 1})]))
    assert not bench.accepts(only, WRITERS["hermes"]([("g", {})]))


@BOTH
def test_auto_holds_every_call_where_the_checkpoint_wishes_so(name: str, special: bool) -> None:
    """Arguments of tools that are not strict too."""
    bench, form = bench_of(name, special=special)
    lax = [tool("f", {"n": {"type": "integer"}}), tool("g")]
    grammar = form.tool_grammar(lax, ToolChoice("auto"), held=True)
    if name in ("llama_json", "pythonic"):
        assert grammar is None
        return
    assert grammar is not None
    end = "<|call|>" if name == "harmony" else ""
    for call, fits in ((("f", {"n": 3}), True), (("f", {"n": "a"}), False), (("h", {}), False)):
        assert bench.accepts(grammar, WRITERS[name]([call]) + end) is fits, call
    assert bench.accepts(grammar, ("<|channel|>final<|message|>" if name == "harmony" else "") + "Hello.")


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_stands_in_front_of_calls(special: bool) -> None:
    bench, form = bench_of("hermes", special=special)
    call = WRITERS["hermes"]([("get_time", {})])
    may = written(form, REQUIRED, thinking="may")
    for text in (f"<think>\nA?\n</think>\n\n{call}", call):
        assert bench.accepts(may, text), text
    assert not bench.accepts(may, f"<think>A?</think>B.{call}")
    assert not bench.accepts(may, f"A?</think>{call}")
    opened = written(form, REQUIRED, thinking="open")
    assert bench.accepts(opened, f"A?</think>{call}")
    assert not bench.accepts(opened, call)
    assert not bench.accepts(written(form, REQUIRED), f"<think>A?</think>{call}")
    cases: list[tuple[Literal["may", "open"], str]] = [("may", "<think>"), ("open", "")]
    for thinking, before in cases:
        auto = written(form, ToolChoice("auto"), thinking=thinking)
        assert bench.accepts(auto, f"{before}A?</think>B.\n{call}")
        assert not bench.accepts(auto, f"{before}A.")
    assert bench.accepts(written(form, ToolChoice("auto"), thinking="may"), "B.")


def test_reasoning_stands_in_front_of_calls_without_a_marker() -> None:
    bench, form = bench_of("llama_json", special=False)
    call = WRITERS["llama_json"]([("get_time", {})])
    assert bench.accepts(written(form, REQUIRED, thinking="may"), f"<think>A?</think>{call}")
    assert bench.accepts(written(form, REQUIRED, thinking="may"), call)
    assert bench.accepts(written(form, REQUIRED, thinking="open"), f"A?</think>{call}")


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
    grammar = named(name).tool_grammar([hostile], REQUIRED)
    assert grammar is not None
    assert len(grammar) < 300_000
    assert time.process_time() - begin < 5


DIGITS = Grammar("lark", "start: /[0-9]{1,3}/")
NUMBER = Grammar("json", '{"type": "integer", "minimum": 0, "maximum": 99}')


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form_grammar", [DIGITS, NUMBER])
def test_reasoning_stands_before_a_form(special: bool, form_grammar: Grammar) -> None:
    """Where the prompt opened it, where the model may choose, and not where it was closed."""
    bench, form = bench_of("hermes", special=special)
    may = form.form_grammar(form_grammar, "<|im_start|>assistant\n").source
    assert bench.accepts(may, "<think>\nSo 7.\n</think>\n\n42")
    assert bench.accepts(may, "42")
    assert not bench.accepts(may, "<think>So.</think>x")
    opened = form.form_grammar(form_grammar, "<think>\n").source
    assert bench.accepts(opened, "So 7.\n</think>42")
    assert not bench.accepts(opened, "So 7.")
    assert form.form_grammar(form_grammar, "<think></think>") is form_grammar


def test_a_form_in_harmony_is_the_final_message() -> None:
    bench, form = bench_of("harmony", special=True)
    grammar = form.form_grammar(NUMBER, "<|start|>assistant").source
    assert bench.accepts(grammar, "<|channel|>final<|message|>42")
    assert bench.accepts(
        grammar, "<|channel|>analysis<|message|>So 7.<|end|><|start|>assistant<|channel|>final<|message|>42"
    )
    assert not bench.allows(grammar, "<|channel|>final<|message|>x")
    assert not bench.allows(grammar, "42")


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_ends_with_its_budget(special: bool) -> None:
    bench, form = bench_of("hermes", special=special)
    opened = form.budget_grammar("<think>\n", 3)
    assert opened is not None
    for text in ("</think>A.", "abc</think>A<tool_call>b</tool_call>", "a</think>"):
        assert bench.accepts(opened, text), text
    assert not bench.allows(opened, "abcd")
    may = form.budget_grammar("", 3)
    assert may is not None
    for text in ("<think>abc</think>A.", "A longer answer."):
        assert bench.accepts(may, text), text
    assert not bench.allows(may, "<think>abcd")
    none = form.budget_grammar("<think>\n", 0)
    assert none is not None
    assert bench.accepts(none, "</think>A.")
    assert not bench.allows(none, "a")
    assert form.budget_grammar("<think></think>", 3) is None
    assert named("hermes").budget_grammar("", 3) is None
    call = WRITERS["hermes"]([("get_time", {})])
    held = form.tool_grammar(TOOLS, REQUIRED, thinking="may", budget=3)
    assert held is not None
    assert bench.accepts(held, f"<think>abc</think>{call}")
    assert not bench.allows(held, "<think>abcd")
    of_form = form.form_grammar(DIGITS, "<think>", budget=3).source
    assert bench.accepts(of_form, "abc</think>12")
    assert not bench.allows(of_form, "abcd")


def test_a_strict_tool_that_no_grammar_can_hold_is_refused_by_place() -> None:
    odd = {"a": {"type": "string"}, "b": {"not": {"type": "string"}}}
    with pytest.raises(RequestError, match=r"'f'.*parameters\.properties\.b.*not") as refused:
        named("hermes").tool_grammar([tool("f", odd, strict=True)], REQUIRED)
    assert (refused.value.param, refused.value.code) == ("tools", "invalid_json_schema")
    lax = named("hermes").tool_grammar([tool("f", odd)], REQUIRED)
    assert lax is not None
    assert GrammarBench().accepts(lax, WRITERS["hermes"]([("f", {"any": 1})]))


def test_formats_of_strings_that_are_not_known_do_not_count() -> None:
    grammar = written(named("hermes"), REQUIRED)
    assert grammar
    phone = tool("f", {"a": {"type": "string", "format": "phone", "title": "A"}}, strict=True)
    held = named("hermes").tool_grammar([phone], REQUIRED)
    assert held is not None
    assert GrammarBench().accepts(held, WRITERS["hermes"]([("f", {"a": "1"})]))
