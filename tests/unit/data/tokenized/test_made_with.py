"""Which tokenizer tokenized data was made with, and whether a model's is the same."""

import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

import internevo
from internevo.data.tokenized.made_with import tokenizer_of_data
from internevo.errors import DataError
from internevo.text.tokenizer import TokenizersBackend, load_tokenizer


def as_json(model: Path) -> Path:
    """Writes a SentencePiece model as a tokenizer.json next to it, in the form that Llama's has."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocabulary = [(pieces.id_to_piece(n), pieces.get_score(n)) for n in range(pieces.get_piece_size())]
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 0))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.save(str(model.with_name("tokenizer.json")))
    return model.with_name("tokenizer.json")


def test_two_forms_of_a_tokenizer_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SentencePiece model shows no token that begins a document, and a tokenizer.json does, with another space after it."""
    texts = [f"the cat sat on {n} mats and purred" for n in range(30)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    folder, own = tmp_path / "own", tmp_path / "another"
    for home, written in ((folder, texts), (own, [text[::-1] for text in texts])):
        home.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(written), model_prefix=str(home / "tokenizer"), vocab_size=30, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
        )  # fmt: skip
    model = folder / "tokenizer.model"
    forms = load_tokenizer(model), load_tokenizer(as_json(model))
    ids = [form.with_bos(texts[0]) + form.eos for form in forms]
    assert ids[0] == ids[1] and forms[0].decode(ids[0]) != forms[1].decode(ids[0])
    sizes, whole = list[bool](), TokenizersBackend.size

    def size(backend: TokenizersBackend, added: bool = True) -> int:
        sizes.append(added)
        return whole(backend, added)

    monkeypatch.setattr(TokenizersBackend, "size", size)
    data = tmp_path / "data"
    for made_with, other in ((model, folder), (folder, model)):
        shutil.rmtree(data, ignore_errors=True)
        internevo.tokenize([tmp_path / "texts.txt"], data, tokenizer=made_with)
        sizes.clear()
        found, notes = tokenizer_of_data(data, other)
        assert found is not None and not notes
        assert len(sizes) <= 2, "the entries of a vocabulary are counted once, and not for each id"
        with pytest.raises(DataError, match="by the other"):
            tokenizer_of_data(data, own)
        assert tokenizer_of_data(data, own, compares=False)[0] is not None, "it has been done before"
