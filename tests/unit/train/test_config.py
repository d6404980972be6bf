"""``model.from_hf``: a config gets its shape, tokenizer and weights from a Hugging Face folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internevo.checkpoint.manifest import Manifest
from internevo.config import Config, dump
from internevo.config.check import missing_paths
from internevo.config.load import read_values
from internevo.errors import ConfigError, UsageError
from internevo.models.families.registry import FAMILIES, decoder_config, decoder_from_hf
from internevo.models.huggingface.folder import HfFolder, save_hf
from internevo.text.tokenizer import train_bpe
from internevo.train.check import problems
from internevo.train.config import load_config, local_tokenizer, with_tokenizer
from internevo.train.resume import Recorded
from tests.conftest import random_model
from tests.families import CONFIGS

SIZES = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "rms_norm_eps": 1e-3,
}  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    {"model_type": "internlm", "bias": True, "rotary": {"base": 5000, "type": "dynamic"}, "max_position_embeddings": 64},
    {"model_type": "internlm", "bias": False},
    {"model_type": "internlm2", "bias": True, "num_key_value_heads": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"model_type": "baichuan", "max_position_embeddings": 64},
    {"model_type": "baichuan", "model_max_length": 64},
]
"""Values of families that transformers does not have; the last one uses ALiBi."""
REST: dict[str, Any] = {"data": {"seq_len": 8, "micro_bsz": 1, "total_steps": 1}, "adam": {"lr": 1}}


def write(folder: Path, model: dict[str, Any], **sections: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**REST, "model": model, **sections}))
    return folder / "config.json"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Returns a Hugging Face folder with weights and a tokenizer."""
    hf = {**SIZES, "model_type": "llama", "num_key_value_heads": 2, "rope_theta": 777.0, "tie_word_embeddings": True}
    save_hf(random_model(decoder_from_hf(hf, "test")), tmp_path / "llama")
    train_bpe(["abc"], 280, tmp_path / "llama")
    return tmp_path / "llama"


@st.composite
def as_published(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Any ``config.json`` of a family, with what all of its published models have and a config has no key for."""
    values: dict[str, Any] = {**draw(CONFIGS[name]).to_dict(), "architectures": [FAMILIES[name].ARCHITECTURE]}
    if name == "GEMMA3":
        values["rope_parameters"]["sliding_attention"]["rope_theta"] = 10000.0
    if name == "DEEPSEEKV3":
        values["rope_interleave"] = True
    return values


@given(data=st.data(), name=st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=60)
def test_a_config_from_a_folder_is_the_model_of_the_conversion(
    data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("model")
    values = data.draw(as_published(name))
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(values))
    wanted = decoder_from_hf(values, "test")
    config = load_config(write(folder, {"from_hf": str(folder / "hf"), "pretrained": False}))
    assert decoder_config(config.model_type, config.model) == wanted
    assert not problems(config, 1)


@pytest.mark.parametrize("values", OTHERS, ids=lambda values: values["model_type"])
def test_also_for_families_that_transformers_does_not_have(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "hf").mkdir()
    values = {**SIZES, **values}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    config = load_config(write(tmp_path, {"from_hf": str(tmp_path / "hf"), "pretrained": False}))
    assert decoder_config(config.model_type, config.model) == decoder_from_hf(values, "test")


def test_a_run_starts_from_the_weights_with_the_tokenizer(llama: Path, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {"from_hf": str(llama)}))
    info = config.ckpt.load_ckpt_info
    assert info is not None and (info.path, info.content, info.is_hf) == (str(llama), ("model",), True)
    assert config.data.tokenizer_path == str(llama) and config.model.dtype == "float32"
    (tmp_path / "resolved.json").write_text(dump(config))  # what is in the run folder
    assert load_config(tmp_path / "resolved.json") == config

    shape = load_config(write(tmp_path, {"from_hf": str(llama), "pretrained": False, "num_layers": 5}))
    assert shape.ckpt.load_ckpt_info is None and shape.model.num_layers == 5 and shape.model.hidden_size == 16
    other = load_config(write(tmp_path, {"from_hf": str(llama)}, ckpt={"load_ckpt_info": {"path": str(tmp_path)}}))
    assert other.ckpt.load_ckpt_info is not None and other.ckpt.load_ckpt_info.path == str(tmp_path)


def test_a_key_overrides_unless_it_contradicts_the_weights(llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path, {"from_hf": str(llama), "rope_base": 5.0, "dtype": "torch.bfloat16"})
    config = load_config(path, ["data.tokenizer_path=none"])
    assert (config.model.rope_base, config.model.dtype, config.data.tokenizer_path) == (5.0, "bfloat16", None)
    assert config.ckpt.load_ckpt_info is not None and config.ckpt.load_ckpt_info.may_differ == ("rope_base",)
    for override, key in (
        ("model.hidden_size=32", "model.hidden_size = 32"), ("model.mlp_ratio=8", "model.intermediate_size = 256"),
        ("model.num_layers=1", "model.num_layers = 1"), ("model.no_bias=false", "model.qkv_bias = True"),
        ("model.tie_word_embeddings=false", "model.tie_word_embeddings = False"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{key} in the config, and .* in {llama}(?s:.*)Leave these keys out, or"):
            load_config(path, [override])
        load_config(path, [override, "model.pretrained=false"])


def test_a_head_that_is_not_tied_is_read_as_such(llama: Path, tmp_path: Path) -> None:
    """As in the conversion: config.json says tied, but the weights have another head."""
    hf = json.loads((llama / "config.json").read_text())
    hf["tie_word_embeddings"] = False
    save_hf(random_model(decoder_from_hf(hf, "test")), llama, overwrite=True)
    (llama / "config.json").write_text(json.dumps({**hf, "tie_word_embeddings": True}))
    assert load_config(write(tmp_path, {"from_hf": str(llama)})).model.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unheard"}, "no family fits model_type = 'unheard'"),
        ({"model_type": "llava", "vision_config": {}}, "'llava'.* \\(a multimodal model; only language models can be read\\)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} does not fit LLAMA2"),
        ({"hidden_size": None}, "hidden_size = None must be a whole number"),
        ({"hidden_size": 32}, "has shape .* but by config.json it should have"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_by_name(
    llama: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    hf = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**hf, **changes}))
    with pytest.raises(UsageError, match=message):
        load_config(write(tmp_path, {"from_hf": str(llama)}))


def test_an_incomplete_folder_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path, {"from_hf": str(llama)})
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    (llama / "model.safetensors").rename(llama / "model-00001-of-00002.safetensors")
    with pytest.raises(UsageError, match="names model-00002-of-00002.safetensors, which the folder does not have"):
        load_config(path)
    assert load_config(path, ["model.pretrained=false"]).model.num_layers == 2
    (llama / "tokenizer.json").unlink()
    assert load_config(path, ["model.pretrained=false"]).data.tokenizer_path is None
    (llama / "config.json").unlink()
    with pytest.raises(UsageError, match="llama is not a Hugging Face folder: it has no config.json"):
        load_config(path)
    with pytest.raises(UsageError, match="'no/such/model' does not exist, and is no name on the hub"):
        load_config(path, ["model.from_hf=no/such/model"])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(UsageError, match="is a run folder or checkpoint: leave model.from_hf out"):
        load_config(path, [f"model.from_hf={tmp_path / 'run'}"])


def test_a_folder_is_the_same_model_as_its_weights(llama: Path, tmp_path: Path) -> None:
    values = read_values(write(tmp_path, {"from_hf": str(llama)}))
    assert "model_type" not in values and values["model"] == {"from_hf": str(llama)}
    config = load_config(tmp_path / "config.json")
    assert decoder_config(config.model_type, config.model) == HfFolder(llama).config


def recorded(run: Path, config: Config, tokenizer: Path | None) -> None:
    """What of a run's checkpoint matters here."""
    folder = run / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    Manifest(1, {}, {}, run="a").write(folder)
    (folder / "config.json").write_text(dump(config))
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer")


def test_a_model_that_is_here_decides_also_when_a_run_goes_on(llama: Path, tmp_path: Path) -> None:
    """So an override of the first command counts only where it is given."""
    run = tmp_path / "run"
    path = write(tmp_path, {"from_hf": str(llama)}, ckpt={"save_ckpt_folder": str(run)})
    own = load_config(path)
    recorded(run, load_config(path, ["model.dtype=torch.float16", "model.layer_norm_epsilon=1e-4"]), llama)
    again = load_config(path)
    assert again.model == own.model and again.model.dtype != "float16"
    assert again.data.tokenizer_path == str(llama)
    for weights in llama.glob("*.safetensors"):
        weights.unlink()
    assert load_config(path).model.dtype == "float16", "the model cannot be read any more"
    config = run / "checkpoints" / "step-00000001" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "model": {**values["model"], "key_of_another_version": 1}}))
    with pytest.raises(ConfigError, match=r"step-00000001/config.json is of another version.*key_of_another_version"):
        load_config(path)


@given(data=st.data(), name=st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=25)
def test_a_run_with_a_checkpoint_needs_neither_the_model_nor_its_tokenizer(
    data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("model")
    hf = data.draw(as_published(name))
    model, run = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(hf))
    train_bpe(["abc"], 280, model)
    lora = {"from_hf": str(model), "pretrained": False, "lora": {"rank": 2}, "checkpoint": 0.5}
    path = write(tmp_path, lora, ckpt={"save_ckpt_folder": str(run)})
    config = load_config(path)
    (tmp_path / "tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).rename(tmp_path / "tokenizer" / file)
    shutil.rmtree(model)
    with pytest.raises(UsageError, match="model.from_hf = .* does not exist"):
        load_config(path)
    recorded(run, config, tmp_path / "tokenizer")
    again = load_config(path)
    assert decoder_config(again.model_type, again.model) == decoder_config(config.model_type, config.model)
    kept, record = str(run / "checkpoints" / "step-00000001" / "tokenizer"), Recorded.of(again)
    assert again == config and local_tokenizer(again, record) == with_tokenizer(config, kept)
    assert not missing_paths(local_tokenizer(again, record), new=record is None)
    write(tmp_path, {**lora, "checkpoint": 0.0}, ckpt={"save_ckpt_folder": str(run)})
    assert load_config(path).model.checkpoint == 0.0, "a key that the model does not fill in is the config's"
    (tmp_path / "run.json").write_text(dump(config))  # the resolved config in the run folder, also where the run is not
    assert load_config(tmp_path / "run.json") == again
    run.rename(tmp_path / "moved")
    assert load_config(tmp_path / "run.json") == config
    moved = load_config(tmp_path / "run.json", [f"ckpt.save_ckpt_folder={tmp_path / 'moved'}"])
    opened = local_tokenizer(moved, Recorded.of(moved))
    assert opened.data.tokenizer_path == str(tmp_path / "moved" / "checkpoints" / "step-00000001" / "tokenizer")
    with pytest.raises(UsageError, match="model.from_hf = 'other/than/that' does not exist"):
        load_config(path, [f"ckpt.save_ckpt_folder={tmp_path / 'moved'}", "model.from_hf=other/than/that"])
