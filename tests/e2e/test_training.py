"""Training with the command: the same on any number of processes, exact after a resume, and safe when it is killed."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import WriteConfig, metrics, rows_so_far, run, tensors, write_config, write_dataset
from tests.pool import Pool

Reference = Callable[[str], Path]
"""The fixture ``reference``."""
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "consumed_tokens", "skipped", "loss_by_type")


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in SAME} for row in rows]


def assert_close(rows: list[dict[str, Any]], reference: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    assert [r["step"] for r in rows] == [r["step"] for r in reference]
    for row, wanted in zip(rows, reference, strict=True):
        for key in ("loss", "grad_norm"):
            assert abs(row[key] - wanted[key]) <= tolerance * abs(wanted[key]), (
                row["step"],
                key,
                row[key],
                wanted[key],
            )


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero over all of 2": (2, {}),
    "plain data parallel on 2": (2, {"parallel__zero1": 1}),
    "zero in groups of 2 on 4": (4, {"parallel__zero1": 2}),
    "fsdp on 2": (2, {"parallel__zero1": {"size": -1, "fsdp": True}}),
    "hybrid fsdp on 4": (4, {"parallel__zero1": {"size": 2, "fsdp": True}}),
    "uneven: 3": (3, {}),
    "recompute on 2": (2, {"model__checkpoint": True}),
    "several rows per micro-batch": (1, {"data__micro_bsz": 4}),
    "half of the layers recomputed": (1, {"model__checkpoint": 0.5}),
}


SMALL_GRADIENTS = 1e-6
"""Adam makes full updates out of smaller gradients, too, which experts with few tokens have, and out of their rounding."""
KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"data__use_packed_dataset": False},
    "tied": {"model__tie_word_embeddings": True},
    "gemma": {"model_type": "GEMMA", "model__head_dim": 16},
    "alibi": {"model_type": "BAICHUAN2", "model__use_alibi": True, "model__num_kv_attention_heads": 4},
    "gshard": {
        "model_type": "QWEN2MOE", "model__num_experts": 5, "model__top_k": 2, "model__num_shared_experts": 2,
        "model__moe_intermediate_size": 20, "model__mlp_only_layers": [0], "loss__moe_z_loss_coeff": 0.1,
        "model__use_sliding_window": True, "model__sliding_window": 9, "adam__adam_eps": SMALL_GRADIENTS,
    },
    "dropless": {
        "model_type": "MIXTRALMOE", "model__num_experts": 4, "model__top_k": 2, "model__moe_type": "Dropless",
        "loss__moe_loss_coeff": 0.1, "loss__moe_loss_kind": "pooled", "adam__adam_eps": SMALL_GRADIENTS,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Reference:
    """The run folder of one process, for each kind of data or model, trained once."""
    folder = tmp_path_factory.mktemp("reference")
    dataset = write_dataset(folder / "data")

    def train(kind: str) -> Path:
        if not (folder / kind).exists():
            pool.train(write_config(folder, dataset, kind, **KINDS[kind]))
        return folder / kind

    return train


PAIRS = [(name, "packed") for name in LAYOUTS]
PAIRS += [(name, kind) for name in ("zero over all of 2", "hybrid fsdp on 4") for kind in KINDS if kind != "packed"]
PAIRS += [("recompute on 2", "gshard"), ("uneven: 3", "dropless")]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_layout_trains_the_same_model_as_one_process(
    pool: Pool, config: WriteConfig, tmp_path: Path, reference: Reference, name: str, kind: str
) -> None:
    processes, changes = LAYOUTS[name]
    one = reference(kind)
    pool.train(config("many", **{**KINDS[kind], **changes}), processes)
    assert_close(metrics(tmp_path / "many"), metrics(one))
    for row, wanted in zip(metrics(tmp_path / "many"), metrics(one), strict=True):
        assert (row["moe"] is None) == (kind not in ("gshard", "dropless"))
        for key, value in (wanted["moe"] or {}).items():
            torch.testing.assert_close(torch.tensor(row["moe"][key]), torch.tensor(value), atol=1e-5, rtol=1e-5)
    mine, wanted = tensors(tmp_path / "many", 8), tensors(one, 8)
    assert mine.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (mine[key] - tensor).abs().max() <= 1e-5 * max(1.0, float(tensor.abs().max())), key


@pytest.mark.parametrize("kind", ["packed", "gshard", "dropless"])
def test_deterministic_algorithms_change_no_bit_on_a_cpu(
    pool: Pool, config: WriteConfig, tmp_path: Path, reference: Reference, kind: str
) -> None:
    pool.train(config("deterministic", **KINDS[kind], deterministic=True))
    assert comparable(metrics(tmp_path / "deterministic")) == comparable(metrics(reference(kind)))
    mine, wanted = tensors(tmp_path / "deterministic", 8), tensors(reference(kind), 8)
    assert all(torch.equal(mine[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["packed", "gshard"])
def test_recomputation_changes_no_bit(pool: Pool, config: WriteConfig, tmp_path: Path, reference: Reference, kind: str) -> None:
    pool.train(config("recomputed", **KINDS[kind], model__checkpoint=True))
    assert comparable(metrics(tmp_path / "recomputed")) == comparable(metrics(reference(kind)))


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_resume_is_bit_identical(pool: Pool, config: WriteConfig, tmp_path: Path, dtype: str) -> None:
    changes = {"model__dtype": dtype, "ckpt__checkpoint_every": 3, "data__rampup_batch_size": "4 4 2"}
    pool.train(config("whole", **changes))
    half = config("halves", **changes)
    pool.train(half, 1, "data.total_steps=5")
    pool.train(half)
    assert comparable(metrics(tmp_path / "halves")) == comparable(metrics(tmp_path / "whole"))
    mine, wanted = tensors(tmp_path / "halves", 8), tensors(tmp_path / "whole", 8)
    assert all(torch.equal(mine[key], wanted[key]) for key in wanted)


def test_a_ramp_up_has_the_same_batches_on_another_number_of_processes(pool: Pool, config: WriteConfig, tmp_path: Path) -> None:
    ramp = {"data__rampup_batch_size": "4 4 2"}
    pool.train(config("whole", **ramp))
    parts = config("parts", **ramp)
    pool.train(parts, 2, "data.total_steps=3")
    pool.train(parts, 4)
    assert_close(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"))
    ranks = config("ranks", data__global_batch_size=None, data__micro_num=4, data__rampup_batch_size="1 1 2")
    pool.train(ranks, 1, "data.total_steps=2")
    done = run("train", ranks, "data.total_steps=3", "--nproc", 2)
    assert "the global batch has 4 rows now (8 after the ramp-up), and had 2 (4 after the ramp-up) before" in done.stdout
    assert "with data.global_batch_size=4 data.rampup_batch_size='1 1 2' they would be the same" in done.stdout


@pytest.mark.parametrize("kind", ["packed", "gshard"])
def test_resume_on_another_number_of_processes(
    pool: Pool, config: WriteConfig, tmp_path: Path, reference: Reference, kind: str
) -> None:
    parts = config("parts", **KINDS[kind])
    pool.train(parts, 2, "data.total_steps=2")
    pool.train(parts, 3, "data.total_steps=4", "parallel.zero1.fsdp=true")
    pool.train(parts, 2, "data.total_steps=6", "parallel.zero1=1")
    pool.train(parts)
    assert_close(metrics(tmp_path / "parts"), metrics(reference(kind)))
    mine, wanted = tensors(tmp_path / "parts", 8), tensors(reference(kind), 8)
    assert all((mine[k] - wanted[k]).abs().max() <= 1e-5 * max(1.0, float(wanted[k].abs().max())) for k in wanted)


def start(path: Path, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "internevo", "train", str(path), *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if len(rows_so_far(folder)) >= step:
            return
        time.sleep(0.02)
    said = process.stdout.read() if process.stdout and process.poll() is not None else ""
    raise AssertionError(f"step {step} was not reached: {said}")


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_finishes_the_step_saves_and_exits_0(
    config: WriteConfig, tmp_path: Path, number: signal.Signals, processes: int
) -> None:
    steps = {"data__total_steps": 400, "lr_scheduler__total_steps": 400}
    path = config("stopped", **steps)
    process = start(path, "--nproc", processes)
    wait_for_step(tmp_path / "stopped", 5, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    last = metrics(tmp_path / "stopped")[-1]["step"]
    assert 5 <= last < 400
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
    run("train", path, f"data.total_steps={last + 3}", "--nproc", processes)
    assert [row["step"] for row in metrics(tmp_path / "stopped")] == list(range(1, last + 4))


def test_a_killed_run_is_resumed_to_bit_identical_weights(pool: Pool, config: WriteConfig, tmp_path: Path) -> None:
    changes = {"ckpt__checkpoint_every": 4, "ckpt__oss_snapshot_freq": 3, "ckpt__keep_last": 2, "data__total_steps": 28,
               "lr_scheduler__total_steps": 28}  # fmt: skip
    pool.train(config("whole", **changes), 2)
    path = config("killed", **changes)
    draw = random.Random(3)
    for _ in range(2):
        process = start(path, "--nproc", 2, start_new_session=True)
        done = len(rows_so_far(tmp_path / "killed"))
        wait_for_step(tmp_path / "killed", min(done + draw.randint(2, 9), 26), process)
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too, which would save if only their launcher ended
        process.wait()
        time.sleep(0.2)
    run("train", path, "--nproc", 2)
    assert comparable(metrics(tmp_path / "killed")) == comparable(metrics(tmp_path / "whole"))
    mine, wanted = tensors(tmp_path / "killed", 28), tensors(tmp_path / "whole", 28)
    assert all(torch.equal(mine[key], wanted[key]) for key in wanted)
    kept = sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir())
    assert kept == ["step-00000024", "step-00000028"]


def test_a_wsd_run_goes_on_from_before_its_decay_as_if_its_length_had_been_planned(
    pool: Pool, config: WriteConfig, tmp_path: Path
) -> None:
    """From step 4 of a run of 6 steps to 8 steps, and from step 4 of a run of 8 steps to 6."""
    schedule = {"kind": "wsd", "warmup_steps": 2, "decay_steps": 2, "eta_min": 1e-3}
    changes: dict[str, Any] = {"lr_scheduler": schedule, "ckpt__checkpoint_every": 4, "ckpt__keep_every": 4}
    for steps, other in ((6, 8), (8, 6)):
        pool.train(config(f"planned{steps}", **changes, data__total_steps=steps))
        info = {"path": str(tmp_path / f"planned{steps}" / "checkpoints" / "step-00000004")}
        pool.train(config(f"changed{other}", **changes, data__total_steps=other, ckpt__load_ckpt_info=info))
    for steps in (6, 8):
        rows = metrics(tmp_path / f"planned{steps}")
        assert [row["lr"] for row in rows] == pytest.approx([0.005, *[0.01] * (steps - 2), 0.0055])
        assert comparable(metrics(tmp_path / f"changed{steps}")) == comparable(rows)[4:]
        line = f"then constant, linear to 0.001 in the last 2 of {steps} steps"
        assert line in (tmp_path / f"planned{steps}" / "report.html").read_text()


def test_a_process_that_is_killed_ends_the_run_and_is_named(config: WriteConfig, tmp_path: Path) -> None:
    path = config("failing")
    process = start(path, "--nproc", 2, "data.total_steps=400", "lr_scheduler.total_steps=400")
    wait_for_step(tmp_path / "failing", 3, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    message = output[output.index("rank 1 of 2 failed:") :]
    assert "killed by SIGKILL" in message  # after what it may have written itself


def test_half_precision_follows_fp32(pool: Pool, config: WriteConfig, tmp_path: Path, reference: Reference) -> None:
    for dtype in ("torch.bfloat16", "torch.float16"):
        pool.train(config("half", model__dtype=dtype, ckpt__enable_save_ckpt=False))
        for row, wanted in zip(metrics(tmp_path / "half"), metrics(reference("packed")), strict=True):
            assert abs(row["loss"] - wanted["loss"]) < 0.03 and not row["skipped"]


@pytest.mark.parametrize(("kind", "recomputed"), [("packed", True), ("gshard", True), ("alibi", False)])
def test_compiled_layers_train_the_same(
    pool: Pool, config: WriteConfig, tmp_path: Path, reference: Reference, kind: str, recomputed: bool
) -> None:
    changes = {**KINDS[kind], "model__compile": True, "model__checkpoint": recomputed}
    pool.train(config("compiled", **changes), 1, "data.total_steps=3", timeout=600)
    assert_close(metrics(tmp_path / "compiled"), metrics(reference(kind))[:3])


def test_steps_with_overflow_are_skipped_and_counted_and_the_loss_scale_shrinks(config: WriteConfig, tmp_path: Path) -> None:
    scaler = {"fp16": {"initial_scale": 2.0**40, "growth_interval": 3}, "hysteresis": 1}
    run(
        "train",
        config("overflow", model__dtype="torch.float16", grad_scaler=scaler),
        "data.total_steps=30",
        "lr_scheduler.total_steps=30",
    )
    rows = metrics(tmp_path / "overflow")
    assert rows[0]["skipped"] and not rows[-1]["skipped"]
    scales = [row["loss_scale"] for row in rows]
    assert scales[0] == 2.0**39 and min(scales) < 2.0**30
    assert max(scales[20:]) > min(scales)  # it grows again
    assert rows[-1]["skipped_steps"] == sum(row["skipped"] for row in rows)


def test_validation_stop_file_skips_and_export(config: WriteConfig, tmp_path: Path, dataset: Path) -> None:
    stop = tmp_path / "stop"
    path = config(
        "full", data__valid_folder=str(dataset), data__valid_every=2, data__skip_batches="1,3-4",
        ckpt__stop_file_path=str(stop), ckpt__enable_internevo2hf_ckpt=True, ckpt__checkpoint_every=2,
    )  # fmt: skip
    run("train", path, "--nproc", 2)
    rows = metrics(tmp_path / "full")
    assert [row["step"] for row in rows] == [1, 3, 6, 7, 8]
    assert set(rows[0]["loss_by_type"]) == {"cn", "en"}
    text = (tmp_path / "full" / "metrics.jsonl").read_text()
    assert text.count('valid_loss"') == 2  # steps 6 and 8 are trained and multiples of 2
    assert stop.read_text() == "0"
    for name in (
        "report.html",
        "config.json",
        "log/rank-00000.log",
        "log/rank-00001.log",
        "hf/step-00000008/model.safetensors",
    ):
        assert (tmp_path / "full" / name).is_file(), name
    assert not re.search("<(script|link|img)[^>]*(src|href)=.?http", (tmp_path / "full" / "report.html").read_text())


def test_a_new_run_loads_the_content_that_it_names(config: WriteConfig, tmp_path: Path) -> None:
    first = config("first", ckpt__checkpoint_every=2, ckpt__keep_last=1, ckpt__keep_every=4)
    run("train", first, "data.total_steps=6")
    kept = sorted(p.name for p in (tmp_path / "first" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    run("train", config("whole", data__total_steps=7, ckpt__load_ckpt_info={"path": str(tmp_path / "first"), "content": "all"}))
    rows = metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == [7] and rows[0]["consumed_tokens"] == 7 * 12 * 32
    info = {"path": str(tmp_path / "first"), "content": ["model"], "ckpt_type": "internevo"}
    run("train", config("weights", data__total_steps=1, adam__lr=0.0, ckpt__load_ckpt_info=info), "--nproc", 2)
    rows = metrics(tmp_path / "weights")
    assert [row["step"] for row in rows] == [1] and rows[0]["consumed_tokens"] == 12 * 32
    mine, wanted = tensors(tmp_path / "weights", 1), tensors(tmp_path / "first", 6)
    names = [n for n in wanted if n.startswith("model/")]
    assert all(torch.equal(mine[n], wanted[n]) for n in names)
