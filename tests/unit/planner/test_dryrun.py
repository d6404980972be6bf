"""Dry runs of ranks of large worlds, their file, and what they refuse."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internevo import cli
from internevo.config import validate
from internevo.planner.dryrun import DryRun, balanced_rows, dry_run
from tests.conftest import tiny, write_config
from tests.parallel.layouts import EXPERTS

DRY = ["--dry-run", "--world-size"]
LARGE: dict[str, dict[str, Any]] = {
    "ZBV 4, isp 4 x 8, zero 2": {
        "model__num_layers": 8, "model__num_chunks": 2, "parallel__pipeline": {"size": 4, "mode": "ZBV"},
        "parallel__tensor": {"size": 4, "mode": "isp"}, "parallel__weight": {"size": 8}, "parallel__zero1": {"size": 2},
    },
    "ZBH1 2, experts over 4, msp 2": {
        **EXPERTS, "model__moe_type": "Dropless", "model__num_layers": 2, "parallel__pipeline": {"size": 2, "mode": "ZBH1"},
        "parallel__tensor": {"size": 2, "mode": "msp"}, "parallel__expert": {"size": 4},
    },
    "fsdp": {"parallel__zero1": {"size": -1, "fsdp": True}, "model__checkpoint": True, "model__dtype": "torch.bfloat16"},
}  # fmt: skip


def dry(rank: int, world: int, **changes: Any) -> DryRun:
    config = validate(
        tiny(data={"seq_len": 32, "micro_bsz": 1, "micro_num": 4, "total_steps": 8}, **{"model__vocab_size": 128, **changes})
    )
    return dry_run(config, world, rank)


@pytest.mark.parametrize(("name", "rank"), [*((name, 0) for name in LARGE), ("ZBV 4, isp 4 x 8, zero 2", 1023)])
def test_a_rank_of_1024_has_what_the_strategies_state(name: str, rank: int) -> None:
    found = dry(rank, 1024, **LARGE[name])
    assert found.stated_collectives is not None and found.stated_memory is not None
    counted, stated = (
        [(row.kind, row.axis, row.count, row.nbytes) for row in rows] for rows in (found.collectives, found.stated_collectives)
    )
    assert [row[:3] for row in counted] == [row[:3] for row in stated]
    pairs = [(mine[3], formula[3]) for mine, formula in zip(counted, stated, strict=True)]
    assert all(mine == formula if rank == 0 else mine <= formula for mine, formula in pairs)  # rank 0 has the largest shards
    memory, formula = asdict(found.memory), asdict(found.stated_memory)
    if rank == 0:
        assert (memory["masters"], memory["after"]) == (formula["masters"], formula["after"])
        assert memory["activations"] == pytest.approx(formula["activations"], rel=0.03)
    assert not dist.is_initialized()


def test_what_is_known_without_formulas_is_counted_with_adapters() -> None:
    found = dry(1, 4, model__lora={"rank": 3, "alpha": 6, "targets": ["wq", "wo"]}, parallel__zero1={"size": 2})
    assert found.stated_memory is None and found.stated_collectives is None
    assert {row.axis for row in found.collectives} == {"zero", "replicate", "data"}  # all ranks are those of the data axis
    assert 0 < found.memory.moments < found.memory.masters
    assert any(line.split() == ["moments", f"{found.memory.moments:,}", "-"] for line in found.lines())


@pytest.mark.parametrize(("ranks", "rows"), [(4, 8), (4, 10), (3, 2), (1, 5)])
def test_balanced_rows_are_sent_as_often_as_received(ranks: int, rows: int) -> None:
    counts = [balanced_rows(rank, rows, torch.zeros(ranks, 2), torch.zeros(ranks, 2)) for rank in range(ranks)]
    for a, (sent, received) in enumerate(counts):
        assert sum(sent) == sum(received) == rows and max(sent) - min(sent) <= 1
        assert received == [counts[b][0][a] for b in range(ranks)]


def run(path: Path, *arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(path), *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.usefixtures("exits_in_process")
def test_the_file_has_what_is_printed_and_a_run_may_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, "not here", "run", model__vocab_size=128)
    assert run(path, *DRY, 12, "--rank", 3, "parallel.tensor.size=2", "data.global_batch_size=24") == 0
    assert run(path, *DRY, 4) == 0  # the file of a dry run is replaced
    written = json.loads((tmp_path / "run" / "dryrun.json").read_text())
    assert (written["rank"], written["world"], written["micro_batches"]) == (0, 4, 3)
    out = capsys.readouterr().out
    assert f"master weights                  {written['memory']['counted']['masters']:>20,}" in out
    assert all(row["counted"] == row["formula"] for row in written["collectives"]) and out.count("the same") >= 3
    assert run(path, "data.type=mocked", "data.total_steps=1", "--nproc", 1) == 0


@pytest.mark.usefixtures("exits_in_process")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", 4], "--world-size and --rank belong to --dry-run"),
        (["--rank", 0], "--world-size and --rank belong to --dry-run"),
        (["--dry-run"], "--dry-run needs --world-size N"),
        ([*DRY, 4, "--nproc", 4], "--dry-run needs --world-size N, the number of ranks of the run, and no --nproc"),
        ([*DRY, 4, "--rank", 4], "--rank 4: the ranks of --world-size 4 are 0 to 3"),
        ([*DRY, 3, "parallel.tensor.size=2"], "3 processes cannot be divided into groups"),
        ([*DRY, 5], "data.global_batch_size = 12 is not a multiple"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    assert run(write_config(tmp_path, None), *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("exits_in_process")
def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dryrun.json").write_text('{"mine": 1}')
    assert run(write_config(tmp_path, None), *DRY, 4) == 2
    assert "is not from a dry run, and is not replaced" in capsys.readouterr().err
    assert (tmp_path / "run" / "dryrun.json").read_text() == '{"mine": 1}'
