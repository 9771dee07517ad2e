"""Pages and queries of a tiny model of late interaction, as the server writes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from sensorium.checkpoint.configs import Checkpoint
from sensorium.processors.base import Processor
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message
from sensorium.serving.concurrency import PromptThreads
from sensorium.serving.late import LatePrompts
from sensorium.types import MediaItem, Prompt


def page_prompt(checkpoint: Checkpoint, processor: Processor, page: MediaItem) -> Prompt:
    """Through the family's template."""
    assert checkpoint.chat_template is not None
    template = LocalTemplate(
        checkpoint.chat_template,
        processor.tokenizer.with_literals(processor.literals, special=True),
        modalities=processor.modalities,
        placeholder=processor.placeholder,
    )
    text = template.render([Message("user", (MediaPart("image"),))], add_generation_prompt=False)
    return processor.build(text, [processor.process(page)], add_special_tokens=False)


def late_prompts(checkpoint: Checkpoint, processor: Processor) -> LatePrompts:
    """What writes queries."""
    assert checkpoint.family.late is not None
    prompts = SimpleNamespace(tokenizer=processor.tokenizer, prompt_of_ids=lambda ids, param: Prompt(ids))
    limit = cast("Any", SimpleNamespace(max_model_len=500))
    return LatePrompts(checkpoint.family.late, cast("Any", prompts), limit, PromptThreads(2), filler=None)
