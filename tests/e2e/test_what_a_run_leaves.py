"""What a run leaves in its folder: strict JSON and exports, and nothing of killed saves. A failed export does not end a run."""

import os
from pathlib import Path

import pytest

from internevo.checkpoint import complete_checkpoints
from tests.conftest import WriteConfig, metrics, run
from tests.strict_json import strict


def test_a_failed_export_is_a_warning_and_does_not_end_the_run(tmp_path: Path, config: WriteConfig) -> None:
    path = config("run", ckpt__checkpoint_every=4, ckpt__enable_internevo2hf_ckpt=True)
    (tmp_path / "run" / "log").mkdir(parents=True)
    (tmp_path / "run" / "log" / "rank-00000.log").touch()  # it is a run folder
    (tmp_path / "run" / "hf").write_text("in the way")
    done = run("train", path)
    log = (tmp_path / "run" / "log" / "rank-00000.log").read_text()
    for step in (4, 8):
        warning = f"the export to {tmp_path}/run/hf/step-{step:08d} failed: "
        assert f"warning: {warning}" in done.stdout.replace("\n", "")
        assert f"WARNING {warning}" in log
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step-00000008", "step-00000004"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_model_that_cannot_be_exported_is_refused_before_the_first_step(
    tmp_path: Path, config: WriteConfig, processes: int
) -> None:
    path = config("run", model__qkv_bias=True, model__o_bias=False, ckpt__enable_internevo2hf_ckpt=True)
    done = run("train", path, "--nproc", processes, code=2)
    assert "a Hugging Face folder of LlamaForCausalLM cannot describe this model: its o_bias is False" in done.stderr
    assert "ckpt.enable_internevo2hf_ckpt=False" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run("train", path, "ckpt.enable_save_ckpt=False", "data.total_steps=1")  # nothing is saved, so nothing is exported


def test_a_run_that_diverges_writes_strict_json(tmp_path: Path, config: WriteConfig, dataset: Path) -> None:
    experts = {"model__num_experts": 4, "model__top_k": 2, "model__moe_type": "Dropless"}
    path = config(
        "run", model_type="MIXTRALMOE", **experts, model__out_head_init_std=1e38, data__total_steps=3,
        data__valid_folder=str(dataset), data__valid_every=1, monitor__comm=True, ckpt__checkpoint_every=1,
    )  # fmt: skip
    run("train", path)
    folder = tmp_path / "run"
    rows = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert None in [row["loss"] for row in rows if "loss" in row]
    assert None in [row["valid_loss"] for row in rows if "loss" not in row]
    read = {file.name for file in folder.rglob("*.json") if strict(file.read_text()) is not None}
    assert {"config.json", "comm.json", "state.json", "manifest.json", "model.json"} <= read
    run("report", folder)


def test_leftovers_of_killed_saves_are_removed_at_the_next_start(tmp_path: Path, config: WriteConfig) -> None:
    path = config("run", ckpt__checkpoint_every=1, data__total_steps=3)
    run("train", path, "data.total_steps=2")
    folders = [tmp_path / "run" / name for name in ("checkpoints", "snapshots", "hf")]
    for folder, name in zip(folders, ("step-00000003", "0", "step-00000002"), strict=True):
        (folder / f".{name}.tmp").mkdir(parents=True)
        (folder / f".{name}.01234567.tmp").mkdir()
        (folder / "notes.tmp").mkdir()
    (folders[0] / "step-00000002").rename(folders[0] / ".step-00000002.01234567.old")  # killed while it was replaced
    assert "step 2" in run("inspect", tmp_path / "run").stdout
    run("train", path, "--nproc", 2)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    assert sorted(os.listdir(folders[0])) == ["notes.tmp", "step-00000001", "step-00000002", "step-00000003"]
    assert os.listdir(folders[1]) == os.listdir(folders[2]) == ["notes.tmp"]
