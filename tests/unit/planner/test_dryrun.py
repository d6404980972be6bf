"""Dry runs of ranks of large worlds, their file, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internevo import cli
from internevo.config import validate
from internevo.planner.dryrun import DryRun, balanced_rows, dry_run
from tests.conftest import tiny, write_config
from tests.parallel.layouts import DEEPSEEK, EXPERTS

DRY = ["--dry-run", "--world-size"]
LARGE: dict[str, dict[str, Any]] = {
    "ZBV 4, isp 4 x 8, zero 2": {
        "model__num_layers": 8, "model__num_chunks": 2, "parallel__pipeline": {"size": 4, "mode": "ZBV"},
        "parallel__tensor": {"size": 4, "mode": "isp"}, "parallel__weight": {"size": 8}, "parallel__zero1": {"size": 2},
    },
    "ZBH1 2, experts over 4, msp 2": {
        **EXPERTS, "model__moe_type": "Dropless", "model__num_layers": 2, "parallel__pipeline": {"size": 2, "mode": "ZBH1"},
        "parallel__tensor": {"size": 2, "mode": "msp"}, "parallel__expert": {"size": 4},
        "loss__moe_loss_coeff": 0.1, "loss__moe_loss_kind": "pooled",
    },
    "fsdp": {"parallel__zero1": {"size": -1, "fsdp": True}, "model__checkpoint": True, "model__dtype": "torch.bfloat16"},
}  # fmt: skip


def dry(rank: int, world: int, **changes: Any) -> DryRun:
    data = {"seq_len": 32, "micro_bsz": 1, "micro_num": 4, "total_steps": 8, **changes.pop("data", {})}
    config = validate(tiny(data=data, **{"model__vocab_size": 128, **changes}))
    return dry_run(config, world, rank)


@pytest.mark.parametrize(("name", "rank"), [*((name, 0) for name in LARGE), *((name, 1023) for name in LARGE)])
def test_a_rank_of_1024_has_what_the_strategies_state(name: str, rank: int) -> None:
    found = dry(rank, 1024, **LARGE[name])
    assert found.stated_collectives is not None and found.stated_memory is not None
    counted, stated = (
        [(row.kind, row.axis, row.count, row.nbytes) for row in rows] for rows in (found.collectives, found.stated_collectives)
    )
    assert counted == stated
    assert found.memory == found.stated_memory
    assert not dist.is_initialized()


@pytest.mark.parametrize(("balance", "z", "tensor"), [(0.1, 0.0, 1), (0.0, 0.1, 2), (0.0, 0.1, 1), (0.0, 0.0, 2)])
def test_routers_with_sigmoid_scores_keep_what_the_losses_need(balance: float, z: float, tensor: int) -> None:
    losses = {"loss__moe_loss_coeff": balance, "loss__moe_z_loss_coeff": z}
    layout = {"parallel__tensor": {"size": tensor, "mode": "msp"}, "parallel__expert": {"size": 1}}
    found = dry(0, 2, **{**DEEPSEEK, "model_type": "DEEPSEEKV3", **layout, **losses})
    assert found.memory == found.stated_memory


@pytest.mark.parametrize("name", [*LARGE, "1F1B 2 x 2"])
def test_a_shortened_step_shows_what_a_whole_one_does(name: str) -> None:
    changes: dict[str, Any] = {"parallel__pipeline": {"size": 2}, "model__num_chunks": 2, "model__num_layers": 4}
    config = validate(tiny(data={"seq_len": 8, "micro_bsz": 1, "micro_num": 15, "total_steps": 1},
                           **{"model__vocab_size": 128, "model__num_layers": 2, **LARGE.get(name, changes)}))  # fmt: skip
    short, whole = (dry_run(config, 64, 33, whole=whole) for whole in (False, True))
    assert {**short.to_dict(), "seconds": 0} == {**whole.to_dict(), "seconds": 0}
    assert len(short.passes) in (2 * 15, 3 * 15, 4 * 15, 6 * 15)


def test_collectives_are_written_in_their_order() -> None:
    found = dry(0, 4, data={"seq_len": 8, "micro_num": 3}, parallel__zero1={"size": -1, "fsdp": True})
    written = found.to_dict()
    sums: dict[tuple[str, str], list[int]] = {}
    for *_, number in written["passes"]:
        for kind, group, nbytes, repeated in written["calls"][number]:
            count = sums.setdefault((kind, group), [0, 0])
            count[0], count[1] = count[0] + repeated, count[1] + repeated * nbytes
    assert sums == {(row["kind"], row["group"]): list(row["counted"].values()) for row in written["collectives"]}
    assert [entry[:3] for entry in written["passes"]] == [
        *([kind, 0, number] for number in range(3) for kind in "FB"), ["update", None, None],
    ]  # fmt: skip
    assert written["passes"][2][3] == written["passes"][4][3]  # the same lists are written once
    assert written["data"]["rows_of_the_first_step"] == [0, 4, 8] and written["data"]["rows_per_step"] == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dtype": "torch.bfloat16"},
        {"model__dtype": "torch.float16", "parallel__pipeline": {"size": 2, "mode": "ZBV"}, "model__num_chunks": 2},
        {"model__compile": True, "data__use_packed_dataset": False},
        {"data__type": "streaming", "data__tokenizer_path": "/not/here"},
    ],
    ids=["bf16", "fp16, ZBV", "compiled, padded", "streaming"],
)
def test_every_kind_of_run_has_a_dry_run(changes: dict[str, Any]) -> None:
    size = 2 if "parallel__pipeline" in changes else 1
    found = dry(0, size, model__num_layers=4, **changes)
    assert found.memory.total > found.memory.masters > 0 and found.stated_memory is not None
    assert (found.memory.masters, found.memory.moments) == (found.stated_memory.masters, found.stated_memory.moments)


def test_the_peak_is_at_least_what_is_kept_after_a_pass() -> None:
    found = dry(0, 2, parallel__zero1={"size": -1, "fsdp": True})
    assert found.peak.nbytes > found.memory.total and found.peak.during is not None and found.peak.operator
    assert any(line.startswith("most, within passes too") and "pass" in line for line in found.lines())


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
    checkpoint = "ckpt.load_ckpt_info.path=/not/here"
    assert run(path, *DRY, 4, "model.compile=True", checkpoint) == 0  # the file of a dry run is replaced
    written = json.loads((tmp_path / "run" / "dryrun.json").read_text())
    assert (written["rank"], written["world"], written["micro_batches"]) == (0, 4, 3)
    out, err = capsys.readouterr()
    assert "note: model.compile: " in err and "note: ckpt.load_ckpt_info: " in err
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
        ([*DRY, 4, "--nproc", 4], "--dry-run needs --world-size N, the number of ranks, and no --nproc"),
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
@pytest.mark.parametrize("name", ["file", "file/run", "folder"])
def test_a_folder_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "dryrun.json").mkdir(parents=True)
    assert run(write_config(tmp_path, None), *DRY, 4, f"ckpt.save_ckpt_folder={tmp_path / name}") == 2
    assert "choose another folder (ckpt.save_ckpt_folder)" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("exits_in_process")
def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dryrun.json").write_text('{"mine": 1}')
    assert run(write_config(tmp_path, None), *DRY, 4) == 2
    assert "is not from a dry run, and is not replaced" in capsys.readouterr().err
    assert (tmp_path / "run" / "dryrun.json").read_text() == '{"mine": 1}'
