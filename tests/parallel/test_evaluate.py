"""An evaluation gives the losses of one process on every layout."""

import os
from pathlib import Path

import pytest
import torch

import internevo
from internevo.models.config import DecoderConfig, Experts
from internevo.parallel.launcher import read_launcher
from internevo.train.evaluate import Evaluation, evaluate
from tests.conftest import random_model, write_dataset
from tests.pool import Pool

CONFIG = DecoderConfig("MIXTRALMOE", 104, 32, 24, 4, 4, 2, 8, experts=Experts(4, 2, 24))
LAYOUTS = [
    (2, []),
    (2, ["parallel.tensor.size=2", "parallel.tensor.mode=msp"]),
    (2, ["parallel.pipeline.size=2"]),
    (4, ["parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2", "parallel.zero1.fsdp=true"]),
]


def on_rank(model: str, data: str, overrides: list[str]) -> Evaluation:
    return evaluate(model, data, seq_len=48, batch_size=2, overrides=overrides, launcher=read_launcher(os.environ))


@pytest.mark.parametrize(("processes", "overrides"), LAYOUTS)
def test_every_layout_gives_the_losses_of_one_process(pool: Pool, tmp_path: Path, processes: int, overrides: list[str]) -> None:
    torch.manual_seed(0)
    model = random_model(CONFIG)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    internevo.save_hf(model, tmp_path / "hf")
    data = write_dataset(tmp_path / "data")
    wanted = internevo.evaluate(model, data, seq_len=48)
    found = pool.run_alone(on_rank, processes, str(tmp_path / "hf"), str(data), overrides)
    assert all(result == found[0] for result in found)
    for name, score in wanted.by_type.items():
        mine = found[0].by_type[name]
        assert (mine.documents, mine.tokens) == (score.documents, score.tokens)
        assert mine.loss == pytest.approx(score.loss, rel=1e-5)
