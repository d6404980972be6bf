"""Where the beginnings of a text end in its ids, without encoding each of them from the start."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from .tokenizer import Tokenizer


def encode_with_beginnings(tokenizer: Tokenizer, text: str, ends: Iterable[int]) -> tuple[list[int], list[int]]:
    """Encodes a text, and finds how much of its ids belongs to each of its beginnings, ``text[:end]``.

    A beginning may have other ids at its end than the text has there: "mat" and "mats" are each one token. What counts is how
    many ids both have in common, from the first one.

    Added tokens (``<|im_end|>``) divide a text: what follows one of them is encoded without regard to what is before it. So of
    a beginning only the part from its last added token is encoded again, or all of it if it has none. One part is encoded at a
    time, because a tokenizer needs many times the memory of a text.

    Returns:
        The ids of the text, and for each end the number of ids that they have in common with those of ``text[:end]``.
    """
    ids, places = tokenizer.backend.encode_with_places(text)
    stops = [place.stop for place in places]
    counts = []
    for end in ends:
        last = bisect_right(stops, end) - 1
        number, start = (places[last].number, places[last].start) if last >= 0 else (0, 0)
        part = tokenizer.encode(text[start:end])
        if last >= 0:
            # The added token is the first one of the part. Some tokenizers put a space in front of each text.
            part = part[part.index(ids[number]) :]
        counts.append(number + common_length(ids[number : number + len(part)], part))
    return ids, counts


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns the length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
