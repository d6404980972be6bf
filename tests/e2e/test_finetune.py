"""``internevo finetune``: one command from a model and data to an exported model, which goes on after it was killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import internevo
from internevo.checkpoint import Checkpoint, complete_checkpoints
from internevo.commands.demo import compare_with_transformers
from internevo.commands.finetune import finetune
from internevo.commands.finetune_config import Options
from internevo.models.families.registry import decoder_from_hf
from internevo.models.huggingface.folder import save_hf
from internevo.text.tokenizer import load_tokenizer
from tests.conftest import Run, metrics, random_model
from tests.unit.data.encoding.test_formats import CHATML, folder_with

OPTIONS = ("--lora", "4", "--seq-len", "128", "data.total_steps=12", "ckpt.checkpoint_every=4")
OPTIONS_IN_PYTHON = partial(Options, lora=4, seq_len=128, overrides=["data.total_steps=12", "ckpt.checkpoint_every=4"])


def write_chat_model(path: Path) -> Path:
    """Writes a small Hugging Face folder with a tokenizer that has a chat template."""
    folder = folder_with(path, CHATML)
    hf = {
        "model_type": "llama", "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    model = random_model(decoder_from_hf(hf, "test"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    save_hf(model, folder, overwrite=True)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a small Hugging Face folder with a tokenizer that has a chat template."""
    return write_chat_model(tmp_path_factory.mktemp("finetune") / "model")


def write_chats(path: Path, count: int) -> Path:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "abc " * (n % 5 + 1)}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kill_while_training(run: Path, *arguments: object) -> None:
    """Starts a command, and kills it as soon as it has written a checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": "cpu"}
    child = subprocess.Popen(
        [sys.executable, "-m", "internevo", *map(str, arguments)], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        while child.poll() is None and not complete_checkpoints(run):
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL


def test_adapters_are_trained_also_over_a_kill_and_exported(tmp_path: Path, run: Run, model: Path) -> None:
    chats, out = write_chats(tmp_path / "chats.jsonl", 40), tmp_path / "tuned"
    command = ("finetune", model, chats, "--output", out, *OPTIONS)
    kill_while_training(out, *command)
    refused = run(*command[:-1], code=2).stderr
    assert "was begun with overrides = ['data.total_steps=12', 'ckpt.checkpoint_every=4'], and not" in refused
    said = run(*command).stdout
    assert f"going on with {out}" in said and f"loaded all from {out / 'checkpoints'}" in said
    assert [row["step"] for row in metrics(out)] == list(range(1, 13))
    valid = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "valid_loss" in line]
    assert valid[0]["step"] == 0 and valid[-1]["step"] == 12 and valid[-1]["valid_loss"] < valid[0]["valid_loss"]
    assert f"{valid[0]['valid_loss']:.4f} (perplexity" in said and f"{valid[-1]['valid_loss']:.4f} (perplexity" in said
    assert f"adapters: {out / 'checkpoints' / 'step-00000012'}" in said

    assert compare_with_transformers(out / "model") < 1e-4
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():  # the adapters are merged
        tuned, base = (internevo.load_model(folder)(tokens) for folder in (out / "model", model))
        assert torch.allclose(tuned, internevo.load_model(out)(tokens), atol=1e-5)
        assert not torch.allclose(tuned, base, atol=1e-3)
    assert Checkpoint(complete_checkpoints(out)[0]).config.lora is not None
    assert json.loads((out / "model" / "tokenizer_config.json").read_text())["chat_template"] == CHATML
    ends = [load_tokenizer(model).backend.token_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    for name in ("generation_config.json", "config.json"):
        assert json.loads((out / "model" / name).read_text())["eos_token_id"] == ends
    # By hand, with the config that it has written; and the command on what is finished exports what is new.
    assert "the same command goes on" not in said
    again = said.partition("more steps: internevo ")[2].splitlines()[0].replace("=24", "=14").split()
    run(*again)
    assert [row["step"] for row in metrics(out)] == list(range(1, 15))
    assert finetune(OPTIONS_IN_PYTHON(str(model), str(chats)), out, None) == 0
    with torch.no_grad():
        tuned, trained = (internevo.load_model(folder)(tokens) for folder in (out / "model", out))
    assert torch.allclose(tuned, trained, atol=1e-5)


def test_all_weights_are_trained_on_instructions_with_the_models_own_template(tmp_path: Path, run: Run, model: Path) -> None:
    rows = [{"instruction": f"say {n}", "input": "", "output": "abc " * (n % 5 + 1)} for n in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    out = tmp_path / "tuned"
    said = run("finetune", model, tmp_path / "data.json", "--output", out, "--epochs", 1).stdout
    assert "read as instructions, with the chat template; what the assistant says is predicted" in said
    assert "⟦<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n⟧abc <|im_end|>" in said
    assert "no document is cut" in said and "lengths in tokens: median" in said
    assert compare_with_transformers(out / "model") < 1e-4
    # Killed after the last step; while it exports; and after everything.
    options, steps = Options(str(model), str(tmp_path / "data.json"), epochs=1.0), metrics(out)
    for lost in (["finetune.json"], ["finetune.json", "model"], ["finetune.json", "model/config.json"], []):
        before = {path: path.stat().st_mtime_ns for path in (out / "model").rglob("*")}
        if lost:
            (out / "finetune.json").write_text(json.dumps(asdict(options)))
            (out / ".model.0123abcd.tmp").mkdir()
        for name in lost[1:]:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        assert finetune(options, out, None) == 0
        assert compare_with_transformers(out / "model") < 1e-4 and metrics(out) == steps
        assert not (out / ".model.0123abcd.tmp").exists()
        assert ({path: path.stat().st_mtime_ns for path in (out / "model").rglob("*")} == before) == (not lost)
