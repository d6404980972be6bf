"""A run folder keeps the tokenizer of its run."""

from pathlib import Path

from internevo.text.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe
from internevo.train.resume import keep_tokenizer


def test_a_run_keeps_its_tokenizer_and_sets_another_one_aside(tmp_path: Path) -> None:
    run, one, two = tmp_path / "run", tmp_path / "one", tmp_path / "two"
    run.mkdir()
    first, second = train_bpe(["abc abc"], 260, one), train_bpe(["xyz xyz"], 259, two)
    keep_tokenizer(run, None)
    keep_tokenizer(run, str(tmp_path / "none"))
    assert not any(run.iterdir())
    keep_tokenizer(run, str(first))  # a file
    kept = run / "tokenizer"
    assert load_tokenizer(kept).encode("abc") == load_tokenizer(one).encode("abc")
    before = kept.stat().st_ino
    for path in (one, kept):
        keep_tokenizer(run, str(path))
        assert kept.stat().st_ino == before, "it is the same"
    keep_tokenizer(run, str(second))
    assert tokenizer_fingerprint(kept) == tokenizer_fingerprint(two)
    assert tokenizer_fingerprint(run / "tokenizer.1") == tokenizer_fingerprint(one)
    assert sorted(path.name for path in run.iterdir()) == ["tokenizer", "tokenizer.1"]
