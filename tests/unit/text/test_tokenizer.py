"""Every type of tokenizer gives the same ids as its own library, and the right tokens begin and end a document."""

import base64
import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken as FastToken
from tokenizers import Tokenizer as Fast
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from internevo.data.encoding.formats import encode_documents
from internevo.data.raw.documents import Document
from internevo.errors import UsageError
from internevo.models.huggingface.tokenizer import copy_tokenizer, special_ids
from internevo.text.special_tokens import model_eos_ids
from internevo.text.tiktokens import ENCODINGS
from internevo.text.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe

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
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"empty is not a folder of a tokenizer: it has no tokenizer\.json, "):
        load_tokenizer(tmp_path / "empty")
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


def test_a_folder_with_a_tiktoken_file_may_name_its_tokens(tmp_path: Path) -> None:
    ranks = {bytes([b]): b for b in range(256)}
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (tmp_path / "qwen.tiktoken").write_text(lines)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer"})
    special = ENCODINGS["qwen"].special
    assert load_tokenizer(tmp_path).eos_id == special["<|endoftext|>"]
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer", "eos_token": "<|im_end|>"})
    assert load_tokenizer(tmp_path).eos_id == special["<|im_end|>"]


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


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of byte-level BPE, and a SentencePiece model of 40 pieces."""
    folder = tmp_path_factory.mktemp("models")
    train_bpe(iter(TEXTS), 300, folder)
    (folder / "corpus.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=40, minloglevel=2,
    )  # fmt: skip
    return folder


def bpe(models: Path, folder: Path, special: Sequence[str] = (), without: str | None = None) -> Fast:
    """Writes the byte-level tokenizer.json, with these special tokens, and without the one that it has."""
    values = json.loads((models / "tokenizer.json").read_text())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != without]
    if without:
        values["model"]["vocab"] = {piece: n for piece, n in values["model"]["vocab"].items() if piece != without}
    fast = Fast.from_str(json.dumps(values))
    fast.add_special_tokens([FastToken(name, special=True) for name in special])
    fast.save(str(folder / "tokenizer.json"))
    return fast


def token(content: str, **more: object) -> dict[str, object]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **more}


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
FORMS: dict[str, tuple[tuple[str, ...], dict[str, dict[str, object]]]] = {
    "gpt2": ((), {
        "config.json": {"model_type": "gpt2", "bos_token_id": 256, "eos_token_id": 256},
        "tokenizer_config.json": {"model_max_length": 1024},
    }),
    "llama3": (LLAMA3, {
        "config.json": {"model_type": "llama", "eos_token_id": [1, 2]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": LLAMA3[0], "eos_token": LLAMA3[2],
            "added_tokens_decoder": {str(300 + n): token(name, special=True) for n, name in enumerate(LLAMA3)},
        },
        "special_tokens_map.json": {"bos_token": token(LLAMA3[0]), "eos_token": token(LLAMA3[2])},
    }),
    "qwen2": (("<|im_start|>", "<|im_end|>"), {
        "config.json": {"model_type": "qwen2", "bos_token_id": 256},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "added_tokens_decoder": {
                "0": token("<|endoftext|>", special=True), "300": token("<|im_start|>", special=True),
                "301": token("<|im_end|>", special=True),
            },
        },
    }),
    "qwen2 without names": ((), {
        "config.json": {"model_type": "qwen2"}, "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"},
    }),
    "gemma": (("<pad>", "<eos>", "<bos>", "<unk>"), {
        "config.json": {"model_type": "gemma"},
        "tokenizer_config.json": {"tokenizer_class": "GemmaTokenizer"},
    }),
    "mistral": (("<s>", "</s>", "[INST]"), {
        "config.json": {"model_type": "llama"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": token("<s>", __type="AddedToken"),
                                  "eos_token": token("</s>", __type="AddedToken"), "add_bos_token": True},
    }),
    "named only in special_tokens_map.json": (("<s>", "</s>"), {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {"bos_token": token("<s>"), "eos_token": token("</s>")},
    }),
    "the map takes precedence": (("<s>", "</s>", "<e>"), {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "<e>"},
    }),
    "added_tokens.json": ((), {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
        "added_tokens.json": {"<|im_end|>": 300, "[X]": 301},
    }),
    "tokens that only the settings have": ((), {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", "pad_token": "[PAD]", "image_token": "<img>",
            "additional_special_tokens": ["<|im_start|>", token("<|im_end|>", __type="AddedToken")],
        },
    }),
    "the map beside added_tokens_decoder": (("<s>", "</s>"), {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                                  "added_tokens_decoder": {"300": token("<s>", special=True)}},
        "special_tokens_map.json": {"eos_token": "<s>"},
    }),
    "a tokenizer without an end token": ((), {
        "config.json": {"model_type": "qwen2", "eos_token_id": 256},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None},
    }),
}  # fmt: skip
"""Folders in the forms of published ones: the special tokens in tokenizer.json, and the other files."""
SAID = [
    "the quick fox",
    " [INST] the</s><s> fox<|im_end|>",
    "<|endoftext|>  [X]<e>[PAD]<img>",
    "über <|im_start|>den\n<bos><eos>",
]


@pytest.mark.parametrize("form", FORMS)
def test_special_tokens_and_ids_are_those_of_transformers(tmp_path: Path, models: Path, form: str) -> None:
    special, files = FORMS[form]
    bpe(models, tmp_path, special)
    for name, values in files.items():
        write_json(tmp_path / name, values)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert {k: v for k, v in theirs.special_tokens_map.items() if k in ours.special_tokens} == {
        k: v for k, v in ours.special_tokens.items() if k in theirs.special_tokens_map
    }
    if form != "gemma":  # transformers builds Gemma's from the pieces, not from tokenizer.json
        assert [ours.encode(text) for text in SAID] == theirs(SAID, add_special_tokens=False)["input_ids"]
        assert ours.vocab_size == len(theirs)
    copy_tokenizer(tmp_path, copied := tmp_path / "copy")
    copy = load_tokenizer(copied)
    assert (copy.bos_id, copy.eos_id, copy.special_tokens) == (ours.bos_id, ours.eos_id, ours.special_tokens)
    assert [copy.encode(text) for text in SAID] == [ours.encode(text) for text in SAID]
    assert tokenizer_fingerprint(copied) == tokenizer_fingerprint(tmp_path)
    assert special_ids(copied) == special_ids(tmp_path)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, (1, 2)),
        ({"config.json": {"model_type": "llama"}, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, (1, 2)),
        ({"tokenizer_config.json": {"tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>"},
          "special_tokens_map.json": {"eos_token": "</s>"}}, (1, 2)),
        ({"tokenizer_config.json": {"tokenizer_class": "BaichuanTokenizer", "bos_token": token("<s>", __type="AddedToken"),
                                    "eos_token": token("</s>", __type="AddedToken")}}, (1, 2)),
        ({"special_tokens_map.json": {"eos_token": "<s>"}}, (1, 1)),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}, "added_tokens.json": {"<|im_end|>": 45}}, (1, 45)),
    ],
    ids=["model alone", "Llama 2", "InternLM2", "Baichuan2", "only the map", "added_tokens.json"],
)  # fmt: skip
def test_special_tokens_of_folders_with_a_sentencepiece_model(
    tmp_path: Path, models: Path, files: dict[str, object], wanted: tuple[int, int]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((models / "tokenizer.model").read_bytes())
    for name, values in files.items():
        write_json(tmp_path / name, values)
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id) == wanted
    if "config.json" in files:
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert (theirs.bos_token_id, theirs.eos_token_id) == wanted


def test_a_tokenizer_json_alone_ends_documents_with_a_usual_token(tmp_path: Path, models: Path) -> None:
    bpe(models, tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 0
    bpe(models, tmp_path, ("<s>", "</s>"), without="<|endoftext|>")
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id) == (found.backend.token_id("<s>"), found.backend.token_id("</s>"))
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 1024})
    assert load_tokenizer(tmp_path).eos_id == found.eos_id
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [5, 6]})
    assert load_tokenizer(tmp_path).eos_id == 5


def test_truncation_padding_dropout_and_post_processors_leave_a_texts_own_ids(tmp_path: Path, models: Path) -> None:
    fast = bpe(models, tmp_path, ("<s>", "</s>"))
    wanted = [fast.encode(text).ids for text in TEXTS]
    fast.enable_truncation(8)
    fast.enable_padding(length=500)
    begin, end = (fast.token_to_id(name) for name in ("<s>", "</s>"))
    fast.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)])
    fast.model.dropout = 0.5
    fast.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    ours = load_tokenizer(tmp_path)
    assert ours.backend.encode_batch(TEXTS) == wanted
    for text, ids in zip(TEXTS, encode_documents("text", [Document(t, "") for t in TEXTS], None, ours), strict=True):
        assert not isinstance(ids, Exception) and ids.tolist() == [begin, *ours.encode(text), end]


def test_a_token_that_begins_and_ends_documents_is_in_each_once(tmp_path: Path, models: Path) -> None:
    bpe(models, tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    ours = load_tokenizer(tmp_path)
    (ids,) = encode_documents("text", [Document("the", "")], None, ours)
    assert ours.bos_id == ours.eos_id and not isinstance(ids, Exception)
    assert ids.tolist() == [*ours.encode("the"), ours.eos_id] and ours.with_bos("") == [ours.eos_id]


def test_the_fingerprint_changes_with_every_file_that_decides_the_ids(tmp_path: Path, models: Path) -> None:
    bpe(models, tmp_path)
    found = {tokenizer_fingerprint(tmp_path), tokenizer_fingerprint(tmp_path / "tokenizer.json")}
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                 "additional_chat_templates/tool_use.jinja"):  # fmt: skip
        write_json(tmp_path / name, {"eos_token": name})
        found |= {tokenizer_fingerprint(tmp_path), tokenizer_fingerprint(tmp_path / "tokenizer.json")}
    assert len(found) >= 6
    before = tokenizer_fingerprint(tmp_path)
    write_json(tmp_path / "config.json", {})
    assert tokenizer_fingerprint(tmp_path) == before


@pytest.mark.parametrize("decoder", [[1], {"x": {"content": "a"}}, {"1": {}}, {"1": {"content": "a", "lstrip": "x"}}])
def test_the_error_names_the_folder_of_damaged_settings(tmp_path: Path, models: Path, decoder: object) -> None:
    bpe(models, tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    with pytest.raises(UsageError, match="the added tokens in .* cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["json", "model"])
def test_only_added_tokens_that_no_document_needs_may_be_outside_a_models_vocabulary(tmp_path: Path, kind: str) -> None:
    """As in Gemma 3 1B, whose tokenizer has one token more than the model: a place for images."""
    if kind == "json":
        train_bpe(iter(TEXTS), 300, tmp_path)
        table = json.loads((tmp_path / "tokenizer_config.json").read_text())
    else:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2,
        )  # fmt: skip
        table = {"eos_token": "</s>"}
    size = load_tokenizer(tmp_path).vocab_size
    assert load_tokenizer(tmp_path).fits(size) and not load_tokenizer(tmp_path).fits(size - 1)
    more = {"added_tokens_decoder": {str(size): {"content": "<image>", "special": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**table, **more}))
    found = load_tokenizer(tmp_path)
    assert found.vocab_size == size + 1 and found.fits(size) and not found.fits(size - 1)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**table, **more, "eos_token": "<image>"}))
    assert not load_tokenizer(tmp_path).fits(size)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_damaged_config_beside_a_tokenizer_is_named_before_anything_is_copied(
    tmp_path: Path, models: Path, name: str, text: str
) -> None:
    bpe(models, tmp_path)
    (tmp_path / name).write_text(text)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(UsageError, match=f"{tmp_path / name} is "):
            special_ids(path)
        if name == "config.json":  # the other one is copied as it is
            with pytest.raises(UsageError, match=f"{tmp_path / name} is "):
                copy_tokenizer(path, tmp_path / "copy")
            assert not (tmp_path / "copy").exists()


def test_what_is_no_id_in_a_config_is_left_out(tmp_path: Path, models: Path) -> None:
    bpe(models, tmp_path)
    own = special_ids(tmp_path)
    for wrong in ("x", 1.5, True, [], [0, "x"], {"a": 1}, None):
        write_json(tmp_path / "config.json", {"eos_token_id": wrong})
        assert special_ids(tmp_path) == own and model_eos_ids(tmp_path) == [], wrong
    write_json(tmp_path / "config.json", {"eos_token_id": [3, 5], "bos_token_id": "x"})
    assert special_ids(tmp_path) == {"eos_token_id": [3, 5]} and model_eos_ids(tmp_path) == [3, 5]


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("kind", ["tokenizer.json", "SentencePiece", "vocab.json"])
@pytest.mark.parametrize("same", [False, True], ids=["two tokens", "one token"])
def test_the_folder_says_whether_documents_begin_with_the_begin_token(
    tmp_path: Path, models: Path, kind: str, flag: bool | None, same: bool
) -> None:
    """As in transformers, which reads the flag if there is no tokenizer.json, and else that file's post-processor."""
    if kind == "SentencePiece":
        (tmp_path / "tokenizer.model").write_bytes((models / "tokenizer.model").read_bytes())
    else:
        fast = bpe(models, tmp_path, ("<s>", "</s>"))
        begins = flag is True or (flag is None and not same)
        template = TemplateProcessing(single="<s> $A" if begins else "$A", special_tokens=[("<s>", fast.token_to_id("<s>"))])
        fast.post_processor = template
        fast.save(str(tmp_path / "tokenizer.json"))
    if kind == "vocab.json":
        values = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").unlink()
        write_json(tmp_path / "vocab.json", values["model"]["vocab"])
        merges = "\n".join(" ".join(pair) for pair in values["model"]["merges"])
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    name = {"tokenizer.json": "PreTrainedTokenizerFast", "SentencePiece": "LlamaTokenizer", "vocab.json": "GPT2Tokenizer"}[kind]
    table = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "<s>" if same else "</s>", "unk_token": "<unk>"}
    write_json(tmp_path / "tokenizer_config.json", {**table, **({} if flag is None else {"add_bos_token": flag})})
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    if flag is not None or kind == "tokenizer.json":
        plain = theirs("the fox", add_special_tokens=False)["input_ids"]
        assert [*ours.bos, *plain] == theirs("the fox")["input_ids"]
    (ids,) = encode_documents("text", [Document("the fox", "")], None, ours)
    assert not isinstance(ids, Exception) and ids.tolist() == [*ours.with_bos("the fox"), ours.eos_id]
    assert (ids[0] == ours.bos_id) == ((not same) if flag is None else flag)
    assert ours.boundaries <= ours.apart
