"""Data and tokenizers that are larger than the model's vocabulary are refused before a run starts."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internevo.commands.config import show
from internevo.config import validate
from internevo.data.tokenized.files import MASKED_ZERO, TokenWriter
from internevo.data.tokenized.vocabulary import check_ids
from internevo.errors import ConfigError, DataError
from internevo.text.tokenizer import load_tokenizer, train_bpe
from internevo.train.check import check
from tests.conftest import TINY
from tests.unit.data.writers import write_binary, write_json, write_megatron


def write(path: Path, documents: list[list[int]]) -> Path:
    write_binary(path, documents, None)
    return path.parent


def config_of(tmp_path: Path, **values: Any) -> Path:
    table = json.loads(json.dumps(TINY))
    for key, value in values.items():
        section, _, name = key.partition("__")
        table.setdefault(section, {})[name] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize(
    "write_file",
    [
        partial(write_binary, vocab_size=None), partial(write_binary, vocab_size=100), write_json,
        partial(write_megatron, dtype=np.int32, code=4),
    ],
    ids=["int32", "uint16", "JSON", "Megatron"],
)  # fmt: skip
def test_an_id_outside_the_vocabulary_is_found_with_its_document(tmp_path: Path, write_file: Any) -> None:
    documents = [[1, 2], [3], [4, 99, 5], [6]]
    write_file(tmp_path / "a.bin", [[ids] for ids in documents] if "megatron" in str(write_file) else documents)
    check_ids(tmp_path, 100)
    with pytest.raises(DataError, match=r"a\.bin, document 2: token id 99 is outside the vocabulary of 99 \(model\.vocab_s"):
        check_ids(tmp_path, 99)


def test_masked_ids_count_and_a_masked_0_does_not(tmp_path: Path) -> None:
    check_ids(write(tmp_path / "a.bin", [[1, MASKED_ZERO]]), 2)
    with pytest.raises(DataError, match="token id 7 is outside the vocabulary of 7"):
        check_ids(write(tmp_path / "b.bin", [[1], [-7]]), 7)


def test_large_files_are_read_in_pieces_from_the_beginning_to_the_end(tmp_path: Path) -> None:
    ids = np.zeros(3_000_000, np.int32)
    ids[-1] = 9
    writer = TokenWriter(tmp_path / "a.bin")
    writer.write(ids, np.full(3, 1_000_000))
    writer.close()
    with pytest.raises(DataError, match="document 2: token id 9"):
        check_ids(tmp_path, 9)


@pytest.mark.parametrize("split", [None, "train"])
def test_the_tokenizer_of_the_data_may_not_be_larger_than_the_model(tmp_path: Path, split: str | None) -> None:
    folder = write((tmp_path / (split or "") / "en" / "a.bin"), [[1, 2]]).parent
    size = load_tokenizer(train_bpe(["the cat sat on the mat"] * 9, 290, tmp_path)).vocab_size
    config = config_of(tmp_path, data__train_folder=str(folder), model__vocab_size=size - 1)
    message = rf"model\.vocab_size = {size - 1} is smaller than .* of data\.train_folder, which has {size} entries"
    with pytest.raises(ConfigError, match=message):
        show(config, [], None)
    with pytest.raises(ConfigError, match=message):
        check(validate(json.loads(config.read_text())), 1)
    show(config_of(tmp_path, data__train_folder=str(folder), model__vocab_size=size), [], None)


def test_the_tokenizer_of_the_config_may_not_be_larger_than_the_model(tmp_path: Path) -> None:
    train_bpe(["the cat sat on the mat"] * 9, 290, tmp_path)
    with pytest.raises(ConfigError, match=r"is smaller than the vocabulary of data\.tokenizer_path = '.*', which has"):
        show(config_of(tmp_path, data__tokenizer_path=str(tmp_path), model__vocab_size=97), [], None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer.json"):
        show(config_of(tmp_path, data__tokenizer_path=str(tmp_path)), [], None)


@pytest.mark.parametrize("key", ["train_folder", "valid_folder", "mixture"])
def test_ids_of_all_data_that_is_read_are_checked(tmp_path: Path, key: str) -> None:
    good, bad = write(tmp_path / "good" / "a.bin", [[1]]), write(tmp_path / "bad" / "a.bin", [[97]])
    values: dict[str, Any] = {"train_folder": str(good), "valid_folder": str(good), "valid_every": 2}
    values[key] = [{"folder": str(good)}, {"folder": str(bad)}] if key == "mixture" else str(bad)
    config = config_of(tmp_path, **{f"data__{name}": value for name, value in values.items()})
    for look in (lambda: show(config, [], None), lambda: check(validate(json.loads(config.read_text())), 1)):
        with pytest.raises(DataError, match=r"bad/a\.bin, document 0: token id 97 is outside the vocabulary of 97"):
            look()
    show(config, ["data.on_error=skip"], None)
