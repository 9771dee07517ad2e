"""Chat templates that are known by name: of models that are embedded with other words than they chat with, and those
that tutorials pass to --chat-template as a file. Literal data.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath

from sensorium.checkpoint import chat_templates, pair_templates

# The image comes where its part stands; the state of the end token is the embedding.
_DSE_QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{{ '<|im_start|>assistant\n<|endoftext|>' }}"
)
# No markers of turns: parts in their order, a space between them.
_VLM2VEC = (
    "{% if messages | length > 1 %}"
    "{{ raise_exception('Embedding models of this kind take exactly one message.') }}"
    "{% endif %}"
    "{% set seen = namespace(images=0) %}"
    "{% for part in messages[0]['content'] %}"
    "{% if not loop.first %}{{ ' ' }}{% endif %}"
    "{% if part['type'] == 'image' %}"
    "{% set seen.images = seen.images + 1 %}{{ '<|image_' ~ seen.images ~ '|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)

# The instruction ends in punctuation; of a message's parts videos come first, then images, then texts.
_QWEN3_VL_EMBEDDING = (
    "{% macro of_kind(content, kind) %}{% for part in content if part['type'] == kind %}"
    "{% if kind == 'text' %}{{ part['text'] }}{% else %}"
    "{{ '<|vision_start|><|' + kind + '_pad|><|vision_end|>' }}{% endif %}{% endfor %}{% endmacro %}"
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}"
    "{{ of_kind(content, 'video') + of_kind(content, 'image') + of_kind(content, 'text') }}{% endif %}{% endmacro %}"
    "{% macro instruction() %}{% for message in messages if message['role'] == 'system' %}"
    "{{ said(message['content']) }}{% endfor %}{% endmacro %}"
    """{% set given = instruction() | trim or "Represent the user's input." %}"""
    "{{ '<|im_start|>system\n' + given }}"
    """{% if given[-1] not in "!\\"#%&'()*,-./:;?@[]_{}。！？，、；：）」』】》”’…" %}{{ '.' }}{% endif %}"""
    "{{ '<|im_end|>\n' }}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (said(message['content']) or 'NULL') + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)

POOLING: dict[str, str] = {"dse-qwen2": _DSE_QWEN2, "vlm2vec": _VLM2VEC, "qwen3-vl-embedding": _QWEN3_VL_EMBEDDING}
"""Part of a model's name -> the template for its embeddings."""

OF_BARE_TEXTS = frozenset({_QWEN3_VL_EMBEDDING})
"""Templates that texts without a chat around them go through too, as what a user says."""

NAMED: dict[str, str] = {
    "llava": chat_templates.VICUNA_LLAVA,
    "dse_qwen2_vl": _DSE_QWEN2,
    "vlm2vec": _VLM2VEC,
    "vlm2vec_phi3v": _VLM2VEC,
    "qwen3_vl_embedding": _QWEN3_VL_EMBEDDING,
    "qwen3_reranker": pair_templates.QWEN3_RERANKER,
    "qwen3_vl_reranker": pair_templates.QWEN3_VL_RERANKER,
    "mxbai_rerank_v2": pair_templates.MXBAI_RERANK,
    "bge_reranker_v2_gemma": pair_templates.BGE_GEMMA,
}
"""What --chat-template may name: also as the files that users of other servers know, `template_llava.jinja`."""


def pooling_template_of(names: Iterable[str]) -> str | None:
    """The template for embeddings of a model of one of these names, if it needs its own."""
    known = [name.rstrip("/").rpartition("/")[2].lower() for name in names]
    return next((template for key, template in POOLING.items() if any(key in name for name in known)), None)


def is_embedder_name(names: Iterable[str]) -> bool:
    """Whether a model is called an embedder, or is known as one."""
    known = [name.rstrip("/").rpartition("/")[2].lower() for name in names]
    return any(word in name for word in ("embed", *POOLING) for name in known)


def folder_names(folder: Path) -> tuple[str, ...]:
    """What a checkpoint is called by where it lies: the hub's cache has folders named by commits in the model's."""
    return folder.name, *(part for part in folder.parts[-3:] if part.startswith("models--"))


def is_embedder_template(flag: str | None) -> bool:
    """Whether --chat-template names one that is for embeddings."""
    return flag is not None and named_template(flag) in POOLING.values()


def named_template(flag: str) -> str | None:
    return NAMED.get(PurePath(flag).name.removesuffix(".jinja").removeprefix("template_"))
