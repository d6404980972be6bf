"""One interface for all tokenizers: ``tokenizer.json``, SentencePiece ``.model``, tiktoken files and Hugging Face folders.

Python code in a tokenizer's folder is never run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import InternEvoError, UsageError
from ..storage.jsonfile import read_object, write_json
from .sentencepieces import SentencePieceBackend
from .special_tokens import token_text
from .tiktokens import is_tiktoken, read_tiktoken

FILES = ("tokenizer.json", "tokenizer.model")
"""The files that a tokenizer is read from; the first one that is in the folder is used."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""The files that name the special tokens; the first one that is in the folder is used."""


class Backend(Protocol):
    """Converts text to ids, without adding special tokens, and ids to text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text."""

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids."""

    def size(self) -> int:
        """Returns the size of the vocabulary. Every id is below it."""

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, or None if there is no such token."""


@dataclass
class Tokenizer:
    """A tokenizer, with the ids of the tokens that begin and end a document."""

    backend: Backend
    path: Path
    """The file or folder that it was read from."""
    bos_id: int | None = None
    eos_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary. Every id is below it."""
        return self.backend.size()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without the tokens that begin and end a document."""
        return self.backend.encode_batch([text])[0]

    def with_bos(self, text: str) -> list[int]:
        """Returns the ids of a text that begins a document. There is at least one id, also if the text is empty."""
        begin = self.bos_id if self.bos_id is not None else self.eos_id
        ids = self.encode(text)
        return [begin, *ids] if begin is not None and (self.bos_id is not None or not ids) else ids or [0]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids."""
        return self.backend.decode(ids)


class _TokenizersBackend:
    """A tokenizer of Hugging Face's ``tokenizers`` library."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    @classmethod
    def read(cls, path: Path) -> _TokenizersBackend:
        """Reads a tokenizer.json."""
        from tokenizers import Tokenizer as Fast

        try:
            return cls(Fast.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise UsageError(f"{path} is not a tokenizer.json: {error}") from error

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.fast.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.fast.decode(ids, skip_special_tokens=False)

    def size(self) -> int:
        return max(self.fast.get_vocab().values()) + 1  # ids may have gaps

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
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def size(self) -> int:
        return len(self.tokenizer)

    def token_id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return None if found == self.tokenizer.unk_token_id else found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer.

    Args:
        path: a tokenizer.json, SentencePiece .model or .tiktoken file, or a folder that contains a tokenizer.

    Raises:
        UsageError: if ``path`` does not exist, is not a tokenizer, or cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"the tokenizer {path} does not exist")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = [*(path / n for n in FILES if (path / n).is_file()), *sorted(path.glob("*.tiktoken"))]
        path = found[0] if found else path
    backend: Backend
    if path.suffix == ".json":
        backend = _TokenizersBackend.read(path)
    elif path.suffix == ".tiktoken" or (path.suffix == ".model" and is_tiktoken(path)):
        fast, encoding = read_tiktoken(path)
        backend = _TokenizersBackend(fast)
        bos = backend.token_id(encoding.bos) if encoding.bos else None
        return Tokenizer(backend, path, bos, backend.token_id(encoding.eos))
    elif path.suffix == ".model":
        backend = SentencePieceBackend(path)
    elif path.is_dir():
        backend = _TransformersBackend(path)
    else:
        raise UsageError(f"the tokenizer {path} is neither a folder nor a .json, .model or .tiktoken file")
    return Tokenizer(backend, path, *_bos_eos_ids(folder, backend))


def tokenizer_fingerprint(path: Path) -> str:
    """Returns a hash of the files that decide which ids a text has."""
    names = (*FILES, *SETTINGS)
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.name in names or f.suffix == ".tiktoken")
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def _bos_eos_ids(folder: Path, backend: Backend) -> tuple[int | None, int | None]:
    """Returns the ids that begin and end a document: those of the tokens that the folder's files name, else of usual names."""
    if isinstance(backend, SentencePieceBackend) and not (folder / "tokenizer_config.json").is_file():
        ids = (backend.model.bos_id(), backend.model.eos_id())
        return tuple(i if i >= 0 else None for i in ids)  # type: ignore[return-value]
    for name in SETTINGS:
        if (folder / name).is_file():
            table = read_object(folder / name)
            return _id_of(table.get("bos_token"), backend), _id_of(table.get("eos_token"), backend)
    for eos in ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"):
        if backend.token_id(eos) is not None:
            bos = {"</s>": "<s>", "<eos>": "<bos>", "<|end_of_text|>": "<|begin_of_text|>"}.get(eos)
            return (backend.token_id(bos) if bos else None), backend.token_id(eos)
    return None, None


def _id_of(token: Any, backend: Backend) -> int | None:
    text = token_text(token)
    return None if text is None else backend.token_id(text)


END_OF_TEXT = "<|endoftext|>"
"""The token that ends a document, in the tokenizers that are trained here."""


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
