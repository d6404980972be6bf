"""Shared by all tests: a tiny config, a tiny dataset, and a way to run the commands as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from torch import Tensor

    from internevo.models.config import DecoderConfig
    from internevo.models.decoder import Decoder
    from tests.pool import Pool

Run = Callable[..., subprocess.CompletedProcess[str]]
"""The fixture ``run``."""
WriteConfig = Callable[..., Path]
"""The fixture ``config``: ``write_config`` for this test's folder and dataset."""
settings.register_profile("internevo", deadline=None)  # no test depends on how fast a machine is
settings.load_profile("internevo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where the tests run under nohup, or in the background of a script, these are ignored, also by the processes that they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "JOB_NAME": "tiny",
    "model_type": "LLAMA2",
    "model": {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_kv_attention_heads": 2, "vocab_size": 97,
        "intermediate_size": 48, "dtype": "torch.float32",
    },
    "data": {"seq_len": 32, "micro_bsz": 1, "global_batch_size": 12, "total_steps": 8},
    "adam": {"lr": 1e-2},
    "hybrid_zero_optimizer": {"clip_grad_norm": 1.0},
    "lr_scheduler": {"total_steps": 20},
    "enable_tb": False,
}  # fmt: skip


def run(
    *arguments: object,
    code: int | None = 0,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    command: list[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs ``internevo ARGUMENTS`` and returns the finished process; fails with its output on another exit code."""
    command = command or [sys.executable, "-m", "internevo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": "cpu", **(env or {})}
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=environment)
    assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(name="run")
def run_fixture() -> Run:
    return run


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes for training runs, kept over tests."""
    from tests.pool import Pool

    pool = Pool()
    yield pool
    pool.stop(patience=10)


@pytest.fixture
def exits_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that call the command line in this process: a process in which ranks could have run ends with ``os._exit``."""
    monkeypatch.setattr(os, "_exit", sys.exit)


def random_model(config: DecoderConfig) -> Decoder:
    """A model whose weights, norms and biases included, are drawn from a normal distribution."""
    import torch

    from internevo.models.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(config)
    model.materialize("cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def write_dataset(folder: Path) -> Path:
    """Two types of documents, random lengths, some masked tokens (token 0 among them)."""
    from internevo.data.tokenized.files import MASKED_ZERO, TokenWriter

    draw = np.random.default_rng(7)
    for name in ("cn", "en"):
        writer = TokenWriter(folder / name / "part.bin", vocab_size=2**20)
        counts = draw.integers(1, 80, size=60)
        ids = draw.integers(0, 97, size=counts.sum())
        masked = draw.random(len(ids)) < 0.05
        writer.write(np.where(masked, np.where(ids == 0, MASKED_ZERO, -ids), ids), counts)
        writer.close()
    return folder


def tiny(**changes: Any) -> dict[str, Any]:
    """The tiny config as plain values, with changes (``section__key=value``)."""
    values = json.loads(json.dumps(TINY))
    for key, value in changes.items():
        *path, last = key.split("__")
        node = values
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return values


def write_config(folder: Path, dataset: Path | str | None, name: str = "run", **changes: Any) -> Path:
    """Writes the tiny config with changes to a file; its run folder is ``folder/NAME``."""
    places = {"data__train_folder": str(dataset), "ckpt": {"save_ckpt_folder": str(folder / name)}}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tiny(**{**places, **changes})))
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data")


@pytest.fixture
def config(tmp_path: Path, dataset: Path) -> WriteConfig:
    return partial(write_config, tmp_path, dataset)


def rows_so_far(folder: Path | str) -> list[dict[str, Any]]:
    """Training rows of a run folder, as far as there are any."""
    path = Path(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if "loss" in row]


def metrics(folder: Path | str) -> list[dict[str, Any]]:
    """Training rows of a run folder that has trained: comparisons of nothing with nothing would pass."""
    rows = rows_so_far(folder)
    assert rows, f"{folder} has trained no step"
    return rows


def tensors(folder: Path | str, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of a run folder, in full."""
    from internevo.checkpoint import Checkpoint

    checkpoint = Checkpoint(Path(folder) / "checkpoints" / f"step-{step:08d}")
    assert checkpoint.manifest.tensors
    return {name: checkpoint.tensor(name) for name in checkpoint.manifest.tensors}
