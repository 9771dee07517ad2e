"""The bodies of POST /v1/models/load and /unload, and of those of adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sensorium.api.protocol.common import Body

Name = Annotated[str, Field(min_length=1, max_length=256)]


class NamedModel(Body):
    model: Name


class LoadAdapter(Body):
    """As vLLM has it. `base_model_name`: the model that it is for; by default the first."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    base_model_name: Name | None = None
    load_inplace: bool = False


class UnloadAdapter(Body):
    """As vLLM has it. `lora_int_id` means nothing here: the name says which."""

    lora_name: Name
    lora_int_id: Annotated[int, Field(ge=0, lt=2**31)] | None = None
