"""tiktoken files: each line holds a token in base64 and its rank in byte-pair encoding.

Such a file does not say how text is split into words, nor which tokens are special. Both are known for the encodings below. As
in transformers, the ranks are converted to the vocabulary and the merges of the ``tokenizers`` library.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError

CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|reserved_special_token_4|>", "<|eot_id|>", *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
)  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """What has to be known about an encoding besides the ranks in its file."""

    pattern: str
    """A regular expression that matches the words; tokens never extend over two words."""
    special: dict[str, int]
    """The ids of the special tokens."""
    eos: str
    """The special token that ends a document."""
    bos: str | None = None
    """The special token that begins a document, if there is one."""


def _consecutive_ids(names: tuple[str, ...], first: int) -> dict[str, int]:
    return {name: first + n for n, name in enumerate(names)}


ENCODINGS = {
    "qwen": Encoding(
        CL100K_PATTERN.replace("{DIGITS}", ""), _consecutive_ids(QWEN_SPECIAL, 151643), "<|endoftext|>"
    ),
    "llama3": Encoding(
        CL100K_PATTERN.replace("{DIGITS}", "{1,3}"), _consecutive_ids(LLAMA3_SPECIAL, 128000),
        "<|end_of_text|>", "<|begin_of_text|>",
    ),
    "cl100k_base": Encoding(
        CL100K_PATTERN.replace("{DIGITS}", "{1,3}"),
        {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
         "<|endofprompt|>": 100276},
        "<|endoftext|>",
    ),
    "o200k_base": Encoding(O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, "<|endoftext|>"),
    "p50k_base": Encoding(GPT2_PATTERN, {"<|endoftext|>": 50256}, "<|endoftext|>"),
    "r50k_base": Encoding(GPT2_PATTERN, {"<|endoftext|>": 50256}, "<|endoftext|>"),
}  # fmt: skip
LLAMA3_RANKS = 128000
"""The number of ranks in Llama 3's file, which is called ``tokenizer.model``."""


def is_tiktoken(path: Path) -> bool:
    """Returns whether a file is a tiktoken file, judged by its first line (Llama 3's file is called ``tokenizer.model``)."""
    with open(path, "rb") as file:
        token, _, rank = file.readline(4096).strip().partition(b" ")
    try:
        return rank.isdigit() and bool(base64.b64decode(token, validate=True))
    except binascii.Error:
        return False


def read_tiktoken(path: Path) -> tuple[Any, Encoding]:
    """Reads a tiktoken file. Returns it as a ``tokenizers.Tokenizer``, and its encoding.

    Raises:
        UsageError: if a line is damaged, or the encoding is not one of ``ENCODINGS``.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    ranks = _read_ranks(path)
    encoding = _encoding_of(path, ranks)
    letters = _byte_letters()
    vocabulary = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    merges = [("".join(letters[b] for b in left), "".join(letters[b] for b in right)) for left, right in _merges(ranks)]
    vocabulary |= encoding.special
    fast = Fast(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(encoding.pattern), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in encoding.special])
    return fast, encoding


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        try:
            if line:
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError) as error:
            raise UsageError(f"{path}, line {number} is not a token in base64 followed by its rank: {error}") from error
    return ranks


def _encoding_of(path: Path, ranks: dict[bytes, int]) -> Encoding:
    """Returns the encoding of a file, which its name tells."""
    name = path.name.removesuffix(".tiktoken")
    if name == "tokenizer.model" and len(ranks) == LLAMA3_RANKS:
        name = "llama3"
    if name not in ENCODINGS:
        known = ", ".join(f"{name}.tiktoken" for name in ENCODINGS)
        raise UsageError(
            f"{path} is a tiktoken file of an unknown encoding: the file does not say how text is split into words (known by "
            f"their names: {known}, and Llama 3's tokenizer.model); use a tokenizer.json"
        )
    return ENCODINGS[name]


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yields every pair of tokens that together are a token, by the rank of that token.

    All pairs are needed, because tiktoken joins two neighbours however each of them was made.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        for split in range(1, len(token)):
            left, right = token[:split], token[split:]
            if left in ranks and right in ranks:
                yield left, right


def _byte_letters() -> dict[int, str]:
    """Returns the printable letter that GPT-2 uses for each byte (https://github.com/openai/gpt-2/blob/master/src/encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(rest)}}
