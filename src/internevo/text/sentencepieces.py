"""A folder that holds a SentencePiece ``tokenizer.model``, with the settings of its Hugging Face files.

The model alone does not give the folder's ids: added tokens ("<|im_start|>") are cut out of the text before it sees it, may
have ids behind its own, and ``legacy = false`` changes where a space is put in front (as Hugging Face's LlamaTokenizer does,
https://github.com/huggingface/transformers/pull/24565).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..storage.jsonfile import read_object
from .special_tokens import token_text

SPACE = "\u2581"
"""SentencePiece's sign for a space."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Added:
    """A token that is cut out of the text as a whole."""

    id: int
    special: bool = False
    lstrip: bool = False
    """Takes blanks to its left away."""
    rstrip: bool = False


class SentencePiece:
    """The ``sentencepiece`` library, and what ``folder`` adds to it."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of the ``.model``; the settings lie beside it, if there are any.
        """
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # the library raises several kinds
            raise UsageError(f"{path} is not a SentencePiece model: {error}") from error
        settings = _settings(path.parent)
        self.added = self._added(path.parent, settings)
        self.names = {token.id: name for name, token in self.added.items()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self.added else None
        self.legacy = settings.get("legacy") is not False
        self.prefix = settings.get("add_prefix_space") is not False
        self.unknown: str = token_text(settings.get("unk_token")) or "<unk>"
        if not self.legacy:
            self.model = _without_prefix(self.model)
            self.skipped = len(self.model.encode(self.unknown))
            self.blank = self._own_id(SPACE)

    def _added(self, folder: Path, settings: dict[str, Any]) -> dict[str, Added]:
        found: dict[str, Added] = {}
        for number, entry in settings.get("added_tokens_decoder", {}).items():
            flags = {key: bool(entry.get(key)) for key in ("special", "lstrip", "rstrip")}
            found[entry["content"]] = Added(int(number), **flags)
        for name, number in _object(folder / "added_tokens.json").items():
            found.setdefault(name, Added(int(number)))
        more = settings.get("additional_special_tokens") or []
        for entry in [*(settings.get(key) for key in SPECIAL), *more]:
            text = token_text(entry)
            if text and text not in found:
                free = max([self.model.get_piece_size() - 1, *(token.id for token in found.values())]) + 1
                own = self._own_id(text)
                found[text] = Added(free if own is None else own, special=True)
        return found

    def _own_id(self, piece: str) -> int | None:
        found = self.model.piece_to_id(piece)
        return found if self.model.id_to_piece(found) == piece else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        if self.cut is None and self.legacy:
            return self._encode_plain(texts)
        parts = [self._parts(text) for text in texts]
        plain = [part for of_text in parts for part in of_text if isinstance(part, str)]
        encoded = iter(self._encode_plain(plain))
        joined = []
        for of_text in parts:
            ids = [part for of_part in of_text for part in (next(encoded) if isinstance(of_part, str) else [of_part.id])]
            # The space put in front is not there before a special token.
            drop = not self.legacy and len(ids) > 1 and ids[0] == self.blank and self._is_special(ids[1])
            joined.append(ids[1:] if drop else ids)
        return joined

    def _is_special(self, number: int) -> bool:
        name = self.names.get(number)
        return name is not None and self.added[name].special

    def _parts(self, text: str) -> list[str | Added]:
        """Added tokens, and the text between them."""
        if not self.legacy and text:
            text = (SPACE if self.prefix else "") + text.replace(SPACE, " ")
        if self.cut is None:
            return [text]
        pieces = self.cut.split(text)  # text, token, text, token, ..., text
        tokens = [self.added[name] for name in pieces[1::2]]
        parts: list[str | Added] = []
        for number, plain in enumerate(pieces[::2]):
            if number and tokens[number - 1].rstrip:
                plain = plain.lstrip()
            if number < len(tokens) and tokens[number].lstrip:
                plain = plain.rstrip()
            parts += [plain] if plain else []
            parts += tokens[number : number + 1]
        return parts

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        if self.legacy:
            return self.model.encode(texts, out_type=int, num_threads=1)
        # SentencePiece strips blanks in front, but not behind another piece.
        guarded = [text.startswith((SPACE, " ")) for text in texts]
        given = [self.unknown + text if guard else text for text, guard in zip(texts, guarded, strict=True)]
        encoded = self.model.encode(given, out_type=int, num_threads=1)
        return [ids[self.skipped :] if guard else ids for ids, guard in zip(encoded, guarded, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, added tokens by their names."""
        text, run = "", list[int]()
        for number in [*ids, None]:
            if number is not None and number not in self.names:
                run.append(number)
                continue
            if run:
                begins = self.model.id_to_piece(run[0]).startswith(SPACE)  # with a blank, which only a text's first loses
                text += (" " if begins and text else "") + self.model.decode(run).removeprefix(" " if begins else "")
                run = []
            text += "" if number is None else self.names[number]
        return text

    def size(self) -> int:
        """Number of ids."""
        return max([self.model.get_piece_size(), *(token.id + 1 for token in self.added.values())])

    def token_id(self, token: str) -> int | None:
        """The id of an added token or a piece."""
        if token in self.added:
            return self.added[token].id
        found = self._own_id(token)
        return None if found == self.model.unk_id() else found


def _settings(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, and what ``special_tokens_map.json`` says besides."""
    return {**_object(folder / "special_tokens_map.json"), **_object(folder / "tokenizer_config.json")}


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _without_prefix(model: Any) -> Any:
    """The same model, which puts no space in front by itself."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        model.serialized_model_proto()
    )
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
