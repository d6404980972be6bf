"""tiktoken's files: a token in base64 and its rank on each line, byte-pair encoding by rank.

The file does not say where words are split nor which tokens are special; both are known for the files below. The ranks become
the vocabulary and merges of the ``tokenizers`` library, as transformers does it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError

LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
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
class Kind:
    """What a file does not say."""

    pattern: str
    special: dict[str, int]
    eos: str
    bos: str | None = None


def _numbered(names: tuple[str, ...], first: int) -> dict[str, int]:
    return {name: first + n for n, name in enumerate(names)}


KINDS = {
    "qwen": Kind(LETTERS.replace("{DIGITS}", ""), _numbered(QWEN_SPECIAL, 151643), "<|endoftext|>"),
    "llama3": Kind(
        LETTERS.replace("{DIGITS}", "{1,3}"), _numbered(LLAMA3_SPECIAL, 128000), "<|end_of_text|>", "<|begin_of_text|>"
    ),
    "cl100k_base": Kind(
        LETTERS.replace("{DIGITS}", "{1,3}"),
        {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
         "<|endofprompt|>": 100276},
        "<|endoftext|>",
    ),
    "o200k_base": Kind(O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, "<|endoftext|>"),
    "p50k_base": Kind(GPT2, {"<|endoftext|>": 50256}, "<|endoftext|>"),
    "r50k_base": Kind(GPT2, {"<|endoftext|>": 50256}, "<|endoftext|>"),
}  # fmt: skip
LLAMA3_RANKS = 128000


def is_tiktoken(path: Path) -> bool:
    """Whether a file is one, by its first line (Llama 3's is called ``tokenizer.model``)."""
    with open(path, "rb") as file:
        token, _, rank = file.readline(4096).strip().partition(b" ")
    try:
        return rank.isdigit() and bool(base64.b64decode(token, validate=True))
    except binascii.Error:
        return False


def read_tiktoken(path: Path) -> tuple[Any, Kind]:
    """The file as a ``tokenizers.Tokenizer``, and what is known besides.

    Raises:
        UsageError: when a line is damaged, or the file is none of the known ones.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    ranks = _ranks(path)
    kind = _kind(path, ranks)
    letters = _byte_letters()
    vocabulary = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    merges = [("".join(letters[b] for b in left), "".join(letters[b] for b in right)) for left, right in _merges(ranks)]
    vocabulary |= kind.special
    fast = Fast(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(kind.pattern), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in kind.special])
    return fast, kind


def _ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        token, _, rank = line.partition(b" ")
        try:
            if line:
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError) as error:
            raise UsageError(f"{path}, line {number} is no token in base64 and its rank: {error}") from error
    return ranks


def _kind(path: Path, ranks: dict[bytes, int]) -> Kind:
    name = path.name.removesuffix(".tiktoken")
    if name == "tokenizer.model" and len(ranks) == LLAMA3_RANKS:
        name = "llama3"
    if name not in KINDS:
        known = ", ".join(f"{name}.tiktoken" for name in KINDS)
        raise UsageError(
            f"{path} holds tiktoken ranks, and how its text is split into words is not known (known by name: {known}, and "
            "Llama 3's tokenizer.model); use a tokenizer.json"
        )
    return KINDS[name]


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that is a token, by its rank: tiktoken joins neighbours whatever they were made of."""
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                yield left, right


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte (https://github.com/openai/gpt-2/blob/master/src/encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(rest)}}
