"""What a beginning of a text has in common with its ids is what encoding it from the start says, in every type of tokenizer."""

import json
import random
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from internevo.text.beginnings import common_length, encode_with_beginnings
from internevo.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = ["the cat sat on the mats, and purred: don't   stop\n\n  now", "über den faulen Hund 春眠不觉晓 \t 12345"] * 20
ADDED = {
    "<|end|>": {},
    "<|end|><|x|>": {},
    "<l>": {"lstrip": True},
    "<r>": {"rstrip": True},
    "<both>": {"lstrip": True, "rstrip": True},
    "WORD": {"single_word": True},
    "<plain>": {"special": False},
    "<Norm>": {"special": False, "normalized": True},
    "</s>": {"normalized": True},
}
"""Added tokens, and their flags."""
PIECES = [
    *ADDED, "<|end|", "<", "|>", "<unk>", "\u2581", " ", "  ", "\n", "\n\n", "the", "cat", "ca", "ts", " mats", "'t", "Ω", "ü",
    "u\u0308", "\u0308", "春眠", "123", "W", "ＷＯＲＤ", "<NORM>", "<norm>", ",", ": ", "\t", "a",
]  # fmt: skip
"""What random texts consist of: added tokens and parts of them, spaces, and characters that normalisation changes."""


def reference(tokenizer: Tokenizer, text: str, ends: Any) -> tuple[list[int], list[int]]:
    """Encodes every beginning from the start, all in one batch, and compares id by id: memory and time are quadratic."""
    whole, *beginnings = tokenizer.backend.encode_batch([text, *(text[:end] for end in ends)])
    return whole, [sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(whole, ids, strict=False))) for ids in beginnings]


FASTS: dict[str, Any] = {
    "byte level": lambda: (models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte level with a space in front": lambda: (models.BPE(), normalizers.NFC(), pre_tokenizers.ByteLevel()),
    "as Qwen": lambda: (models.BPE(), normalizers.NFC(), pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])),
    "as Llama, legacy": lambda: (models.BPE(unk_token="<unk>", fuse_unk=True), normalizers.Sequence([
        normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None),
    "as Llama": lambda: (models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "Metaspace": lambda: (models.BPE(unk_token="<unk>"), normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="always")),
    "unigram": lambda: (models.Unigram(), normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
                        pre_tokenizers.Metaspace()),
    "word pieces": lambda: (models.WordPiece(unk_token="<unk>"), normalizers.BertNormalizer(),
                            pre_tokenizers.BertPreTokenizer()),
}  # fmt: skip


def fast(folder: Path, kind: str) -> Tokenizer:
    model, normalizer, pre_tokenizer = FASTS[kind]()
    built = Fast(model)
    if normalizer is not None:
        built.normalizer = normalizer
    if pre_tokenizer is not None:
        built.pre_tokenizer = pre_tokenizer
    training: Any = {"vocab_size": 400, "show_progress": False}
    trainer: Any = {
        models.BPE: lambda: trainers.BpeTrainer(
            **training, special_tokens=["<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
        models.Unigram: lambda: trainers.UnigramTrainer(**training, special_tokens=["<unk>"], unk_token="<unk>"),
        models.WordPiece: lambda: trainers.WordPieceTrainer(**training, special_tokens=["<unk>"]),
    }[type(model)]()
    built.train_from_iterator(CORPUS, trainer)
    for name, flags in ADDED.items():
        token = AddedToken(name, **{"special": True, "normalized": False, **flags})
        (built.add_special_tokens if token.special else built.add_tokens)([token])
    built.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def sentencepieces(folder: Path, legacy: bool, added: bool = True, prefix: bool = True) -> Tokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), vocab_size=80, minloglevel=2,
        remove_extra_whitespaces=False, model_type="bpe", hard_vocab_limit=False,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    names = {0: "<unk>", 2: "</s>"} | dict(enumerate((name for name in ADDED if name != "</s>"), size))
    decoder = {str(n): {"content": name, "special": True, **ADDED.get(name, {})} for n, name in names.items()}
    table = {"legacy": legacy, "add_prefix_space": prefix, "added_tokens_decoder": decoder if added else {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(table if added else {"legacy": legacy}))
    return load_tokenizer(folder)


def transformers_only(folder: Path, name: str) -> Tokenizer:
    built = fast(folder, "byte level")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(values["model"]["vocab"] | {"<|endoftext|>": 1000}))
    merges = "\n".join(" ".join(pair) for pair in values["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    table = {"tokenizer_class": name, "unk_token": "<unk>", "additional_special_tokens": ["<|end|>", "</s>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    found = load_tokenizer(folder)
    assert type(found.backend) is not type(built.backend)
    return found


KINDS: dict[str, Any] = {
    **{kind: lambda folder, kind=kind: fast(folder, kind) for kind in FASTS},
    "SentencePiece, legacy": lambda folder: sentencepieces(folder, True),
    "SentencePiece": lambda folder: sentencepieces(folder, False),
    "SentencePiece without a space in front": lambda folder: sentencepieces(folder, False, prefix=False),
    "SentencePiece, legacy, without added tokens": lambda folder: sentencepieces(folder, True, added=False),
    "SentencePiece without added tokens": lambda folder: sentencepieces(folder, False, added=False),
    "transformers": lambda folder: transformers_only(folder, "GPT2Tokenizer"),
    "transformers' own code": lambda folder: transformers_only(folder, "CTRLTokenizer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_beginnings_have_in_common_with_a_text_what_encoding_them_from_the_start_says(tmp_path: Path, kind: str) -> None:
    tokenizer, draw = KINDS[kind](tmp_path), random.Random(7)
    reencoded = 0
    for _ in range(200):
        text = "".join(draw.choices(PIECES, k=draw.randint(0, 14)))
        ends = [draw.randint(0, len(text)) for _ in range(6)]
        assert encode_with_beginnings(tokenizer, text, ends) == reference(tokenizer, text, ends), (text, ends)
        reencoded += bool(tokenizer.backend.encode_with_places(text)[1])
    assert (reencoded > 50) == ("without added" not in kind and "own code" not in kind)


def test_the_common_length_is_that_of_the_longest_common_prefix() -> None:
    draw = random.Random(3)
    for _ in range(300):
        a = "".join(draw.choices("ab", k=draw.randint(0, 9)))
        b = a[: draw.randint(0, 9)] + "".join(draw.choices("ab", k=draw.randint(0, 9)))
        wanted = max(n for n in range(len(a) + 1) if b.startswith(a[:n]))
        assert common_length(a, b) == common_length(list(a), list(b)) == wanted


def test_only_what_follows_the_last_added_token_is_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, encoded = fast(tmp_path, "byte level"), 0
    encode = Tokenizer.encode

    def counting(self: Tokenizer, text: str) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    text = "the cat sat<|end|>" * 500
    encode_with_beginnings(tokenizer, text, range(0, len(text), 9))
    assert encoded < 4 * len(text)  # with all of each beginning: 500 times


@pytest.mark.parametrize("kind", KINDS)
def test_no_texts_have_no_ids(tmp_path: Path, kind: str) -> None:
    assert KINDS[kind](tmp_path).backend.encode_batch([]) == []
