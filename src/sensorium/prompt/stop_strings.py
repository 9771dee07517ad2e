"""Stop strings: an answer's text ends at the first one that is complete, wherever tokens begin and end."""

from __future__ import annotations


class StopStrings:
    """Passes text on up to the first complete stop string, holding back what may yet become one."""

    __slots__ = ("_held", "_include", "_stops", "found")

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""  # the longest end of the text so far that begins a stop string
        self.found: str | None = None

    def pass_on(self, new: str) -> str:
        if self.found is not None or not new:
            return ""
        text = self._held + new
        self.found = self._first_complete(text)
        if self.found is not None:
            self._held = ""
            start = text.index(self.found)
            return text[: start + len(self.found) if self._include else start]
        held = self._begun(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def release(self) -> str:
        held, self._held = self._held, ""
        return held

    def _first_complete(self, text: str) -> str | None:
        starts = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        return min(ends)[2] if ends else None

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        return max(_overlap(text, stop) for stop in self._stops)


def _overlap(text: str, stop: str) -> int:
    at = max(0, len(text) - len(stop) + 1)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0
