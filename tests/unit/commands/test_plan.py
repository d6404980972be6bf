"""``internevo plan``: what it prints and writes, and what it says if something is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from internevo.cli import main
from internevo.errors import UsageError
from internevo.parallel.memory import Memory
from internevo.planner.dryrun import dry_run
from internevo.planner.plan import plan
from internevo.planner.report import to_dict
from internevo.planner.search import Candidate
from internevo.train.check import problems
from internevo.train.config import load_config
from tests.conftest import write_config

MODEL = {"model__num_layers": 4, "model__dtype": "torch.bfloat16", "data__global_batch_size": 16}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        main(["plan", *arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def config(folder: Path, **changes: Any) -> str:
    return str(write_config(folder, None, **{**MODEL, **changes}))


@pytest.mark.parametrize("suffix", [".py", ".yaml", ".toml", ".json"])
def test_the_written_config_can_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    out, picture = tmp_path / f"fast{suffix}", tmp_path / "fast.svg"
    asked = (config(tmp_path), "--gpus", "8", "--gpu", "h100", "--out", str(out), "--picture", str(picture), "--tokens", "1B")
    code, text, err = run(capsys, *asked)
    assert (code, err) == (0, "")
    for words in ("own", "Why 1 is faster than 2", "exposed communication", "temporary buffers", "GB sent", "dollars"):
        assert words in text
    written = load_config(out)
    assert problems(written, 8) == [] and written.data.global_batch_size == 16
    assert suffix != ".toml" or ("zero1 = {size = " in out.read_text() and '" = ' not in out.read_text())
    assert picture.read_text().count("<circle") >= 10
    code, _, err = run(capsys, *asked)  # its own files are replaced; JSON has no comment that would tell them
    assert code == (2 if suffix == ".json" else 0)
    assert ("fast.json exists, and a JSON file has no comment" in err and "or write .yaml" in err) == (suffix == ".json")
    out.write_text("mine")
    assert run(capsys, *asked)[0] == 2 and out.read_text() == "mine"


def test_json_is_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, config(tmp_path), "--gpus", "4", "--gpu", "h100", "--json")
    found = json.loads(text)
    assert (
        code == 0
        and len(found["best"]) == 10
        and (found["rows"], found["gpu"], found["machine"]["name"]) == (16, "h100", "h100")
    )
    _, printed, _ = run(capsys, config(tmp_path), "--gpus", "4", "--gpu", "h100")
    assert found["why"] == [line.strip() for line in printed.partition("Why 1 is faster than 2:\n")[2].splitlines()]
    assert all(each["words"] in printed for each in found["best"])
    for each in [*found["best"], found["own"]]:
        assert sum(each["seconds"].values()) == pytest.approx(each["prediction"]["step"])
        *parts, total = each["memory"].values()
        assert sum(parts) == total


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8", "--gpu", "h10O"], ["unknown GPU 'h10O'; did you mean h100?", "bf16_tflops = 989.4"]),
        (["--gpus", "8", "--gpu", "h100", "--memory", "1KB"], ["no layout fits", "bytes", "more GPUs", "over all ranks"]),
        (["--gpus", "7", "--gpu", "h100", "parallel.tensor.size=2"], ["data.global_batch_size"]),
        (["--gpus", "7", "--gpu", "h100", "data.global_batch_size=16"], ["no layout of 7 GPUs", "16"]),
        (["--gpus", "8", "--nodes", "3", "--gpu", "h100"], ["--nodes 3"]),
        (["--gpus", "8"], ["--gpu NAME"]),
        (["--gpus", "8", "--gpu", "h100", "--picture", "a.png"], [".svg"]),
        (["--gpus", "8", "--gpu", "h100", "--out", "a.txt"], ["a.txt", ".py"]),
        (["--gpus", "8", "--gpu", "h100", "--out", "/dev/null/a.py"], ["/dev/null is not a folder"]),
        (["--gpus", "8", "--gpu", "h100", "--picture", "/dev/null/a.svg"], ["/dev/null is not a folder"]),
        (["--gpus", "8", "--gpu", "h100", "--tokens", "many"], ["'many' is not a number of tokens"]),
        (["--gpus", "8", "--gpu", "h100", "--tokens", "1e300"], ["'1e300' is not a number of tokens"]),
        (["--gpus", "8", "--gpu", "h100", "--memory", "81GiB"], ["81.0 GiB of the 80 GiB that h100 has", "--gpu FILE"]),
        (["--gpus", "8", "--gpu", "h100", "--nproc", "2"], ["--calibrate"]),
        (["--calibrate", "--tokens", "1B", "--json"], ["leave out CONFIG, --tokens, --json"]),
        (["--gpus", "8", "--gpu", "h100", "model.hidden_size=30"], ["hidden_size = 30"]),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    changes = {"data__global_batch_size": None} if "parallel.tensor.size=2" in arguments else {}
    code, out, err = run(capsys, config(tmp_path, **changes), *arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    for word in words:
        assert word in err


def test_what_cannot_make_a_layout_fit_is_not_advised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a large model on one GPU, shorter rows save a small part of what is missing; of long rows, they save enough."""
    wide = config(tmp_path, model__hidden_size=8192, model__num_layers=400, model__num_attention_heads=64)
    _, _, err = run(capsys, wide, "--gpus", "1", "--gpu", "h100")
    assert "It would fit with more GPUs" in err and "seq_len" not in err and "GPUs of at least" not in err
    rows = [f"data.seq_len={2**22}", f"model.max_position_embeddings={2**22}", "data.global_batch_size=1", "data.micro_bsz=1"]
    _, _, err = run(capsys, config(tmp_path), "--gpus", "1", "--gpu", "h100", "--memory", "1GiB", *rows)
    assert re.search(r"--memory \d+GiB", err) and "with a shorter data.seq_len" in err and "grad_dtype" not in err


def test_small_numbers_are_not_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny model on two GPUs: microseconds, megabytes, and a thousandth of a dollar. What is printed adds up."""
    code, text, _ = run(capsys, config(tmp_path), "--gpus", "2", "--gpu", "h100", "--tokens", "1M", "--memory", "40GiB")
    assert code == 0 and "40.0 of 80 GiB" in text and " 0.0B " not in text
    lines = [line.split() for line in text.splitlines()]
    assert min(float(line[3]) for line in lines if line and line[0].isdigit() and "%" in "".join(line[2:3])) > 0
    (whole,) = (line[2] for line in lines if line[:2] == ["step,", "s"])
    parts = [
        line[-2] for line in lines if line and line[-1].endswith("%") and line[-2][0].isdigit() and line[0].strip(",").isalpha()
    ]
    last = 10 ** -len(whole.partition(".")[2])
    assert float(whole) > 0 and sum(map(float, parts)) == pytest.approx(float(whole), abs=len(parts) * last)
    changes = re.findall(r": ([\d.]+) s \w+ \(([\d.]+) in place of ([\d.]+) s\)", text)
    for change, now, before in changes:
        digits = 10 ** -len(change.partition(".")[2])
        assert float(change) > 0 and abs(float(before) - float(now)) == pytest.approx(float(change), abs=1.1 * digits)
    (budget,) = (line for line in text.splitlines() if "1,000,000 tokens" in line)
    assert all(float(number) > 0 for number in budget.replace(",", "").split() if number.replace(".", "").isdigit())


@pytest.mark.parametrize("asked", [{"gpus": 0}, {"nodes": -1}, {"nodes": 0}, {"memory_limit": 0}, {"imbalance": 0.5},
                                   {"imbalance": float("nan")}])  # fmt: skip
def test_a_script_is_told_what_is_wrong(tmp_path: Path, asked: dict[str, Any]) -> None:
    loaded = load_config(Path(config(tmp_path)), [])
    with pytest.raises(UsageError):
        plan(loaded, **{"gpus": 4, "gpu": "h100", **asked})


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__pipeline": {"size": 2}, "parallel__zero1": {"size": 2}},
        {"parallel__tensor": {"size": 2, "mode": "msp"}, "model__vocab_size": 96},
        {"model_type": "QWEN3MOE", "model__num_experts": 4, "model__top_k": 2, "model__moe_intermediate_size": 64,
         "parallel__expert": {"size": 2}, "parallel__zero1": {"size": 1}},
    ],
    ids=["pipeline", "msp", "experts"],
)  # fmt: skip
def test_a_plan_is_what_a_dry_run_counts(tmp_path: Path, changes: dict[str, Any]) -> None:
    """What the most loaded rank keeps, to the byte, and its collectives. (Temporary buffers are those of a GPU.)"""
    loaded = load_config(Path(config(tmp_path, **changes)), [])
    found = plan(loaded, 4, "h100")
    assert isinstance(found.own, Candidate)
    planned = to_dict(found.own, found.search.gpu, found.search.calibration, None)
    ran = dry_run(loaded, 4, 2 * planned["pipeline_rank"])
    assert {part: planned["memory"][name] for part, name in Memory.NAMES.items()} == {
        part: getattr(ran.memory, part) for part in Memory.NAMES
    }
    stated = {(row["kind"], row["group"]): row["count"] for row in planned["traffic"]}
    assert stated == {(row.kind, row.axis): row.count for row in ran.collectives}


def test_no_layout_is_listed_twice(tmp_path: Path) -> None:
    """On one GPU, FSDP is the same as ZeRO."""
    found = plan(load_config(Path(config(tmp_path)), []), 1, "h100").best
    assert len(found) > 1 and not any(candidate.choice.fsdp for candidate in found)


def test_a_calibration_of_another_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.toml").write_text("version = 0\n")
    asked = ["--gpus", "8", "--gpu", "h100", "--calibration", str(tmp_path / "old.toml")]
    code, _, err = run(capsys, config(tmp_path), *asked)
    assert code == 2 and "is of version 0" in err and "--calibrate" in err


def test_a_calibration_is_measured_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNEVO_DEVICE", "cpu")
    monkeypatch.setattr("internevo.planner.calibrate.SECONDS", 0.01)
    out, gpu = tmp_path / "here.toml", tmp_path / "here-gpu.toml"
    code, text, err = run(capsys, "--calibrate", "--out", str(out))
    assert (code, err) == (0, "") and "TFLOPS" in text and "not measured" in text
    code, text, err = run(capsys, config(tmp_path), "--gpus", "4", "--gpu", str(gpu), "--calibration", str(out))
    assert (code, err) == (0, "") and "TGS" in text
    code, _, err = run(capsys, "--calibrate", "--gpu", "h100", "--out", str(out))  # a CPU is not compared with a GPU's peaks
    assert code == 2 and "leave out --gpu" in err
    out.write_text("mine")
    code, _, err = run(capsys, "--calibrate", "--out", str(out))
    assert code == 2 and out.read_text() == "mine"
