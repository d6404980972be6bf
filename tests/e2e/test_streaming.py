"""Training runs on streaming data and mixtures have the same losses on any number of processes, and after stops."""

import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from internevo.text.tokenizer import train_bpe
from tests.conftest import metrics, write_config, write_dataset
from tests.e2e.test_training import start, wait_for_step
from tests.pool import Pool

STREAM = {"model__vocab_size": 300, "data__num_worker": 0, "ckpt__checkpoint_every": 3, "data__seq_len": 24}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for name in ("cn", "en"):
        (folder / "raw" / name).mkdir(parents=True)
        for number in range(3):
            lines = [json.dumps({"text": "".join(draw.choices("abcd 春", k=draw.randint(1, 90)))}) for _ in range(12)]
            (folder / "raw" / name / f"{number}.jsonl").write_text("\n".join(lines))
    shutil.copytree(folder / "raw", folder / "held")
    return folder, train_bpe(["the cat sat"] * 3, 300, folder / "tokenizer")


def test_a_stream_gives_the_same_losses_on_any_number_of_processes_and_after_a_stop(
    tmp_path: Path, pool: Pool, texts: tuple[Path, Path]
) -> None:
    folder, tokenizer = texts
    changes = {**STREAM, "data__type": "streaming", "data__tokenizer_path": str(tokenizer)}
    changes |= {"data__valid_folder": str(folder / "held")}

    def run(name: str, processes: int, steps: int = 8, **more: Any) -> list[Any]:
        config = write_config(tmp_path, folder / "raw", name, **changes, **more)
        pool.train(config, processes, f"data.total_steps={steps}", "data.valid_every=8" if steps == 8 else "data.valid_every=0")
        return [(row["step"], row["loss"], row["loss_by_type"]) for row in metrics(tmp_path / name)]

    wanted = run("one", 1)
    assert set(wanted[0][2]) == {"cn", "en"}
    close = [(step, pytest.approx(loss, rel=1e-5), pytest.approx(types, rel=1e-5)) for step, loss, types in wanted]
    assert run("three", 3) == close
    assert run("sequences", 4, parallel__tensor={"size": 2, "mode": "msp"}) == close  # every rank tokenizes
    assert run("stopped", 2, 4) == close[:4]
    assert run("stopped", 1) == close
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "three")]
    valid = [[row["valid_loss"] for row in map(json.loads, part) if "valid_loss" in row] for part in lines]
    assert valid[0] == pytest.approx(valid[1], rel=1e-5) and len(valid[0]) == 1


def test_what_asks_a_run_to_stop_does_not_end_its_tokenizing_processes(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """Slurm sends a signal to all processes of a job."""
    folder, tokenizer = texts
    changes = {**STREAM, "data__type": "streaming", "data__tokenizer_path": str(tokenizer), "data__num_worker": 1}
    steps = {"data__total_steps": 400, "lr_scheduler__total_steps": 400}
    process = start(write_config(tmp_path, folder / "raw", "asked", **changes, **steps), start_new_session=True)
    wait_for_step(tmp_path / "asked", 3, process)
    os.killpg(process.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    last = metrics(tmp_path / "asked")[-1]["step"]
    assert last < 400 and (tmp_path / "asked" / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
    assert "died" not in output


def test_a_mixture_reports_the_losses_of_each_part_and_resumes_where_it_stopped(
    tmp_path: Path, pool: Pool, texts: tuple[Path, Path]
) -> None:
    folder, tokenizer = texts
    parts = [
        {"folder": str(folder / "raw" / "en" / "0.jsonl"), "kind": "streaming", "weight": 2, "epochs": 1, "name": "web"},
        {"folder": str(write_dataset(tmp_path / "books")), "weight": 1},
    ]
    changes = {**STREAM, "data__mixture": parts, "data__tokenizer_path": str(tokenizer)}
    wanted: list[Any] = []
    for name, sizes in (("whole", [1]), ("parts", [2, 3])):
        config = write_config(tmp_path, None, name, **changes)
        for number, size in enumerate(sizes, start=1):
            pool.train(config, size, "data.total_steps=5" if number < len(sizes) else "data.total_steps=8")
        rows = [(r["step"], r["loss"], r["loss_by_type"]) for r in metrics(tmp_path / name)]
        if wanted:
            assert rows == [(s, pytest.approx(l, rel=1e-5), pytest.approx(t, rel=1e-5)) for s, l, t in wanted]
        wanted = rows
    seen = Counter(name for *_, types in wanted for name in types)
    assert seen["books"] == 8 and 1 <= seen["web"] < 8  # its only epoch ends


def test_documents_that_are_left_out_are_counted_and_named(tmp_path: Path, pool: Pool, texts: tuple[Path, Path]) -> None:
    folder, tokenizer = texts
    (tmp_path / "raw").mkdir()
    lines = (folder / "raw" / "en" / "0.jsonl").read_text().splitlines()
    lines[3], lines[5] = '{"text"', '{"other": 1}'
    (tmp_path / "raw" / "a.jsonl").write_text("\n".join(lines))
    changes = {**STREAM, "data__type": "streaming", "data__tokenizer_path": str(tokenizer), "data__total_steps": 2}
    config = write_config(tmp_path, tmp_path / "raw", "skip", **changes, data__on_error="skip", data__global_batch_size=2)
    pool.train(config, 2)
    assert metrics(tmp_path / "skip")[0]["data_skipped"] == 2
    logs = "".join(path.read_text() for path in (tmp_path / "skip" / "log").iterdir())
    assert logs.count("left out: ") == 2 and "a.jsonl, byte" in logs
    config = write_config(tmp_path, tmp_path / "raw", "stop", **changes, data__global_batch_size=2)
    with pytest.raises(AssertionError, match=r"a\.jsonl, byte .* the line is not JSON"):
        pool.train(config, 2)
