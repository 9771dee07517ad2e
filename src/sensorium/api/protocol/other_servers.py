"""Fields of OpenAI's, vLLM's and other servers that this one does not have and that would change the answer.

One table: each field with the values that ask for nothing, and what to do instead. A request that asks for something
is refused by name, since an answer that ignores it would look right. Fields that change nothing are `IGNORED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values of a field that we do not have which still ask for nothing."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """`harmless` are the values with which the field may be there all the same; `advice` completes a sentence.
    `code` is that of the error, where clients read it."""

    harmless: tuple[Any, ...] = NOTHING
    advice: str = "leave it out"
    code: str = "unsupported_field"

    def allows(self, value: Any) -> bool:
        return any(_same(value, known) for known in self.harmless)


def _same(value: Any, known: Any) -> bool:
    """Equal, where 1 is 1.0 but true is not 1."""
    if isinstance(value, bool) or isinstance(known, bool):
        return value is known
    both_numbers = isinstance(value, int | float) and isinstance(known, int | float)
    return (both_numbers or type(value) is type(known)) and bool(value == known)


def _fields(names: str, harmless: tuple[Any, ...] = NOTHING, advice: str = "leave it out") -> dict[str, Foreign]:
    return dict.fromkeys(names.split(), Foreign(harmless, advice))


def _called(name: str, others: str, *harmless: Any) -> dict[str, Foreign]:
    """What `name` is called elsewhere; `harmless` values ask for what happens anyway."""
    return _fields(others, (None, *harmless), f"it is called `{name}` here")


_FORM = "`response_format` and `structured_outputs` say what form an answer is to have"
_UNPACKED = "its entries are fields of their own here, beside `messages` or `prompt`"
_FIXED = "temperature, `top_k`, `top_p` and `min_p` are the samplers here, in this order"

TOOLS: Mapping[str, Foreign] = {
    **_fields("thinking_token_budget", (None,), "it goes with chats"),
    **_fields("tools", advice="tools go with chats"),
    **_fields("tool_choice", (None, "none", "auto"), "tools go with chats"),
}
FORMS: Mapping[str, Foreign] = {
    **_fields("guided_choice guided_grammar guided_regex structured_outputs", advice="it goes with generated text"),
    **_fields("guided_json guided_decoding_backend guided_whitespace_pattern", (None,), "it goes with generated text"),
    **_fields("response_format", (None, {"type": "text"}), "it goes with generated text"),
}
"""For endpoints without text that could be held to a form."""

EVERYWHERE: Mapping[str, Foreign] = {
    **_fields("""audio documents ec_transfer_params kv_transfer_params
        media_io_kwargs prediction prompt_embeds repetition_detection return_mm_kwargs
        return_prompt_text return_token_offsets suffix vllm_xargs watermarking web_search_options"""),
    **_fields("best_of stream_interval", (None, 1)),
    **_fields("functions function_call", (*NOTHING, "none", "auto"), "they are called `tools` and `tool_choice` here"),
    **_fields("modalities", (None, [], ["text"])),
    **_fields("spaces_between_special_tokens", (None, True)),
    **_fields(
        "extra_body", advice="it is an argument of OpenAI's Python client: put its entries beside the other fields"
    ),
    **_fields("lora lora_path adapter_id", advice="an adapter is asked for by its name, as the `model`"),
}
"""Fields that no endpoint has."""
BEAMS: Mapping[str, Foreign] = {
    **_fields("use_beam_search early_stopping", advice="/v1/chat/completions and /v1/completions have it"),
    **_fields("length_penalty", (None, 1), "/v1/chat/completions and /v1/completions have it"),
}
"""Those of a search for answers, where an endpoint has none."""

ANSWERS: Mapping[str, Foreign] = {
    **EVERYWHERE,
    # llama.cpp, SGLang, Ollama, TGI, TabbyAPI, koboldcpp, text-generation-webui, Gemini: the form of an answer
    **_fields(
        """grammar_string regex_pattern structural_tag stop_regex format outlines_type schema response_schema
        output_schema output_format json_object choice""",
        advice=_FORM,
    ),
    **_fields("responseSchema response_mime_type", (*NOTHING, "text/plain"), _FORM),
    **_fields("options sampling_params parameters generation_config", advice=_UNPACKED),
    # what ours are called there
    **_called(
        "max_tokens",
        """n_predict num_predict max_new_tokens max_output_tokens max_tokens_to_sample max_length
        max_gen_tokens""",
        -1,
    ),
    **_called("min_tokens", "min_new_tokens min_length", 0),
    **_called("repetition_penalty", "repeat_penalty rep_pen", 1),
    **_called("seed", "sampling_seed", -1),
    **_called("stop", "stop_sequences stop_sequence stopping_strings stop_words", "", []),
    **_called("logprobs", "n_probs return_logprob top_logprobs_num top_n_tokens", 0, False),
    **_called("ignore_eos", "ban_eos_token", False),
    **_called("include_stop_str_in_output", "no_stop_trim", False),
    **_called("echo", "return_full_text", False),
    **_called("chat_template", "template", ""),
    **_called("thinking_token_budget", "thinking_budget reasoning_budget reasoning_budget_tokens", -1),
    **_called("top_p", "p", 1),
    **_called("top_k", "k", 0, -1),
    **_fields("do_sample", (None, True), "`temperature`: 0 takes the likeliest token"),
    **_fields("system", advice="it is a message with the role `system` here"),
    **_fields(
        """images image_data video_data audio_data image_urls multi_modal_data multimodal_data mm_data""",
        advice="media are parts of a message's `content` here",
    ),
    # how reasoning and calls are told apart from the rest
    **_fields("separate_reasoning parse_tool_calls", (None, True), "the answer's parts are always told apart here"),
    **_fields("thinking_forced_open", advice="the template says whether an answer begins with reasoning"),
    # samplers and penalties that are not offered
    **_fields(
        """mirostat mirostat_mode dynatemp_range dynamic_temperature dry_multiplier xtc_probability top_a
        epsilon_cutoff eta_cutoff smoothing_factor skew penalty_alpha no_repeat_ngram_size temperature_last
        negative_prompt""",
        (*NOTHING, 0),
    ),
    **_fields("top_n_sigma nsigma", (None, -1, 0)),
    **_fields("adaptive_target", (None, -1)),
    **_fields(
        "typical_p typ_p typical tfs_z tfs guidance_scale cfg_scale encoder_repetition_penalty num_beams beam_width",
        (None, 1),
    ),
    **_fields("min_keep", (None, 0, 1)),
    **_fields("samplers sampler_priority sampler_order", advice=_FIXED),
    **_fields(
        """repeat_last_n penalty_last_n rep_pen_range repetition_penalty_range repetition_context_size
        penalty_range""",
        (None, -1),
        "penalties count the whole text here",
    ),
    **_fields("penalize_nl penalize_newline", (None, True), "penalties count every token here"),
    **_fields(
        "custom_logit_processor custom_params logits_processors banned_tokens bantokens custom_token_bans "
        "token_healing input_prefix"
    ),
    **_called("bad_words", "banned_strings", []),
    **_called("logprob_token_ids", "token_ids_logprob", []),
    # what ends an answer, or goes along with it
    **_fields("n_indent t_max_predict_ms", (None, 0, -1)),
    **_fields("return_tokens return_hidden_states return_routed_experts search_parameters"),
    **_fields("logprob_start_len", (None, -1)),
    **_fields("safe_prompt raw watermark"),
}
"""Those that no endpoint has which generates text."""
_THOUGHTS = "`enable_thinking`, `reasoning_effort`, `thinking_token_budget` and `include_reasoning` say it here"
CHATS: Mapping[str, Foreign] = {
    **ANSWERS,
    **_fields("input_ids prompt_token_ids", advice="/v1/completions takes token ids, as its `prompt`"),
    **_fields("moderation"),
    **_fields("thinking", (None, {"type": "enabled"}, {"type": "auto"}), _THOUGHTS),
    **_fields("reasoning", (None, {}, {"enabled": True}, {"exclude": False}), _THOUGHTS),
}
"""Those that chats do not have."""

COMPLETIONS: Mapping[str, Foreign] = {
    **ANSWERS,
    **TOOLS,
    **_called("max_tokens", "n_predict num_predict max_new_tokens max_output_tokens max_length"),
    **_called("prompt", "input_ids prompt_token_ids"),
}
"""Here `max_tokens` is 16 by default: -1, for as many as there is room for, asks for something."""

_STATELESS = "responses are not stored here: send the whole conversation in `input`"
RESPONSES: Mapping[str, Foreign] = {
    **{name: field for name, field in ANSWERS.items() if name not in ("max_output_tokens", "logprobs")},
    **_called("max_output_tokens", "max_tokens max_completion_tokens"),
    **_called("input", "messages"),
    **_fields("previous_response_id conversation", (None,), _STATELESS),
    **_fields("background", (None, False), "answers come while the request is open"),
    **_fields("prompt", (None,), "prompts are not stored here: send `instructions` and `input`"),
    **_fields("context_management moderation", (None, [], {})),
}
"""And where an answer is a list of items."""

OLLAMA: Mapping[str, Foreign] = {
    **EVERYWHERE,
    **BEAMS,
    **_fields(
        "temperature top_p top_k min_p seed stop num_predict max_tokens repeat_penalty",
        (None,),
        "what is sampled how stands in `options`",
    ),
    **_called("format", "response_format json_schema"),
    **_called("think", "reasoning_effort enable_thinking"),
}
"""Those that Ollama's chats and texts do not have."""
OLLAMA_OPTIONS = frozenset(
    """
    num_keep num_ctx num_batch num_gpu main_gpu num_thread num_gqa numa low_vram f16_kv vocab_only use_mmap use_mlock
    logits_all embedding_only rope_frequency_base rope_frequency_scale mirostat_tau mirostat_eta draft_num_predict
    """.split()
)
"""Options that change nothing here: they say how a machine is used."""

PENALTY_WINDOWS = frozenset(
    """
    repeat_last_n penalty_last_n rep_pen_range repetition_penalty_range repetition_context_size penalty_range
    penalize_nl penalize_newline
    """.split()
)
"""What these bound may be off; then they change nothing."""

VECTORS: Mapping[str, Foreign] = {
    **FORMS,
    **TOOLS,
    **EVERYWHERE,
    **BEAMS,
    **_fields("allowed_token_ids bad_words logprob_token_ids"),
    **_fields("prompt_logprobs", (None, False)),
    **_fields(
        "output_dtype", (None, "float32", "float"), "vectors are float32; `embedding_type` of /v1/embeddings changes it"
    ),
    **_fields("embedding_types", (None, [], ["float"]), "/v2/embed has it, /v1/embeddings one `embedding_type`"),
    **_fields("parameters", advice="its entries are fields of their own here, beside the inputs"),
    **_fields("padding", (None, "do_not_pad")),
    **_fields("embd_normalize", (None, 2), "`use_activation`: false leaves vectors as they are"),
    **_called("dimensions", "output_dimension truncate_dim"),
    **_fields("instruction", (None,), "/score and /rerank have it; elsewhere it stands in the text"),
    **_fields("data late_chunking return_multivector"),
}
"""Those that no endpoint has which answers with vectors, classes or scores."""
UNPROMPTED: Mapping[str, Foreign] = {
    **VECTORS,
    **_fields("prompt_name input_type", (None,), "prompts are chosen at /v1/embeddings; a score has a side for each"),
}
"""And where no prompt is chosen."""
COMPARED: Mapping[str, Foreign] = {name: one for name, one in UNPROMPTED.items() if name != "instruction"}
"""And where the two sides of a comparison have a task."""

RECORDINGS: Mapping[str, Foreign] = {
    **_fields("best_of beam_size n", (None, "1")),
    **_fields("chunking_strategy", ("", "auto")),
    **_fields("include", ([],)),
    **_fields("length_penalty", ("1", "1.0")),
    **_fields("stop grammar suppress_tokens known_speaker_names known_speaker_references", ("", [])),
    **_fields(
        "word_timestamps return_timestamps timestamps",
        ("false", "False", "0"),
        "`timestamp_granularities[]` asks for times, of models that tell them",
    ),
    **_fields("offset_t duration clip_timestamps", ("", "0"), "the whole file is heard: send the part that counts"),
    **_fields("diarize tinydiarize", ("false", "False", "0"), "this model does not tell speakers apart"),
    **_fields("use_beam_search include_stop_str_in_output vad_filter", ("false", "False", "0")),
    **_fields("translate", ("false", "False", "0"), "/v1/audio/translations translates"),
    **_fields("task", ("transcribe",), "/v1/audio/translations translates"),
    **_called("prompt", "initial_prompt"),
    **_called("to_language", "target_language"),
    **_called("max_completion_tokens", "max_tokens max_new_tokens"),
    **_fields("vllm_xargs", ("", "{}")),
}
"""Those of the upload form, whose values are text."""

NO_THREADS = "thread_unsupported_request"
"""Anthropic's clients, which find this in an error's details, go on by sending whole conversations."""
_NOT_ANTHROPICS = "Anthropic's API has no such field; /v1/chat/completions has"
MESSAGES: Mapping[str, Foreign] = {
    **EVERYWHERE,
    **BEAMS,
    **_called("max_tokens", "max_completion_tokens max_output_tokens max_tokens_to_sample"),
    **_called("stop_sequences", "stop", "", []),
    **_called("output_config.format", "response_format", {"type": "text"}),
    **_called("output_config.effort", "reasoning_effort"),
    **_called("tool_choice.disable_parallel_tool_use", "parallel_tool_calls", True),
    **_called("messages", "prompt"),
    **_fields("n", (None, 1), "a message is one answer"),
    **_fields("mcp_servers", (None, []), "tools are called by the client: describe them in `tools`"),
    "thread": Foreign(
        (None,), "messages are not stored here: send the whole conversation in `messages`, without it", NO_THREADS
    ),
    **_called("thinking.budget_tokens", "thinking_token_budget", -1),
    **_called("thinking.type", "enable_thinking"),
    **_fields(
        """frequency_penalty presence_penalty logprobs top_logprobs logit_bias seed min_p min_tokens bad_words
        stop_token_ids ignore_eos include_stop_str_in_output echo logprob_token_ids return_token_ids
        return_tokens_as_token_ids""",
        (*NOTHING, 0),
        _NOT_ANTHROPICS,
    ),
    **_fields("repetition_penalty", (*NOTHING, 0, 1), _NOT_ANTHROPICS),
    **_fields("skip_special_tokens add_generation_prompt", (None, True), _NOT_ANTHROPICS),
    **_fields("allowed_token_ids prompt_logprobs truncate_prompt_tokens chat_template", (None,), _NOT_ANTHROPICS),
    **_fields(
        """structured_outputs guided_choice guided_grammar guided_regex guided_json json_schema grammar regex ebnf""",
        (None,),
        "`output_config.format` holds an answer to a JSON schema; /v1/chat/completions has other forms",
    ),
}
"""Those that Anthropic's Messages API does not have, and those of it that need a server that stores."""
COMPACTED: Mapping[str, Foreign] = {
    **MESSAGES,
    **_fields("compaction", (None,), "ask for a summary in a message, and send it in place of what it sums up"),
}
"""And where an answer is asked for, not a count."""

IGNORED = frozenset(
    """
    container context_management diagnostics inference_geo speed cache_control betas billing_policy
    fallback_credit_token fallbacks user_profile_id workspace_id
    metadata prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier
    service_tier session_id store verbosity
    cache_prompt id_slot n_keep n_discard timings_per_token return_progress response_fields post_sampling_probs
    reasoning_format mirostat_tau mirostat_eta dynatemp_exponent dry_base dry_allowed_length dry_penalty_last_n
    dry_sequence_breakers xtc_threshold smoothing_curve adaptive_decay grammar_lazy grammar_triggers preserved_tokens
    keep_alive num_ctx rid stream_reasoning details decoder_input_details
    """.split()
)
"""Fields that clients send and that change nothing here; some only say how something is done that was refused."""
