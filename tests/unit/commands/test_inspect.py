"""``internevo inspect`` on tokenized data."""

from pathlib import Path

import pytest

from internevo.commands.inspect import describe
from internevo.data.tokenized.files import MASKED_ZERO
from internevo.errors import DataError, UsageError
from internevo.text.tokenizer import load_tokenizer, train_bpe
from tests.unit.data.writers import write_binary


def test_inspect_describes_a_dataset_and_names_every_broken_file(tmp_path: Path) -> None:
    texts = ["def f(x):", "return x", "x = 1\n" * 9]
    tokenizer = load_tokenizer(train_bpe(texts, 280, tmp_path))
    documents = [tokenizer.encode(text) for text in texts]
    documents[1] = [MASKED_ZERO, *(-n for n in documents[1][:2]), *documents[1][2:]]
    for name in ("code", "more"):
        write_binary(tmp_path / "train" / name / "part.bin", documents, None)
    lines = list(describe(tmp_path / "train", decode=3))
    total = sum(map(len, documents))
    assert f": 6 documents, {2 * total:,} tokens, files: 2" in lines[0]
    assert lines[1] == f"type code: 3 documents, {total} tokens"
    largest = max(abs(n) for ids in documents for n in ids if n != MASKED_ZERO)
    assert any(f"the largest id is {largest} (" in line for line in lines)
    assert any(f"{tokenizer.vocab_size} entries" in line and "every id is in it" in line for line in lines)
    counted = [int(line.split()[1]) for line in lines if "█" in line]
    assert sum(counted) == 6
    start = tokenizer.decode([0, *(-n for n in documents[1][1:3])])
    assert lines[-6::2] == [
        f"--- {tmp_path / 'train' / 'code' / 'part.bin'}, document {n}: {len(ids)} tokens"
        + (", 3 of them masked" if n == 1 else "")
        for n, ids in enumerate(documents)
    ]
    assert lines[-5::2] == [texts[0], f"⟦{start}⟧{tokenizer.decode(documents[1][3:])}", texts[2]]

    small = train_bpe(["a"], 257, tmp_path / "small")
    with pytest.raises(DataError, match=rf"has the token id {largest}, which is outside the vocabulary of 257"):
        list(describe(tmp_path / "train", small))
    for name in ("code", "more"):
        path = tmp_path / "train" / name / "part.bin"
        path.write_bytes(path.read_bytes()[:-4])
    seen: list[str] = []
    with pytest.raises(DataError, match="2 of 2 files below"):
        seen.extend(describe(tmp_path / "train"))
    with pytest.raises(UsageError, match="--decode needs a tokenizer"):
        write_binary(tmp_path / "a" / "b" / "part.bin", [[1]], None)
        list(describe(tmp_path / "a" / "b", decode=1))


@pytest.mark.usefixtures("exits_in_process")
def test_an_error_at_the_end_of_a_file_is_not_taken_for_an_abort(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """typer takes every EOFError for the end of standard input."""
    from internevo import cli
    from internevo.commands import inspect

    def fail(*arguments: object) -> None:
        raise EOFError("No data left in file")

    monkeypatch.setattr(inspect, "describe", fail)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["inspect", "."])
    error = capsys.readouterr().err
    assert "EOFError: No data left in file" in error and "interrupted" not in error
