"""The pieces of a text that is generated make up the whole text, and end before a stop text."""

import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from internevo.text.pieces import Pieces
from internevo.text.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat", "日本語 と 🎉 émojis", "  two  spaces\n\tand tabs"]


def train_sentencepiece(texts: list[str], vocab_size: int, folder: Path) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size, byte_fallback=True,
        character_coverage=0.98, model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make = train_bpe if request.param == "bpe" else train_sentencepiece
    return load_tokenizer(make(TEXTS * 20, 300, folder))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("the cat 日本🎉é\n"), max_size=30), cut=st.integers(0, 30), strip=st.booleans())
def test_the_pieces_of_any_text_are_the_whole_text(tokenizer: Tokenizer, text: str, cut: int, strip: bool) -> None:
    ids = tokenizer.encode(text)
    prompt, new = ids[:cut], ids[cut:]
    pieces = Pieces(tokenizer, prompt, strip=strip)
    found = "".join([*map(pieces.add, new), pieces.finish()])
    wanted = tokenizer.decode(ids)[len(tokenizer.decode(prompt).rstrip("\ufffd")) :] if new else ""
    assert found == (wanted.strip() if strip else wanted) or "\ufffd" in tokenizer.decode(prompt)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=1236)
def test_a_text_ends_before_the_first_stop_text(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("ab\n") for _ in range(30))
    stops = ["".join(draw.choice("ab\n") for _ in range(draw.randint(1, 4))) for _ in range(2)]
    pieces, found = Pieces(tokenizer, stop=stops), ""
    for id_ in tokenizer.encode(text):
        found += pieces.add(id_)
        if pieces.stopped:
            break
    found += pieces.finish()
    text = tokenizer.decode(tokenizer.encode(text))
    # Of two that overlap, the one that is complete first, in whatever tokens the text comes.
    _, end = min(((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text), default=(0, len(text)))
    assert found == text[:end]
