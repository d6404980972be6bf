"""Interchange with Hugging Face, generation, and damaged checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from internevo import load_model, save_hf
from internevo.checkpoint import Checkpoint
from internevo.errors import CheckpointError, UsageError
from internevo.generate import Sampling, generate
from internevo.interchange import convert
from internevo.models import Decoder, internlm2, llama
from internevo.tokenizer import train_bpe


@pytest.fixture
def llama_folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "hf")
    train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "hf")
    return tmp_path / "hf"


def test_a_round_trip_is_bit_exact_and_loads_in_transformers(llama_folder, tmp_path):
    convert(llama_folder, tmp_path / "ours", "internevo")
    convert(tmp_path / "ours", tmp_path / "back", "hf", shard_bytes=20_000)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    wanted = load_file(llama_folder / "model.safetensors")
    found = {}
    for path in (tmp_path / "back").glob("*.safetensors"):
        found.update(load_file(path))
        assert path.stat().st_size < 60_000
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    tokens = torch.randint(0, 300, (2, 9))
    for folder in (llama_folder, tmp_path / "ours", tmp_path / "back"):
        assert (load_model(folder)(tokens) - model(tokens).logits).abs().max() < 1e-5
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 2


def test_save_hf_writes_what_transformers_reads(llama_folder, tmp_path):
    model = load_model(llama_folder, dtype=torch.bfloat16)
    save_hf(model, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    tokens = torch.randint(0, 300, (1, 9))
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 0.04


def test_older_bin_folders_load_and_code_in_them_does_not_run(llama_folder, tmp_path):
    weights = load_file(llama_folder / "model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((llama_folder / "config.json").read_text())
    torch.save(weights, old / "pytorch_model.bin")
    tokens = torch.randint(0, 300, (1, 9))
    assert torch.equal(load_model(old)(tokens), load_model(llama_folder)(tokens))


def test_a_folder_that_does_not_fit_is_refused_by_name(llama_folder, tmp_path):
    path = llama_folder / "config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "architectures": ["BertModel"], "model_type": "bert"}))
    with pytest.raises(UsageError, match=r"hf: no family fits architectures = \['BertModel'\]"):
        load_model(llama_folder)
    path.write_text(json.dumps({**good, "intermediate_size": 41}))
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.gate\.weight has shape \[40, 32\]"):
        load_model(llama_folder)
    path.write_text(json.dumps(good))
    weights = load_file(llama_folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, llama_folder / "model.safetensors")
    with pytest.raises(UsageError, match="has no tensor 'model.norm.weight'"):
        load_model(llama_folder)
    with pytest.raises(UsageError, match="nor is it a Hugging Face folder"):
        load_model(tmp_path)


def test_internlm2_is_llama_with_another_layout_on_disk(llama_folder, tmp_path):
    """wqkv is read by an independent description: row (g, j, n) of the view (K, H/K + 2, N)."""
    llama_model = load_model(llama_folder)
    config = internlm2.from_hf({**json.loads((llama_folder / "config.json").read_text()), "bias": False, "rope_theta": 500.0})
    disk = {}
    for name, tensor in load_file(llama_folder / "model.safetensors").items():
        new = (
            name.replace("embed_tokens", "tok_embeddings")
            .replace("self_attn.o_proj", "attention.wo")
            .replace("lm_head", "output")
        )
        new = new.replace("mlp.gate_proj", "feed_forward.w1").replace("mlp.up_proj", "feed_forward.w3")
        new = new.replace("mlp.down_proj", "feed_forward.w2").replace("input_layernorm", "attention_norm")
        disk[new.replace("post_attention_layernorm", "ffn_norm")] = tensor
    for layer in range(2):
        q, k, v = (disk.pop(f"model.layers.{layer}.self_attn.{n}_proj.weight") for n in "qkv")
        rows = []
        for group in range(2):
            rows += [q[16 * group : 16 * group + 16], k[8 * group : 8 * group + 8], v[8 * group : 8 * group + 8]]
        disk[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    folder = tmp_path / "internlm2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(internlm2.to_hf(config)))
    save_file(disk, folder / "model.safetensors")
    model = load_model(folder)
    assert model.config.family == "INTERNLM2"
    tokens = torch.randint(0, 300, (2, 20))
    assert torch.equal(model(tokens), llama_model(tokens))
    convert(folder, tmp_path / "ours", "internevo")
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == disk.keys() and all(torch.equal(back[k], disk[k]) for k in disk)


def test_generation_with_the_cache_equals_transformers(llama_folder):
    ours, theirs = load_model(llama_folder), AutoModelForCausalLM.from_pretrained(llama_folder)
    prompt = torch.randint(3, 300, (1, 7))
    wanted = theirs.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 7:].tolist()
    assert generate(ours, prompt[0].tolist(), 30, Sampling(temperature=0)) == wanted


def test_sampling_is_seeded_and_keeps_to_its_limits():
    from internevo.generate import choose

    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    draw = lambda **k: {choose(logits, Sampling(**k), torch.Generator().manual_seed(s)) for s in range(1000)}  # noqa: E731
    assert draw(temperature=0.0) == {0}
    assert draw(top_k=2) == {0, 1}
    assert draw(top_p=0.5) == {0}  # its probability is 0.64
    assert draw() == {0, 1, 2, 3, 4}


def test_a_damaged_checkpoint_is_named_with_the_place(llama_folder, tmp_path, run):
    convert(llama_folder, tmp_path / "ours", "internevo")
    assert "intact" in run("inspect", tmp_path / "ours").stdout
    path = tmp_path / "ours" / "model-00000.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    done = run("inspect", tmp_path / "ours", code=1)
    assert "model-00000.safetensors is damaged: its checksum differs in bytes 0 to" in done.stderr
    path.write_bytes(good[:-1])
    assert "bytes, and the manifest says" in run("inspect", tmp_path / "ours", code=1).stderr
    path.unlink()
    assert "model-00000.safetensors is missing" in run("inspect", tmp_path / "ours", code=1).stderr
    path.write_bytes(good)
    (tmp_path / "ours" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        Checkpoint(tmp_path / "ours")


def test_commands_generate_and_convert(llama_folder, tmp_path, run):
    done = run("generate", llama_folder, "--prompt", "def ", "--max-new-tokens", 5, "--seed", 3)
    assert done.stdout.startswith("def ")
    assert done.stdout == run("generate", llama_folder, "--prompt", "def ", "--max-new-tokens", 5, "--seed", 3).stdout
    run("convert", llama_folder, tmp_path / "ours", "--to", "internevo", "--dtype", "bfloat16")
    assert Checkpoint(tmp_path / "ours").dtype == torch.bfloat16
    assert "is not empty" in run("convert", llama_folder, tmp_path / "ours", "--to", "hf", code=2).stderr
    assert "does not exist" in run("convert", tmp_path / "none", tmp_path / "x", "--to", "hf", code=2).stderr
    assert "5XB" in run("convert", llama_folder, tmp_path / "y", "--to", "hf", "--max-shard-size", "5XB", code=2).stderr
    assert "LlamaForCausalLM" in run("inspect", llama_folder).stdout


def test_training_starts_from_a_hugging_face_folder(llama_folder, tmp_path, config, run):
    from tests.conftest import metrics

    model = {"num_layers": 2, "intermediate_size": 40, "vocab_size": 300, "rope_base": 500.0,
             "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "layer_norm_epsilon": 1e-6}  # fmt: skip
    changes = {f"model__{k}": v for k, v in model.items()}
    info = {"path": str(llama_folder), "content": ["model"], "ckpt_type": "hf"}
    path = config("tuned", ckpt__load_ckpt_info=info, adam__lr=0.0, data__total_steps=1, **changes)
    run("train", path, "--nproc", 2)
    back = load_model(tmp_path / "tuned")
    wanted = load_model(llama_folder)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), wanted.parameters(), strict=True))
    assert len(metrics(tmp_path / "tuned")) == 1


def test_parameter_counts_follow_from_the_shapes():
    for family, shape in ((llama, {"qkv_bias": True, "mlp_bias": True}), (internlm2, {"tie_embeddings": True})):
        config = family.from_hf({
            "vocab_size": 67, "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8,
        })  # fmt: skip
        config = type(config)(**{**vars(config), **shape})
        assert config.parameters() == sum(p.numel() for p in Decoder(config).parameters())
