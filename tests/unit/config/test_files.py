"""Config files: each mistake is one message with the file and the line; no file ends the program or changes another one."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from internevo.config import notices, validate
from internevo.errors import ConfigError
from internevo.train.check import problems
from internevo.train.config import load_config
from tests.conftest import TINY, tiny

BODY = "".join(f"{key} = {value!r}\n" for key, value in TINY.items())
YAML = "model: {num_layers: 2, hidden_size: 32, vocab_size: 97, num_attention_heads: 4}\n"
YAML += "data: {seq_len: 32, micro_bsz: 1, total_steps: 8}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.py", "x = 1\nadam = dict(lr=1\n", "a.py, line 2: SyntaxError"),
        ("a.py", "x = 1\ny = z\n", "a.py, line 2: NameError: name 'z'"),
        ("a.py", "import sys\nsys.exit(0)\n", "a.py, line 2: SystemExit: 0"),
        ("a.py", "exit()\n", "a.py, line 1: SystemExit"),
        ("a.py", "raise BaseException('own')\n", "a.py, line 1: BaseException: own"),
        ("a.py", "def f():\n    return f()\nf()\n", "line 2: RecursionError"),
        ("a.py", "import broken_helper\n", "a.py, line 1 ("),
        ("a.py", "import json\njson.loads('{')\n", "a.py, line 2 ("),
        ("a.py", "x = 1\n\0", "a.py"),
        ("a.py", BODY + "adam = dict\n", "adam: must be a section with keys"),
        ("a.py", BODY + "import json as data\n", "data: must be a section with keys"),
        ("a.py", BODY + "data['self'] = data\n", "config key data.self.self...: it contains itself"),
        ("a.py", BODY + "data['x'] = (n for n in ())\n", "data.x: unknown key"),
        ("a.py", BODY + "hidden = 3\n", "hidden: unknown key; write the file's own names in capitals"),
        ("a.yaml", "", "a.yaml is empty"),
        ("a.yaml", "# nothing\n", "a.yaml is empty"),
        ("a.yaml", "- 1\n", "must be a mapping"),
        ("a.yaml", "just text\n", "must be a mapping"),
        ("a.yaml", "data:\n\tseq_len: 3\n", "a.yaml: line 2: not YAML: found character '\\t'"),
        ("a.yaml", "a: 1\nb: {c: 1\n", "a.yaml: line 3: not YAML"),
        ("a.yaml", "a: 1\nb: 2\na: 3\n", "a.yaml: line 3: the key 'a' occurs twice"),
        ("a.yaml", "a:\n  b: 1\n  b: 2\n", "a.yaml: line 3: the key 'b' occurs twice"),
        ("a.yaml", "a: !!python/object/apply:os.system [ls]\n", "a.yaml: line 1: not YAML"),
        ("a.yaml", "a: *b\n", "a.yaml: line 1: not YAML: found undefined alias"),
        ("a.yaml", "a: &x {b: *x}\n", "contains itself"),
        ("a.yaml", "a: 1\n---\nb: 1\n", "a.yaml: line 2: not YAML"),
        ("a.yaml", "a: \x01\n", "not YAML"),
        ("a.yaml", YAML + "JOB_NAME: 2024\n", "JOB_NAME: must be text; in a file, put it in quotes (got 2024)"),
        ("a.yaml", YAML + "JOB_NAME: 2024-01-02\n", "JOB_NAME: must be text"),
        ("a.toml", "a = 1\na = 2\n", "a.toml: not TOML: Cannot overwrite a value (at line 2"),
        ("a.toml", "a = \n", "a.toml: not TOML: Invalid value (at line 1"),
        ("a.json", "", "a.json: line 1: not JSON"),
        ("a.json", '{"a": 1,\n}', "a.json: line 2: not JSON"),
        ("a.json", '{"a": 1, "a": 2}', "a.json: the key 'a' occurs twice"),
        ("a.json", '{"a": {"b": 1, "b": 2}}', "a.json: the key 'b' occurs twice"),
        ("a.json", '{"adam": {"lr": NaN}}', "adam.lr: must be a finite number (got nan)"),
        ("a.json", "[" * 100_000, "a.json: "),
        ("a.txt", "", "unknown file type '.txt'"),
        ("a", "", "unknown file type ''"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_message_with_its_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "broken_helper.py").write_text("x = 1\nraise ValueError('of the helper')\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name)
    assert message in str(caught.value)
    if "broken_helper" in content:
        assert f"({tmp_path / 'broken_helper.py'}, line 2): ValueError: of the helper" in str(caught.value)


@pytest.mark.parametrize("suffix", [".py", ".yaml", ".toml", ".json"])
def test_what_is_not_a_text_file_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    os.mkfifo(tmp_path / f"fifo{suffix}")
    (tmp_path / f"binary{suffix}").write_bytes(b"a = '\xff\xfe'\n")
    for name, message in (("folder", "is not a file"), ("fifo", "is not a file"), ("no", "does not exist")):
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / (name + suffix))
    with pytest.raises(ConfigError, match="codec" if suffix == ".py" else r"is not UTF-8 at byte 5 \(0xff\)"):
        load_config(tmp_path / f"binary{suffix}")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(YAML)
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ConfigError, match=r"a\.yaml cannot be read: Permission denied"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.py", BODY),
        ("a.yaml", YAML + "adam: {lr: 0.01}\n"),
        ("a.toml", "adam.lr = 0.01\n" + YAML.replace(": {", " = {").replace(": ", " = ")),
        ("a.json", json.dumps(TINY)),
    ],
)  # fmt: skip
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert load_config(tmp_path / name).adam.lr == 0.01


def test_yaml_reads_numbers_as_people_write_them_and_merges(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        YAML + "adam: &adam {lr: 1e-4, adam_eps: 1E-08}\nhybrid_zero_optimizer: {reduce_bucket_size: 5e8}\n"
        "monitor: {sample_prompts: ['1e-4', a1e4]}\nmodel_type: LLAMA2\n"
    )
    config = load_config(path)
    assert (config.adam.lr, config.adam.adam_eps, config.hybrid_zero_optimizer.reduce_bucket_size) == (1e-4, 1e-8, 5 * 10**8)
    assert config.monitor.sample_prompts == ("1e-4", "a1e4")
    path.write_text(
        YAML.replace("data: {", "data: &data {") + "adam: {lr: 1}\nckpt: {load_ckpt_info: &a {<<: {path: x}, path: y}}\n"
    )
    info = load_config(path).ckpt.load_ckpt_info
    assert info is not None and info.path == "y"


def test_a_python_config_may_define_functions_import_modules_and_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = []
    for name, lr in (("one", 0.5), ("two", 0.25)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "own_values.py").write_text(f"LR = {lr}\n")
        (folder / "package").mkdir()
        (folder / "package" / "__init__.py").write_text("")
        (folder / "package" / "inner.py").write_text(f"LR = {lr}\n")
        (folder / "c.py").write_text(
            "import os, math\nfrom pathlib import Path\nfrom own_values import LR\nfrom package import inner\nprint('hello')\n"
            "class Own:\n    pass\ndef half(x):\n    return x / 2\n_x = 1\n" + BODY + "adam = dict(lr=half(LR + inner.LR))\n"
        )
        configs.append(load_config(folder / "c.py"))
    assert [config.adam.lr for config in configs] == [0.5, 0.25]
    assert capsys.readouterr() == ("", "hello\nhello\n")
    assert not {"own_values", "package", "package.inner", "internlm"} & set(sys.modules)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"ckpt": {"load_ckpt_folder": "local:x"}}, "ckpt.load_ckpt_info.path", "x"),
        ({"ckpt": {"load_model_only_folder": "x"}}, "ckpt.load_ckpt_info.content", ("model",)),
        ({"ckpt": {"load_ckpt_folder": {"path": "x", "content": ["model"]}}}, "ckpt.load_ckpt_info.content", ("model",)),
        ({"ckpt": {"load_given_ckpt": True}}, "ckpt.auto_resume", False),
        ({"hybrid_zero_optimizer": {"zero_overlap_communication": False}}, "hybrid_zero_optimizer.overlap_sync_grad", False),
        ({"reduce_comm_dtype": "torch.bfloat16"}, "hybrid_zero_optimizer.grad_dtype", "bfloat16"),
        ({"model__adapt_hf": True}, "model.qk_interleaved", False),
        ({"moe": {"top_k": 2, "capacity_factor": 1.5}}, "model.top_k", 2),
        ({"moe": {"top_k": 2, "capacity_factor": 1.5}}, "model.moe_layer_kwargs.capacity_factor", 1.5),
        ({"model__moe_use_residual": True}, "model.num_shared_experts", 1),
        ({"data__hf_dataset_name": "x"}, "data.train_folder", "x"),
        ({"alert_address": "x"}, "monitor.alert.enable_feishu_alert", True),
        ({"parallel": {"fsdp": {"enable": True}}}, "parallel.zero1.fsdp", True),
        ({"parallel": {"expert_weight": 4}}, "parallel.expert_weight.size", 4),
    ],
)
def test_older_keys_are_translated(changes: dict[str, Any], key: str, value: Any) -> None:
    node: Any = validate(tiny(**changes))
    for name in key.split("."):
        node = getattr(node, name)
    assert node == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__adapt_hf": True, "model__qk_interleaved": True}, "model.adapt_hf = True and model.qk_interleaved = True"),
        ({"data__hf_dataset_name": "x", "data__train_folder": "y"}, "leave out data.hf_dataset_name"),
        ({"moe": {"top_k": 2}, "model__top_k": 1}, "leave out moe.top_k"),
        ({"moe": {"drop_tokens": True}, "model__moe_layer_kwargs": {"drop_tokens": False}}, "leave out moe.drop_tokens"),
        ({"moe": 3}, "moe: unknown key"),
        ({"moe": {"top": 3}}, "model.moe_layer_kwargs.top: unknown key"),
        ({"ckpt": {"load_given_ckpt": True, "auto_resume": True}}, "leave out ckpt.load_given_ckpt"),
        ({"reduce_comm_dtype": "a", "hybrid_zero_optimizer": {"grad_dtype": "b"}}, "leave out reduce_comm_dtype"),
        ({"reduce_comm_dtype": "float32", "hybrid_zero_optimizer": 3}, "hybrid_zero_optimizer: must be a section"),
        ({"parallel": {"fsdp": {"enable": True}, "zero1": {"fsdp": False}}}, "contradict each other"),
        ({"parallel": {"fsdp": {"enable": True}, "zero1": "x"}}, "parallel.zero1: must be a section"),
        ({"parallel": 3}, "parallel: must be a section"),
        ({"alert_address": "x", "monitor": 3}, "monitor: must be a section"),
        ({"ckpt": {"load_ckpt_folder": 2024}}, "ckpt.load_ckpt_folder: must be text"),
        ({"data__gradient_accumulation": 3, "data__micro_num": 2}, "leave out data.gradient_accumulation"),
    ],
)
def test_older_keys_are_never_ignored_in_silence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(tiny(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"ckpt": {"load_ckpt_folder": "x", "load_ckpt_info": {"path": "y"}}}, ["ckpt.load_ckpt_folder"]),
        ({"ckpt": {"load_model_only_folder": "x", "load_ckpt_folder": "y"}}, ["ckpt.load_model_only_folder"]),
        ({"ckpt": {"load_optimizer": False, "load_ckpt_info": {"path": "y"}}}, ["ckpt.load_optimizer"]),
        ({"moe": {"parallel_mode": "tensor"}}, ["model.moe_layer_kwargs.parallel_mode"]),
        ({"moe": {"top_k": 2, "capacity_factor": 2}}, ["model.top_k", "model.moe_layer_kwargs.capacity_factor"]),
        ({"model__top_k": 2, "model__num_experts": 4, "loss": {"moe_loss_coeff": 0.5}}, []),
        ({"loss": {"moe_loss_coeff": 0.5}, "model__top_k": 1}, ["loss.moe_loss_coeff"]),
        ({"ckpt": {"keep_every": 5}}, ["ckpt.keep_every"]),
        ({"ckpt": {"keep_every": 5, "keep_last": 1}}, []),
        ({"monitor": {"sample_every": 5}}, ["monitor.sample_every"]),
        ({"model__sliding_window": 8}, ["model.sliding_window"]),
        ({"selective_checkpoint": True}, ["selective_checkpoint"]),
        ({"parallel": {"expert_zero1": {"size": 2}}}, ["parallel.expert_zero1.size"]),
        ({"parallel": {"expert_zero1": {"fsdp": True}}}, ["parallel.expert_zero1.fsdp"]),
        ({"parallel": {"expert_weight": {"size": 1, "overlap": True}}}, ["parallel.expert_weight.overlap"]),
        (
            {"parallel": {"sequence_2D": {"enable": False, "head_size": 2, "context_size": 4}}},
            ["parallel.sequence_2D.head_size", "parallel.sequence_2D.context_size"],
        ),
    ],
)
def test_keys_without_effect_are_noticed(changes: dict[str, Any], keys: list[str]) -> None:
    assert [line.split()[0] for line in notices(validate(tiny(**changes)))] == keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__seq_len": 2**20, "data__micro_bsz": 2**11}, "data.seq_len * data.micro_bsz"),
        ({"grad_scaler": {"fp16": {"initial_scale": 2, "min_scale": 4}}}, "grad_scaler.fp16.min_scale = 4.0 is greater"),
        ({"model__mlp_only_layers": [2]}, "model.mlp_only_layers: there is no layer 2"),
        ({"data__skip_batches": "²"}, "data.skip_batches"),
        ({"data__skip_batches": "9" * 5000}, "data.skip_batches"),
        ({"data__rampup_batch_size": "² 1 1"}, "data.rampup_batch_size"),
        ({"data__rampup_batch_size": f"{'9' * 5000} 1 1"}, "data.rampup_batch_size"),
        ({"lr_scheduler": {"warmup_ratio": 1, "init_steps": 1}}, "lr_scheduler.init_steps = 1 and the warm-up"),
    ],
)
def test_more_contradictions(changes: dict[str, Any], message: str) -> None:
    assert any(line.startswith(message) for line in problems(validate(tiny(**changes)), 1))


def test_modules_next_to_a_config_replace_none_of_pythons_own(tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("raise ValueError('not this one')\n")
    (tmp_path / "a.py").write_text("import colorsys\n" + BODY)
    assert load_config(tmp_path / "a.py").JOB_NAME == "tiny"
