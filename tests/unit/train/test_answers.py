"""A model that was trained on chats stops at the end of an answer, in transformers as here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from internevo.commands.convert import convert
from internevo.config import validate
from internevo.data.encoding.tokenize import tokenize
from internevo.inference.text import TextModel
from internevo.models.huggingface.tokenizer import special_ids
from internevo.text.tokenizer import load_tokenizer
from internevo.train.answers import note_end_of_answers, trains_on_chats
from internevo.train.run import train
from tests.conftest import tiny
from tests.unit.data.encoding.test_chats import ALTERNATES
from tests.unit.data.encoding.test_formats import CHATML, folder_with, write_chats

BASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "one": {"config.json": {"model_type": "llama", "bos_token_id": 301, "eos_token_id": 0}},
    "several": {"generation_config.json": {"eos_token_id": [0, 7], "temperature": 0.5}, "config.json": {"eos_token_id": 0}},
    "only generation": {"generation_config.json": {"eos_token_id": 0, "pad_token_id": 3}},
}
"""What a folder says of its base model."""


def base(folder: Path, name: str, template: str = CHATML) -> Path:
    folder_with(folder, template)
    for file, values in BASES[name].items():
        (folder / file).write_text(json.dumps(values))
    return folder


def end_of(tokenizer: Path) -> int:
    return load_tokenizer(tokenizer).backend.token_id("<|im_end|>") or 0


def data_of(tmp_path: Path, tokenizer: Path, kind: str, format: Any = "chat") -> dict[str, Any]:
    """The data section of a run."""
    (tmp_path / "raw").mkdir()
    if format == "chat":
        write_chats(tmp_path / "raw" / "train.jsonl", [[("user", "the cat?"), ("assistant", "sat")]] * 30)
    else:
        (tmp_path / "raw" / "train.jsonl").write_text('{"text": "the cat sat"}\n' * 60)
    folder: Path = tmp_path / "raw"
    if kind == "tokenized":
        folder = tmp_path / "data"
        tokenize([tmp_path / "raw"], folder, tokenizer=tokenizer, format=format, workers=1)
    return {"data__train_folder": str(folder), "data__type": kind, "data__format": format if kind == "streaming" else "text"}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", ["streaming", "tokenized"])
def test_an_exported_chat_model_stops_at_the_end_of_an_answer_in_transformers(tmp_path: Path, kind: str, name: str) -> None:
    tokenizer, run = base(tmp_path / "base", name), tmp_path / "run"
    section = {**data_of(tmp_path, tokenizer, kind), "data__tokenizer_path": str(tokenizer), "data__total_steps": 1}
    train(validate(tiny(model__vocab_size=304, ckpt__save_ckpt_folder=str(run), ckpt__enable_save_ckpt=True, **section)))
    convert(run, tmp_path / "model", "hf")
    end = end_of(tokenizer)
    ends = [*([0, 7] if name == "several" else [0]), end]
    loader: Any = transformers.AutoModelForCausalLM
    model = loader.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == ends
    for number in ends:
        found = model.generate(torch.tensor([[5, 6]]), max_new_tokens=9, logits_processor=[Saying([9, 10, number, 11])])
        assert found[0].tolist() == [5, 6, 9, 10, number]
    assert TextModel.open(run).eos_ids == TextModel.open(tmp_path / "model").eos_ids == set(ends)
    kept = BASES[name].get("generation_config.json", {})
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {**written, **kept, "eos_token_id": ends} == written
    ours, theirs = load_tokenizer(tmp_path / "model"), load_tokenizer(tokenizer)  # what ends documents is as before
    assert (ours.bos_id, ours.eos_id, ours.special_tokens) == (theirs.bos_id, theirs.eos_id, theirs.special_tokens)


class Saying(transformers.LogitsProcessor):
    """Makes a model say given ids."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = iter(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(self.ids)]), scores.shape[-1]) * 1000.0


@pytest.mark.parametrize("kind", ["streaming", "tokenized"])
@pytest.mark.parametrize("format", ["text", "chat"])
def test_only_data_of_chats_are_chats(tmp_path: Path, kind: str, format: str) -> None:
    tokenizer = base(tmp_path / "base", "one")
    section = {**data_of(tmp_path, tokenizer, kind, format), "data__tokenizer_path": str(tokenizer)}
    data = validate(tiny(model__vocab_size=304, **section)).data
    assert trains_on_chats(data) == (format == "chat")
    part = {"folder": data.train_folder, "kind": kind, "format": section["data__format"], "weight": 1.0}
    other = {"folder": str(tmp_path / "raw"), "kind": "streaming", "format": "text", "weight": 1.0, "name": "other"}
    mixed = tiny(model__vocab_size=304, data__mixture=[other, part], data__tokenizer_path=str(tokenizer))
    assert trains_on_chats(validate(mixed).data) == (format == "chat")


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("template", [CHATML, ALTERNATES, None], ids=["a token of its own", "the end token", "no template"])
def test_what_is_added_is_added_once_and_the_rest_stays(tmp_path: Path, name: str, template: Any) -> None:
    tokenizer = base(tmp_path / "base", name, template)
    section = {**data_of(tmp_path, base(tmp_path / "other", name), "tokenized"), "data__tokenizer_path": str(tokenizer)}
    data = validate(tiny(model__vocab_size=304, **section)).data
    before, files = special_ids(tokenizer), content(tokenizer)
    for _ in range(2):
        note_end_of_answers(tokenizer, data)
        if template == CHATML:
            ids, ends = special_ids(tokenizer), [*([0, 7] if name == "several" else [0]), end_of(tokenizer)]
            assert ids == {**before, **{k: v for k, v in ids.items() if k not in before}, "eos_token_id": ends}
        else:
            assert content(tokenizer) == files
    note_end_of_answers(tmp_path / "none", data)
    assert not (tmp_path / "none").exists()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
