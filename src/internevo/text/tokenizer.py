"""One interface for all tokenizers: ``tokenizer.json``, SentencePiece ``.model``, tiktoken files and Hugging Face folders.

Python code in a tokenizer's folder is never run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..errors import InternEvoError, UsageError, expect
from ..storage.hub import model_folder
from ..storage.jsonfile import read_object, write_json
from .sentencepieces import Place, SentencePieceBackend
from .special_tokens import END_OF_TEXT, SETTINGS, added_tokens, class_tokens, model_eos_ids, read_settings, token_text
from .tiktokens import is_tiktoken, read_tiktoken

FILES = ("tokenizer.json", "tokenizer.model")
"""The files that a tokenizer is read from; the first one that is in the folder is used."""
TEMPLATE = "chat_template.jinja"
"""The file of a chat template."""
TEMPLATES = "additional_chat_templates/*.jinja"
"""The files of chat templates that have other names than "default"."""
OTHER_FILES = ("vocab.json", "merges.txt", "vocab.txt")
"""Files of tokenizers that only transformers can read."""
FOR_TRANSFORMERS = ("*token*", "*vocab*", "*merges*", "*.model")
"""Patterns that a file of every tokenizer of transformers fits, by whatever name."""
ADDS_BOS = "add_bos_token"
"""The setting that says whether texts begin with the token that begins a document."""
USUAL_TOKENS = (
    (None, END_OF_TEXT), ("<s>", "</s>"), ("<bos>", "<eos>"), ("<|begin_of_text|>", "<|end_of_text|>"),
)  # fmt: skip
"""The tokens that begin and end a document if no file names them: the first whose end token the vocabulary has."""


class Backend(Protocol):
    """Converts text to ids, without adding special tokens, and ids to text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text."""

    def encode_with_places(self, text: str) -> tuple[list[int], list[Place]]:
        """Returns the ids of a text, and the places of added tokens among them, as far as it is known where they are."""

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids."""

    def size(self, added: bool = True) -> int:
        """Returns the size of the vocabulary, with or without added tokens: every such id is below it."""

    def added_ids(self) -> set[int]:
        """Returns the ids of added tokens, special ones among them."""

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, or None if there is no such token."""


@dataclass
class Tokenizer:
    """A tokenizer, with the ids of the tokens that begin and end a document. ``Tokenizer.load(path)`` opens one."""

    backend: Backend
    path: Path
    """The file or folder that it was read from."""
    bos_id: int | None = None
    eos_id: int | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    """The special tokens by their names in transformers, {"bos_token": "<s>", ...}, which chat templates use."""
    adds_bos: bool | None = None
    """Whether documents begin with the token that begins one, as the folder says. None: they do, unless it also ends them."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Opens a tokenizer.

        Args:
            path: a tokenizer.json, SentencePiece .model or .tiktoken file, or a folder that contains a tokenizer.

        Raises:
            UsageError: if ``path`` does not exist, is not a tokenizer, or cannot be read.
        """
        return load_tokenizer(path)

    @property
    def bos(self) -> list[int]:
        """What begins a document: one id or none. If its folder does not say otherwise (``adds_bos``), a token that begins and
        ends documents, as GPT-2's, is only their end."""
        begins = self.bos_id != self.eos_id if self.adds_bos is None else self.adds_bos
        return [self.bos_id] if begins and self.bos_id is not None else []

    @property
    def eos(self) -> list[int]:
        """What ends a document: one id or none."""
        return [] if self.eos_id is None else [self.eos_id]

    @property
    def folder(self) -> Path:
        """The folder that has its file and the files next to it."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def boundaries(self) -> set[int]:
        """The ids of the tokens that begin and end a document, whether or not documents have them."""
        return {id_ for id_ in (self.bos_id, self.eos_id) if id_ is not None}

    @property
    def apart(self) -> set[int]:
        """The ids of special and added tokens, which are no piece of a plain text."""
        return self.backend.added_ids() | self.boundaries

    @cached_property
    def vocab_size(self) -> int:
        """The size of the vocabulary. Every id is below it."""
        return self.backend.size()

    def fits(self, vocab_size: int) -> bool:
        """Whether it can be that of a model with this size of the vocabulary.

        Only ids of added tokens may be outside (a text model's tokenizer may have a token for images, as Gemma 3's), and not
        those that begin and end a document. A text with such a token is refused where it is read.
        """
        return self.vocab_size <= vocab_size or max(self.backend.size(added=False) - 1, *self.bos, *self.eos) < vocab_size

    def describe_outside(self, id_: int, vocab_size: int) -> str:
        """Returns the words of a message about a token that a model with this size of the vocabulary does not have."""
        text = self.decode([id_])
        return f"the token {text!r} (id {id_}), which is outside the vocabulary of {vocab_size} (model.vocab_size)"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without the tokens that begin and end a document."""
        return self.backend.encode_batch([text])[0]

    def with_bos(self, text: str) -> list[int]:
        """Returns the ids of a text that begins a document. There is at least one id, also if the text is empty."""
        return [*self.bos, *self.encode(text)] or self.eos or [0]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids."""
        return self.backend.decode(ids)


def _size(vocab: Mapping[str, int], left_out: set[int]) -> int:
    """Returns the largest id of a vocabulary plus 1, without some ids. (There may be gaps between ids.)"""
    return max(set(vocab.values()) - left_out, default=-1) + 1


def _places(encoding: Any, text: str, added: dict[int, str]) -> list[Place]:
    """Returns the places of added tokens in an ``Encoding`` of the library ``tokenizers``.

    The id of an added token that the text does not have there is a piece of the text that the tokenizer does not know.
    """
    ids = encoding.ids
    places = [Place(number, *encoding.token_to_chars(number)) for number, id_ in enumerate(ids) if id_ in added]
    return [place for place in places if text[place.start : place.stop].strip() == added[ids[place.number]].strip()]


class TokenizersBackend:
    """A tokenizer of Hugging Face's ``tokenizers`` library."""

    def __init__(self, fast: Any, folder: Path, settings: dict[str, Any]) -> None:
        """Adds the folder's special tokens, and switches off what would change the ids of a text."""
        from tokenizers import AddedToken

        fast.no_truncation()
        fast.no_padding()
        if getattr(fast.model, "dropout", None):
            fast.model.dropout = None
        known = {token.content for token in fast.get_added_tokens_decoder().values()}
        entries = [entry for _, entry in added_tokens(folder, settings) if entry["content"] not in known]
        try:
            fast.add_tokens([AddedToken(**entry) for entry in entries])
        except TypeError as error:
            raise UsageError(f"the added tokens in {folder} ({', '.join(SETTINGS)}) cannot be read: {error}") from error
        self.fast = fast
        self.added: dict[int, str] = {number: token.content for number, token in fast.get_added_tokens_decoder().items()}

    @classmethod
    def read(cls, path: Path, settings: dict[str, Any]) -> TokenizersBackend:
        """Reads a tokenizer.json."""
        from tokenizers import Tokenizer as Fast

        try:
            fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UsageError(f"{path} is not a tokenizer.json: {error}") from error
        return cls(fast, path.parent, settings)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.fast.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_places(self, text: str) -> tuple[list[int], list[Place]]:
        encoding = self.fast.encode(text, add_special_tokens=False)
        return encoding.ids, _places(encoding, text, self.added)

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids, skip_special_tokens=False)

    def size(self, added: bool = True) -> int:
        return _size(self.fast.get_vocab(), set() if added else self.added_ids())

    def added_ids(self) -> set[int]:
        return set(self.added)

    def token_id(self, token: str) -> int | None:
        return self.fast.token_to_id(token)


class _TransformersBackend:
    """A tokenizer in a folder that only transformers can read (vocab.json and merges.txt, vocab.txt, ...)."""

    def __init__(self, path: Path) -> None:
        code = sorted(path.glob("tokenization_*.py"))
        if code:
            raise UsageError(
                f"the tokenizer of {path} exists only as code ({code[0].name}), and code from a model's folder is not run; use "
                "a tokenizer.json, tokenizer.model or .tiktoken file of the same tokenizer"
            )
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UsageError(
                f"{path} has neither tokenizer.json nor tokenizer.model; to read other files: pip install 'internevo[hf]'"
            ) from None
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise UsageError(f"{path} is not a folder of a tokenizer: {error}") from error

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def encode_with_places(self, text: str) -> tuple[list[int], list[Place]]:
        found = self.tokenizer(text, add_special_tokens=False)
        if not self.tokenizer.is_fast:  # transformers' own code does not say where tokens are in a text
            return found["input_ids"], []
        added = {number: self.tokenizer.convert_ids_to_tokens(number) for number in self.added_ids()}
        return found["input_ids"], _places(found.encodings[0], text, added)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def size(self, added: bool = True) -> int:
        return _size(self.tokenizer.get_vocab(), set() if added else self.added_ids())

    def added_ids(self) -> set[int]:
        return {*self.tokenizer.get_added_vocab().values(), *self.tokenizer.all_special_ids}

    def token_id(self, token: str) -> int | None:
        return self.tokenizer.get_vocab().get(token)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer.

    Args:
        path: a tokenizer.json, SentencePiece .model or .tiktoken file, or a folder that contains a tokenizer; or the name of a
            model on the Hugging Face Hub (owner/name).

    Raises:
        UsageError: if ``path`` does not exist, is not a tokenizer, or cannot be read.
    """
    expect(path, (str, Path), "a tokenizer is given by a path or a name")
    path = model_folder(path, weights=False)
    if not path.exists():
        raise UsageError(f"the tokenizer {path} does not exist")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = [*(path / n for n in FILES if (path / n).is_file()), *sorted(path.glob("*.tiktoken"))]
        path = found[0] if found else path
    settings = read_settings(folder)
    usual: dict[str, str | None] = {}
    backend: Backend
    if path.suffix == ".json":
        backend = TokenizersBackend.read(path, settings)
    elif path.suffix == ".tiktoken" or (path.suffix == ".model" and is_tiktoken(path)):
        fast, encoding = read_tiktoken(path)
        backend = TokenizersBackend(fast, folder, settings)
        usual = {"bos_token": encoding.bos, "eos_token": encoding.eos}
    elif path.suffix == ".model":
        backend = SentencePieceBackend(path, settings)
        usual = backend.bos_eos()
    elif path.is_dir() and not any(file for pattern in FOR_TRANSFORMERS for file in path.glob(pattern)):
        raise UsageError(f"{path} is not a folder of a tokenizer: it has no {', '.join((*FILES, *OTHER_FILES))} or *.tiktoken")
    elif path.is_dir():
        backend = _TransformersBackend(path)
        settings = {**backend.tokenizer.special_tokens_map, ADDS_BOS: settings.get(ADDS_BOS)}
    else:
        raise UsageError(f"the tokenizer {path} is neither a folder nor a .json, .model or .tiktoken file")
    return _with_special_tokens(backend, path, folder, settings, usual)


def as_tokenizer(given: Tokenizer | str | Path) -> Tokenizer:
    """Returns a tokenizer that is given as one, or by its path or name.

    Raises:
        UsageError: as ``load_tokenizer``.
    """
    return given if isinstance(given, Tokenizer) else load_tokenizer(given)


def tokenizer_fingerprint(path: Path) -> str:
    """Returns a hash of the files that decide which ids a text or a chat has."""
    home, patterns = (path, [*FILES, *OTHER_FILES, "*.tiktoken"]) if path.is_dir() else (path.parent, [])
    found = {file for pattern in (*patterns, *SETTINGS, TEMPLATE, TEMPLATES) for file in home.glob(pattern)}
    files = sorted(found if path.is_dir() else {*found, path})
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def _with_special_tokens(
    backend: Backend, path: Path, folder: Path, settings: dict[str, Any], usual: dict[str, str | None]
) -> Tokenizer:
    """Returns the tokenizer with its special tokens.

    Each is the token that the folder's files name (null: there is none), else that of the folder's class of tokenizers in
    transformers, else the one in ``usual``. If all this names no end token, it is the model's, or one with a usual name.
    """
    tokens = {key: text for key, token in settings.items() if key.endswith("_token") and (text := token_text(token))}
    for table in (class_tokens(folder, settings), usual):
        for key, text in table.items():
            if key not in settings and key not in tokens and text and backend.token_id(text) is not None:
                tokens[key] = text
    if "eos_token" not in settings and "eos_token" not in tokens:
        models = [(None, backend.decode([number])) for number in model_eos_ids(folder)[:1] if 0 <= number < backend.size()]
        bos, eos = next(((b, e) for b, e in (*models, *USUAL_TOKENS) if backend.token_id(e) is not None), (None, None))
        tokens |= {key: text for key, text in (("bos_token", bos), ("eos_token", eos)) if text and key not in tokens}
    bos_id, eos_id = (backend.token_id(tokens[key]) if key in tokens else None for key in ("bos_token", "eos_token"))
    adds_bos = settings.get(ADDS_BOS)
    return Tokenizer(backend, path, bos_id, eos_id, tokens, adds_bos if isinstance(adds_bos, bool) else None)


def train_bpe(texts: Any, vocab_size: int, folder: Path) -> Path:
    """Trains a byte-level BPE tokenizer and writes it to ``folder`` in Hugging Face's format.

    Args:
        texts: an iterator over the texts of documents.
        vocab_size: the size of the vocabulary, at least 257 (every byte and the end token).

    Returns:
        The path of ``tokenizer.json``.

    Raises:
        UsageError: if ``vocab_size`` is too small.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise UsageError(f"--vocab-size {vocab_size} is too small: byte-level BPE needs at least {len(alphabet) + 1}")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    try:
        fast.save(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InternEvoError(f"{path} cannot be written: {error}") from error
    write_json(folder / "tokenizer_config.json", TRAINED_SETTINGS, indent=2)
    return path


TRAINED = ("tokenizer.json", "tokenizer_config.json")
"""The files of a tokenizer that was trained here."""
TRAINED_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}
"""What is in the second of them. By it, such a tokenizer is recognised."""


def is_trained_here(folder: Path) -> bool:
    """Returns whether the tokenizer in a folder, if there is one, was made by ``train_bpe``."""
    try:
        return (folder / TRAINED[0]).is_file() and read_object(folder / TRAINED[1]) == TRAINED_SETTINGS
    except (OSError, UsageError):
        return False
