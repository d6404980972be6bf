"""An evaluation gives the losses of one process on every layout, and tasks get its answers."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import internevo
from internevo.checkpoint.open import open_source
from internevo.inference.tasks import Requests, requests_of
from internevo.inference.text import TextModel
from internevo.models.config import DecoderConfig, Experts
from internevo.models.decoder import Decoder
from internevo.parallel.launcher import read_launcher
from internevo.parallel.world import join
from internevo.text.tokenizer import load_tokenizer, train_bpe
from internevo.train.evaluate import Evaluation, evaluate, evaluation_config, load
from tests.conftest import write_dataset
from tests.pool import Pool

CONFIG = DecoderConfig("MIXTRALMOE", 300, 32, 24, 4, 4, 2, 8, experts=Experts(4, 2, 24))
LAYOUTS = [
    (2, []),
    (2, ["parallel.tensor.size=2", "parallel.tensor.mode=msp"]),
    (2, ["parallel.pipeline.size=2"]),
    (4, ["parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2", "parallel.zero1.fsdp=true"]),
]


class Answers(NamedTuple):
    """Answers to some requests of lm-eval."""

    values: list[float]
    greedy: list[bool]
    rolling: list[float]
    texts: list[str]

    @classmethod
    def of(cls, requests: Requests) -> "Answers":
        texts = ["the cat", "a", "and purred on the mat", "sat on"]
        pairs = requests.loglikelihood(ask((text, " on the mat") for text in texts))
        rolling = requests.loglikelihood_rolling(ask((text,) for text in texts))
        generated = requests.generate_until(ask((text, {"until": ["\n"], "max_gen_toks": 4}) for text in texts))
        return cls([value for value, _ in pairs], [greedy for _, greedy in pairs], rolling, generated)


def ask(arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


def on_rank(model: str, data: str, overrides: list[str]) -> tuple[Evaluation, Answers]:
    info = read_launcher(os.environ)
    found = evaluate(model, data, seq_len=48, batch_size=2, overrides=overrides, launcher=info)
    source = open_source(Path(model))
    config = evaluation_config(source, 48, 2, None, overrides)
    with join(info) as world:
        loaded = load(source, config, world)
        text = TextModel(
            source.config, load_tokenizer(model), lambda: loaded.model, dtype=loaded.dtype,
            whole_sequences=loaded.axis.unsharded_sequences,
        )  # fmt: skip
        return found, Answers.of(requests_of(text, loaded.layout, world, 2))


@pytest.mark.parametrize(("processes", "overrides"), LAYOUTS)
def test_every_layout_gives_the_losses_and_answers_of_one_process(
    pool: Pool, tmp_path: Path, processes: int, overrides: list[str]
) -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    train_bpe(["the cat sat on the mat and purred\n"] * 9, 280, tmp_path / "tokenizer")
    internevo.save_hf(model, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    data = write_dataset(tmp_path / "data")
    wanted = internevo.evaluate(model, data, seq_len=48)
    results = pool.run_alone(on_rank, processes, str(tmp_path / "hf"), str(data), overrides)
    assert all(result == results[0] for result in results)
    found, answers = results[0]
    for name, score in wanted.by_type.items():
        mine = found.by_type[name]
        assert (mine.documents, mine.tokens) == (score.documents, score.tokens)
        assert mine.loss == pytest.approx(score.loss, rel=1e-5)
    alone = Answers.of(Requests(TextModel.open(tmp_path / "hf"), 16, 2048))
    assert (answers.greedy, answers.texts) == (alone.greedy, alone.texts)
    assert [*answers.values, *answers.rolling] == pytest.approx([*alone.values, *alone.rolling], rel=1e-4)
