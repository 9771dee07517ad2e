"""Request bodies: every bound and every refusal, in our words (S30-S34, S36-S38, S41, S42, S44, S45, S48)."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from typing import Any, cast

import pytest
from pydantic import BaseModel
from support.api_support import CONTEXT, EOS, LEAKS, TOKENIZER, VOCAB_SIZE

from sensorium.api.protocol.audio import AudioRequest
from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.protocol.common import Body, UnknownFields
from sensorium.api.protocol.completion import CompletionRequest
from sensorium.api.protocol.other_servers import ANSWERS, CHATS, IGNORED
from sensorium.api.protocol.pooling import ClassifyRequest, EmbeddingsRequest, PoolingRequest
from sensorium.api.protocol.score import RerankRequest, ScoreRequest
from sensorium.api.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from sensorium.api.protocol.validation import parse_json
from sensorium.api.routes import ROUTES
from sensorium.config import Limits, ServerConfig
from sensorium.errors import ContextLengthError, RequestError, UnsupportedFieldError
from sensorium.prompt.messages import MediaPart, TextPart
from sensorium.serving.defaults import ModelDefaults, for_choice
from sensorium.types import SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]
DEFAULTS = ModelDefaults(max_model_len=CONTEXT, vocab_size=VOCAB_SIZE, stop_token_ids=(EOS,))
LIMITS = Limits()


def parse(model: type[Body], fields: Any) -> Any:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return parse_json(model, body, UnknownFields())


def chat(**fields: Any) -> ChatRequest:
    """A parsed and checked chat request."""
    request: ChatRequest = parse(ChatRequest, {"messages": MESSAGES, **fields})
    request.check(LIMITS, ServerConfig())
    return request


def sampling(prompt_tokens: int = 10, defaults: ModelDefaults = DEFAULTS, **fields: Any) -> SamplingParams:
    return chat(**fields).sampling(defaults, prompt_tokens)


def complete(prompt_tokens: int = 10, **fields: Any) -> SamplingParams:
    request: CompletionRequest = parse(CompletionRequest, {"prompt": "hi", **fields})
    request.check(LIMITS)
    return request.sampling(DEFAULTS, prompt_tokens)


def refusal(model: type[Body], fields: Any) -> RequestError:
    """The error for a body, from parsing or any later check."""
    with pytest.raises(RequestError) as caught:
        request = parse(model, fields)
        if isinstance(request, ChatRequest):
            request.check(LIMITS, ServerConfig())
            request.conversation(frozenset(), LIMITS)
            request.sampling(DEFAULTS, 10)
        elif isinstance(request, CompletionRequest):
            request.check(LIMITS)
            request.sampling(DEFAULTS, 10)
        else:
            request.check(ServerConfig())
    assert not LEAKS.search(caught.value.message)
    assert "\n" not in caught.value.message
    return caught.value


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [0, 17, 10**9, -1, "2", 1.5, True]),
        ("temperature", [NAN, INF, -INF, -0.1, 2.1, "1", True]),
        ("top_p", [NAN, 0, -0.1, 1.1, "1"]),
        ("min_p", [NAN, INF, -0.1, 1.1, "0"]),
        ("presence_penalty", [NAN, INF, -2.1, 2.1, "1"]),
        ("frequency_penalty", [NAN, -INF, -2.1, 2.1, "1"]),
        ("repetition_penalty", [NAN, INF, 0, -1, "1"]),
        ("top_k", [-2, 2**31, 1.5, "1"]),
        ("top_logprobs", [21, -1, 10**9, "1", True]),
        ("max_tokens", [0, -1, 2**63, "5", 1.5]),
        ("max_completion_tokens", [0, -1, 2**31]),
        ("min_tokens", [-1, "1", 600]),
        ("seed", [2**63, -(2**63) - 1, "1", 1.5]),
        ("stop", ["", [""], ["a"] * 5, [1], 5, {"a": 1}, "x" * 257, ["y" * 10_000_000], ["z"] * 500_000]),
        ("stop_token_ids", [[-1], [VOCAB_SIZE], [2**31], ["1"], 5, [1] * 300]),
        (
            "logit_bias",
            [{"-1": 1}, {"99999999": 1}, {"x": 1}, {str(i): 0 for i in range(301)}, {"1": 101}, {"1": NAN}, [1]],
        ),
        ("stream", [1, "true"]),
        ("stream_options", [{"include_usage": True}, True]),
        ("priority", [2**40, "1"]),
        ("user", ["u" * 2000, 5]),
        ("cache_salt", ["s" * 129]),
        ("chat_template", ["{% for i in range(10**9) %}x{% endfor %}"]),
        ("chat_template_kwargs", [{"a": {"b": 1}}, {"a": [1]}, {"a": "x" * 5000}, {str(i): 1 for i in range(33)}, 5]),
        ("mm_processor_kwargs", [{"max_pixels": 10**12}, 5]),
        ("messages", [[], None, "hi", [{}], [5], [{"role": "user"}], [{"role": "user", "content": None}]]),
        ("model", [5, "m" * 300]),
    ],
)
def test_bad_values_name_their_field(field: str, values: list[Any]) -> None:
    for value in values:
        body = json.dumps({"messages": MESSAGES, "logprobs": True, field: value}).encode()
        start_s = time.thread_time()
        error = refusal(ChatRequest, body)
        assert error.status == 400
        assert (error.param or "").startswith(field), (value, error.message)
        assert time.thread_time() - start_s < 2


@pytest.mark.parametrize("field", [name for name in ChatRequest.model_fields if name != "messages"])
def test_null_means_the_default(field: str) -> None:
    assert sampling(**cast(Any, {field: None})) == sampling()


def test_product_of_n_and_length_is_bounded() -> None:
    error = refusal(ChatRequest, {"messages": MESSAGES, "n": 16, "max_tokens": CONTEXT - 10})
    assert error.param == "n"
    assert sampling(n=16).max_tokens == 4 * CONTEXT // 16
    assert sampling(n=2).max_tokens == CONTEXT - 10


@pytest.mark.parametrize("field", sorted(ANSWERS))
def test_known_but_unsupported_fields_are_refused_by_name(field: str) -> None:
    for value in ANSWERS[field].harmless:
        chat(**{field: value})
    value = next(value for value in ({"a": 1}, [{"a": 1}], "x", 5, True) if not ANSWERS[field].allows(value))
    error = refusal(ChatRequest, {"messages": MESSAGES, "presence_penalty": 0.5, field: value})
    assert isinstance(error, UnsupportedFieldError)
    assert error.param == field
    assert field in error.message


ANSWERED = """model frequency_penalty presence_penalty logit_bias logprobs max_tokens n seed stop stream stream_options
    temperature top_p user use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens truncate_prompt_tokens truncation_side
    prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo add_special_tokens structured_outputs
    response_format priority request_id return_tokens_as_token_ids return_token_ids cache_salt"""
NOT_ANSWERED = """spaces_between_special_tokens kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
    stream_interval watermarking return_token_offsets"""
POOLED = "model user truncate_prompt_tokens truncation_side request_id priority mm_processor_kwargs cache_salt"
TEXTS = f"""{POOLED} input messages add_special_tokens add_generation_prompt continue_final_message chat_template
    chat_template_kwargs"""
VECTORS = f"{TEXTS} encoding_format embed_dtype endianness dimensions use_activation"
COMPARED = f"""{POOLED} documents max_tokens_per_query max_tokens_per_doc instruction chat_template chat_template_kwargs
    use_activation"""
PUBLISHED: dict[type[Body], tuple[str, str, str]] = {
    ChatRequest: (
        f"""{ANSWERED} messages max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls
        reasoning_effort include_reasoning thinking_token_budget add_generation_prompt continue_final_message
        chat_template chat_template_kwargs mm_processor_kwargs""",
        "session_id service_tier store metadata verbosity safety_identifier prompt_cache_key",
        f"""{NOT_ANSWERED} documents media_io_kwargs return_prompt_text return_mm_kwargs modalities audio prediction
        web_search_options functions function_call""",
    ),
    CompletionRequest: (
        f"{ANSWERED} prompt",
        "session_id",
        f"{NOT_ANSWERED} thinking_token_budget prompt_embeds suffix best_of",
    ),
    EmbeddingsRequest: (VECTORS, "", "padding media_io_kwargs"),
    PoolingRequest: (f"{VECTORS} task", "", "padding media_io_kwargs data"),
    ClassifyRequest: (f"{TEXTS} use_activation", "", "padding media_io_kwargs"),
    ScoreRequest: (f"{COMPARED} queries items data_1 data_2 text_1 text_2", "", "padding media_io_kwargs"),
    RerankRequest: (f"{COMPARED} query top_n", "", "padding media_io_kwargs"),
    AudioRequest: (
        """model language prompt hotwords response_format timestamp_granularities stream stream_include_usage
        stream_continuous_usage_stats to_language temperature top_p top_k min_p seed frequency_penalty presence_penalty
        repetition_penalty max_completion_tokens""",
        "",
        "use_beam_search n length_penalty include_stop_str_in_output vllm_xargs",
    ),
    TokenizeRequest: (
        """model prompt messages tools add_special_tokens return_token_strs add_generation_prompt
        continue_final_message chat_template chat_template_kwargs mm_processor_kwargs""",
        "",
        "media_io_kwargs",
    ),
    DetokenizeRequest: ("model tokens", "", ""),
}
"""Body -> the fields of vLLM's published protocol that are done, those without effect, and those that are refused."""


def test_what_is_empty_is_said_to_be() -> None:
    for fields, param in (({"stop": ""}, "stop"), ({"allowed_token_ids": []}, "allowed_token_ids")):
        assert refusal(ChatRequest, {"messages": MESSAGES, **fields}).message == f"`{param}` must not be empty."


@pytest.mark.parametrize("model", PUBLISHED)
def test_fields_of_the_published_protocol(model: type[Body], caplog: pytest.LogCaptureFixture) -> None:
    done, ignored, refused = (set(names.split()) for names in PUBLISHED[model])
    assert done <= set(model.model_fields)
    assert ignored <= IGNORED
    assert refused <= set(model.foreign)
    unchecked = model.model_construct(None, **dict.fromkeys(ignored, "a"))
    with caplog.at_level(logging.WARNING):
        unchecked.check_fields(UnknownFields())
    assert caplog.text == ""
    for name in refused:
        own = model.model_construct(None, **{name: {"a": 1}})
        with pytest.raises(UnsupportedFieldError, match=f"`{name}` is not supported by this server: .+") as caught:
            own.check_fields(UnknownFields())
        assert caught.value.param == name


@pytest.mark.parametrize(
    "model",
    [
        ChatRequest,
        CompletionRequest,
        EmbeddingsRequest,
        PoolingRequest,
        ClassifyRequest,
        ScoreRequest,
        RerankRequest,
        AudioRequest,
        TokenizeRequest,
        DetokenizeRequest,
    ],
)
def test_no_field_is_ours_and_foreign_and_ignored(model: type[Body]) -> None:
    assert not set(model.model_fields) & set(model.foreign) - {"documents"}  # which /rerank has and chats have not
    assert not set(model.model_fields) & IGNORED
    assert not set(model.foreign) & IGNORED


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [
        ("n_predict", 5, "`max_tokens`"),
        ("num_predict", 5, "`max_tokens`"),
        ("max_new_tokens", 5, "`max_tokens`"),
        ("min_new_tokens", 5, "`min_tokens`"),
        ("repeat_penalty", 1.1, "`repetition_penalty`"),
        ("stop_sequences", ["x"], "`stop`"),
        ("sampling_seed", 3, "`seed`"),
        ("n_probs", 2, "`logprobs`"),
        ("do_sample", False, "`temperature`"),
        ("options", {"temperature": 0}, "fields of their own"),
        ("sampling_params", {"regex": "a"}, "fields of their own"),
        ("extra_body", {"top_k": 1}, "beside the other"),
        ("format", "json", "`response_format`"),
        ("format", {"type": "object"}, "`response_format`"),
        ("samplers", ["top_k"], "in this order"),
        ("mirostat", 2, "leave it out"),
        ("typical_p", 0.9, "leave it out"),
        ("response_schema", {"type": "object"}, "`response_format`"),
        ("choice", ["a"], "`structured_outputs`"),
        ("template", "{{ 1 }}", "`chat_template`"),
        ("input_ids", [1], "`prompt`"),
        ("image_data", ["x"], "`content`"),
        ("thinking_budget", 5, "`thinking_token_budget`"),
        ("separate_reasoning", False, "told apart"),
        ("top_n_tokens", 2, "`logprobs`"),
    ],
)
@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_what_other_servers_call_it_is_refused_with_our_name(
    model: type[Body], field: str, value: Any, ours: str
) -> None:
    error = refusal(model, {"messages": MESSAGES, "prompt": "x", field: value})
    assert (error.status, error.param) == (400, field)
    assert ours in error.message


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [("thinking", {"type": "disabled"}, "`enable_thinking`"), ("reasoning", {"effort": "low"}, "`reasoning_effort`")],
)
def test_wishes_for_reasoning_in_others_words_are_refused(field: str, value: Any, ours: str) -> None:
    error = refusal(ChatRequest, {"messages": MESSAGES, field: value})
    assert (error.param, ours in error.message) == (field, True)
    for nothing in CHATS[field].harmless:
        chat(**{field: nothing})


def test_what_llama_cpp_s_page_always_sends_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    body = {
        "cache_prompt": True,
        "reasoning_format": "none",
        "dynatemp_range": 0,
        "dynatemp_exponent": 1,
        "typical_p": 1,
        "typ_p": 1.0,
        "xtc_probability": 0,
        "xtc_threshold": 0.1,
        "repeat_last_n": 64,
        "repeat_penalty": 1,
        "dry_multiplier": 0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": -1,
        "timings_per_token": False,
        "samplers": [],
        "keep_alive": "5m",
        "mirostat": 0,
        "n_predict": -1,
        "grammar": "",
        "json_schema": None,
        "presence_penalty": 0,
        "id_slot": -1,
        "n_probs": 0,
    }
    with caplog.at_level(logging.WARNING, "sensorium.api"):
        parse_json(ChatRequest, json.dumps({"messages": MESSAGES, **body}).encode(), UnknownFields())
    assert not caplog.records
    # What changes nothing alone does so beside a penalty.
    assert refusal(ChatRequest, {"messages": MESSAGES, **body, "frequency_penalty": 0.5}).param == "repeat_last_n"
    assert refusal(CompletionRequest, {"prompt": "x", "n_predict": -1}).param == "n_predict"
    assert refusal(ChatRequest, {"messages": MESSAGES, "mirostat": False, "n_predict": True}).param == "n_predict"


def test_what_only_changes_an_answer_does_not_matter_to_a_vector() -> None:
    body = {"input": "x", "options": {"num_ctx": 512}, "n_predict": 5, "keep_alive": "5m"}
    parse_json(EmbeddingsRequest, json.dumps(body).encode(), UnknownFields())
    for field, value, words in (
        ("output_dimension", 8, "`dimensions`"),
        ("embd_normalize", -1, "`use_activation`"),
        ("output_dtype", "int8", "float32"),
        ("instruction", "x", "/rerank have it"),
        ("return_multivector", True, "leave it out"),
        ("parameters", {"normalize": False}, "fields of their own"),
    ):
        error = refusal(EmbeddingsRequest, {"input": "x", field: value})
        assert (error.param, words in error.message) == (field, True)


def test_unknown_fields_are_logged_once_and_escaped(caplog: pytest.LogCaptureFixture) -> None:
    unknown = UnknownFields(max_names=3)
    body = json.dumps({"messages": MESSAGES, "max_token": 5, "a\nb": 1}).encode()
    with caplog.at_level(logging.WARNING, "sensorium.api"):
        for _ in range(3):
            parse_json(ChatRequest, body, unknown)
    assert len(caplog.records) == 2
    assert all("\n" not in record.getMessage() for record in caplog.records)
    with caplog.at_level(logging.WARNING, "sensorium.api"):
        for index in range(10):
            unknown.note(f"field {index}")
    assert len(caplog.records) == 3


def test_unknown_names_are_logged_short(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sensorium.api"):
        parse(ChatRequest, {"messages": MESSAGES, "x" * 100_000: 1})
    assert len(caplog.records[0].getMessage()) < 256


def walk(schema: Any, path: str, found: list[str]) -> None:
    """Collect every part of a JSON schema that has no bounds."""
    if not isinstance(schema, dict):
        return
    kind = str(schema.get("type"))
    bounded: dict[str, tuple[str, ...]] = {
        "integer": ("minimum", "exclusiveMinimum"),
        "number": ("minimum", "exclusiveMinimum"),
        "string": ("maxLength",),
        "array": ("maxItems",),
        "object": ("maxProperties", "properties"),
    }
    closed: dict[str, tuple[str, ...]] = {
        "integer": ("maximum", "exclusiveMaximum"),
        "number": ("maximum", "exclusiveMaximum"),
    }
    if "const" not in schema and "enum" not in schema:
        for table in (bounded, closed):
            if kind in table and not any(name in schema for name in table[kind]):
                found.append(f"{path}: {kind}")
    for key in ("items", "additionalProperties", "propertyNames"):
        walk(schema.get(key), f"{path}.{key}", found)
    for key in ("anyOf", "oneOf", "allOf"):
        for place, part in enumerate(schema.get(key, ())):
            walk(part, f"{path}.{key}[{place}]", found)
    for name, part in {**schema.get("properties", {}), **schema.get("$defs", {})}.items():
        walk(part, f"{path}.{name}", found)


@pytest.mark.parametrize("body", [route.body for route in ROUTES if route.body], ids=lambda body: body.__name__)
def test_every_field_has_bounds(body: type[BaseModel]) -> None:
    found: list[str] = []
    walk(body.model_json_schema(), body.__name__, found)
    assert not found


def test_the_walk_finds_what_has_no_bounds() -> None:
    class Loose(BaseModel):
        size: int
        name: str
        rows: list[int]

    found: list[str] = []
    walk(Loose.model_json_schema(), "Loose", found)
    assert len(found) >= 4


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"n":' + b"9" * 5000 + b"}",
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"messages":[]} x',
        b"{'a':1}",
        b"\xff\xfe",
        b'{"prompt":"\xff"}',
        b"nul",
        b"\x00",
    ],
    ids=range(13),
)
def test_what_is_not_json_is_said_to_be_so(body: bytes) -> None:
    for model in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        error = refusal(model, body)
        assert (error.status, error.code, error.param) == (400, "invalid_json", None)


@pytest.mark.parametrize("body", [b"null", b"[]", b"5", b'"x"', b"true"])
def test_a_body_is_an_object(body: bytes) -> None:
    assert refusal(ChatRequest, body).message == "The body must be an object."


def test_numbers_beyond_json_are_refused() -> None:
    for word in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        error = refusal(ChatRequest, b'{"messages":[{"role":"user","content":"hi"}],"temperature":' + word + b"}")
        assert error.status == 400


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([[]], "prompt[0]"),
        ([""], "prompt"),
        (None, "prompt"),
        ([-1], "prompt[0]"),
        ([2**31], "prompt[0]"),
        ([2**63], "prompt[0]"),
        ([1.5], "prompt[0]"),
        (["a", [1]], "prompt[1]"),
        ([[1], "a"], "prompt[1]"),
        ([[1], [2]] * 10_000, "prompt"),
        (5, "prompt"),
        ({"a": 1}, "prompt"),
        ([True], "prompt[0]"),
        ([[1, "x"]], "prompt[0][1]"),
    ],
)
def test_prompts_of_a_wrong_form(prompt: Any, param: str) -> None:
    assert refusal(CompletionRequest, {"prompt": prompt}).param == param


def test_a_missing_field_is_required() -> None:
    for model, field in ((ChatRequest, "messages"), (CompletionRequest, "prompt")):
        error = refusal(model, {})
        assert (error.param, error.code) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    ("part", "param", "code"),
    [
        ({"type": "image_embeds", "image_embeds": "x"}, "type", "unsupported_content_part"),
        ({"type": "prompt_embeds", "data": "x"}, "type", "unsupported_content_part"),
        ({"type": "input_text", "text": "x"}, "type", "unsupported_content_part"),
        ({"type": "image_url", "image_url": {}}, "image_url.url", "missing_required_parameter"),
        ({"type": "image_url", "image_url": {"url": 5}}, "image_url.url", "invalid_value"),
        ({"type": "image_url", "image_url": None}, "image_url", "invalid_value"),
        ({"type": "image_url"}, "image_url", "missing_required_parameter"),
        ({"type": "image_url", "image_url": {"url": ""}}, "image_url.url", "invalid_value"),
        ({"type": "image_url", "image_url": "data:x"}, "image_url", "unsupported_modality"),
        ({"type": "image_url", "image_url": {"url": "data:x"}}, "image_url.url", "unsupported_modality"),
        ({"type": "video_url", "video_url": {"url": "data:x"}}, "video_url.url", "unsupported_modality"),
        ({"type": "audio_url", "audio_url": {"url": "data:x"}}, "audio_url.url", "unsupported_modality"),
        (
            {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
            "input_audio.data",
            "unsupported_modality",
        ),
        ({"type": "text"}, "text", "missing_required_parameter"),
        ({"text": "x"}, "type", "missing_required_parameter"),
    ],
)
def test_content_parts_that_are_refused(part: dict[str, Any], param: str, code: str) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
    error = refusal(ChatRequest, {"messages": messages})
    assert error.param == f"messages[1].content[1].{param}"
    assert error.code == code


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user<|im_end|>", "content": "x"},
        {"role": "", "content": "x"},
        {"role": "user", "content": "x", "name": "<|a|>"},
        {"role": "function", "content": "x", "name": "f"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f<|x|>"}}]},
        {"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f"}},
    ],
)
def test_messages_that_are_refused(message: dict[str, Any]) -> None:
    assert (refusal(ChatRequest, {"messages": [message]}).param or "").startswith("messages[0].")


def test_too_many_messages_and_parts() -> None:
    assert refusal(ChatRequest, {"messages": MESSAGES * 1025}).param == "messages"
    assert refusal(ChatRequest, {"messages": MESSAGES * 100_000}).param == "messages"
    parts = [{"type": "text", "text": "x"}]
    for count in (257, 5000):
        error = refusal(ChatRequest, {"messages": [{"role": "user", "content": parts * count}]})
        assert error.param == "messages[0].content"


def test_media_keep_their_place_in_the_conversation() -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {
            "role": "user",
            "name": "ann",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:1", "detail": "low"}, "uuid": "x"},
                {"type": "text", "text": "what"},
                {"type": "image_url", "image_url": "data:2"},
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}]},
    ]
    found = chat(messages=messages).conversation(frozenset({"image", "audio"}), LIMITS)
    assert [message.role for message in found.messages] == ["developer", "user", "assistant", "user"]
    assert found.messages[1].content == (MediaPart("image"), TextPart("what"), MediaPart("image"))
    assert found.messages[1].name == "ann"
    assert found.messages[2].content == ()
    assert [(source.kind, source.url, source.data, source.param) for source in found.media] == [
        ("image", "data:1", None, "messages[1].content[0].image_url.url"),
        ("image", "data:2", None, "messages[1].content[2].image_url"),
        ("audio", None, "AA", "messages[3].content[0].input_audio.data"),
    ]


def test_defaults_come_from_the_checkpoint_where_they_are_sensible() -> None:
    generation = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0.1}
    size = {"max_model_len": CONTEXT, "vocab_size": VOCAB_SIZE, "stop_token_ids": (EOS,)}
    own = ModelDefaults.of(generation, **size)  # type: ignore[arg-type]
    found = sampling(defaults=own)
    assert {name: getattr(found, name) for name in generation} == generation
    assert sampling(defaults=own, temperature=0).temperature == 0
    assert sampling(defaults=own, top_k=-1, top_p=1, min_p=0, repetition_penalty=1) == sampling(
        temperature=0.7, top_k=0
    )
    odd = {"temperature": -1, "top_p": 5, "top_k": None, "repetition_penalty": "x", "min_p": True}
    assert ModelDefaults.of(odd, **size) == ModelDefaults.of({}, **size)  # type: ignore[arg-type]


@pytest.mark.parametrize(("told", "length"), [(20, 20), (20.0, 20), (CONTEXT * 2, CONTEXT - 10)])
def test_a_checkpoint_may_say_how_long_answers_are(told: float, length: int) -> None:
    """`max_new_tokens` of generation_config.json is the length that a request leaves open, where it fits."""
    size = {"max_model_len": CONTEXT, "vocab_size": VOCAB_SIZE, "stop_token_ids": (EOS,)}
    own = ModelDefaults.of({"max_new_tokens": told}, **size)  # type: ignore[arg-type]
    assert sampling(defaults=own).max_tokens == length
    assert sampling(defaults=own, max_tokens=30).max_tokens == 30
    assert AudioRequest().sampling(own, 10, "file").max_tokens == length
    for odd in (0, -1, None, True, "20", 2**40):
        own = ModelDefaults.of({"max_new_tokens": odd}, **size)  # type: ignore[arg-type]
        assert sampling(defaults=own).max_tokens == CONTEXT - 10


def test_request_fields_become_sampling_params() -> None:
    found = sampling(
        temperature=0.005,
        top_k=-1,
        seed=-1,
        stop_token_ids=[5, EOS, 5],
        logit_bias={"7": 1.5, "8": -100},
        min_tokens=2,
        max_tokens=9,
        max_completion_tokens=8,
        logprobs=True,
        top_logprobs=3,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
    )
    assert found == SamplingParams(
        max_tokens=8,
        min_tokens=2,
        temperature=0.005,
        top_k=0,
        seed=None,
        stop_token_ids=(EOS, 5),
        logprobs=3,
        logit_bias=((7, 1.5), (8, -100.0)),
        presence_penalty=0.5,
        frequency_penalty=-0.5,
    )
    assert sampling(ignore_eos=True, stop_token_ids=[5]).stop_token_ids == (5,)
    assert sampling(logprobs=True).logprobs == 0
    assert sampling().logprobs is None
    assert sampling(seed=7).seed == 7


def test_lengths() -> None:
    assert sampling(10).max_tokens == CONTEXT - 10
    assert sampling(10, max_tokens=CONTEXT - 10).max_tokens == CONTEXT - 10
    assert complete(10).max_tokens == 16
    assert complete(CONTEXT - 5).max_tokens == 5
    for tokens, wanted in ((10, CONTEXT - 9), (CONTEXT, None), (10 * CONTEXT, 5)):
        with pytest.raises(ContextLengthError) as caught:
            sampling(tokens, max_tokens=wanted)
        assert str(tokens) in caught.value.message
        assert str(CONTEXT) in caught.value.message


def test_completions_have_their_own_rules() -> None:
    assert complete(logprobs=5).logprobs == 5
    assert complete(logprobs=5).prompt_logprobs is None
    assert complete(logprobs=2, echo=True).prompt_logprobs == 2
    assert complete(echo=True, max_tokens=0).max_tokens == 1
    assert refusal(CompletionRequest, {"prompt": "hi", "max_tokens": 0}).param == "max_tokens"
    assert refusal(CompletionRequest, {"prompt": "hi", "logprobs": True}).param == "logprobs"
    assert refusal(CompletionRequest, {"prompt": "hi", "logprobs": 21}).param == "logprobs"
    assert refusal(CompletionRequest, {"prompt": ["a"] * 100, "n": 11}).param == "n"
    with pytest.raises(RequestError, match="logprobs"):
        complete(100_000, logprobs=20, echo=True)


WORDY = dataclasses.replace(DEFAULTS, tokenizer=TOKENIZER)


@pytest.mark.parametrize("ask", [sampling, complete])
def test_token_ids_reach_the_sampler_once_each(ask: Any) -> None:
    params = ask(allowed_token_ids=[5, 3, 5], logprobs=True if ask is sampling else 1, logprob_token_ids=[7, 7, 0])
    assert (params.allowed_token_ids, params.logprob_token_ids) == ((5, 3), (7, 0))


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": ["1"]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": TOKENIZER.encode("a"), "bad_words": ["a"]}, "allowed_token_ids"),
        ({"logprob_token_ids": [3]}, "logprob_token_ids"),
        ({"logprob_token_ids": [VOCAB_SIZE], "logprobs": 1}, "logprob_token_ids"),
        ({"logprob_token_ids": [0] * 129, "logprobs": 1}, "logprob_token_ids"),
        ({"bad_words": "a"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["a" * 257]}, "bad_words[0]"),
        ({"bad_words": ["a"] * 257}, "bad_words"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -2}, "prompt_logprobs"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": 5}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
    ],
)
def test_fields_of_tokens_are_checked(model: type[Body], fields: dict[str, Any], param: str) -> None:
    if model is ChatRequest and "logprobs" in fields:
        fields = {**fields, "logprobs": True}
    with pytest.raises(RequestError) as caught:
        request = parse(model, {"messages": MESSAGES, "prompt": "x", **fields})
        request.check(*((LIMITS, ServerConfig()) if model is ChatRequest else (LIMITS,)))
        request.sampling(WORDY, 10)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_bad_words_are_their_tokens_alone_and_after_a_space() -> None:
    params = sampling(defaults=WORDY, bad_words=["ab", " c", "ab", " "])
    forms = ["ab", " ab", " c", "c", " "]
    assert params.bad_words == tuple(tuple(TOKENIZER.encode(form)) for form in forms)


def test_all_alternatives_where_the_operator_allows_it() -> None:
    wide = dataclasses.replace(DEFAULTS, max_logprobs=VOCAB_SIZE)
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": -1, "max_tokens": 1}
    assert sampling(defaults=wide, **asked).logprobs == VOCAB_SIZE
    assert sampling(defaults=wide, prompt_logprobs=-1).prompt_logprobs == VOCAB_SIZE
    with pytest.raises(RequestError, match="--max-logprobs") as caught:
        sampling(**asked)
    assert caught.value.param == "top_logprobs"
    large = dataclasses.replace(wide, vocab_size=150_000, max_logprobs=150_000)
    assert sampling(defaults=large, **{**asked, "max_tokens": 3}).logprobs == 150_000
    with pytest.raises(RequestError, match="max_tokens") as caught:
        sampling(defaults=large, **{**asked, "max_tokens": 4})
    assert caught.value.param == "top_logprobs"


def test_choices_draw_their_own_numbers() -> None:
    params = sampling(seed=2**63 - 1, n=3)
    assert [for_choice(params, index).seed for index in range(3)] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert for_choice(sampling(n=2), 1).seed is None


def test_a_seed_under_mistrals_name() -> None:
    assert [sampling(random_seed=3).seed, sampling(random_seed=3, seed=4).seed, sampling(seed=-1).seed] == [3, 4, None]


def test_any_is_mistrals_word_for_required() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert (
        chat(tools=tools, tool_choice="any").tool_choice_of()
        == chat(tools=tools, tool_choice="required").tool_choice_of()
    )
    assert refusal(ChatRequest, {"messages": MESSAGES, "tool_choice": "any"}).param == "tool_choice"


def test_a_message_is_continued_instead_of_answered() -> None:
    assert chat().generates_prompt
    assert not chat(continue_final_message=True).generates_prompt
    assert not chat(continue_final_message=True, add_generation_prompt=False).generates_prompt
    assert not chat(add_generation_prompt=False).generates_prompt
    error = refusal(ChatRequest, {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True})
    assert error.param == "continue_final_message"


def test_template_and_processor_are_closed_to_requests() -> None:
    for field, value, flag in (
        ("chat_template", "x", "--allow-request-chat-template"),
        ("mm_processor_kwargs", {"a": 1}, "--allow-request-mm-kwargs"),
    ):
        for model in (ChatRequest, TokenizeRequest):
            error = refusal(model, {"messages": MESSAGES, field: value})
            assert (error.param, error.code) == (field, f"{field}_not_allowed")
            assert f"`{field}`" in error.message and flag in error.message
    parse(ChatRequest, {"messages": MESSAGES, "chat_template": "x"}).check(
        LIMITS, ServerConfig(allow_request_chat_template=True)
    )


def test_tokenize_takes_one_of_two() -> None:
    assert refusal(TokenizeRequest, {}).param == "prompt"
    assert refusal(TokenizeRequest, {"prompt": "x", "messages": MESSAGES}).param == "prompt"


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, {}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        (
            {
                "enable_thinking": True,
                "reasoning_effort": None,
                "chat_template_kwargs": {"enable_thinking": False, "a": 1},
            },
            {"enable_thinking": False, "a": 1},
        ),
    ],
)
@pytest.mark.parametrize("model", [ChatRequest, TokenizeRequest])
def test_template_variables_with_fields_of_their_own(
    model: Any, fields: dict[str, Any], wanted: dict[str, Any]
) -> None:
    request = parse(model, {"messages": MESSAGES, **fields})
    assert request.template_options()["template_kwargs"] == wanted
