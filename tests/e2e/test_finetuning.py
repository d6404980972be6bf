"""Fine-tuning: streamed chats in the tokenizer's template; only the adapters are trained, and exports merge them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import internevo
from internevo.checkpoint import Checkpoint
from internevo.models.decoder import Decoder
from tests.conftest import Run, metrics, tensors, write_config
from tests.pool import Pool
from tests.unit.data.encoding.test_formats import CHATML, folder_with

LORA = {"rank": 4, "alpha": 8, "targets": ["wqkv", "down"]}
BASE = {"model__vocab_size": 304, "data__total_steps": 3, "data__num_worker": 0}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the config changes for a run on a file of chats, with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = folder_with(folder / "tokenizer", CHATML)
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "abc " * (n % 5 + 1)}]}
        for n in range(30)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **BASE, "data__type": "streaming", "data__format": "chat", "data__train_folder": str(folder / "chats.jsonl"),
        "data__tokenizer_path": str(tokenizer), "data__use_packed_dataset": True,
    }  # fmt: skip


def test_adapters_are_trained_on_chats_and_merged_on_export(
    tmp_path: Path, pool: Pool, run: Run, chats: dict[str, Any], dataset: Path
) -> None:
    pool.train(write_config(tmp_path, dataset, "base", **BASE))
    info = {"path": str(tmp_path / "base"), "content": ["model"], "ckpt_type": "internevo"}
    tuned = {**chats, "model__lora": LORA, "ckpt__load_ckpt_info": info, "adam__lr": 0.05, "ckpt__checkpoint_every": 2}
    config = write_config(tmp_path, None, "tuned", **tuned, ckpt__enable_internevo2hf_ckpt=True)
    pool.train(config, 2, "data.total_steps=4")
    losses = [row["loss"] for row in metrics(tmp_path / "tuned")]
    assert losses[-1] < losses[0]

    before, after = tensors(tmp_path / "base", 3), tensors(tmp_path / "tuned", 4)
    adapters = {name for name in after if ".lora." in name}
    moments = {name for name in after if name.startswith("optimizer/")}
    assert moments
    assert moments < adapters
    for name in before:
        if name.startswith("model/"):
            assert torch.equal(before[name], after[name])  # frozen

    run("convert", tmp_path / "tuned", tmp_path / "exported", "--to", "hf")
    run("convert", tmp_path / "tuned", tmp_path / "plain", "--to", "internevo")
    merged = internevo.load_model(tmp_path / "tuned")
    tokens = torch.randint(0, 304, (2, 20), generator=torch.Generator().manual_seed(0))
    with_adapters = _unmerged(tmp_path / "tuned" / "checkpoints" / "step-00000004")
    with torch.no_grad():
        wanted = with_adapters(tokens)
        for folder in (tmp_path / "exported", tmp_path / "plain", tmp_path / "tuned" / "hf" / "step-00000004"):
            assert torch.allclose(internevo.load_model(folder)(tokens), wanted, atol=1e-5)
        assert torch.allclose(merged(tokens), wanted, atol=1e-5)
        assert not torch.allclose(internevo.load_model(tmp_path / "base")(tokens), wanted, atol=1e-2)

    run("generate", tmp_path / "tuned", "--format", "chat", "--prompt", "say 1", "--max-new-tokens", 5, "--temperature", 0)
    # The same command resumes; a new run can also start from a Hugging Face folder.
    pool.train(config, 1, "data.total_steps=6")
    assert [row["step"] for row in metrics(tmp_path / "tuned")] == list(range(1, 7))
    again = {**tuned, "ckpt__load_ckpt_info": {**info, "path": str(tmp_path / "exported"), "ckpt_type": "hf"}}
    pool.train(write_config(tmp_path, None, "again", **again), 1, "data.total_steps=1")
    assert metrics(tmp_path / "again")[0]["loss"] < losses[0]


def _unmerged(folder: Path) -> Decoder:
    from internevo.models.decoder import Decoder

    checkpoint = Checkpoint(folder)
    model = Decoder(checkpoint.config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(checkpoint.tensor(f"model/{name}"))
    return model


def test_a_bf16_run_keeps_only_one_copy_of_frozen_weights(tmp_path: Path, pool: Pool, chats: dict[str, Any]) -> None:
    changes = {**chats, "model__lora": LORA, "model__dtype": "torch.bfloat16"}
    pool.train(write_config(tmp_path, None, "half", **changes), 1, "data.total_steps=1")
    stored = tensors(tmp_path / "half", 1)
    assert {stored[name].dtype for name in stored if name.startswith("model/")} == {torch.bfloat16, torch.float32}
    assert all((".lora." in name) == (stored[name].dtype == torch.float32) for name in stored if name.startswith("model/"))
    pool.train(write_config(tmp_path, None, "half", **changes), 2, "data.total_steps=2")
    assert len(metrics(tmp_path / "half")) == 2


def test_a_checkpoint_with_other_adapters_is_refused(tmp_path: Path, pool: Pool, chats: dict[str, Any]) -> None:
    pool.train(write_config(tmp_path, None, "one", **chats, model__lora=LORA), 1, "data.total_steps=1")
    info = {"path": str(tmp_path / "one"), "content": ["model"], "ckpt_type": "internevo"}
    for name, lora in (("other", {**LORA, "rank": 2}), ("none", None)):
        config = write_config(tmp_path, None, name, **chats, model__lora=lora, ckpt__load_ckpt_info=info)
        with pytest.raises(AssertionError, match="has other adapters: model.lora is .*rank=4"):
            pool.train(config, 1)
