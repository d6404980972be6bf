"""The micro-batch is the largest that fits; less memory costs recomputation first, and then shards the weights."""

from typing import Any

import pytest
import torch

from internevo.config import Config
from internevo.config.load import validate
from internevo.errors import InternEvoError
from internevo.train import fit
from internevo.train.fit import USED, fitted, free_memory, needed_memory
from tests.conftest import tiny

CPU, SIZES = torch.device("cpu"), [8, 4, 2, 1]


def config_of(**more: Any) -> Config:
    return validate(tiny(data__seq_len=64, data__micro_bsz=1, data__global_batch_size=16, **more), "the test")


def choose(config: Config, processes: int, memory: float, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bool, bool, bool]:
    """Returns the rows of a micro-batch, whether layers are computed again, whether weights are sharded, whether it fits."""
    monkeypatch.setattr(fit, "free_memory", lambda device, count: memory)
    chosen, enough = fitted(config, SIZES, processes, CPU)
    assert enough == (needed_memory(chosen, processes, "cpu") <= USED * memory)
    return chosen.data.micro_bsz, bool(chosen.model.checkpoint), chosen.parallel.zero1.fsdp, enough


def test_less_memory_means_smaller_micro_batches_then_recomputation_then_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    config, processes = config_of(), 2
    most = needed_memory(config.model_copy(update={"data": config.data.model_copy(update={"micro_bsz": 8})}), processes, "cpu")
    results = [choose(config, processes, most / USED * share / 200, monkeypatch) for share in range(220, 0, -1)]
    assert results[0] == (8, False, False, True) and results[-1][3] is False
    fits = list(dict.fromkeys(row for row in results if row[3]))
    order = [(rows, again, sharded, True) for sharded in (False, True) for again in (False, True) for rows in SIZES]
    assert fits == [row for row in order if row in fits]
    assert {row[1] for row in fits} == {False, True} and (1, False, False, True) in fits


def test_one_process_and_adapters_shard_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = config_of(model__lora={"rank": 2, "targets": ["q"]})
    for config, processes in ((config_of(), 1), (adapters, 2)):
        assert choose(config, processes, 1, monkeypatch) == (1, True, False, False)
    assert needed_memory(adapters, 1, "cpu") < needed_memory(config_of(), 1, "cpu")


def test_a_gpu_that_cannot_be_used_says_why() -> None:
    with pytest.raises(InternEvoError, match=r"the free memory of cuda:99 cannot be read: \w+.*: .*(CUDA|device)"):
        free_memory(torch.device("cuda", 99), 1)


def test_free_memory_is_shared_by_the_processes() -> None:
    one, two = free_memory(CPU, 1), free_memory(CPU, 2)
    assert 2**20 < two < one < 2**50
