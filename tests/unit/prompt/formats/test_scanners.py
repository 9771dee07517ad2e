"""What each format's scanner makes of an answer: calls, reasoning and text, and what models do wrong."""

from __future__ import annotations

import json
import time

import pytest
from support.output_formats import NAMES, TOOLS, WRITERS, Read, named, read, tool

CALLS = [("get_weather", {"city": "Zürich", "days": 3}), ("get_time", {})]
MARKED = [name for name in NAMES if name not in ("llama_json", "pythonic", "harmony")]


@pytest.mark.parametrize("name", NAMES)
def test_reads_calls_as_the_family_writes_them(name: str) -> None:
    found = read(named(name), WRITERS[name](CALLS))
    assert found.parsed == CALLS
    assert (found.text, found.reasoning) == ("", "")


@pytest.mark.parametrize("name", MARKED)
def test_text_around_calls_is_content_without_the_space_before_the_marker(name: str) -> None:
    found = read(named(name), f"I will look.\n\n{WRITERS[name](CALLS[:1])}\nDone.")
    assert found.parsed == CALLS[:1]
    assert found.text == "I will look.\nDone."


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_stays_as_it_is(name: str) -> None:
    text = '  In JSON {"a": [1, 2]} and <b>tags</b>, [x](y) or f(a=1).\n  functools is a module. \n'
    found = read(named(name), text)
    assert (found.text.strip(), found.calls) == (text.strip(), [])
    if name != "harmony":
        assert found.text == text


@pytest.mark.parametrize("name", NAMES)
def test_without_tools_nothing_is_a_call(name: str) -> None:
    if name == "harmony":
        assert read(named(name), WRITERS[name](CALLS), tools=()).calls == []
    else:
        text = WRITERS[name](CALLS)
        assert read(named(name), text, tools=()) == Read(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_marker_is_all_that_text_waits_for(name: str) -> None:
    """Text is held back while it may be the beginning of a marker, and no longer."""
    form = named(name, "think")
    text = "Look: a < b, <tool, [TOOL, <|to and func. It goes on for a while without a call, {as: said}."
    longest = max(map(len, form.markers))
    scanner = form.scanner("", TOOLS)
    sent = 0
    for at, letter in enumerate(text, 1):
        sent += sum(len(delta.text) for delta in scanner.push(letter))  # type: ignore[union-attr, misc]
        assert at - sent <= longest


@pytest.mark.parametrize("name", NAMES)
def test_arguments_come_while_they_are_written(name: str) -> None:
    """Of a long string argument everything is there but for what may be the beginning of its end."""
    whole = WRITERS[name]([("get_weather", {"city": "x" * 400})])
    cut = whole[: whole.index("x" * 400) + 300]
    found = read(named(name), cut, complete=False)
    assert [call[0] for call in found.calls] == ["get_weather"]
    assert found.calls[0][1].startswith('{"city": "xxx')
    assert found.calls[0][1].count("x") == 300
    assert found.text == ""


def test_text_before_two_calls_and_one_without_arguments() -> None:
    """The golden transcript."""
    text = (
        'I will look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    )
    found = read(named("hermes"), text)
    assert found == Read("I will look.", "", [("get_weather", '{"city": "Zürich"}'), ("get_time", "{}")])


def test_a_call_cut_within_a_string_keeps_what_came() -> None:
    """The golden transcript: the string has a brace and the beginning of the end marker in it."""
    text = '<tool_call>\n{"name": "note", "arguments": {"text": "a}</tool_ca'
    assert read(named("hermes"), text, complete=False) == Read("", "", [("note", '{"text": "a}</tool_ca')])


def test_a_marker_that_was_only_begun_is_text() -> None:
    assert read(named("hermes"), "so <tool_c", complete=False) == Read("so <tool_c")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {"a": "}</tool_call>{"}}', [("f", '{"a": "}</tool_call>{"}')]),
        ('{"name": "f", "arguments": {"a": "\\"}\\\\"}}', [("f", '{"a": "\\"}\\\\"}')]),
        ('{"name": "f", "arguments": {"a": {"b": [[{}], []]}}}', [("f", '{"a": {"b": [[{}], []]}}')]),
        ('{"arguments": {"a": 1}, "name": "f"}', [("f", '{"a": 1}')]),
        ('{"id": 7, "x": [1], "name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
        ('{"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}', [("f", '{"a": "é"}')]),
        ('{"name": "f", "arguments": null}', [("f", "{}")]),
        ('{"name": "f"}', [("f", "{}")]),
        ('{"type": "function", "function": {"name": "f", "arguments": {}}}', [("f", "{}")]),
        ('{"name": "f", "arguments": {"a": "\\ud83d\\ude00"}}', [("f", '{"a": "\\ud83d\\ude00"}')]),
        ('{"name": "f", "arguments": {a: 1}}', [("f", "{a: 1}")]),
        ('{"name": "f", "arguments": {\'a\': 1}}', [("f", "{'a': 1}")]),
        ('{"name": "f", "arguments": {"a": 1}', [("f", '{"a": 1}')]),
        ('{"name": "f\\u00fc", "arguments": {}}', [("fü", "{}")]),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', [("f", "{}"), ("g", "{}")]),
        ('{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}', [("f", "{}"), ("g", "{}")]),
    ],
)
def test_the_json_of_a_call_is_found_by_its_strings_and_brackets(text: str, expected: list[tuple[str, str]]) -> None:
    assert read(named("hermes"), f"<tool_call>\n{text}\n</tool_call> ok") == Read("ok", "", expected)


def test_a_second_marker_ends_the_call_before() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    assert read(named("hermes"), text).calls == [("f", '{"a": 1\n'), ("g", "{}")]


def test_what_is_no_call_within_a_marker_is_text() -> None:
    assert read(named("hermes"), 'a <tool_call>{"x": 1}</tool_call> b') == Read('a\n{"x": 1} b')
    assert read(named("hermes"), "a <tool_call>hello</tool_call> b </tool_call>") == Read("a\nhello b ")


# Reasoning.


@pytest.mark.parametrize(
    ("tail", "text", "expected"),
    [
        ("", "<think>\nA.\n</think>\n\nB.", Read("B.", "A.")),
        ("", "B.", Read("B.")),
        ("<|im_start|>assistant\n<think>\n", "A.\n</think>\n\nB. </think>", Read("B.", "A.")),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "B.", Read("B.")),
        ("", "\n<think>A.</think>B.<think>C.</think>", Read("\nB.", "A.\nC.")),
        ("", "<think>A.", Read("", "A.")),
        ("", "<think>\n\n</think>\n\nB.", Read("B.")),
    ],
)
def test_reasoning_is_told_from_content(tail: str, text: str, expected: Read) -> None:
    found = read(named("none", "think"), text, tail=tail)
    assert found == expected or found.text.strip() == expected.text.strip()
    assert found.reasoning == expected.reasoning


def test_a_call_within_reasoning_ends_it() -> None:
    text = '<think>I call.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call></think>Done.'
    assert read(named("hermes", "think"), text) == Read("Done.", "I call.", [("f", "{}")])


@pytest.mark.parametrize(
    ("thinking", "text"),
    [
        ("mistral", "[THINK]A.[/THINK]B."),
        ("gemma4", "<|channel>thought\nA.\n<channel|>B."),
        ("granite", "Here is my thought process:\nA.\nHere is my response:\nB."),
        ("seed_oss", "<seed:think>A.</seed:think>B."),
        ("cohere", "<|START_THINKING|>A.<|END_THINKING|>B."),
        ("kimi_vl", "◁think▷A.◁/think▷B."),
    ],
)
def test_other_ways_to_mark_reasoning(thinking: str, text: str) -> None:
    assert read(named("none", thinking), text) == Read("B.", "A.")


def test_a_sentence_marks_reasoning_at_the_beginning_only() -> None:
    text = "I say: Here is my thought process: A. Here is my response: B."
    assert read(named("none", "granite"), text) == Read(text)


def test_how_an_answer_begins_is_read_from_the_prompts_end() -> None:
    form = named("hermes", "think")
    header = "<|im_start|>assistant\n"
    assert form.thinking(header) == "may"
    assert form.thinking(f"{header}<think>\n") == "open"
    assert form.thinking(f"{header}<think>\n\n</think>\n\n") == "off"
    assert named("hermes").thinking(header) == "off"
    assert form.scanner(f"{header}<think>\n", ()).in_reasoning
    assert not form.scanner(header, ()).in_reasoning


def test_where_the_scanner_stands() -> None:
    scanner = named("hermes", "think").scanner("", TOOLS)
    states = []
    for piece in ("<think>", "a", "</think>", "<tool_call>", '{"name": "f", "arguments"', ": {}}", "</tool_call>", "x"):
        scanner.push(piece)
        states.append((scanner.in_reasoning, scanner.in_call))
    thinks, free, calls = (True, False), (False, False), (False, True)
    assert states == [thinks, thinks, free, calls, calls, calls, free, free]


# Qwen's tags, and their kin.


def test_raw_values_are_typed_by_the_schema() -> None:
    tools = [
        tool(
            "f",
            {
                "text": {"type": "string"},
                "whole": {"type": "integer"},
                "number": {"type": "number"},
                "truth": {"type": "boolean"},
                "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "either": {"type": ["string", "null"]},
                "things": {"type": "array"},
                "unit": {"$ref": "#/$defs/Unit"},
                "odd": {"type": "integer"},
                "free": {},
            },
            schema={"$defs": {"Unit": {"enum": ["C", "F"]}}},
        )
    ]
    given = {
        "text": "5\ntrue",
        "whole": "5",
        "number": "-.5e1",
        "truth": "True",
        "maybe": "null",
        "either": "null!",
        "things": '["</parameter>", {"a": "<function=g>"}]',
        "unit": "C",
        "odd": "five",
        "free": "NaN",
        "extra": '{"a": 1}',
    }
    text = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in given.items())
    found = read(named("qwen_xml"), f"<tool_call>\n<function=f>\n{text}</function>\n</tool_call>", tools=tools)
    assert found.parsed == [
        (
            "f",
            {
                "text": "5\ntrue",
                "whole": 5,
                "number": -5.0,
                "truth": True,
                "maybe": None,
                "either": "null!",
                "things": ["</parameter>", {"a": "<function=g>"}],
                "unit": "C",
                "odd": "five",
                "free": "NaN",
                "extra": {"a": 1},
            },
        )
    ]


def test_one_newline_at_each_end_of_a_value_is_markup() -> None:
    text = "<function=get_weather>\n<parameter=city>\n\n a \n\n</parameter>\n</function>"
    assert read(named("qwen_xml"), text).parsed == [("get_weather", {"city": "\n a \n"})]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<function=get_time>\n</function>\n</tool_call>", [("get_time", "{}")]),
        ("<tool_call>\n<function=get_time>\n<function=get_time>", [("get_time", "{}"), ("get_time", "{}")]),
        (
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n<tool_call>\n<function=get_time>\n</function>",
            [("get_weather", '{"city": "Rome"}'), ("get_time", "{}")],
        ),
        (
            "<function=get_weather><parameter=city>Rome<parameter=days>3</function>",
            [("get_weather", '{"city": "Rome", "days": 3}')],
        ),
        ('<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>', [("get_time", "{}")]),
    ],
)
def test_tags_that_were_forgotten(text: str, expected: list[tuple[str, str]]) -> None:
    assert read(named("qwen_xml"), text) == Read("", "", expected)


def test_a_number_is_sent_when_it_is_whole() -> None:
    cut = "<function=get_weather>\n<parameter=days>\n1"
    assert read(named("qwen_xml"), cut, complete=False).calls == [("get_weather", '{"days": ')]
    assert read(named("qwen_xml"), cut + "2").calls == [("get_weather", '{"days": 12}')]


def test_a_deepseek_value_says_itself_whether_it_is_a_string() -> None:
    tag = "｜DSML｜"
    text = (
        f'<{tag}function_calls>\n<{tag}invoke name="f">\n<{tag}parameter name="a" string="true">1</{tag}parameter>\n'
        f'<{tag}parameter name="b" string="false">[1]</{tag}parameter>\n</{tag}invoke>\n</{tag}function_calls>'
    )
    assert read(named("deepseek_dsml"), text).parsed == [("f", {"a": "1", "b": [1]})]


# Python, Gemma.


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("'it\\'s \"x\"'", 'it\'s "x"'),
        ('"a\\n\\t\\x41\\u00e9\\U0001F600\\q"', "a\n\tAé😀\\q"),
        ("'''a'b\nc'''", "a'b\nc"),
        ("'a' \"b\"", "ab"),
        ("r'\\d'", "\\d"),
        ("-1_000", -1000),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("0x10", 16),
        ("007", 7),
        ("1e999", "1e999"),
        ("[True, False, None, (1,), {'a': {1: 'b'}}]", [True, False, None, [1], {"a": {"1": "b"}}]),
        ("[[[]], {}, ()]", [[[]], {}, []]),
        ("celsius", "celsius"),
    ],
)
def test_python_values_become_json(written: str, expected: object) -> None:
    assert read(named("pythonic"), f"[f(a={written}, b=1)]").parsed == [("f", {"a": expected, "b": 1})]


def test_lists_that_are_no_calls_are_text() -> None:
    for text in ("[1, 2]", "[a](b)", "[f(x)]", "[unknown()]", "[get_time", "[get_time(a == 1)]"):
        assert read(named("pythonic"), text) == Read(text)


def test_python_that_goes_wrong_goes_out_as_it_is() -> None:
    found = read(named("lfm2"), "<|tool_call_start|>[f(a=1, b=$x)]<|tool_call_end|>ok")
    assert found == Read("ok", "", [("f", '{"a": 1, "b": $x)]')])


def test_llama_4_may_write_json() -> None:
    text = '<|python_start|>[{"name": "get_time", "parameters": {}}]<|python_end|>'
    assert read(named("llama4_pythonic"), text).calls == [("get_time", "{}")]


def test_gemmas_strings_need_no_escapes() -> None:
    text = '<|tool_call>call:f{a:<|"|>say "}<tool_call|>\n"<|"|>,b:{c:[1,<|"|>x<|"|>,true]},d:word}<tool_call|>'
    assert read(named("gemma4"), text).parsed == [
        ("f", {"a": 'say "}<tool_call|>\n"', "b": {"c": [1, "x", True]}, "d": "word"})
    ]


# JSON without a marker.


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Anna", "age": 31}',
        '{"city": "Rome"}',
        '{"name": "Anna"}',
        '{"parameters": {"a": 1}}',
        "{}",
        "{ not JSON",
        '{"name": ' + '"x" * 200',
    ],
)
def test_an_answer_in_json_is_no_call(text: str) -> None:
    assert read(named("llama_json"), text) == Read(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "get_time"}', [("get_time", "{}")]),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
        ('{"type": "function", "name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
        ('\n{"name": "f", "arguments": {}};{"name": "g", "parameters": {}}', [("f", "{}"), ("g", "{}")]),
        ('[{"name": "f", "parameters": {}}]', [("f", "{}")]),
        ('{"name": "f", "parameters": {"a": 1}}\n{"name": "g", bad}', [("f", '{"a": 1}'), ("g", "{}")]),
    ],
)
def test_llamas_calls_need_no_marker(text: str, expected: list[tuple[str, str]]) -> None:
    assert read(named("llama_json"), text).calls == expected


# Names before JSON.


def test_mistrals_dialects_are_all_read() -> None:
    expected = Read("", "", [("f", '{"a": "[TOOL_CALLS]"}'), ("g", "{}")])
    a, g = '{"a": "[TOOL_CALLS]"}', "{}"
    for text in (
        f"[TOOL_CALLS]f[ARGS]{a}[TOOL_CALLS]g[ARGS]{g}",
        f"[TOOL_CALLS]f{a}[TOOL_CALLS]g{g}",
        f"[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{a}[TOOL_CALLS] g [ARGS] {g}",
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {a}, "id": "abcdefghi"}}, {{"name": "g", "arguments": {g}}}]',
    ):
        assert read(named("mistral"), text) == expected
        assert read(named("mistral_list"), text) == expected


def test_either_deepseek_dialect_is_read() -> None:
    for name in ("deepseek_v3", "deepseek_v31"):
        for writer in ("deepseek_v3", "deepseek_v31"):
            assert read(named(name), WRITERS[writer](CALLS)).parsed == CALLS


# Harmony.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<|channel|>analysis<|message|>A.<|end|><|start|>assistant<|channel|>analysis<|message|>B.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>C.<|return|>",
            Read("C.", "A.\nB."),
        ),
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.f<|channel|>commentary "
            '<|constrain|>json<|message|>{"a": "<|end|>"}<|call|>',
            Read("I look.", "", [("f", '{"a": "<|end|>"}')]),
        ),
        ("<|channel|>commentary to=functions.f<|message|>{}", Read("", "", [("f", "{}")])),
        ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>", Read("", "", [("f", "{}")])),
        ("<|channel|>analysis to=python<|message|>1+1<|call|>", Read()),
        ("<|channel|>final<|message|>C.", Read("C.")),
        ("Plain.", Read("Plain.")),
        (" to=functions.f<|channel|>commentary json<|message|>{}", Read("", "", [("f", "{}")])),
    ],
)
def test_harmony_messages_are_told_by_their_headers(text: str, expected: Read) -> None:
    assert read(named("harmony"), text, tail="<|start|>assistant") == expected


def test_harmony_goes_on_where_the_prompt_ends() -> None:
    form = named("harmony")
    tail = "<|start|>assistant<|channel|>analysis<|message|>So"
    assert form.scanner(tail, ()).in_reasoning
    assert read(form, " it is.<|end|><|start|>assistant<|channel|>final<|message|>C.", tail=tail) == Read(
        "C.", " it is."
    )
    tail = "<|start|>assistant<|channel|>final<|message|>The"
    assert read(form, " end.", tail=tail) == Read(" end.")
    assert (form.thinking(tail), form.thinking("<|start|>assistant")) == ("off", "may")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", '{"name":"f","arguments":{', "<tool_call>[[[", "[TOOL_CALLS]", '\\"', "<think>", " ", "[f(a=["],
)
def test_time_grows_with_the_text_alone(name: str, unit: str) -> None:
    """Generous: what is not linear takes minutes here."""
    form = named(name, "think")
    begin = time.process_time()
    scanner = form.scanner("", TOOLS)
    for _ in range(1200):
        scanner.push(unit)
    scanner.finish(complete=True)
    assert time.process_time() - begin < 5


def test_arguments_are_utf_8_and_not_escaped() -> None:
    found = read(named("qwen_xml"), '<function=get_weather><parameter=city>Zü"r\\ich\t😀</parameter></function>')
    assert found.calls == [("get_weather", '{"city": "Zü\\"r\\\\ich\\t😀"}')]
    assert json.loads(found.calls[0][1]) == {"city": 'Zü"r\\ich\t😀'}


@pytest.mark.parametrize(
    ("thinking", "text"),
    [
        ("ernie", "<think>\nHm.\n</think>\n\n\n<response>\nYes.\n</response>\n"),
        ("hunyuan", "<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>"),
        ("cohere", "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>"),
    ],
)
def test_what_content_stands_between_is_no_content(thinking: str, text: str) -> None:
    found = read(named("hermes", thinking), text)
    assert (found.reasoning, found.text.rstrip()) == ("Hm.", "Yes.")
    assert read(named("hermes", thinking), list(text)) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '```tool_code\nprint(get_weather(city="Rome"))\nget_time()\n```',
            [("get_weather", {"city": "Rome"}), ("get_time", {})],
        ),
        ('```tool_code\nget_weather(city="Rome", days=2)\n```', [("get_weather", {"city": "Rome", "days": 2})]),
        ('```python\n[get_weather(city="a```b")]\n```', [("get_weather", {"city": "a```b"})]),
        ('```json\n{"name": "get_weather", "parameters": {"city": "Rome"}}\n```', [("get_weather", {"city": "Rome"})]),
        ('{"name": "get_weather", "parameters": {"city": "Rome"}}', [("get_weather", {"city": "Rome"})]),
        ('[get_weather(city="Rome")]', [("get_weather", {"city": "Rome"})]),
    ],
)
def test_gemma_3_writes_calls_in_blocks_of_code(text: str, expected: list[tuple[str, object]]) -> None:
    for pieces in (text, list(text)):
        found = read(named("gemma3"), pieces)
        assert (found.parsed, found.text) == (expected, "")


@pytest.mark.parametrize(
    "text", ['```python\nprint("hi")\n```\nSo.', '```json\n{"name": "Ann"}\n```', "```\n[1, 2]\n```"]
)
def test_other_code_of_gemma_3_is_text(text: str) -> None:
    assert read(named("gemma3"), list(text)) == Read(text)


def test_a_value_may_stand_in_character_data() -> None:
    city, days = '<param name="city"><![CDATA[a </param> <b>]]></param>', '<param name="days">2</param>'
    text = f'<function name="get_weather">{city}{days}</function>'
    for pieces in (text, list(text)):
        assert read(named("minicpm5"), pieces).parsed == [("get_weather", {"city": "a </param> <b>", "days": 2})]
