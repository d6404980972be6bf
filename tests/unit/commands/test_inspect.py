"""``internevo inspect`` on tokenized and raw data, and on what comes from a model."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from internevo import load_model, save_hf
from internevo.commands.config_from_hf import from_hf
from internevo.commands.convert import convert
from internevo.commands.inspect import describe
from internevo.data.encoding.tokenize import tokenize
from internevo.data.tokenized.files import MASKED_ZERO
from internevo.data.tokenized.origin import find_origin
from internevo.errors import DataError, UsageError
from internevo.models.config import DecoderConfig, Lora
from internevo.models.huggingface.peft import write_peft
from internevo.models.huggingface.tokenizer import copy_tokenizer
from internevo.models.source import ModelInMemory
from internevo.text.tokenizer import load_tokenizer, train_bpe
from tests.conftest import random_model, run, write_config
from tests.unit.data.writers import write_binary, write_megatron


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
    with pytest.raises(DataError, match="broken: 2 of 2 files below"):
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


def test_tokenized_data_remembers_its_tokenizer(tmp_path: Path) -> None:
    texts = ["def f(x):", "return x", "x = 1\n" * 9, "y"] * 4
    train_bpe(texts, 280, tmp_path / "tok")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenize([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=tmp_path / "tok", valid_ratio=0.5, workers=1)
    for folder in (tmp_path / "out", tmp_path / "out" / "train", tmp_path / "out" / "train" / "en"):
        lines = list(describe(folder, decode=9))
        assert f"tokenized with: {tmp_path / 'tok'}, as text" in lines and any("every id is in it" in line for line in lines)
        assert not any(line.startswith("note:") for line in lines)
        assert any(line.removesuffix("<|endoftext|>") in texts for line in lines)
    tokenize([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer=tmp_path / "tok", overwrite=True, workers=1)
    assert find_origin(tmp_path / "out" / "en") == find_origin(tmp_path / "out")
    write_binary(tmp_path / "out" / "other" / "a.bin", [[1]], None)  # other data next to it
    assert find_origin(tmp_path / "out" / "other") is None

    train_bpe(["other text"], 270, tmp_path / "tok")
    note = f"note: the tokenizer {tmp_path / 'tok'} has changed since it was tokenized, so the text may be wrong"
    seen: list[str] = []
    with pytest.raises(DataError, match="outside the vocabulary"):
        for line in describe(tmp_path / "out" / "en"):
            seen.append(line)
    assert note in seen
    shutil.rmtree(tmp_path / "tok")
    missing = f"the tokenizer {tmp_path / 'tok'}, with which it was tokenized, is no longer there"
    assert any(missing in line for line in describe(tmp_path / "out" / "en"))
    with pytest.raises(UsageError, match=f"--decode needs a tokenizer: {missing}; give --tokenizer PATH"):
        list(describe(tmp_path / "out" / "en", decode=1))


def test_raw_data_is_described_with_the_format_that_fits(tmp_path: Path) -> None:
    chats = [{"id": n, "messages": [{"role": "user", "content": "x" * n}], "text": None} for n in range(1, 5)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    lines = list(describe(tmp_path / "chats.jsonl"))
    assert lines[0].startswith(f"raw data {tmp_path / 'chats.jsonl'}: 1 file (jsonl), ") and "; 4 documents" in lines[0]
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["id", "number", "4", "times"], ["messages", "list", "4", "times,"], ["text", "null", "4", "times"],
    ]  # fmt: skip
    assert "items: median 1, 95% 1, longest 1" in lines[2] and lines[-1] == "fits --format chat"
    table = pyarrow.table({"instruction": ["a", "b"], "output": ["c", "dd" * 200], "extra": [1, None]})
    (tmp_path / "table").mkdir()
    parquet.write_table(table, tmp_path / "table" / "a.parquet")
    lines = list(describe(tmp_path / "table"))
    assert lines[-1] == "fits --format alpaca (or chat, with the tokenizer's chat template)" and "..." in lines[-2]
    assert any("output" in line and "characters: median 200, 95% 380, longest 400" in line for line in lines)
    (tmp_path / "c.csv").write_text("question,answer\na,b\n")
    assert list(describe(tmp_path / "c.csv"))[-1].startswith("no format fits: chat needs a list in messages or conversations; ")
    (tmp_path / "t.txt").write_text("a text")
    assert (
        list(describe(tmp_path / "t.txt"))[-1]
        == "fits --format text of internevo finetune; internevo tokenize needs no --format"
    )
    (tmp_path / "chats.jsonl").write_text('{"text": "a"}\n{nothing\n')
    with pytest.raises(DataError, match=r"1 document cannot be read; the first: .*chats.jsonl, byte 14: the line is not JSON"):
        list(describe(tmp_path / "chats.jsonl"))


def test_what_comes_from_a_model_is_described_and_is_no_model(tmp_path: Path) -> None:
    """A tokenizer's copy, adapters and a GGUF file: ``inspect`` says what they are, and what needs a model refuses them."""
    tokenizer = train_bpe(["def f(x): return x"] * 5, 280, tmp_path / "tok").parent
    shape = DecoderConfig(
        family="LLAMA2",
        vocab_size=280,
        hidden_size=8,
        intermediate_size=12,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    save_hf(random_model(shape), tmp_path / "hf", tokenizer=tokenizer)
    copy_tokenizer(tmp_path / "hf", tmp_path / "copy")
    assert list(describe(tmp_path / "copy")) == [
        f"tokenizer {tmp_path / 'copy'}: vocabulary {load_tokenizer(tokenizer).vocab_size}",
        "documents end with '<|endoftext|>' (id 0)",
        "chat template: no",
    ]
    tuned = replace(shape, lora=Lora(rank=2, alpha=4, targets=("q", "v")))
    write_peft(ModelInMemory(tuned, random_model(tuned), None), tmp_path / "peft", base="owner/base")
    lines = list(describe(tmp_path / "peft"))
    assert lines[0].endswith("LORA, for the model owner/base") and lines[1] == "rank: 2, alpha: 4, targets: q_proj, v_proj"
    assert lines[2].startswith("intact: all 4 tensors can be read, ")
    convert(tmp_path / "hf", tmp_path / "gguf", "gguf")
    file = tmp_path / "gguf" / "model.gguf"
    count = sum(parameter.numel() for parameter in load_model(tmp_path / "hf").parameters())
    lines = list(describe(tmp_path / "gguf"))
    assert lines == list(describe(file)) and lines[:2] == [f"GGUF model {file}: llama, {count:,} parameters", "tokenizer: yes"]

    reasons = {"copy": "has a tokenizer and no model", "peft": "adapters of the peft library", "gguf": "llama.cpp"}
    for name, reason in (*reasons.items(), ("gguf/model.gguf", "llama.cpp")):
        for act in (load_model, lambda path: from_hf(str(path))):
            with pytest.raises(UsageError, match=reason):
                act(tmp_path / name)
    whole = file.read_bytes()
    for length in (0, 2, 100, 3000, len(whole) // 2, len(whole) - 64):
        file.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=f"{file} is not a whole GGUF file"):
            list(describe(file))


def test_a_file_is_described_as_what_it_belongs_to(tmp_path: Path) -> None:
    """A tokenizer's file as its folder; a dataset of Megatron's by the path that training takes, and by its files."""
    file = train_bpe(["def f(x): return x"] * 5, 280, tmp_path / "tok")
    of_folder, of_file = list(describe(file.parent)), list(describe(file))
    assert of_file == [of_folder[0].replace(str(file.parent), str(file)), *of_folder[1:]] and len(of_file) == 3
    (tmp_path / "meg").mkdir()
    write_megatron(tmp_path / "meg" / "my_text_document", [[[1, 2, 3]], [[4, 5]]], np.uint16, 8)
    for name in ("my_text_document", "my_text_document.bin", "my_text_document.idx"):
        lines = list(describe(tmp_path / "meg" / name, tokenizer=file, decode=1))
        assert lines[0] == f"tokenized data {tmp_path}/meg/my_text_document: 2 documents, 5 tokens, files: 1"
        assert any("every id is in it" in line for line in lines) and lines[-2].endswith("document 0: 3 tokens")
    with pytest.raises(UsageError, match="does not exist"):
        list(describe(tmp_path / "meg" / "my_text"))


def test_runs_in_a_folder_are_listed_and_adapters_of_a_run_are_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q", "v"]}
    run(
        "train",
        write_config(
            tmp_path, None, "tuned", ckpt__save_ckpt_folder=str(runs / "tuned"), data__type="mocked", model__lora=lora
        ),
    )
    assert "adapters (LoRA): rank 2, alpha 4, targets: q, v" in list(describe(runs / "tuned"))
    steps = [{"step": step, "loss": loss} for step, loss in ((1, 2.5), (2, None))]
    for name, rows in (("began", []), ("no-loss", steps), ("short", steps[:1])):
        (runs / name).mkdir()
        (runs / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (runs / "notes").mkdir()  # is no run
    first, *lines = describe(runs)
    assert first == f"4 runs in {runs}:" and len(lines) == 4
    assert lines[0] == "  began    no step yet; 0 checkpoints" and lines[1] == "  no-loss  step 2, no loss; 0 checkpoints"
    assert lines[2] == "  short    step 1, loss 2.5000; 0 checkpoints"
    assert re.fullmatch(r"  tuned    step (\d) of \1, loss \d\.\d{4}; 1 checkpoint", lines[3])
    write_binary(runs / "data" / "part.bin", [[1, 2]], None)  # data beside the runs: the folder is described as data
    assert next(iter(describe(runs))).startswith(f"tokenized data {runs}: 1 document,")
