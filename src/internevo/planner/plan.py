"""The fastest layouts of a config on a cluster, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..config import Config
from ..config.axes import data_size
from ..data.batches import BatchSizes
from ..errors import ConfigError, UsageError, expect
from ..models.families.registry import decoder_config
from ..parallel.layout import Layout
from ..train.check import check_config, problems
from . import hardware, memory, step
from .calibration import Calibration
from .choice import Choice, in_rows
from .job import Job
from .search import Candidate, Search

RESERVE = 0.1
"""The share of a GPU's memory that is left for CUDA, NCCL and the allocator."""
TOP = 10


@dataclass(frozen=True)
class Plan:
    """The layouts of a config on a cluster."""

    search: Search
    best: list[Candidate]
    """The fastest ones that fit, with their predictions; empty if none fits."""
    own: Candidate | list[str]
    """The config's own layout with its prediction, or why it cannot be trained on these GPUs."""

    def config(self, number: int = 0) -> Config:
        """Returns the config with one of the best layouts, counted from 0."""
        return self.best[number].choice.apply(self.search.config, self.search.rows)


def plan(
    config: Config,
    gpus: int,
    gpu: str,
    *,
    nodes: int | None = None,
    calibration: str | Path | None = None,
    memory_limit: int | None = None,
    imbalance: float = 1.0,
) -> Plan:
    """Finds the fastest layouts of a config on a cluster, without that cluster.

    Args:
        gpus: number of GPUs.
        gpu: which GPU: its name ("h100"), or the path of a file that describes it.
        nodes: number of nodes; None: as many GPUs in a node as usual.
        calibration: a file of ``internevo plan --calibrate``.
        memory_limit: bytes that a rank may use; None: 90% of the GPU's.
        imbalance: rows of the rank whose experts get the most, divided by the mean.

    Raises:
        UsageError, ConfigError: if the GPU is not known, or the config cannot be planned.
    """
    expect(config, Config, "plan takes the config that load_config returned")
    if gpus < 1:
        raise UsageError(f"gpus = {gpus} must be at least 1")
    machine = hardware.find(gpu)
    if nodes is not None and (nodes < 1 or gpus % nodes):
        raise UsageError(f"--gpus {gpus} cannot be divided among --nodes {nodes}")
    if not 1 <= imbalance < float("inf"):
        raise UsageError(
            f"--imbalance {imbalance:g} must be at least 1: the busiest rank has at least as many rows as the mean"
        )
    if nodes is not None:
        machine = replace(machine, gpus_per_node=gpus // nodes)
    limit = _limit(machine, memory_limit)
    measured = Calibration.load(Path(calibration)) if calibration else Calibration()
    asked = in_rows(config, gpus)
    if asked is None or not (rows := asked.data.global_batch_size):
        raise ConfigError(
            f"the config's own layout does not fit {gpus} GPUs, so its global batch is not known: set "
            "data.global_batch_size, in rows"
        )
    if config.model.lora is not None:
        raise ConfigError("memory and times are not known for model.lora; leave it out")
    check_config(Choice().apply(asked, rows), 1)
    decoder = decoder_config(config.model_type, config.model)
    search = Search(asked, decoder, gpus, rows, machine, measured, limit, imbalance)
    return Plan(search, search.best(TOP), _own(config, search))


def _limit(machine: hardware.GPU, asked: int | None) -> int:
    """Returns the bytes that a rank may use."""
    has = int(machine.memory_gib * 2**30)
    if asked is not None and not 1 <= asked <= has:
        raise UsageError(
            f"--memory: a rank cannot use {asked / 2**30:,.1f} GiB of the {machine.memory_gib:g} GiB that {machine.name} has; "
            "another GPU is described in a file (--gpu FILE.toml)"
        )
    return int(has * (1 - RESERVE)) if asked is None else asked


def _own(config: Config, search: Search) -> Candidate | list[str]:
    wrong = problems(config, search.world)
    if wrong:
        return wrong
    layout = Layout.from_config(config, search.world)
    sizes = BatchSizes.from_config(config.data, data_size(config, search.world))
    job = replace(Job.from_config(search.decoder, config, layout, sizes.micro_num), imbalance=search.imbalance)
    return Candidate(Choice.of(config, layout), job, step.predict(job, search.gpu, search.calibration), memory.most_loaded(job))
