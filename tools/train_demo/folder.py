"""The checkpoint's files beside the weights: a tiny Qwen2.5-Omni thinker, as transformers would write it.

Every picture is brought to about 112 x 112 pixels (16 rows of the decoder), every clip to eight frames of about
84 x 84.
"""

from __future__ import annotations

import json
import random
import string
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dialogs
import functions
from sounds import Speech
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from words import CAPITALS

VOCAB_SIZE = 3072  # at most: of few texts a tokenizer has fewer
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)
ROLES = ("system", "user", "assistant", "tool")  # words of every prompt
MARKERS = ("<tool_call>", "</tool_call>", "<tools>", "</tools>")  # tokens that are text

# Media first, wherever they stand in the message: so small a model learns to look with the question in mind only once.
# Functions stand behind the last question, so that their names know whether the question speaks of them.
CHAT_TEMPLATE = """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set last.user = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif part['type'] in ('video', 'video_url') -%}
<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif part['type'] in ('audio', 'audio_url', 'input_audio') -%}
<|audio_bos|><|AUDIO|><|audio_eos|>
{%- endif -%}
{%- endfor -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if tools and loop.index0 == last.user -%}
{{ '\\n<tools>\\n' }}
{%- for tool in tools -%}
{%- set one = tool.function if tool.function is defined else tool -%}
{%- set parameters = one.parameters if one.parameters is mapping else {} -%}
{{ one.name }}
{%- if one.description %} {{ one.description.strip().split('\\n')[0].split('. ')[0][:80] }}
{%- endif -%}
={{ one.name }}(
{%- for name, given in (parameters.properties or {}).items() -%}
{{ name }}{{ '' if name in (parameters.required or []) else '?' }}:
{%- if given is mapping and given.enum -%}
{{ given.enum | join('|') }}
{%- elif given is mapping and given.type is string -%}
{{ given.type }}
{%- elif given is mapping and given.anyOf and given.anyOf[0].type is string -%}
{{ given.anyOf[0].type }}
{%- else -%}
string
{%- endif -%}
{{ '' if loop.last else ',' }}
{%- endfor -%}
){{ '\\n' }}
{%- endfor -%}
</tools>
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{%- set one = call.function if call.function is defined else call -%}
{{ '\\n' if message['content'] or not loop.first else '' -}}
<tool_call>
{"name": "{{ one.name }}", "arguments": {{ one.arguments if one.arguments is string else one.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def sentences(speech: Speech, dialogs_read: int) -> Iterator[str]:
    """What the model reads and writes, to train the tokenizer on."""
    source = dialogs.Source(random.Random(1), speech, chinese=0.4)
    makers = {"image": 0.35, "video": 0.1, "audio": 0.1, "text": 0.2, "tools": 0.25}
    for _ in range(dialogs_read):
        kind = source.rng.choices(list(makers), list(makers.values()))[0]
        for turn in dialogs.make(source, kind):
            yield turn.question + turn.shown
            yield turn.answer


def make_tokenizer(texts: Sequence[str], begin_with: Tokenizer | None = None) -> Tokenizer:
    """Byte-level, digits apart. What occurs often is one token, letters with and without a space before them; every
    other word is spelt letter by letter, everywhere alike, so that a model can copy it. What is not of ASCII is merged
    as `begin_with` does, or as BPE learns from the texts."""
    old = begin_with or _trained(texts)
    model = json.loads(old.to_str())["model"]
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merges = [(f"{SPACE}", letter) for letter in string.ascii_letters]
    merges += [(one, other) for one, other in pairs if not any(char in string.ascii_letters for char in one + other)]
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokens |= dict.fromkeys(one + other for one, other in merges)
    tokens |= dict.fromkeys(_frequent(old, texts, VOCAB_SIZE - len(SPECIALS) - len(MARKERS) - len(tokens), tokens))
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = _pieces(), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in MARKERS])
    if tokenizer.get_vocab_size() > VOCAB_SIZE:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} ids, more than {VOCAB_SIZE}")
    return tokenizer


SPACE = "\u0120"  # as byte-level vocabularies write it


def _pieces() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("(?<=[a-z])(?=[A-Z])"), "isolated"),  # getWeather has the words of get_weather
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _trained(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pieces()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _frequent(old: Tokenizer, texts: Iterable[str], count: int, taken: Container[str]) -> list[str]:
    """The words to be one token: those that `old` has, then the most frequent, each with and without its space. Names
    are left to be spelt."""
    pieces, found = _pieces(), Counter[str](dict.fromkeys(ROLES, len(ROLES) * 1000))
    for text in texts:
        found.update(piece for piece, _ in pieces.pre_tokenize_str(text))
    known = old.get_vocab()
    spelt = {word for name in (*functions.CITIES, *functions.PEOPLE) for word in name.split()} - set(CAPITALS.values())
    chosen: dict[str, None] = {}
    for piece in sorted(found, key=lambda piece: (piece not in known, -found[piece], piece)):
        bare = piece.removeprefix(SPACE)
        if len(piece) < 2 or bare in spelt or (piece not in known and (found[piece] < 8 or not bare.isascii())):
            continue
        twin = bare if piece != bare else SPACE + bare
        pair = [piece, twin] if bare.isascii() and bare.isalpha() and len(bare) > 1 else [piece]
        if len(pair) == 2 and bare.islower() and (found[bare.capitalize()] or found[SPACE + bare.capitalize()]):
            pair += [bare.capitalize(), SPACE + bare.capitalize()]  # at the beginning of a question
        chosen |= dict.fromkeys(one for one in pair if one not in taken)
        if len(chosen) >= count:
            break
    return list(chosen)[:count]


def config(ids: dict[str, int]) -> dict[str, Any]:
    hidden = 256
    return {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "model_type": "qwen2_5_omni_thinker",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "audio_token_index": ids["<|AUDIO|>"],
        "image_token_index": ids["<|IMAGE|>"],
        "video_token_index": ids["<|VIDEO|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "audio_end_token_id": ids["<|audio_eos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
        "position_id_per_seconds": 4,
        "seconds_per_chunk": 2,
        "pad_token_id": ids["<|endoftext|>"],
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": 4,
            "hidden_size": 192,
            "intermediate_size": 448,
            "num_heads": 6,
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2, 3],
            "out_hidden_size": hidden,
        },
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "d_model": 160,
            "encoder_layers": 3,
            "encoder_attention_heads": 5,
            "encoder_ffn_dim": 512,
            "num_mel_bins": 80,
            "max_source_positions": 1500,
            "n_window": 100,
            "activation_function": "gelu",
            "scale_embedding": False,
            "output_dim": hidden,
        },
    }


def write(folder: Path, tokenizer: Tokenizer) -> None:
    """Every file but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: tokenizer.token_to_id(name) for name in SPECIALS}
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    pictures = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    files: dict[str, Any] = {
        "config.json": config(ids),
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "do_sample": False,
            "temperature": 0.0,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "max_new_tokens": 512,
            "strict_tools": True,  # so small a model misspells names of functions
            "pad_token_id": ids["<|endoftext|>"],
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5OmniProcessor",
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": 80,
            "sampling_rate": 16000,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": 300,
            "min_pixels": 9408,
            "max_pixels": 13200,
            **pictures,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "min_pixels": 6272,
            "max_pixels": 9500,
            "num_frames": 8,
            **pictures,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2TokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 32768,
            "add_bos_token": False,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
