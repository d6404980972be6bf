"""The losses of an evaluation are those that transformers computes of each document alone."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from typer.testing import CliRunner

import internevo
from internevo.cli import app
from internevo.commands.evaluate import Question, run
from internevo.data.tokenized.files import MASKED_ZERO, TokenWriter
from internevo.data.tokenized.index import open_index
from internevo.data.windows import WholeDocuments, choose_documents
from internevo.errors import ConfigError, DataError, InternEvoError, UsageError
from internevo.models.config import DecoderConfig, Experts
from internevo.models.families.registry import decoder_config
from internevo.text.tokenizer import load_tokenizer, train_bpe
from internevo.train.check import check_config
from internevo.train.config import load_config
from internevo.train.evaluate import evaluation_config
from tests.conftest import ROOT, random_model, write_dataset

LLAMA = DecoderConfig("LLAMA2", 100, 24, 40, 2, 4, 2, 6, max_position_embeddings=64, tie_embeddings=True)
MIXTRAL = DecoderConfig(
    "MIXTRALMOE", 100, 24, 20, 2, 4, 2, 6, max_position_embeddings=64, windows=(9, 9), experts=Experts(4, 2, 20)
)


def model_in(folder: Path, config: DecoderConfig) -> Path:
    torch.manual_seed(1)
    internevo.save_hf(random_model(config), folder)
    return folder


@torch.no_grad()
def reference(folder: Path, data: Path, seq_len: int, stride: int) -> dict[str, tuple[int, float, int]]:
    """Type -> (documents, sum of the losses, predicted tokens): each window alone, with the labels that none before has."""
    loader: Any = transformers.AutoModelForCausalLM
    model, index, found = (
        loader.from_pretrained(folder, dtype=torch.float32),
        open_index(data),
        dict[str, tuple[int, float, int]](),
    )
    for document in range(len(index)):
        raw = index.read(document)
        masked, total, done = raw < 0, 0.0, 1
        ids = torch.from_numpy(np.where(raw == MASKED_ZERO, 0, np.abs(raw)))
        count = 0
        for start in itertools.count(0, stride):
            if done >= len(ids):
                break
            window = ids[start : start + seq_len]
            losses = F.cross_entropy(
                model(window[None]).logits[0].float(), ids_after(ids, start, len(window)), reduction="none"
            )
            for place, loss in enumerate(losses.tolist()):
                target = start + place + 1
                if done <= target < len(ids) and not masked[target]:
                    total, count = total + loss, count + 1
            done = max(done, start + len(window) + 1)
        kind = index.types[index.file_types[index.file_of(document)]]
        before = found.get(kind, (0, 0.0, 0))
        found[kind] = (before[0] + 1, before[1] + total, before[2] + count)
    return found


def ids_after(ids: torch.Tensor, start: int, count: int) -> torch.Tensor:
    after = ids[start + 1 : start + count + 1]
    return F.pad(after, (0, count - len(after)))


@pytest.mark.parametrize(("config", "seq_len", "stride"), [(LLAMA, 64, 64), (LLAMA, 16, 5), (MIXTRAL, 24, 24)])
def test_losses_by_type_are_those_of_transformers(tmp_path: Path, config: DecoderConfig, seq_len: int, stride: int) -> None:
    folder, data = model_in(tmp_path / "hf", config), write_dataset(tmp_path / "data")
    wanted = reference(folder, data, seq_len, stride)
    found = internevo.evaluate(folder, data, seq_len=seq_len, stride=stride, batch_size=3)
    assert found.by_type.keys() == wanted.keys() == {"cn", "en"}
    for name, (documents, total, tokens) in wanted.items():
        score = found.by_type[name]
        assert (score.documents, score.tokens) == (documents, tokens)
        assert score.loss == pytest.approx(total / tokens, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
        assert score.bits_per_byte is None  # no tokenizer is known
    assert found.total.tokens == sum(tokens for _, _, tokens in wanted.values())
    assert found.total.loss == pytest.approx(sum(total for _, total, _ in wanted.values()) / found.total.tokens, rel=1e-5)
    in_memory = internevo.evaluate(internevo.load_model(folder), data, seq_len=seq_len, stride=stride)
    assert in_memory.total.loss == pytest.approx(found.total.loss, rel=1e-5)


def test_documents_are_packed_whole_and_a_limit_is_of_each_type(tmp_path: Path) -> None:
    index = open_index(write_dataset(tmp_path / "data"))
    chosen = choose_documents(index, 7)
    assert [index.file_types[index.file_of(document)] for document in chosen] == [0] * 7 + [1] * 7
    rows = WholeDocuments(index, choose_documents(index, None), 80, 100, 80)
    windows = [window for row in rows.rows for window in row]
    lengths = index.documents[:, 1]
    assert sorted(window.document for window in windows) == np.flatnonzero(lengths > 1).tolist()  # none is cut
    assert all(sum(window.stop - window.start for window in row) <= 80 for row in rows.rows)
    assert len(rows) <= 1.1 * (lengths - 1).sum() / 80  # little is padded


def test_bits_per_byte_count_the_bytes_of_the_predicted_text(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "日本語 and 🎉", "x"]
    tokenizer = load_tokenizer(train_bpe(texts * 9, 300, tmp_path / "hf"))
    folder = tmp_path / "model"
    internevo.save_hf(random_model(DecoderConfig("LLAMA2", 300, 24, 40, 1, 4, 2, 6)), folder, tokenizer=tokenizer)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    internevo.tokenize(tmp_path / "text.jsonl", tmp_path / "data", tokenizer=tmp_path / "hf", workers=1)
    found = internevo.evaluate(folder, tmp_path / "data").total
    first = sum(len(tokenizer.decode(tokenizer.encode(text)[:1]).encode()) for text in texts)  # is predicted by nothing
    nbytes = sum(len(text.encode()) for text in texts) - first
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / nbytes)


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = model_in(tmp_path / "hf", LLAMA), write_dataset(tmp_path / "data")
    question = Question(model=folder, data=data, seq_len=32, batch_size=2, limit=5, json=True)
    assert run(question, 1) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["total"]["documents"] == 10 and set(values["by_type"]) == {"cn", "en"} and values["seq_len"] == 32
    assert question.arguments() == [
        "evaluate", "--data", str(data), "--seq-len", "32", "--batch-size", "2", "--limit", "5", "--json", "--", str(folder)
    ]  # fmt: skip
    assert run(replace(question, json=False), 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["type", "cn", "en", "all"]
    assert float(lines[-1].split()[3]) == pytest.approx(values["total"]["loss"], abs=1e-3)


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    folder, data = model_in(tmp_path / "hf", LLAMA), write_dataset(tmp_path / "data")
    small = model_in(tmp_path / "small", DecoderConfig("LLAMA2", 50, 24, 40, 1, 4, 2, 6))
    with pytest.raises(DataError, match="outside the vocabulary of 50 of the model"):
        internevo.evaluate(small, data)
    with pytest.raises(DataError, match="neither a folder of tokenized data"):
        internevo.evaluate(folder, tmp_path / "nothing")
    with pytest.raises(UsageError, match="stride = 99 must be from 1 to seq_len = 64"):
        internevo.evaluate(folder, data, stride=99)
    with pytest.raises(UsageError, match="an evaluation can change only how the model is computed"):
        internevo.evaluate(folder, data, overrides=["data.seq_len=4"])
    with pytest.raises(ConfigError, match=r"parallel\.tensor"):
        internevo.evaluate(folder, data, overrides=["parallel.tensor.size=2"])
    writer = TokenWriter(tmp_path / "one" / "en" / "part.bin", vocab_size=100)
    writer.write(np.array([1, 2, 3]), np.array([1, 1, 1]))
    writer.close()
    with pytest.raises(DataError, match="no document has two tokens"):
        internevo.evaluate(folder, tmp_path / "one")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_the_config_of_an_evaluation_has_the_sizes_of_every_model(path: Path) -> None:
    config = load_config(path)
    decoder = decoder_config(config.model_type, config.model)
    source = SimpleNamespace(config=decoder, dtype_of=lambda name: torch.bfloat16)
    made = evaluation_config(source, 512, 2, config, ["parallel.zero1.size=1"])
    again = decoder_config(made.model_type, made.model)
    for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size", "tie_embeddings"):
        assert getattr(again, name) == getattr(decoder, name)
    assert made.model.num_experts == (decoder.experts.count if decoder.experts else 1)
    assert made.model.dtype == config.model.dtype and made.parallel.tensor == config.parallel.tensor
    check_config(evaluation_config(source, 512, 2, None, []), 1)


def test_data_of_another_tokenizer_is_refused_and_what_is_not_known_is_said(tmp_path: Path) -> None:
    texts = [f"the cat sat on {n} mats and purred" for n in range(30)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    one, two = tmp_path / "one", tmp_path / "two"
    train_bpe(texts * 3, 290, one)
    train_bpe(["xyz " + text[::-1] for text in texts] * 3, 290, two)
    folder = model_in(tmp_path / "hf", replace(LLAMA, vocab_size=300))
    shutil.copytree(one, folder, dirs_exist_ok=True)
    data = tmp_path / "data"
    internevo.tokenize([tmp_path / "texts.txt"], data, tokenizer=two)
    with pytest.raises(DataError, match=r"was tokenized with .*two.*hf.* is the model's tokenizer: .* by the other"):
        internevo.evaluate(folder, data)
    known = internevo.evaluate(folder, data, tokenizer=two)
    assert known.total.bits_per_byte and not known.notes
    two.rename(tmp_path / "moved")
    found = internevo.evaluate(folder, data)
    assert found.total.loss == known.total.loss and "is no longer there" in found.notes[0]
    internevo.tokenize([tmp_path / "texts.txt"], tmp_path / "right", tokenizer=one)
    assert not internevo.evaluate(folder, tmp_path / "right").notes
    (folder / "tokenizer.json").write_text("{}")  # the loss needs none
    found = internevo.evaluate(folder, tmp_path / "right")
    assert found.total.bits_per_byte and not found.notes
    found = internevo.evaluate(folder, data)
    assert found.total.loss == known.total.loss and found.total.bits_per_byte is None
    assert "bits per byte are not known, because the model's tokenizer cannot be opened" in found.notes[0]


def test_all_is_checked_before_processes_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, data = model_in(tmp_path / "hf", LLAMA), write_dataset(tmp_path / "data")
    monkeypatch.setattr("internevo.commands.evaluate.launch", lambda *arguments: pytest.fail("started"))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)

    def ask(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["evaluate", *arguments, "--nproc", "2"])
        assert isinstance(result.exception, InternEvoError), result.output
        return str(result.exception)

    assert "none does not exist" in ask(str(tmp_path / "none"), "--data", str(data))
    assert "neither a folder of tokenized data" in ask(str(folder), "--data", str(tmp_path / "hf" / "x"))
    assert "package lm-eval" in ask(str(folder), "--tasks", "arc") or find_spec("lm_eval")
    assert "parallel.tensor" in ask(str(folder), "parallel.tensor.size=4", "--data", str(data))
    assert "does not exist" in ask(str(folder), "--data", str(data), "--tokenizer", str(tmp_path / "t"))
