"""Writes tokenizers into GGUF files, in the forms that llama.cpp reads.

llama.cpp has one implementation for each kind of tokenizer, by name: "llama" merges SentencePiece's pieces by their scores,
"t5" finds the most likely pieces, and "gpt2" is byte-level BPE with a named way to split texts into words. What it would read
in another way is refused here. Added tokens are of type CONTROL (it hides them, and finds them in texts only if it is told to),
or USER_DEFINED (it always splits them off).
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...text.chat import templates
from ...text.sentencepieces import SPACE, SentencePieceBackend
from ...text.special_tokens import read_settings
from ...text.tiktokens import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, is_tiktoken
from ...text.tokenizer import Tokenizer, TokenizersBackend, load_tokenizer
from .tokenizer import special_ids

MODEL = "tokenizer.model"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens: SentencePiece's, which are also those of GGUF files."""
LOWEST = -10000.0
"""The score of ids without a token."""
ADDED = -1000.0
"""The score of added tokens."""
NEXT_TURN = "<|user|>"
"""A token that ends the answers of GLM-4; llama.cpp knows the other ones by their names."""
PADDING = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
"""Added tokens that models use as control tokens, whatever their files say."""
CONTROL_NAME = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>")
"""So are those with such a name."""
UNUSED_NAME = re.compile(r"\[UNUSED_TOKEN_\d+\]")
"""Pieces of InternLM2's vocabulary that stand for nothing."""


@dataclass
class Vocabulary:
    """The tokens of a model, as a GGUF file has them."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, size: int) -> Vocabulary:
        """Returns one in which no id has a token."""
        return cls([f"[PAD{number}]" for number in range(size)], [UNUSED] * size, [LOWEST] * size)

    def put(self, number: int, text: str, kind: int, score: float = 0.0) -> None:
        """Sets a token. One that is outside the model's vocabulary is left out: the model cannot compute with it."""
        if number < len(self.tokens):
            # A text of zero bytes would be read as empty; llama.cpp gives empty ones this name.
            self.tokens[number] = text if text.strip("\0") else f"[EMPTY_{number}]"
            self.types[number], self.scores[number] = kind, score

    def put_added(self, added: dict[int, tuple[str, bool]]) -> None:
        """Sets added tokens: id -> (text, whether it is special)."""
        for number, (text, special) in added.items():
            if number < len(self.tokens) and self.tokens[number] == text and self.types[number] in (UNKNOWN, CONTROL):
                continue
            if special or text in PADDING or CONTROL_NAME.fullmatch(text):
                self.put(number, text, CONTROL, ADDED)
            else:
                self.put(number, text.replace(SPACE, " "), USER_DEFINED, ADDED)


def write_tokenizer(writer: Any, path: Path | None, vocab_size: int) -> None:
    """Adds a tokenizer to a GGUF file. A model without one gets none.

    Args:
        writer: a ``gguf.GGUFWriter``.
        path: the file or folder of the tokenizer.
        vocab_size: the size of the model's vocabulary. The file has as many tokens.

    Raises:
        UsageError: if llama.cpp cannot read texts as this tokenizer does, or its files cannot be read.
    """
    if path is None:
        writer.add_tokenizer_model("no_vocab")
        return
    file = path / MODEL if path.is_dir() else path
    tokenizer, vocabulary = load_tokenizer(path), Vocabulary.empty(vocab_size)
    if file.suffix == ".model" and file.is_file() and not is_tiktoken(file):
        _sentencepiece(writer, file, tokenizer, vocabulary)
    elif isinstance(tokenizer.backend, TokenizersBackend):
        values = json.loads(tokenizer.backend.fast.to_str())
        vocabulary.merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in values["model"].get("merges") or []]
        kind = _pieces if values["model"].get("byte_fallback") else _byte_level
        kind(writer, values, tokenizer, vocabulary)
    else:
        raise UsageError(f"{path} is neither a SentencePiece model nor a tokenizer.json: a GGUF file cannot have it")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    _special_tokens(writer, path, tokenizer, vocabulary)
    if isinstance(tokenizer.backend, TokenizersBackend) and _strips_as_phi3(tokenizer.backend, vocabulary):
        writer.add_name("Phi-3")


def _strips_as_phi3(backend: TokenizersBackend, vocabulary: Vocabulary) -> bool:
    """Whether added tokens take the white space after them as those of Phi-3 do: all but three. A file cannot say this of a
    token, but llama.cpp does it in models of this name (src/llama-vocab.cpp)."""
    added = backend.fast.get_added_tokens_decoder()
    special = {number for number, kind in enumerate(vocabulary.types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
    kept = {vocabulary.tokens[number] for number in special if number not in added or not added[number].rstrip}
    return kept == {"<unk>", "<s>", "<|endoftext|>"} and "</s>" in vocabulary.tokens


def _special_tokens(writer: Any, path: Path, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Adds which tokens begin and end a text, whether llama.cpp adds them, the merges, and the chat template."""
    import gguf

    folder = tokenizer.folder
    try:
        special = gguf.SpecialVocab(folder, n_vocab=len(vocabulary.tokens))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the special tokens in {folder} cannot be read: {error}") from error
    special.merges = vocabulary.merges
    ids: dict[str, Any] = {**special_ids(path)}
    for key, value in ids.items():
        given = value[0] if isinstance(value, list) else value  # a file has one end token
        if isinstance(given, int) and 0 <= given < len(vocabulary.tokens):
            special.special_token_ids.setdefault(key.removesuffix("_token_id"), given)
    ends = ids.get("eos_token_id")
    if isinstance(ends, list) and NEXT_TURN in vocabulary.tokens and vocabulary.tokens.index(NEXT_TURN) in ends:
        special.special_token_ids.setdefault("eot", vocabulary.tokens.index(NEXT_TURN))
    if UNKNOWN in vocabulary.types:  # llama.cpp's own number is another one for some kinds
        special.special_token_ids.setdefault("unk", vocabulary.types.index(UNKNOWN))
    if "bos" not in special.special_token_ids:
        special.add_special_token["bos"] = False
    elif vocabulary.merges:  # otherwise, llama.cpp adds it in front of every text, if it has a name for how texts are split
        special.add_special_token.setdefault("bos", False)
    if special.chat_template is None:
        special.chat_template = templates(folder).get("default")
    special.add_to_gguf(writer, quiet=True)


# SentencePiece -------------------------------------------------------------------------------------------------------


def _sentencepiece(writer: Any, file: Path, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Adds a SentencePiece model, with the added tokens of its folder."""
    from sentencepiece import sentencepiece_model_pb2

    settings = read_settings(file.parent)
    model = SentencePieceBackend(file, settings)
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())  # type: ignore[attr-defined]
    kinds = {proto.trainer_spec.BPE: "llama", proto.trainer_spec.UNIGRAM: "t5"}
    kind = kinds.get(proto.trainer_spec.model_type)
    if kind is None:
        raise UsageError(f"{file} is a SentencePiece model of words or characters: a GGUF file cannot have it")
    if kind == "t5" and proto.trainer_spec.byte_fallback:
        raise UsageError(f"{file} is a unigram model with bytes for unknown characters, which llama.cpp does not use")
    for number, piece in enumerate(proto.pieces):
        if piece.type == USER_DEFINED:
            vocabulary.put(number, piece.piece.replace(SPACE, " "), USER_DEFINED, piece.score)
        else:
            unused = UNUSED_NAME.fullmatch(piece.piece)
            vocabulary.put(number, piece.piece, UNUSED if unused else piece.type, piece.score)
    vocabulary.put_added({token.id: (text, token.special) for text, token in model.added.items()})
    if isinstance(tokenizer.backend, TokenizersBackend):  # of the tokenizer.json next to it
        vocabulary.put_added(_added(tokenizer.backend))
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(vocabulary.scores)
    normalizer = proto.normalizer_spec
    writer.add_add_space_prefix(normalizer.add_dummy_prefix and settings.get("add_prefix_space") is not False)
    if kind == "t5":
        writer.add_remove_extra_whitespaces(normalizer.remove_extra_whitespaces)
        if normalizer.precompiled_charsmap:
            writer.add_precompiled_charsmap(normalizer.precompiled_charsmap)


def _added(backend: TokenizersBackend) -> dict[int, tuple[str, bool]]:
    return {number: (token.content, token.special) for number, token in backend.fast.get_added_tokens_decoder().items()}


def _pieces(writer: Any, values: dict[str, Any], tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Adds a ``tokenizer.json`` that was made from a SentencePiece model, which is not there.

    llama.cpp merges the pair whose piece has the highest score first. A piece's score is therefore the negative rank of its
    first merge, as in the original.

    Raises:
        UsageError: if it treats spaces in another way than SentencePiece.
    """
    model = values["model"]
    unknown = model.get("unk_token") or tokenizer.special_tokens.get("unk_token")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(vocabulary.merges):
        left, _, right = pair.partition(" ")
        ranks.setdefault(left + right, rank)
    for text, number in model["vocab"].items():
        kind = UNKNOWN if text == unknown else BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else NORMAL
        vocabulary.put(number, text, kind, -float(ranks.get(text, len(ranks))))
    assert isinstance(tokenizer.backend, TokenizersBackend)
    vocabulary.put_added(_added(tokenizer.backend))
    vocabulary.merges = []
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(_space_in_front(values, tokenizer.path))


def _space_in_front(values: dict[str, Any], path: Path) -> bool:
    """Whether a space is put in front of a text. Raises UsageError if spaces become something else than SentencePiece's."""
    parts = [part for key in ("normalizer", "pre_tokenizer") for part in _parts(values.get(key))]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = False
    for part in parts:
        kind = part["type"]
        if kind == "Prepend" and part.get("prepend") == SPACE:
            first = True
        elif kind == "Metaspace" and part.get("replacement") == SPACE:
            first = part.get("prepend_scheme", "always") != "never"
        elif part != replaces and not (kind == "Split" and part.get("pattern") == {"String": " "}):
            raise UsageError(f"{path} treats texts in a way that a GGUF file cannot describe ({kind})")
    return first


# Byte-level BPE ------------------------------------------------------------------------------------------------------

DIGITS = r"\p{N}"
HAN = r"[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
CASED = (
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂ"
    "ℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
"""Letters that are upper or lower case; the pattern of DeepSeek-V2 lists them."""
WIDE = "[一-龥ࠀ-一가-퟿]+"
TEKKEN = O200K_PATTERN.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: dict[tuple[str, ...], str] = {
    (GPT2_PATTERN,): "gpt-2",
    (DIGITS, GPT2_PATTERN): "smollm",
    (CL100K_PATTERN.replace("{DIGITS}", ""),): "qwen2",
    (CL100K_PATTERN.replace("{DIGITS}", "{1,3}"),): "llama-bpe",
    (TEKKEN,): "tekken",
    (O200K_PATTERN,): "gpt-4o",
    (r"\p{N}{1,3}", HAN, DEEPSEEK): "deepseek-v3",
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", WIDE, DIGITS): "deepseek-coder",
    (r"[\r\n]", rf"\s?{CASED}", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", WIDE, DIGITS): "deepseek-llm",
}
"""The regular expressions that split a text, one after the other -> llama.cpp's name of them."""
JOINS_DIGITS = ("deepseek-llm",)
"""The names with which llama.cpp does not split digits from each other: it makes no difference if no token joins them."""
IGNORES_MERGES = ("llama-bpe", "tekken")
"""The names with which llama.cpp takes a word that is a token as it is (``ignore_merges``). With all others it merges its
bytes, whatever the tokenizer's file says (src/llama-vocab.cpp)."""
MERGES = {"llama-bpe": "smaug-bpe"}
"""Another name of the same way to split texts, with which llama.cpp merges."""


def _byte_level(writer: Any, values: dict[str, Any], tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Adds a tokenizer of byte-level BPE.

    Raises:
        UsageError: if it is of another kind, or has a way to split texts that llama.cpp has no name for, or finds the token of
            a word in another way.
    """
    model, normalizers = values["model"], [part["type"] for part in _parts(values.get("normalizer"))]
    parts, path = _parts(values.get("pre_tokenizer")), tokenizer.path
    if model.get("type") != "BPE" or not any(part["type"] == "ByteLevel" for part in parts):
        raise UsageError(f"{path} is neither byte-level BPE nor next to a {MODEL}: a GGUF file cannot have it")
    name = SPLITS.get(tuple(_split(part, path) for part in parts if part["type"] != "ByteLevel" or part.get("use_regex", True)))
    if name is None or set(normalizers) - {"NFC"} or any(part.get("add_prefix_space") for part in parts):
        raise UsageError(f"{path} splits texts in a way that llama.cpp has no name for ({normalizers or ''}{parts})")
    assert isinstance(tokenizer.backend, TokenizersBackend)
    ignores = bool(model.get("ignore_merges"))
    name = name if ignores else MERGES.get(name, name)
    if ignores != (name in IGNORES_MERGES) and (word := _word_that_merges_change(tokenizer.backend.fast, model)):
        ways = f"{'takes' if ignores else 'merges'} it, and llama.cpp {'merges' if ignores else 'takes'} it"
        raise UsageError(
            f"{path}: the token {word!r} is a word that its merges do not make. This tokenizer {ways} (ignore_merges, which "
            f"llama.cpp decides by the name {name!r} of how texts are split): a GGUF file cannot have it"
        )
    if name in JOINS_DIGITS and (joined := _token_of_digits(tokenizer.backend.fast, model)):
        raise UsageError(
            f"{path} splits all digits, and llama.cpp would take {joined!r} as one token: a GGUF file cannot have it"
        )
    for text, number in model["vocab"].items():
        vocabulary.put(number, text, NORMAL)
    vocabulary.put_added(_added(tokenizer.backend))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)


def _token_of_digits(fast: Any, model: dict[str, Any]) -> str | None:
    """Returns a token that has several digits. None: there is none. Arguments as for ``_word_that_merges_change``."""
    from tokenizers import decoders

    characters = decoders.ByteLevel()
    added = {token.content for token in fast.get_added_tokens_decoder().values()}
    texts = (str(characters.decode([token])) for token in model["vocab"] if token not in added)
    return next((text for text in texts if sum(unicodedata.category(one)[0] == "N" for one in text) > 1), None)


def _word_that_merges_change(fast: Any, model: dict[str, Any]) -> str | None:
    """Returns a token that is a whole word, and that the merges do not make of its bytes.

    None: there is none, so it makes no difference whether words that are tokens are merged.

    Args:
        fast: the library's tokenizer.
        model: the part of its file that has the tokens and the merges.
    """
    from tokenizers import decoders, models

    merges = [(left, right) for left, right in (p.split(" ") if isinstance(p, str) else p for p in model["merges"])]
    merging, characters = models.BPE(vocab=model["vocab"], merges=merges), decoders.ByteLevel()
    added = {token.content for token in fast.get_added_tokens_decoder().values()}
    for token in model["vocab"]:
        if token in added or [piece.value for piece in merging.tokenize(token)] == [token]:
            continue
        word = characters.decode([token])
        if [piece for piece, _ in fast.pre_tokenizer.pre_tokenize_str(word)] == [token]:
            return str(word)
    return None


def _parts(values: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the parts of a normalizer or pre-tokenizer, in their order."""
    if not values:
        return []
    inner = values.get("pretokenizers", values.get("normalizers"))
    return [values] if inner is None else [part for one in inner for part in _parts(one)]


def _split(part: dict[str, Any], path: Path) -> str:
    """Returns the regular expression by which a part splits texts."""
    if part["type"] == "ByteLevel":
        return GPT2_PATTERN
    if part["type"] == "Digits" and part.get("individual_digits"):
        return DIGITS
    pattern = part.get("pattern") or {}
    isolated = (part.get("behavior"), part.get("invert")) in (("Isolated", False), ("Removed", True))
    if part["type"] != "Split" or not isolated:
        raise UsageError(f"{path} splits texts in a way that llama.cpp has no name for ({part})")
    text = str(pattern.get("Regex", pattern.get("String")))
    return text.replace("\r", r"\r").replace("\n", r"\n")  # some files have the characters themselves
