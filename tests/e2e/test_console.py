"""What a user sees of a run: its own lines and nothing else; and the run does not depend on being seen."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WriteConfig, metrics, run

OWN = (
    r"starting \d process|reading the index of |building the model|tiny: |learning rate: |step \d+|saved step 3: |"
    r"done: 3 of 3 steps, |  loss |  checkpoint: |  the same command goes on |report: |timeline of |memory of rank|"
    r"memory of every rank|peak, MB|collective|all-|reduce-|master|moments|weights and|activations|total"
)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, {"enable_tb": True}),
        (2, {"parallel__zero1": {"fsdp": True}}),
        (2, {"parallel__tensor": {"size": 2, "mode": "msp"}, "model__vocab_size": 98, "model__checkpoint": True}),
    ],
)
def test_a_run_prints_its_own_lines_and_nothing_else(
    tmp_path: Path, config: WriteConfig, dataset: Path, processes: int, changes: dict[str, object]
) -> None:
    path = config(
        "run", data__total_steps=3, data__valid_folder=str(dataset), data__valid_every=3, lr_scheduler__total_steps=3,
        monitor={"comm": True, "memory": True, "trace": True}, **changes,
    )  # fmt: skip
    done = run("train", path, "--nproc", processes)
    assert done.stderr == ""
    assert [file.read_text() for file in (tmp_path / "run" / "log").glob("*.stderr")] == [""] * (
        processes if processes > 1 else 0
    )
    assert [line for line in done.stdout.splitlines() if not re.match(OWN, line)] == []
    assert (
        f"\nsaved step 3: {tmp_path}/run/checkpoints/step-00000003 (" in done.stdout and "\ndone: 3 of 3 steps, " in done.stdout
    )
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("save", 3), ("stop", 3)]
    assert events[0]["processes"] == processes and events[0]["command"].endswith(f"train {path} --nproc {processes}")


@pytest.mark.parametrize("output", ["a pipe whose reader ends", "a full disk"])
def test_a_run_goes_on_if_its_output_cannot_be_written(tmp_path: Path, config: WriteConfig, output: str) -> None:
    path = config("run", data__total_steps=3, lr_scheduler__total_steps=3)
    command = [sys.executable, "-m", "internevo", "train", str(path)]
    with open("/dev/full", "w") as full, open(tmp_path / "stderr", "w") as stderr:
        piped = subprocess.PIPE if output.startswith("a pipe") else full
        environment = {**os.environ, "INTERNEVO_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=piped, stderr=stderr, text=True, env=environment)
        if process.stdout is not None:
            process.stdout.readline()
            process.stdout.close()
        assert process.wait(600) == 0, (tmp_path / "stderr").read_text()
    assert (tmp_path / "stderr").read_text() == ""
    assert len(metrics(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").is_file()
    assert "the console cannot be written any more" in (tmp_path / "run" / "log" / "rank-00000.log").read_text()
