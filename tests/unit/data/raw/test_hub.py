"""Which files of a dataset in the Hugging Face layout belong to a split."""

import gzip
import json
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from internevo.data.encoding.formats import document_text
from internevo.data.raw.documents import Document, read_documents
from internevo.data.raw.hub import dataset_files
from internevo.data.raw.inputs import split_files
from internevo.errors import ConfigError, DataError, UsageError
from internevo.train.check import check
from internevo.train.config import load_config
from tests.conftest import write_config


def write_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(gzip.compress(b"{}") if name.endswith(".gz") else b"{}")
    return root


def chosen(root: Path | str, split: str, subset: str | None = None, trained_on: bool = False) -> list[str]:
    home, files = dataset_files(str(root), subset, split, trained_on)
    return [path.relative_to(home).as_posix() for _, path in files]


@pytest.mark.parametrize(
    ("names", "train", "valid"),
    [
        # roneneldan/TinyStories has the same rows as text and as parquet.
        (
            ["TinyStories-train.txt", "TinyStories-valid.txt", "data/train-00000-of-00002-2d.parquet", "README.md",
             "data/train-00001-of-00002-c4.parquet", "data/validation-00000-of-00001-a.parquet", "TinyStories_all_data.tar.gz"],
            ["data/train-00000-of-00002-2d.parquet", "data/train-00001-of-00002-c4.parquet"],
            ["data/validation-00000-of-00001-a.parquet"],
        ),
        (["train/en.jsonl.gz", "train/de.jsonl.gz", "dev/en.jsonl.gz"], ["train/de.jsonl.gz", "train/en.jsonl.gz"],
         ["dev/en.jsonl.gz"]),
        (["en/1.jsonl", "en/2.jsonl", "test/a.jsonl"], ["en/1.jsonl", "en/2.jsonl"], ["en/1.jsonl", "en/2.jsonl"]),
        (["data-00000-of-00001.arrow", "dataset_info.json", "state.json"], ["data-00000-of-00001.arrow"],
         ["data-00000-of-00001.arrow"]),
        (["training_data/restrained.csv", "my_eval.csv"], ["training_data/restrained.csv"], None),
        (["latest/a.json", "contest/b.json"], ["contest/b.json", "latest/a.json"], ["contest/b.json", "latest/a.json"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split_are_found_by_their_names(
    tmp_path: Path, names: list[str], train: list[str], valid: list[str] | None
) -> None:
    write_files(tmp_path, *names)
    assert chosen(tmp_path, "train") == train
    if valid is None:
        with pytest.raises(DataError, match=r"has no files for the split valid \(it has files for: test, train\)"):
            chosen(tmp_path, "valid")
    else:
        assert chosen(tmp_path, "valid") == valid
    if valid and valid != train:
        assert chosen(tmp_path, "valid", trained_on=True) == valid
    else:  # what is trained on is never taken for validation data in silence
        with pytest.raises(DataError, match="has no files for the split valid"):
            chosen(tmp_path, "valid", trained_on=True)


def test_a_split_with_files_of_several_formats_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "a.parquet", "b.jsonl", "c.jsonl.gz")
    with pytest.raises(
        DataError, match=r"several formats for the split train \(1 parquet, 2 jsonl\), which may be the same rows twice"
    ):
        chosen(tmp_path, "train")


def test_a_subset_is_a_folder_of_the_dataset(tmp_path: Path) -> None:
    write_files(tmp_path, "en/train.jsonl", "de/train.jsonl")
    assert chosen(tmp_path, "train", "de") == ["train.jsonl"]
    with pytest.raises(DataError, match=r"fr does not exist \(see data.subset_name\)"):
        chosen(tmp_path, "train", "fr")
    with pytest.raises(DataError, match="no input files"):
        dataset_files(str(write_files(tmp_path / "none", "README.md")), None, "train")


def test_a_name_that_is_not_a_folder_is_downloaded_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    write_files(tmp_path / "cache", "train.parquet")

    def download(name: str, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, revision))
        wanted = ("data/train-0.parquet", "a.jsonl.gz", "b.csv", "c.txt.zst", "photo.jpg", "all.tar.gz", "weights.bin")
        assert [any(map(partial(fnmatch, name), allow_patterns)) for name in wanted] == [True] * 4 + [False] * 3
        if name == "some/thing":
            return str(tmp_path / "cache")
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert chosen("some/thing", "train") == ["train.parquet"] and asked == [("some/thing", "dataset", None)]
    assert chosen("some/thing@v1.0", "train") == ["train.parquet"] and asked[1:] == [("some/thing", "dataset", "v1.0")]
    with pytest.raises(UsageError, match="is not a path here, and the dataset other/thing cannot be had from https:"):
        chosen("other/thing", "train")
    with pytest.raises(UsageError, match="no/such/folder does not exist"):
        chosen("no/such/folder", "train")


def test_json_files_of_a_split_may_have_lines_or_a_single_document(tmp_path: Path) -> None:
    """As c4 does, whose last file may have one line only."""
    texts = [["a", "b"], ["c"], ["d", "e", "f"]]
    (tmp_path / "en").mkdir()
    for number, part in enumerate(texts):
        lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in part).encode()
        (tmp_path / "en" / f"c4-train.{number:05d}-of-00003.json.gz").write_bytes(gzip.compress(lines))
    _, files = dataset_files(str(tmp_path), "en", "train")
    documents = [document for chunk in split_files(files) for document in read_documents(chunk, ("text",))]
    assert [document_text(d, None) for d in documents if isinstance(d, Document)] == [*"abcdef"]


@pytest.mark.parametrize("subset", ["en/", "./en", "en//", "a/./b", "[x]", "w*", ".", "", "a b", "?"])
def test_a_subset_is_downloaded_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subset: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    wanted = (Path(subset) / "train.jsonl").as_posix()
    others = ["x/train.jsonl", "wide/train.jsonl", "e/train.jsonl"]

    def download(name: str, allow_patterns: list[str], **rest: object) -> str:
        files = hub.utils.filter_repo_objects([wanted, *others, "photo.jpg"], allow_patterns=allow_patterns)
        return str(write_files(tmp_path / "cache", *files))

    monkeypatch.setattr(hub, "snapshot_download", download)
    home, files = dataset_files("some/thing", subset, "train")
    found = [path.relative_to(tmp_path / "cache").as_posix() for _, path in files]
    assert sorted(found) == sorted([wanted] if Path(subset) != Path() else [wanted, *others])
    assert home == tmp_path / "cache" / subset


@pytest.mark.parametrize("subset", ["..", "en/../..", "/etc", "../other"])
def test_a_subset_outside_of_the_dataset_is_refused(tmp_path: Path, subset: str) -> None:
    write_files(tmp_path, "other/train.jsonl", "thing/train.jsonl")
    for name in (str(tmp_path / "thing"), "some/thing"):
        with pytest.raises(UsageError, match="is not a folder inside the dataset"):
            dataset_files(name, subset, "train")


def test_the_data_section_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    stream = {"data__type": "streaming", "data__tokenizer_path": str(tmp_path / "tokenizer")}

    def problems(folder: str | None, **changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            check(load_config(write_config(tmp_path, folder, **{**stream, **changes}), []), 1)
        return str(error.value)

    check(load_config(write_config(tmp_path, "some/dataset", **stream), []), 1)
    assert "data.train_folder = '/no/such/folder' does not exist" in problems("/no/such/folder")
    assert "streaming data needs data.tokenizer_path" in problems("some/dataset", data__tokenizer_path=None)
    assert "data.tokenizer_path = '/none' does not exist" in problems("some/dataset", data__tokenizer_path="/none")
    parts = [{"folder": "/none", "weight": 1}, {"folder": "some/dataset", "kind": "streaming", "epochs": 1.5}, {"weight": 2}]
    said = problems(None, data__mixture=parts)
    assert "data.mixture.0.folder = '/none' does not exist" in said and "data.mixture.2 needs a folder" in said
    assert "data.mixture.1.epochs = 1.5 must be a whole number" in said
