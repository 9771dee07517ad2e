"""Short chat templates that show tools and write calls as those of the families do."""

from __future__ import annotations

_CHATML = (
    "{%% if tools %%}<|im_start|>system\n{%% for tool in tools %%}{{ tool | tojson }}\n{%% endfor %%}<|im_end|>\n"
    "{%% endif %%}"
    "{%% for message in messages %%}<|im_start|>{{ message.role }}\n%s"
    "{%% if message.content is string %%}{{ message.content }}{%% endif %%}"
    "{%% for call in message.tool_calls or [] %%}%s{%% endfor %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n%s{%% endif %%}"
)
_HISTORY = "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
_SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"

HERMES = _CHATML % (
    "",
    '\n<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>",
    "",
)
QWEN3 = _CHATML % (
    _HISTORY,
    '\n<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {% if call.function.arguments is string %}'
    "{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}}\n</tool_call>",
    _SWITCH,
)
QWEN_XML = _CHATML % (
    _HISTORY,
    "\n<tool_call>\n<function={{ call.function.name }}>\n{% for key, value in call.function.arguments|items %}"
    "<parameter={{ key }}>\n{{ value if value is string else value | tojson }}\n</parameter>\n{% endfor %}</function>"
    "\n</tool_call>",
    "<think>\n",
)
GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}<|{{ 'observation' if message.role == 'tool' else message.role }}|>\n"
    "{% if message.content is string %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>{{ call.function.name }}\n"
    "{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>\n"
    "<arg_value>{{ value if value is string else value | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think></think>\n{% endif %}"
)
LLAMA = (
    "<|begin_of_text|>{% if tools is not none %}<|start_header_id|>system<|end_header_id|>\n\nGiven the following "
    "functions\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|eot_id|>{% endif %}"
    "{% for message in messages %}{% if message.tool_calls %}"
    "{% if message.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ message.tool_calls[0].function.name }}", "parameters": '
    "{{ message.tool_calls[0].function.arguments | tojson }}}<|eot_id|>"
    "{% elif message.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ message.content }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL = (
    "{%% for message in messages %%}{%% if message.role == 'user' %%}"
    "{%% if tools is not none and loop.first %%}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{%% endif %%}"
    "[INST] {{ message.content }}[/INST]{%% elif message.tool_calls %%}%s</s>"
    "{%% elif message.role == 'tool' %%}{%% if message.tool_call_id | length != 9 %%}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%% endif %%}"
    "[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]"
    "{%% else %%} {{ message.content }}</s>{%% endif %%}{%% endfor %%}"
)
MISTRAL_LIST = _MISTRAL % (
    "[TOOL_CALLS] [{% for call in message.tool_calls %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]"
)
MISTRAL = _MISTRAL % (
    "{% for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]"
    "{{ call.function.arguments | tojson }}{% endfor %}"
)
DEEPSEEK = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{% if message.tool_calls %}<｜Assistant｜><｜tool▁calls▁begin｜>"
    "{% for call in message.tool_calls %}<｜tool▁call▁begin｜>{{ call.type }}<｜tool▁sep｜>{{ call.function.name }}\n"
    "```json\n{{ call.function.arguments }}\n```<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
    "{% else %}<｜{{ message.role | capitalize }}｜>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
GEMMA4 = (
    "{% for tool in tools or [] %}<|tool>declaration:{{ tool.function.name }}<tool|>{% endfor %}"
    "{% for message in messages %}<|turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for call in message.tool_calls or [] %}<|tool_call>call:{{ call.function.name + '{' }}"
    "{% for key, value in call.function.arguments | dictsort %}{% if not loop.first %},{% endif %}{{ key }}:"
    '{% if value is string %}<|"|>{{ value }}<|"|>{% else %}{{ value }}{% endif %}{% endfor %}}<tool_call|>{% endfor %}'
    "{{ message.content }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% if enable_thinking is defined and not enable_thinking %}"
    "<|channel>thought\n<channel|>{% endif %}{% endif %}"
)
HARMONY = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}<|start|>{% if message.tool_calls %}{% set call = message.tool_calls[0].function %}"
    "assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>"
    "{% else %}{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
PHI4 = (
    "{% for message in messages %}{% if message.role == 'system' and message.tools %}"
    "<|system|>{{ message.content }}<|tool|>{{ message.tools }}<|/tool|><|end|>"
    "{% else %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
KIMI = (
    "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_{{ message.role }}|>{{ message.role }}<|im_middle|>{{ message.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
GEMMA3 = (
    "{% set begun = namespace(system='') %}{% if messages[0].role == 'system' %}"
    "{% set begun.system = messages[0].content ~ '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ begun.system if loop.first else '' }}{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SEED_OSS = _CHATML % (
    "",
    "\n<seed:tool_call>\n<function={{ call.function.name }}>\n{% for key, value in call.function.arguments|items %}"
    "<parameter={{ key }}>{{ value }}</parameter>\n{% endfor %}</function>\n</seed:tool_call>",
    "",
)
HUNYUAN = _CHATML % (
    "",
    "{{ '<tool_calls>[' if loop.first else ', ' }}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{% if loop.last %}]</tool_calls>{% endif %}",
    "{# <think> <answer> </answer> #}",
)
STEP3_VL = HERMES.replace("<tool_call>", "<tool_calls>\n<tool_call>").replace(
    "</tool_call>", "</tool_call>\n</tool_calls>"
)
MINICPM5 = _CHATML % (
    "",
    '<function name="{{ call.function.name }}">{% for key, value in call.function.arguments|items %}'
    '<param name="{{ key }}">{{ value }}</param>{% endfor %}</function>',
    "",
)
VISION = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<|image_pad|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Pictures in a tool's result stay there."""
NO_TOOLS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
