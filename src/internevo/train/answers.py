"""The tokenizer that a run on chats keeps says where answers end, so that what is exported stops there in every program."""

from __future__ import annotations

from pathlib import Path

from ..config.data import STREAMS, Data
from ..data.build import parts_of
from ..data.encoding.questions import Ending
from ..data.tokenized.origin import find_origin
from ..models.huggingface.tokenizer import add_end
from ..text.chat import has_template
from ..text.tokenizer import load_tokenizer


def note_end_of_answers(tokenizer: Path, data: Data) -> None:
    """Adds the token with which the chat template ends answers to those that end a text, if a run trains on chats.

    Args:
        tokenizer: the run's copy of its tokenizer; it need not be there.
        data: the data section of the run's config.

    Raises:
        UsageError: if the tokenizer cannot be opened.
    """
    if not (tokenizer.is_dir() and trains_on_chats(data)):
        return
    found = load_tokenizer(tokenizer)
    end = Ending.usual(found).id if has_template(found) else None
    if end is not None:
        add_end(tokenizer, end)


def trains_on_chats(data: Data) -> bool:
    """Whether some of the training data are chats: streams by their format, and tokenized data by what they were made of."""
    for part in parts_of(data):
        folder, _ = part.folders
        origin = find_origin(Path(folder)) if folder and part.type not in STREAMS else None
        if folder and (part.format if part.type in STREAMS else origin and origin.format) == "chat":
            return True
    return False
