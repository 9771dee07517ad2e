"""A request's wishes for reasoning in the words that a template knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sensorium.prompt.formats.harmony import CHANNEL, MESSAGE

EFFORTS: Mapping[str, str] = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts that gpt-oss's template does not know -> the nearest that it does."""
_SWITCHES = ("enable_thinking", "thinking")


def thinking_variables(given: Mapping[str, Any], known: Collection[str], source: str) -> dict[str, Any]:
    """Variables of a request for a template that reads those `known`: an effort switches thinking on or off where the
    template has a switch and the request left it alone, and the switch has the name that the template reads."""
    found = dict(given)
    effort = found.get("reasoning_effort")
    switch = next((name for name in _SWITCHES if name in known), None)
    if switch is not None and isinstance(effort, str) and not any(name in found for name in _SWITCHES):
        found[switch] = effort != "none"
    if switch == "thinking" and "thinking" not in found and "enable_thinking" in found:
        found["thinking"] = found.pop("enable_thinking")
    if CHANNEL in source and MESSAGE in source and isinstance(effort, str):
        found["reasoning_effort"] = EFFORTS.get(effort, effort)
    return found
