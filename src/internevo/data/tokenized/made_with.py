"""Finds the tokenizer that tokenized data was made with, and compares it with a model's."""

from __future__ import annotations

from pathlib import Path

from ...errors import DataError, UsageError
from ...text.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint
from ..rows import tokens_and_labels
from .files import TokenFile
from .index import list_files
from .origin import find_origin
from .vocabulary import find_tokenizer

COMPARED_FILES, COMPARED, COMPARED_IDS = 5, 20, 200
"""Number of files, of documents in each, and of ids at their beginnings, that are compared between two tokenizers."""


def tokenizer_of_data(data: Path, model: Path | None, compares: bool = True) -> tuple[Tokenizer | None, list[str]]:
    """Finds the tokenizer that tokenized data was made with: next to the data, or where it was then, or else the model's.

    Args:
        model: the model's tokenizer.
        compares: read the beginning of the data to see whether the model's tokenizer is another one.

    Returns:
        The tokenizer, if there is one that can be opened; and notes for the user.

    Raises:
        DataError: if the model's tokenizer is another one, by which the ids of the data are other texts.
    """
    origin = find_origin(data)
    theirs = find_tokenizer(data, above=True)
    if theirs is None and origin is not None and not origin.problem():
        theirs = origin.load()
    if theirs is not None and not compares:
        return theirs, []
    try:
        own = None if model is None else load_tokenizer(model)
    except UsageError as error:
        own, reason = None, f"the model's tokenizer cannot be opened: {error}"
    else:
        reason = "there is no tokenizer (--tokenizer PATH)"
    if theirs is not None and own is not None and (example := _difference(data, theirs, own)):
        raise DataError(
            f"{data} was tokenized with {theirs.path}, and {own.path} is the model's tokenizer: {example}. Tokenize the text "
            "again with the model's tokenizer; or give --tokenizer PATH if the model has another one than its folder"
        )
    if theirs is None and origin is not None and own is not None and model is not None:
        if tokenizer_fingerprint(model) == origin.fingerprint:
            return own, []
        return own, [f"{origin.problem()}; it may be another one than the model's, {own.path}"]
    found = theirs or own
    return found, [] if found is not None else [f"bits per byte are not known, because {reason}"]


def _difference(data: Path, theirs: Tokenizer, own: Tokenizer) -> str:
    """Says which document of the data is another text by another tokenizer; empty if none of the first ones is.

    Special and added tokens are left out: two forms of the same tokenizer need not have the same ones. They may also differ in
    spaces around tokens when they decode, so another text counts only if it is encoded otherwise, too.
    """
    home = data if data.is_dir() else data.parent
    added = theirs.apart | own.apart
    for name, *_ in list_files(data)[:COMPARED_FILES]:
        file = TokenFile.open(home / name)
        for document in range(min(len(file.meta), COMPARED)):
            ids = tokens_and_labels(file.read(document))[0][:COMPARED_IDS].tolist()
            plain = [id_ for id_ in ids if id_ not in added]
            text, other = (
                tokenizer.decode([id_ for id_ in plain if id_ < tokenizer.vocab_size]) for tokenizer in (theirs, own)
            )
            if text != other and theirs.encode(text) != own.encode(text):
                begins = f"begins with {text[:30]!r} by the one, and {other[:30]!r} by the other"
                return f"document {document} of {file.path} {begins}"
    return ""
