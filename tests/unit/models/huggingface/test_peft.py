"""Adapters in the form of the ``peft`` library: written, loaded by the library itself, read back, and the start of a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from internevo.config.model import Model
from internevo.errors import UsageError
from internevo.models.config import Lora
from internevo.models.decoder import Decoder
from internevo.models.families.registry import decoder_config
from internevo.models.huggingface.folder import save_hf
from internevo.models.huggingface.owned import MARK
from internevo.models.huggingface.peft import PeftFolder, write_peft
from internevo.models.source import ModelInMemory
from tests.conftest import Run, tensors, write_config, write_dataset

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "vocab_size": 97, "num_attention_heads": 4, "num_kv_attention_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip
LATENT = {
    "num_kv_attention_heads": None, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "num_experts": 4, "top_k": 2, "num_shared_experts": 1, "moe_intermediate_size": 12,
    "moe_type": "Dropless",
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("LLAMA2", {}, ("q", "v", "o", "gate", "down")),
    "one tensor for q, k and v, and for gate and up": ("PHI3", {}, ("q", "v", "o", "gate", "up")),
    "one tensor for gate and up only": ("GLM", {"head_dim": 8}, ("k", "gate", "up", "down")),
    "latent attention": ("DEEPSEEKV2", LATENT, ("q", "o")),
}


def adapted(model_type: str, more: dict[str, Any], targets: tuple[str, ...]) -> tuple[Decoder, Decoder]:
    """A random model, and the same with random adapters."""
    torch.manual_seed(0)
    config = decoder_config(model_type, Model(**{**SHAPE, **more}))
    base, model = Decoder(config), Decoder(replace(config, lora=Lora(3, 6.0, targets)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    values = dict(model.named_parameters())
    base.load_state_dict({name: values[name].detach() for name, _ in base.named_parameters()}, strict=False)
    return base.eval(), model.eval()


def save_base(model: Decoder, folder: Path) -> Any:
    """Saves a model, and returns it as transformers loads it. (Its default special tokens are beyond the tiny vocabulary.)"""
    save_hf(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": None, "eos_token_id": None}))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_library_loads_adapters_and_they_are_read_back(tmp_path: Path, name: str) -> None:
    base, model = adapted(*CASES[name])
    theirs = save_base(base, tmp_path / "base")
    write_peft(ModelInMemory(model.config, model), tmp_path / "adapter", base="a/b@refs/pr/3")
    theirs_of_it = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (theirs_of_it.base_model_name_or_path, theirs_of_it.revision) == ("a/b", "refs/pr/3")
    tokens = torch.randint(0, 97, (2, 9))
    assert (theirs(tokens).logits - base(tokens)).abs().max() < 1e-4
    wanted = model(tokens)
    assert (wanted - base(tokens)).abs().max() > 1e-2
    both: Any = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    assert (both(tokens).logits - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))
    folder = PeftFolder(tmp_path / "adapter", model.config)
    for parameter, value in model.named_parameters():
        if ".lora." in parameter:
            assert torch.equal(folder.read(parameter, 0, len(value)), value)


def test_the_librarys_own_adapters_of_a_fused_tensor_are_read(tmp_path: Path) -> None:
    """They have one A for q, k and v together."""
    from peft import LoraConfig, get_peft_model

    base, _ = adapted("PHI3", {}, ("q",))
    theirs = save_base(base, tmp_path / "base")
    both = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=6, target_modules=["qkv_proj"], task_type="CAUSAL_LM"))
    for name, parameter in both.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    both.save_pretrained(str(tmp_path / "adapter"))
    config = replace(base.config, lora=Lora(3, 6.0, ("q", "k", "v")))
    folder, mine = PeftFolder(tmp_path / "adapter", config), Decoder(config)
    for name, value in mine.state_dict().items():
        value.copy_(folder.read(name, 0, len(value)) if ".lora." in name else base.state_dict()[name])
    tokens = torch.randint(0, 97, (2, 9))
    assert (mine(tokens) - both(tokens).logits).abs().max() < 1e-4


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
    ({"use_dora": True}, "use_dora = True is not supported"),
    ({"lora_alpha": 12}, r"lora_alpha / r = 4, and with model.lora it would be 2; set model.lora.alpha = 12"),
]


def test_adapters_that_are_not_those_of_the_model_are_refused_by_name(tmp_path: Path) -> None:
    _, model = adapted(*CASES["llama"])
    write_peft(ModelInMemory(model.config, model), tmp_path)
    path = tmp_path / "adapter_config.json"
    good = path.read_text()
    for change, message in WRONG:
        path.write_text(json.dumps({**json.loads(good), **change}))
        with pytest.raises(UsageError, match=message):
            PeftFolder(tmp_path, model.config)
    path.write_text(good)
    for lora, message in (
        (None, "the model has none; set model.lora"),
        (Lora(4, 8.0, ("q", "v", "o", "gate", "down")), "which does not fit the model with model.lora.rank = 4"),
        (Lora(3, 6.0, ("q",)), "self_attn.*: the model has no such adapter|mlp.*: the model has no such adapter"),
        (Lora(3, 6.0, ("q", "v", "o", "gate", "up", "down")), "up_proj.*: the folder has no such tensor"),
    ):
        with pytest.raises(UsageError, match=message):
            PeftFolder(tmp_path, replace(model.config, lora=lora))
    with pytest.raises(UsageError, match="it has no adapter_config.json"):
        PeftFolder(tmp_path / "none", model.config)
    base, _ = adapted(*CASES["llama"])
    with pytest.raises(UsageError, match="has no adapters"):
        write_peft(ModelInMemory(base.config, base), tmp_path / "out")


def test_only_what_was_written_here_is_overwritten(tmp_path: Path) -> None:
    _, model = adapted(*CASES["llama"])
    source = ModelInMemory(model.config, model)
    write_peft(source, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        write_peft(source, tmp_path)
    write_peft(source, tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors", MARK}
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"adapter_config\.json was changed after"):
        write_peft(source, tmp_path, overwrite=True)


def test_a_run_starts_from_adapters_and_its_own_are_converted(tmp_path: Path, run: Run) -> None:
    base, model = adapted("LLAMA2", {}, ("q", "down"))
    save_hf(base, tmp_path / "base")
    write_peft(ModelInMemory(model.config, model), tmp_path / "adapter")
    info = {"path": str(tmp_path / "base"), "content": ["model"], "ckpt_type": "hf", "adapter": str(tmp_path / "adapter")}
    shape = {"model_type": "LLAMA2", **{f"model__{key}": value for key, value in SHAPE.items()}}
    changes = {
        **shape, "model__layer_norm_epsilon": 1e-5, "model__max_position_embeddings": 2048, "adam__lr": 0.0,
        "model__lora": {"rank": 3, "alpha": 6, "targets": ["q", "down"]}, "data__total_steps": 1, "lr_scheduler__eta_min": 0.0,
        "ckpt__load_ckpt_info": info,
    }  # fmt: skip
    run("train", write_config(tmp_path, write_dataset(tmp_path / "data"), "run", **changes), "--nproc", 1)
    kept = tensors(tmp_path / "run", 1)
    assert all(torch.equal(kept[f"model/{name}"], value) for name, value in model.named_parameters())
    run("convert", tmp_path / "run", tmp_path / "out", "--to", "peft")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    file = "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
