"""Conversion from and to Hugging Face folders, compared with transformers."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from internevo import load_model, save_hf
from internevo.checkpoint import Checkpoint
from internevo.commands.convert import convert
from internevo.config.model import Model
from internevo.errors import UsageError
from internevo.models.config import DecoderConfig
from internevo.models.families.registry import decoder_config
from internevo.models.huggingface.folder import HfFolder, write_hf
from tests.conftest import Run, WriteConfig, metrics, random_model
from tests.families import CONFIGS, pair
from tests.references import REFERENCES, random_folder


def test_a_round_trip_is_bit_exact_and_loads_in_transformers(llama_folder: Path, tmp_path: Path) -> None:
    convert(llama_folder, tmp_path / "ours", "internevo")
    convert(tmp_path / "ours", tmp_path / "back", "hf", shard_bytes=20_000)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    wanted = load_file(llama_folder / "model.safetensors")
    found = {}
    for path in (tmp_path / "back").glob("*.safetensors"):
        found.update(load_file(path))
        assert path.stat().st_size < 60_000
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    auto: Any = AutoModelForCausalLM  # typed as if it returned a model alone
    model, info = auto.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    tokens = torch.randint(0, 300, (2, 9))
    for folder in (llama_folder, tmp_path / "ours", tmp_path / "back"):
        assert (load_model(folder)(tokens) - model(tokens).logits).abs().max() < 1e-5
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 2


def test_save_hf_writes_what_transformers_reads(llama_folder: Path, tmp_path: Path) -> None:
    model = load_model(llama_folder, dtype=torch.bfloat16)
    save_hf(model, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    tokens = torch.randint(0, 300, (1, 9))
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 0.04


def test_special_ids_that_nobody_knows_are_null(tmp_path: Path) -> None:
    """For a missing key, transformers takes that of the architecture's published model: token 1 to begin with, and 2 to end."""
    save_hf(random_model(DecoderConfig("LLAMA2", 300, 32, 24, 4, 4, 2, 8)), tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, None, None)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-run"),))


def test_older_bin_files_load_and_code_in_them_does_not_run(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(llama_folder / "model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((llama_folder / "config.json").read_text())
    torch.save(weights, old / "pytorch_model.bin")
    tokens = torch.randint(0, 300, (1, 9))
    assert torch.equal(load_model(old)(tokens), load_model(llama_folder)(tokens))
    monkeypatch.chdir(tmp_path)
    torch.save({**weights, "evil": Evil()}, old / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model.bin is refused"):
        load_model(old)
    assert not (tmp_path / "was-run").exists()


def test_a_folder_that_does_not_fit_is_refused_by_name(llama_folder: Path, tmp_path: Path) -> None:
    path = llama_folder / "config.json"
    good = json.loads(path.read_text())

    def refused(match: str, **changes: Any) -> None:
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(UsageError, match=match):
            load_model(llama_folder)

    families = r".*known: INTERNLM \(InternLMForCausalLM\), .*GEMMA"
    refused(r"hf: no family fits model_type = 'bert'" + families, architectures=["BertModel"], model_type="bert")
    refused(
        r"architectures = \['LlamaForSequenceClassification'\] is not a language model",
        architectures=["LlamaForSequenceClassification"],
    )
    refused(r"hidden_act = 'relu' does not fit LLAMA2, which needs 'silu' \(families: INTERNLM", hidden_act="relu")
    refused(
        r"tensor .*gate_proj.weight has shape \[40, 32\], but by config.json it should have \[41, 32\]", intermediate_size=41
    )
    refused(r"has no tensor 'model.layers.0.self_attn.q_proj.bias', which LLAMA2 needs", attention_bias=True)
    refused(r"has a tensor 'model.layers.1.*', which LLAMA2 with this config.json does not have", num_hidden_layers=1)
    path.write_text(json.dumps(good))
    weights = load_file(llama_folder / "model.safetensors")
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, llama_folder / "model.safetensors")
    load_model(llama_folder)
    (llama_folder / "model.safetensors").write_bytes((llama_folder / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(UsageError, match=r"model.safetensors is not a safetensors file: tensor .* does not fit into the file"):
        load_model(llama_folder)
    with pytest.raises(UsageError, match="it is not a Hugging Face folder either"):
        load_model(tmp_path)


def disk(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    assert found
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@settings(max_examples=3, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_family_goes_both_ways_with_transformers(family: str, data: st.DataObject, seed: int, dtype: torch.dtype) -> None:
    theirs, _ = pair(data.draw(CONFIGS[family]), seed)
    theirs.to(dtype)
    with TemporaryDirectory() as temporary:
        there, ours, back = (Path(temporary) / name for name in ("there", "ours", "back"))
        theirs.save_pretrained(there)
        convert(there, ours, "internevo")
        convert(ours, back, "hf", shard_bytes=20_000)
        assert same(disk(back), disk(there))
        auto: Any = AutoModelForCausalLM  # typed as if it returned a model alone
        loaded, info = auto.from_pretrained(back, output_loading_info=True, experts_implementation="eager")
        assert not any(info.values()), info
        assert loaded.dtype == dtype
        tokens = torch.randint(1, theirs.config.vocab_size, (1, 9))
        close = 1e-5 if dtype == torch.float32 else 0.04
        for folder in (there, ours, back):
            assert (load_model(folder, dtype=dtype)(tokens) - theirs(tokens).logits).abs().mean() < close
        assert Checkpoint(ours).config == HfFolder(there).config == HfFolder(back).config


@pytest.mark.parametrize("family", REFERENCES)
@settings(max_examples=5, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_families_without_a_class_in_transformers_go_both_ways(family: str, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    config, tensors = random_folder(family, lambda values: data.draw(st.sampled_from(values)))
    with TemporaryDirectory() as temporary:
        there, ours, back = (Path(temporary) / name for name in ("there", "ours", "back"))
        there.mkdir()
        (there / "config.json").write_text(json.dumps(config))
        save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
        (there / "modeling_own.py").write_text("raise SystemExit('code of the folder was run')")
        convert(there, ours, "internevo")
        convert(ours, back, "hf")
        assert same(disk(back), tensors)
        assert HfFolder(back).config == HfFolder(there).config == Checkpoint(ours).config
        written = json.loads((back / "config.json").read_text())
        assert written["architectures"] == config["architectures"] and "AutoModelForCausalLM" in written["auto_map"]
        assert ("max_position_embeddings" in written) == ("max_position_embeddings" in config)


def test_an_internlm2_model_is_written_as_llama_for_transformers(tmp_path: Path, run: Run) -> None:
    torch.manual_seed(0)
    config, tensors = random_folder("INTERNLM2", lambda values: values[-1])
    folder = tmp_path / "internlm2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    run("convert", folder, tmp_path / "llama", "--to", "hf", "--as", "LLAMA2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    tokens = torch.randint(0, config["vocab_size"], (1, 20))
    assert (load_model(folder)(tokens) - theirs(tokens).logits).abs().max() < 1e-5
    done = run("convert", folder, tmp_path / "gemma", "--to", "hf", "--as", "GEMMA", code=2)
    assert "GemmaForCausalLM cannot describe this model: its tie_embeddings is False" in done.stderr.replace("\n", " ") or (
        "GemmaForCausalLM cannot describe this model" in done.stderr
    )


@pytest.mark.parametrize("family", ["SMOLLM3", "PHI3", "GLM"])
def test_transformers_does_not_pad_with_an_id_outside_of_the_vocabulary(tmp_path: Path, family: str) -> None:
    """Its default in these families is that of the published models."""
    shape = {"num_layers": 1, "hidden_size": 32, "vocab_size": 97, "num_attention_heads": 4}
    model = random_model(decoder_config(family, Model(**shape)))  # type: ignore[arg-type]
    save_hf(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.pad_token_id is None
    tokens = torch.randint(0, 97, (1, 9))
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-5


def test_mistral_without_a_window_is_read_and_written_as_llama(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    theirs = MistralForCausalLM(MistralConfig(**shape, sliding_window=None))
    theirs.save_pretrained(tmp_path / "mistral")
    convert(tmp_path / "mistral", tmp_path / "as", "hf", write_as="LLAMA2")
    convert(tmp_path / "mistral", tmp_path / "read", "hf", family="LLAMA2")
    tokens = torch.randint(0, 97, (1, 20))
    for folder in ("as", "read"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(loaded) is LlamaForCausalLM and torch.equal(loaded(tokens).logits, theirs(tokens).logits)
    MistralForCausalLM(MistralConfig(**shape, sliding_window=4)).save_pretrained(tmp_path / "windowed")
    with pytest.raises(UsageError, match=r"LlamaForCausalLM cannot describe this model: its windows is \(4, 4\)"):
        convert(tmp_path / "windowed", tmp_path / "no", "hf", write_as="LLAMA2")
    with pytest.raises(UsageError, match="sliding_window = 4 does not fit LLAMA2"):
        convert(tmp_path / "windowed", tmp_path / "no", "hf", family="LLAMA2")


def test_other_files_of_the_folder_are_copied(llama_folder: Path, tmp_path: Path) -> None:
    beside = {
        "generation_config.json": '{"temperature": 0.5}', "chat_template.jinja": "{{ messages }}",
        "tokenizer_config.json": '{"bos_token": "<s>"}', "configuration_own.py": "x = 1",
    }  # fmt: skip
    for name, text in beside.items():
        (llama_folder / name).write_text(text)
    path = llama_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "own_key": 7, "torch_dtype": "float32"}))
    convert(llama_folder, tmp_path / "ours", "internevo")
    convert(tmp_path / "ours", tmp_path / "back", "hf", dtype=torch.bfloat16)
    for name, text in beside.items():
        assert (tmp_path / "back" / name).read_text() == text
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["own_key"] == 7
    assert {written[k] for k in ("torch_dtype", "dtype") if k in written} == {"bfloat16"}


@pytest.mark.parametrize(("family", "processes"), [("LLAMA2", 2), ("MIXTRALMOE", 3), ("INTERNLM2", 2)])
def test_training_starts_from_a_hugging_face_folder(
    tmp_path: Path, config: WriteConfig, run: Run, family: str, processes: int
) -> None:
    """With several layouts and families. The learning rate is 0, so that the run's weights equal the folder's."""
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        vocab_size=300, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rope_theta=500.0, rms_norm_eps=1e-6, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "hf"
    experts: dict[str, Any] = {}
    if family == "MIXTRALMOE":
        experts = {"model__num_experts": 4, "model__top_k": 2, "model__moe_type": "Dropless"}
        MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    if family == "INTERNLM2":
        write_hf(HfFolder(folder), tmp_path / "internlm2", write_as="INTERNLM2")
        folder = tmp_path / "internlm2"
    model = {"num_layers": 2, "intermediate_size": 40, "vocab_size": 300, "rope_base": 500.0, "layer_norm_epsilon": 1e-6}
    info = {"path": str(folder), "content": ["model"], "ckpt_type": "hf"}
    path = config(
        "tuned", model_type=family, **experts, **{f"model__{k}": v for k, v in model.items()}, ckpt__load_ckpt_info=info,
        adam__lr=0.0, data__total_steps=1, parallel__zero1={"size": -1, "fsdp": processes == 3},
    )  # fmt: skip
    done = run("train", path, "--nproc", processes)
    assert f"note: model.max_position_embeddings = 2048 in the config, and 64 in {folder}" in done.stdout
    assert (tmp_path / "tuned" / "log" / "rank-00000.log").read_text().count("loaded weights from") == 1
    wanted = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(load_model(tmp_path / "tuned").parameters(), wanted.parameters(), strict=True))
    assert len(metrics(tmp_path / "tuned")) == 1
    other = f"ckpt.save_ckpt_folder={tmp_path}/other"
    failed = run("train", path, "model.num_layers=1", "model.rope_base=7", other, code=2)
    assert f"  model.num_layers = 1 in the config, and 2 in {folder}\n" in failed.stderr
    assert f"  model.rope_base = 7.0 in the config, and 500.0 in {folder}\n" in failed.stderr
