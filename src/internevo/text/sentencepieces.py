"""SentencePiece ``tokenizer.model`` files, with the settings of the Hugging Face files next to them.

The model alone does not give the same ids as the Hugging Face tokenizer. Added tokens ("<|im_start|>") are split off before the
model reads the text, and their ids may come after those of the model. ``legacy = false`` changes where a space is put in front
of the text (as in Hugging Face's LlamaTokenizer, https://github.com/huggingface/transformers/pull/24565).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError
from .special_tokens import added_tokens, token_text

SPACE = "\u2581"
"""The character that SentencePiece uses for a space."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is split off from the text before the model reads it."""

    id: int
    special: bool = False
    lstrip: bool = False
    """Remove the spaces on its left."""
    rstrip: bool = False
    """Remove the spaces on its right."""


class Place(NamedTuple):
    """Where an added token is in a text."""

    number: int
    """Its number among the ids of the text."""
    start: int
    stop: int
    """The characters of the text that it stands for: from ``start``, before ``stop``. They may include spaces around it."""


class SentencePieceBackend:
    """A model of the ``sentencepiece`` library with the added tokens and settings of its folder."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Opens a model.

        Args:
            path: the ``.model`` file.
            settings: the settings of its folder.
        """
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # the library raises several types of errors
            raise UsageError(f"{path} is not a SentencePiece model: {error}") from error
        self.added = self._added(path.parent, settings)
        self.names = {token.id: name for name, token in self.added.items()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.split_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self.added else None
        self.legacy = settings.get("legacy") is not False
        self.add_prefix_space = settings.get("add_prefix_space") is not False
        self.unknown: str = token_text(settings.get("unk_token")) or "<unk>"
        if not self.legacy:
            self.model = _without_prefix(self.model)
            self.unknown_length = len(self.model.encode(self.unknown))
            self.space_id = self._piece_id(SPACE)

    def _added(self, folder: Path, settings: dict[str, Any]) -> dict[str, AddedToken]:
        """Returns the added tokens of the folder's files by their text."""
        found: dict[str, AddedToken] = {}
        for number, entry in added_tokens(folder, settings):
            text, flags = entry["content"], {key: bool(entry.get(key)) for key in ("special", "lstrip", "rstrip")}
            if number is None:
                number = self._piece_id(text)
            if number is None:
                number = max([self.model.get_piece_size() - 1, *(token.id for token in found.values())]) + 1
            found[text] = AddedToken(number, **flags)
        return found

    def _piece_id(self, piece: str) -> int | None:
        """Returns the id of a piece of the model, or None."""
        found = self.model.piece_to_id(piece)
        return found if self.model.id_to_piece(found) == piece else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        if self.split_pattern is None and self.legacy:
            return self._encode_plain(texts)
        return [ids for ids, _ in self._encode_parts(texts)]

    def encode_with_places(self, text: str) -> tuple[list[int], list[Place]]:
        """Returns the ids of a text, and the places of the added tokens."""
        [(ids, numbers)] = self._encode_parts([text])
        prefix = len(self._given(text)) - len(text)
        found = () if self.split_pattern is None else self.split_pattern.finditer(self._given(text), prefix)
        return ids, [Place(n, match.start() - prefix, match.end() - prefix) for n, match in zip(numbers, found, strict=True)]

    def _encode_parts(self, texts: list[str]) -> Iterator[tuple[list[int], list[int]]]:
        """Yields for each text its ids, and which of them are added tokens."""
        parts = [self._parts(text) for text in texts]
        encoded = iter(self._encode_plain([part for text_parts in parts for part in text_parts if isinstance(part, str)]))
        for text_parts in parts:
            ids, numbers = list[int](), list[int]()
            for part in text_parts:
                if isinstance(part, str):
                    ids += next(encoded)
                else:
                    numbers.append(len(ids))
                    ids.append(part.id)
            # As in Hugging Face's tokenizer, a text that begins with a special token gets no space in front.
            drop = int(not self.legacy and len(ids) > 1 and ids[0] == self.space_id and self._is_special(ids[1]))
            yield ids[drop:], [number - drop for number in numbers]

    def _is_special(self, number: int) -> bool:
        name = self.names.get(number)
        return name is not None and self.added[name].special

    def _parts(self, text: str) -> list[str | AddedToken]:
        """Splits a text into added tokens and the text between them."""
        text = self._given(text)
        if self.split_pattern is None:
            return [text]
        pieces = self.split_pattern.split(text)  # text, token, text, token, ..., text
        tokens = [self.added[name] for name in pieces[1::2]]
        parts: list[str | AddedToken] = []
        for number, plain in enumerate(pieces[::2]):
            if number and tokens[number - 1].rstrip:
                plain = plain.lstrip()
            if number < len(tokens) and tokens[number].lstrip:
                plain = plain.rstrip()
            parts += [plain] if plain else []
            parts += tokens[number : number + 1]
        return parts

    def _given(self, text: str) -> str:
        """Returns a text as it is encoded: with the space that is put in front of it."""
        if self.legacy or not text:
            return text
        return (SPACE if self.add_prefix_space else "") + text.replace(SPACE, " ")

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of texts without added tokens."""
        if self.legacy:
            return self.model.encode(texts, out_type=int, num_threads=1)
        # SentencePiece strips spaces at the beginning of a text, unless another token is in front. Its ids are removed again.
        guarded = [text.startswith((SPACE, " ")) for text in texts]
        given = [self.unknown + text if guard else text for text, guard in zip(texts, guarded, strict=True)]
        encoded = self.model.encode(given, out_type=int, num_threads=1)
        return [ids[self.unknown_length :] if guard else ids for ids, guard in zip(encoded, guarded, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, with the text of the added tokens. Ids that no token has are left out."""
        text, run, pieces = "", list[int](), self.model.get_piece_size()
        for number in [*ids, None]:
            if number is not None and number not in self.names:
                run += [number] if number < pieces else []
                continue
            if run:
                # The model drops a space at the beginning, which is right only at the beginning of the whole text.
                spaced = self.model.id_to_piece(run[0]).startswith(SPACE)
                text += (" " if spaced and text else "") + self.model.decode(run).removeprefix(" " if spaced else "")
                run = []
            text += "" if number is None else self.names[number]
        return text

    def size(self, added: bool = True) -> int:
        """Returns the size of the vocabulary, with or without added tokens: the largest id plus 1."""
        return max([self.model.get_piece_size(), *(token.id + 1 for token in self.added.values() if added)])

    def added_ids(self) -> set[int]:
        """Returns the ids of the added tokens, and of the model's control pieces, which no text has."""
        return {*self.names, *(number for number in range(self.model.get_piece_size()) if self.model.is_control(number))}

    def bos_eos(self) -> dict[str, str | None]:
        """Returns the tokens that begin and end a text, "bos_token" and "eos_token", as the model itself names them."""
        ids = {"bos_token": self.model.bos_id(), "eos_token": self.model.eos_id()}
        return {key: self.model.id_to_piece(number) if number >= 0 else None for key, number in ids.items()}

    def token_id(self, token: str) -> int | None:
        """Returns the id of an added token or of a piece of the model; None if there is no such token."""
        if token in self.added:
            return self.added[token].id
        found = self._piece_id(token)
        return None if found == self.model.unk_id() else found


def _without_prefix(model: Any) -> Any:
    """Returns a copy of the model that does not put a space in front of a text."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        model.serialized_model_proto()
    )
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
