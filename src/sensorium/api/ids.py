"""Ids of what an answer consists of: messages, items, calls."""

from __future__ import annotations

import secrets


def new_id(kind: str) -> str:
    """call_4f1c…: unguessable, and so unique."""
    return f"{kind}_{secrets.token_hex(12)}"
