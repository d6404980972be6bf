"""Every recipe of docs/recipes is executed as it stands there, with a smaller model and less data."""

import json
import mailbox
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, tiny
from tests.e2e.test_finetune import write_chat_model, write_chats

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CLUSTER = re.compile(r"^(sbatch|kubectl)\b.*$", re.MULTILINE)
"""Commands that need a cluster; tests/unit/test_deploy.py has the files that they name."""
SMALLER_SHAPE = [("configs/7B_internlm2.py", "tiny.json")]
SMALLER: dict[str, list[tuple[str, str]]] = {
    "pretrain": [
        ("--valid-ratio 0.01", "--valid-ratio 0.2"),
        ("--vocab-size 32000", "--vocab-size 300"), ("vocab_size=32000", "vocab_size=300"), ("num_layers=12", "num_layers=1"),
        ("hidden_size=768", "hidden_size=24"), ("intermediate_size=2048", "intermediate_size=16"), ("bfloat16", "float32"),
        ("seq_len=2048", "seq_len=32"), ("micro_bsz=8", "micro_bsz=1"), ("global_batch_size=256", "global_batch_size=2"),
        ("total_steps=5000", "total_steps=4"), ("=500", "=2"), ("--max-new-tokens 50", "--max-new-tokens 2"),
    ],
    "continue": [
        ("--valid-ratio 0.01", "--valid-ratio 0.2"), ("total_steps=1000", "total_steps=2"),
        ("data.valid_every=100", "data.valid_every=2"),
        ("--max-new-tokens 50", "--max-new-tokens 2"),
    ],
    "finetune": [("--output runs/chat", "--output runs/chat data.total_steps=2"), ("--lora 16", "--lora 2 data.total_steps=2")],
    "resume": [],
    "data-format": [],
    "eight-gpus": [
        *SMALLER_SHAPE, ("--gpus 8", "--gpus 2"), ("--world-size 8", "--world-size 2"), (" data.train_folder=data/train", ""),
    ],
    "slurm": [*SMALLER_SHAPE, ("128", "2")],
}  # fmt: skip
"""For each recipe the texts that are replaced, each of which must be there."""


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """What the recipes take as given: texts, chats, a model with its tokenizer, and a config."""
    (tmp_path / "texts").mkdir()
    lines = [{"content": f"The {animal} sat on mat {n}, and slept."} for n in range(40) for animal in ("cat", "dog")]
    (tmp_path / "texts" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    box = mailbox.mbox(tmp_path / "mail.mbox")
    for n in range(30):
        box.add(f"From: a@example.org\nSubject: {n}\n\nThe cat sat on the mat.\n")
    box.close()
    shutil.copytree(tmp_path / "texts", tmp_path / "old_texts")
    write_chat_model(tmp_path / "base")
    write_chats(tmp_path / "chats.jsonl", 20)
    (tmp_path / "tiny.json").write_text(json.dumps(tiny(data__total_steps=2)))
    return tmp_path


@pytest.mark.parametrize("name", SMALLER)
def test_a_recipe_runs_as_it_is_written(inputs: Path, name: str) -> None:
    text = (ROOT / "docs" / "recipes" / f"{name}.md").read_text(encoding="utf-8")
    for large, small in SMALLER[name]:
        assert large in text
        text = text.replace(large, small)
    blocks = BLOCK.findall(text)
    for language, block in blocks:
        if language == "python":
            (inputs / block.split("\n", 1)[0].removeprefix("# ")).write_text(block)
    commands = CLUSTER.sub("", "".join(block for language, block in blocks if language == "bash"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": "cpu"}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", commands],
        cwd=inputs,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_every_recipe_is_tested() -> None:
    assert {page.stem for page in (ROOT / "docs" / "recipes").glob("*.md")} - {"kubernetes"} == set(SMALLER)
