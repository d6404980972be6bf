"""Every kind of tokenizer gives its own library's ids, and the ends of documents are found."""

import json
import random

import pytest
import sentencepiece
from transformers import AutoTokenizer

from internevo.errors import UsageError
from internevo.tokenizer import load_tokenizer, train_bpe

WORDS = ["the", "quick", "brown", "fox", "jumps", "über", "den", "faulen", "Hund", "文本", "def", "return"]
TEXTS = [" ".join(random.Random(n).choices(WORDS, k=40)) for n in range(99)]


def test_sentencepiece(tmp_path):
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


def test_a_trained_bpe_loads_in_transformers_with_the_same_ids(tmp_path):
    path = train_bpe(iter(TEXTS), 400, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for ours in (load_tokenizer(path), load_tokenizer(tmp_path)):
        assert [ours.encode(t) for t in TEXTS] == [theirs(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
        assert ours.eos_id == theirs.eos_token_id and ours.bos_id is None
        assert ours.decode(ours.encode(TEXTS[3])) == TEXTS[3]


def test_special_tokens_are_those_that_the_folder_names(tmp_path):
    train_bpe(iter(TEXTS), 400, tmp_path)
    table = {"bos_token": {"content": "a", "lstrip": False}, "eos_token": "b"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.encode("a")[0], tokenizer.encode("b")[0])


def test_what_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UsageError, match="--vocab-size 100 is too small"):
        train_bpe(iter(TEXTS), 100, tmp_path)
