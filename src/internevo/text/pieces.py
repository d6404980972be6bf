"""Makes text of ids one by one, so that it can be shown while it is generated."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""What a tokenizer decodes a part of a character to."""
CONTEXT = 16
"""Number of ids of the prompt that are decoded with the first new ones: a token may have a space in front that it shows only
after other text."""


class Pieces:
    """The text of the ids that follow a prompt, up to a stop text. All pieces together are what decoding all ids at once gives.

    A piece ends with a whole character, and before what may be the beginning of a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = (), strip: bool = False) -> None:
        """
        Args:
            prompt: the ids that the new ones follow, if the text is to be appended to theirs.
            stop: the text ends before the first of these that is complete.
            strip: leave out white space at both ends.
        """
        self.tokenizer, self.stop, self.strip = tokenizer, [text for text in stop if text], strip
        self.ids = list(prompt[-CONTEXT:])
        self.begin, self.end = 0, len(self.ids)
        """The ids from ``begin`` on are decoded with new ones; the text of those before ``end`` is known."""
        self.held, self.empty = "", True
        self.stopped = False
        """Whether a stop text has come."""

    def add(self, id_: int) -> str:
        """Takes the next id. Returns the text that is certain now, which may be empty."""
        self.ids.append(id_)
        piece = self._decode()
        if piece.endswith(UNFINISHED):
            return ""
        self.begin, self.end = self.end, len(self.ids)
        return self._pass_on(piece)

    def finish(self) -> str:
        """Returns the rest of the text, after the last id."""
        if self.stopped:
            return ""
        piece, self.end = self._decode(), len(self.ids)
        rest = self._pass_on(piece) + self.held
        return rest.rstrip() if self.strip else rest

    def _decode(self) -> str:
        known = self.tokenizer.decode(self.ids[self.begin : self.end]) if self.end > self.begin else ""
        return self.tokenizer.decode(self.ids[self.begin :])[len(known) :]

    def _pass_on(self, piece: str) -> str:
        text = self.held + piece
        if self.strip and self.empty:
            text = text.lstrip()
        ends = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            _, found = min(ends)
            self.stopped, self.held = True, ""
            return text[:found].rstrip() if self.strip else text[:found]
        certain = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        if self.strip:
            certain = len(text[:certain].rstrip())
        self.held = text[certain:]
        self.empty = self.empty and not certain
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of ``text`` are the beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
