"""Templates of rerankers that are published without one: a query and a document as the model was trained to read them.
Literal data. Messages have the roles query and document; a system message, if there is one, is the instruction.
"""

from __future__ import annotations

import json
import re

_PICK = (
    "{% macro said(role) %}{% for message in messages if message['role'] == role %}{{ message['content'] }}"
    "{% endfor %}{% endmacro %}"
    "{% set instruction = said('system') %}{% set query = said('query') %}{% set document = said('document') %}"
)
_JUDGE = (
    "{{ '<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n\' }}'
    "{{ '<Instruct>: ' }}"
)
QWEN3_RERANKER = (
    _PICK + _JUDGE + "{{ instruction or 'Given a web search query, retrieve relevant passages that answer the query' }}"
    "{{ '\n<Query>: ' + query + '\n<Document>: ' + document }}"
    "{{ '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)
# No line break after the instruction; a user's message is a document too, which is how its parts are found out.
QWEN3_VL_RERANKER = (
    "{% macro said(roles) %}{% for message in messages if message['role'] in roles %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}{% endmacro %}"
    + _JUDGE
    + "{{ said(['system']) or 'Given a search query, retrieve relevant candidates that answer the query.' }}"
    "{{ '<Query>:' + said(['query']) + '\n<Document>:' + said(['document', 'user']) }}"
    "{{ '<|im_end|>\n<|im_start|>assistant\n' }}"
)
MXBAI_RERANK = (
    _PICK + "{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n' }}"
    "{% if instruction %}{{ 'instruction: ' + instruction + '\n' }}{% endif %}"
    "{{ 'query: ' + query + '\ndocument: ' + document }}"
    "{{ '\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance "
    "judgment (0 for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n' }}"
)

BGE_GEMMA = (
    _PICK + "{{ bos_token + 'A: ' + query + '\nB: ' + document + '\n' }}"
    "{{ instruction or 'Given a query A and a passage B, determine whether the passage contains an answer to the query "
    "by providing a prediction of either \\'Yes\\' or \\'No\\'.' }}"
)


def template_of_places(text: str) -> str:
    """A template in llama.cpp's words, a text with the places {query} and {document}, as one for messages."""
    pieces = re.split(r"\{(query|document)\}", text)
    return _PICK + "".join(
        f"{{{{ {piece if index % 2 else json.dumps(piece, ensure_ascii=False)} }}}}"
        for index, piece in enumerate(pieces)
    )


def reads_pairs(source: str | None) -> bool:
    """Whether a template is written for a query and a document, each a message of that role: a reranker's."""
    return source is not None and _names(source, "query") and _names(source, "document")


def reads_instructions(source: str) -> bool:
    """Whether a template for pairs has a place for what the task is."""
    return _names(source, "system")


def _names(source: str, role: str) -> bool:
    return f"'{role}'" in source or f'"{role}"' in source
