"""Every type of tokenizer gives the same ids as its own library, and the right tokens begin and end a document."""

import base64
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from transformers import AddedToken, AutoTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from internevo.errors import UsageError
from internevo.text.tiktokens import ENCODINGS
from internevo.text.tokenizer import load_tokenizer, train_bpe

WORDS = ["the", "quick", "brown", "fox", "jumps", "über", "den", "faulen", "Hund", "文本", "def", "return"]
TEXTS = [" ".join(random.Random(n).choices(WORDS, k=40)) for n in range(99)]


def test_a_sentencepiece_model_gives_the_ids_of_the_sentencepiece_library(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2,
    )  # fmt: skip
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for path in (tmp_path / "tokenizer.model", tmp_path):
        tokenizer = load_tokenizer(path)
        assert [tokenizer.encode(t) for t in TEXTS] == [own.encode(t) for t in TEXTS]
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 40)
        assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert tokenizer.with_bos("")[0] == 1


ADDED = {"<|im_start|>": (40, False), "<|im_end|>": (41, True), "<s>": (1, False), "</s>": (2, False), "[X]": (42, False)}
"""Text of each added token: (id, whether spaces on its right are removed)."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A SentencePiece model of 40 pieces, with Hugging Face files that add tokens to it."""
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    decoder = {str(n): {"content": name, "rstrip": r, "special": name != "[X]"} for name, (n, r) in ADDED.items()}
    table = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
             "pad_token": "<pad>", "added_tokens_decoder": decoder}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    return tmp_path


@pytest.mark.parametrize("legacy", [True, False])
def test_a_folder_with_only_a_sentencepiece_model_gives_the_ids_of_its_settings(folder: Path, legacy: bool) -> None:
    """Compares with transformers' own SentencePiece code, on random texts full of added tokens, spaces and unknown letters."""
    table = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**table, "legacy": legacy}))
    theirs = SentencePieceBackend(
        vocab_file=str(folder / "tokenizer.model"), legacy=legacy, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    theirs.add_tokens([AddedToken(n, rstrip=r, special=n != "[X]", normalized=False) for n, (_, r) in ADDED.items()])
    theirs.add_special_tokens({"pad_token": "<pad>"})
    ours = load_tokenizer(folder)
    assert ours.vocab_size == 44 and (ours.bos_id, ours.eos_id, ours.backend.token_id("<pad>")) == (1, 2, 43)
    draw = random.Random(5)
    pieces = [*ADDED, "<pad>", " ", "  ", "\n", "\u2581", *WORDS, "Ω", "<|im", "<unk>"]
    texts = ["", " ", "<s>", *("".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(500))]
    for text in texts:
        given = "\u2581" + text.replace("\u2581", " ") if not legacy and text else text
        wanted = theirs(given, add_special_tokens=False)["input_ids"]
        if not legacy and len(wanted) > 1 and theirs.convert_ids_to_tokens(wanted[0]) == "\u2581":
            wanted = wanted[1:] if wanted[1] in theirs.all_special_ids else wanted
        assert ours.encode(text) == wanted, text
    assert ours.backend.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert ours.decode(ours.encode("the fox<|im_end|>jumps[X] over")).startswith("the fox<|im_end|>")


def test_a_trained_bpe_loads_in_transformers_with_the_same_ids(tmp_path: Path) -> None:
    path = train_bpe(iter(TEXTS), 400, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for ours in (load_tokenizer(path), load_tokenizer(tmp_path)):
        assert [ours.encode(t) for t in TEXTS] == [theirs(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
        assert ours.eos_id == theirs.eos_token_id and ours.bos_id is None
        assert ours.decode(ours.encode(TEXTS[3])) == TEXTS[3]


def test_the_folder_names_the_tokens_that_begin_and_end_a_document(tmp_path: Path) -> None:
    train_bpe(iter(TEXTS), 400, tmp_path)
    table = {"bos_token": {"content": "a", "lstrip": False}, "eos_token": "b"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.encode("a")[0], tokenizer.encode("b")[0])


def test_the_error_names_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UsageError, match="--vocab-size 100 is too small"):
        train_bpe(iter(TEXTS), 100, tmp_path)


def ranks_of(texts: list[str], size: int) -> dict[bytes, int]:
    """Trains a byte-pair vocabulary in the simplest way. Returns the rank of each token."""
    words = [[bytes([b]) for b in text.encode()] for text in texts]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        pair = max(pairs, key=lambda p: (pairs[p], p))
        ranks[b"".join(pair)] = len(ranks)
        for number, word in enumerate(words):
            joined, n = [], 0
            while n < len(word):
                hit = tuple(word[n : n + 2]) == pair
                joined.append(b"".join(pair) if hit else word[n])
                n += 2 if hit else 1
            words[number] = joined
    return ranks


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_tiktoken_file_gives_the_ids_of_the_tiktoken_library(tmp_path: Path, name: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = ranks_of(["the cat's mat, I'LL see 123 cats ", " 春眠不觉晓 春眠", "def f(x):\n\n    return  x\n", "aaaaaaa"], 300)
    path = tmp_path / f"{name}.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    ours, encoding = load_tokenizer(path), ENCODINGS[name]
    theirs = tiktoken.Encoding(name, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens=encoding.special)
    draw = random.Random(0)
    pieces = ["the cat's", "I'LL ", "春眠", "\n\n", "  ", "12345", "\t", "é", "🙂", "Zebra", "\u2028", *encoding.special]
    for _ in range(200):
        text = "".join(draw.choices(pieces, k=12)) + bytes(draw.randrange(256) for _ in range(20)).decode("latin1")
        assert ours.encode(text) == theirs.encode(text, allowed_special="all") and ours.decode(ours.encode(text)) == text
    assert ours.eos_id == encoding.special[encoding.eos] and ours.vocab_size == theirs.n_vocab
    assert load_tokenizer(tmp_path).encode("the cat") == ours.encode("the cat")


def test_the_error_names_unknown_or_damaged_tiktoken_files_and_code(tmp_path: Path) -> None:
    path = tmp_path / "other.tiktoken"
    path.write_text("YQ== 0\n")
    with pytest.raises(
        UsageError, match=r"other\.tiktoken is a tiktoken file of an unknown encoding.*known by their names: qwen\.tiktoken"
    ):
        load_tokenizer(path)
    path.write_text("YQ== 0\nnonsense\n")
    with pytest.raises(UsageError, match=r"other\.tiktoken, line 2 is not a token in base64 followed by its rank"):
        load_tokenizer(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "tokenization_chatglm.py").write_text("raise SystemExit")
    with pytest.raises(
        UsageError, match=r"exists only as code \(tokenization_chatglm\.py\), and code from a model's folder is not run"
    ):
        load_tokenizer(tmp_path / "code")
