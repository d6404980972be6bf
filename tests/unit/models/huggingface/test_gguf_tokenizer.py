"""Tokenizers in GGUF files: read as llama.cpp reads them, they give the ids of the tokenizer that was written."""

import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, pre_tokenizers
from tokenizers import Tokenizer as Fast
from tokenizers.models import Unigram
from transformers import AutoTokenizer

from internevo.errors import UsageError
from internevo.models.huggingface.gguf_tokenizer import SPLITS, TEKKEN, write_tokenizer
from internevo.text.tiktokens import CL100K_PATTERN, O200K_PATTERN
from internevo.text.tokenizer import load_tokenizer, train_bpe

WORDS = ["the", "quick", "brown", "fox", "jumps", "über", "den", "faulen", "Hund", "def", "return", "2026"]
TEXTS = [" ".join(random.Random(n).choices(WORDS, k=40)) for n in range(99)]
SPACE = "\u2581"


def train(folder: Path, **options: Any) -> Path:
    usual = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 380, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "tokenizer"), minloglevel=2, hard_vocab_limit=False,
        remove_extra_whitespaces=False, **{**usual, **options},
    )  # fmt: skip
    return folder


def settings(folder: Path, **values: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **values}))


def written(path: Path, vocab_size: int, out: Path) -> dict[str, Any]:
    """The fields of a GGUF file with the tokenizer in ``path``."""
    writer = gguf.GGUFWriter(out / "vocab.gguf", "llama")
    write_tokenizer(writer, path, vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(out / "vocab.gguf").fields
    return {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}


def parts(text: str, fields: dict[str, Any]) -> list[str | int]:
    """Added tokens are split off first, the longest first (llama.cpp's tokenizer_st_partition)."""
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNKNOWN)
    added = {
        token: n for n, (token, kind) in enumerate(zip(fields["tokens"], fields["token_type"], strict=True)) if kind in kinds
    }
    pattern = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
    return [added.get(part, part) for part in re.split(f"({pattern})", text) if part]


def merged(text: str, fields: dict[str, Any]) -> list[int]:
    """The pair whose piece has the highest score is merged first, the leftmost of several (llm_tokenizer_spm)."""
    known = {token: n for n, token in enumerate(fields["tokens"])}
    symbols = list(text)
    while True:
        pairs = [(fields["scores"][known[a + b]], -n) for n, (a, b) in enumerate(pairwise(symbols)) if a + b in known]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [n for s in symbols for n in ([known[s]] if s in known else [known[f"<0x{byte:02X}>"] for byte in s.encode()])]


def read_as_llama_cpp(text: str, fields: dict[str, Any]) -> list[int]:
    ids, first = [], True
    for part in parts(text, fields):
        if isinstance(part, str):
            front = " " if first and fields["add_space_prefix"] else ""
            ids += merged((front + part).replace(" ", SPACE), fields)
        else:
            ids.append(part)
        first = False
    return ids


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("form", ["model", "json", "both"])
def test_a_sentencepiece_tokenizer_gives_the_same_ids(tmp_path: Path, form: str, front: bool) -> None:
    folder = train(tmp_path, user_defined_symbols=["[X]", "\u2581\u2581"], add_dummy_prefix=front)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    added = {size: ("<|im_start|>", True), size + 1: ("<tool>", False), size + 2: ("<image_soft_token>", False)}
    settings(
        folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_prefix_space=front, legacy=True,
        added_tokens_decoder={str(n): {"content": text, "special": special} for n, (text, special) in added.items()},
    )  # fmt: skip
    if form != "model":
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "json")  # an independent conversion
    if form == "json":
        folder = tmp_path / "json"
        assert not (folder / "tokenizer.model").exists()
    elif form == "both":
        (folder / "tokenizer.json").write_bytes((tmp_path / "json" / "tokenizer.json").read_bytes())
    fields = written(folder, size + 2, tmp_path)  # one token more than the model's vocabulary, as in Gemma 3 1B
    assert fields["model"] == "llama" and fields["pre"] == "default" and fields["add_space_prefix"] is front
    assert len(fields["tokens"]) == len(fields["scores"]) == size + 2 and "<image_soft_token>" not in fields["tokens"]
    kinds = dict(zip(fields["tokens"], map(gguf.TokenType, fields["token_type"]), strict=True))
    assert kinds["<|im_start|>"] == kinds["<s>"] == gguf.TokenType.CONTROL
    assert kinds["<tool>"] == kinds["[X]"] == kinds["  "] == gguf.TokenType.USER_DEFINED
    assert kinds["<0x41>"] == gguf.TokenType.BYTE and kinds["<unk>"] == gguf.TokenType.UNKNOWN
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    ours, draw, compared = load_tokenizer(folder), random.Random(3), 0
    pieces = [*WORDS, " ", " ", "<|im_start|>", "<tool>", "[X]", "Ω", "\n"]
    for text in ("".join(draw.choices(pieces, k=draw.randint(1, 14))) for _ in range(200)):
        if not front or parts(text, fields)[:1] == [text.lstrip()]:  # llama.cpp puts a space in front only once, and last
            assert read_as_llama_cpp(text, fields) == ours.encode(text), text
            compared += 1
    assert compared >= 20


def test_pieces_without_a_name_or_a_use_and_ids_without_a_token(tmp_path: Path) -> None:
    file = train(tmp_path) / "tokenizer.model"
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())  # type: ignore[attr-defined]
    unused, size = len(proto.pieces), len(proto.pieces) + 2
    for text in ("[UNUSED_TOKEN_7]", "\0"):  # as InternLM2's model has them
        proto.pieces.add(piece=text, score=0.0, type=1)
    file.write_bytes(proto.SerializeToString())
    fields = written(file, size + 5, tmp_path)
    assert fields["tokens"][-1] == f"[PAD{size + 4}]" and fields["token_type"][-1] == gguf.TokenType.UNUSED
    assert fields["tokens"][unused] == "[UNUSED_TOKEN_7]" and fields["token_type"][unused] == gguf.TokenType.UNUSED
    assert "\0" not in "".join(fields["tokens"])
    assert len(set(fields["tokens"])) == size + 5, "llama.cpp needs each text to be one token's"


def test_a_unigram_model_is_of_the_kind_that_finds_the_most_likely_pieces(tmp_path: Path) -> None:
    train(tmp_path, model_type="unigram", vocab_size=330, normalization_rule_name="nmt_nfkc")
    with pytest.raises(UsageError, match="with bytes for unknown characters"):
        written(tmp_path, 330, tmp_path)
    train(tmp_path, model_type="unigram", vocab_size=330, normalization_rule_name="nmt_nfkc", byte_fallback=False)
    fields = written(tmp_path, 330, tmp_path)
    assert fields["model"] == "t5" and fields["remove_extra_whitespaces"] is False and fields["add_space_prefix"] is True
    assert len(fields["precompiled_charsmap"]) > 1000 and fields["unknown_token_id"] == 0
    likely = Fast(Unigram(list(zip(fields["tokens"], fields["scores"], strict=True)), 0))
    own = load_tokenizer(tmp_path)
    for text in TEXTS[:20]:
        assert likely.encode(SPACE + text.replace(" ", SPACE)).ids == own.encode(text)
    train(tmp_path, model_type="char")
    with pytest.raises(UsageError, match="words or characters"):
        written(tmp_path, 330, tmp_path)


def phi3(folder: Path, strips: bool = True) -> int:
    """Makes a tokenizer like Phi-3's, whose added tokens take the white space after them. Returns its size."""
    size = sentencepiece.SentencePieceProcessor(model_file=str(train(folder) / "tokenizer.model")).get_piece_size()
    texts = dict(enumerate(("<unk>", "<s>", "</s>"))) | {size: "<|endoftext|>", size + 1: "<|user|>", size + 2: "<|end|>"}
    added = {
        str(n): {
            "content": text,
            "special": True,
            "normalized": False,
            "rstrip": strips and text in ("</s>", "<|user|>", "<|end|>"),
        }
        for n, text in texts.items()
    }
    settings(folder, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>", legacy=True, added_tokens_decoder=added)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "json")
    (folder / "tokenizer.json").write_bytes((folder / "json" / "tokenizer.json").read_bytes())
    return size + 3


@pytest.mark.parametrize("strips", [True, False])
def test_a_tokenizer_that_strips_as_phi_3_does_has_its_name(tmp_path: Path, strips: bool) -> None:
    fields = written(tmp_path, phi3(tmp_path, strips), tmp_path)
    assert fields.get("general.name") == ("Phi-3" if strips else None)


def split(*patterns: str) -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
CL100K, QWEN = (CL100K_PATTERN.replace("{DIGITS}", digits) for digits in ("{1,3}", ""))


@pytest.mark.parametrize(
    ("words", "ignore_merges", "name"),
    [
        (BYTE_LEVEL, False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]), False, "smollm"),
        (split(QWEN), False, "qwen2"),
        (split(CL100K), True, "llama-bpe"),
        (split(CL100K), False, "smaug-bpe"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTE_LEVEL]), False, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, None),
        (split(QWEN.replace(r"\p{L}+", r"[\p{L}\p{M}]+")), False, None),
        (split(r"\p{N}", CL100K), False, None),
    ],
)
def test_byte_level_bpe_has_the_name_of_how_it_splits_texts(tmp_path: Path, words: Any, ignore_merges: bool, name: str) -> None:
    fast = Fast.from_file(str(train_bpe(TEXTS, 400, tmp_path)))
    fast.pre_tokenizer, size = words, fast.get_vocab_size()
    fast.add_tokens([AddedToken("\u2581\u2581"), "<|tool|>"])
    values = json.loads(fast.to_str())
    values["model"]["ignore_merges"] = ignore_merges
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    if name is None:
        with pytest.raises(UsageError, match="in a way that llama.cpp has no name for"):
            written(tmp_path, 410, tmp_path)
        return
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**table, "additional_special_tokens": ["<|im_start|>"]}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    fields = written(tmp_path, size + 10, tmp_path)
    assert (fields["model"], fields["pre"], len(fields["tokens"])) == ("gpt2", name, size + 10)
    assert fields["tokens"][size : size + 3] == ["  ", "<|tool|>", "<|im_start|>"]
    kinds = [gguf.TokenType(kind) for kind in fields["token_type"][size : size + 4]]
    assert [kind.name for kind in kinds] == ["USER_DEFINED", "CONTROL", "CONTROL", "UNUSED"]
    assert fields["merges"] == [" ".join(pair) for pair in values["model"]["merges"]]
    assert fields["tokens"][fields["eos_token_id"]] == "<|endoftext|>"
    assert fields["add_bos_token"] is False, "llama.cpp would put a token in front that the tokenizer does not have"
    assert fields["tokenizer.chat_template" if "tokenizer.chat_template" in fields else "chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("words", "name", "ignores"),
    [
        (BYTE_LEVEL, "gpt-2", False), (split(QWEN), "qwen2", False), (split(O200K_PATTERN), "gpt-4o", False),
        (split(TEKKEN), "tekken", True), (split(CL100K), "llama-bpe", None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]), "smollm", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ignore_merges", [True, False])
def test_a_word_has_the_token_that_llama_cpp_gives_it(
    tmp_path: Path, words: Any, name: str, ignores: bool | None, ignore_merges: bool
) -> None:
    """With some names llama.cpp looks for a whole word among the tokens, and with others it merges its bytes."""
    fast = Fast.from_file(str(train_bpe(TEXTS, 400, tmp_path)))
    fast.pre_tokenizer = words
    values = json.loads(fast.to_str())
    values["model"]["ignore_merges"] = ignore_merges

    def read() -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        return str(written(tmp_path, 410, tmp_path)["pre"])

    same = ignores in (None, ignore_merges)
    assert read() == (name if ignores is not None or ignore_merges else "smaug-bpe")  # the merges make all tokens
    size = len(values["model"]["vocab"])
    values["model"]["vocab"] |= {"a\u0120b": size, "\u00c3": values["model"]["vocab"]["\u00c3"]}  # no word, and half of one
    read()
    values["model"]["vocab"]["Zebra"] = size + 1
    if same:
        read()
    else:
        with pytest.raises(UsageError, match="the token 'Zebra' is a word that its merges do not make"):
            read()
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert (load_tokenizer(tmp_path).encode("Zebra") == [size + 1]) == ignore_merges


PATTERNS = {name: patterns for patterns, name in SPLITS.items()}
DEEPSEEK_V2 = pre_tokenizers.Sequence(
    [
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS["deepseek-llm"][:-1]),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def test_deepseek_v2_has_no_token_of_several_digits(tmp_path: Path) -> None:
    """llama.cpp does not split digits from each other for it."""
    fast = Fast.from_file(str(train_bpe([text.replace("2026", "") for text in TEXTS], 400, tmp_path)))
    fast.pre_tokenizer = DEEPSEEK_V2
    fast.add_tokens(["[PAD10]"])
    values = json.loads(fast.to_str())

    def read() -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        return str(written(tmp_path, 410, tmp_path)["pre"])

    assert read() == "deepseek-llm"
    values["model"]["vocab"]["20"] = len(values["model"]["vocab"])
    values["model"]["merges"].append(["2", "0"])
    with pytest.raises(UsageError, match="splits all digits, and llama.cpp would take '20' as one token"):
        read()


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_the_user_s_turn_ends_the_answer_if_the_model_says_so(tmp_path: Path, where: str) -> None:
    """As in GLM-4. llama.cpp finds other such tokens by their names."""
    fast = Fast.from_file(str(train_bpe(TEXTS, 400, tmp_path)))
    size = fast.get_vocab_size()
    fast.add_tokens(["<|user|>"])
    (tmp_path / "tokenizer.json").write_text(fast.to_str())
    for ends in ([size, 3], [3], size):
        (tmp_path / where).write_text(json.dumps({"eos_token_id": ends}))
        fields = written(tmp_path, size + 2, tmp_path)
        assert fields.get("eot_token_id") == (size if ends == [size, 3] else None)


def test_of_several_tokens_that_end_a_text_the_first_one_ends_documents(tmp_path: Path) -> None:
    """As in a folder of a model that was trained on chats, whose tokenizer names none."""
    train_bpe(TEXTS, 400, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert written(tmp_path, 400, tmp_path)["eos_token_id"] == load_tokenizer(tmp_path).eos_id == 5
