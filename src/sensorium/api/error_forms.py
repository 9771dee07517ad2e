"""Which API a path belongs to, as far as errors go: known before routing, since what guards refuse has a form too."""

from __future__ import annotations

from sensorium.api.transport.asgi import ErrorForm

FORMS: dict[str, ErrorForm] = {}
"""By the beginning of the path."""


def error_form(path: str) -> ErrorForm | None:
    """None for OpenAI's."""
    return next((form for start, form in FORMS.items() if path.startswith(start)), None)
