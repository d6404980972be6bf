"""Configs: InternEvo's files work unchanged, mistakes are named, and nothing is ignored without a notice."""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from internevo.commands.config import layout_lines, show
from internevo.config import Config, dump, notices, validate
from internevo.config.axes import smallest_world
from internevo.config.option import walk
from internevo.errors import ConfigError, NotAvailableYet
from internevo.models.families.registry import decoder_config
from internevo.train.check import check, missing_features, problems
from internevo.train.config import load_config
from tests import conftest
from tests.conftest import ROOT, TINY, run

INTERNEVO = """
JOB_NAME = "7b_train"
model_type = "INTERNLM2_PUBLIC"
DO_ALERT = False

VOCAB_SIZE = 92544
SEQ_LEN = 2048
HIDDEN_SIZE = 4096
MLP_RATIO = 3.5
MODEL_ONLY_FOLDER = "local:llm_ckpts/xxxx"
SAVE_CKPT_FOLDER = "local:llm_ckpts"
CHECKPOINT_EVERY = 50

ckpt = dict(
    enable_save_ckpt=False,
    enable_internevo2hf_ckpt=False,
    save_ckpt_folder=SAVE_CKPT_FOLDER,
    load_ckpt_info=dict(path=None, content=("model",), ckpt_type="internevo"),
    auto_resume=True,
    checkpoint_every=CHECKPOINT_EVERY,
    async_upload=True,
    async_upload_tmp_folder="/dev/shm/internlm_tmp_ckpt/",
    oss_snapshot_freq=int(CHECKPOINT_EVERY / 2),
)
TRAIN_FOLDER = None
VALID_FOLDER = None
data = dict(
    seq_len=SEQ_LEN, micro_num=4, micro_bsz=2, valid_micro_num=4, valid_every=0, pack_sample_into_one=False,
    total_steps=20, skip_batches="", rampup_batch_size="", min_length=50, train_folder=TRAIN_FOLDER,
    valid_folder=VALID_FOLDER, empty_cache_and_diag_interval=200, diag_outlier_ratio=1.1,
)
grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2, backoff_factor=0.5, max_scale=2**24, hysteresis=2,
)
hybrid_zero_optimizer = dict(
    overlap_sync_grad=True, overlap_sync_param=False, reduce_bucket_size=512 * 1024 * 1024, clip_grad_norm=1.0,
)
loss = dict(label_smoothing=0)
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=data["total_steps"], init_steps=0, warmup_ratio=0.01, eta_min=1e-5, last_epoch=-1)
beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)
use_fp32_norm = False
model = dict(
    checkpoint=False, num_chunks=1, num_attention_heads=32, embed_split_hidden=True, vocab_size=VOCAB_SIZE,
    embed_grad_scale=1, parallel_output=True, hidden_size=HIDDEN_SIZE, num_layers=32, no_bias=True, mlp_ratio=MLP_RATIO,
    apply_post_layer_norm=False, dtype="torch.bfloat16", norm_type="rmsnorm", layer_norm_epsilon=1e-5,
    num_kv_attention_heads=8, use_flash_attn=True, qk_interleaved=False,
)
parallel = dict(
    zero1=dict(size=-1), tensor=dict(size=1, mode="mtp"), pipeline=dict(size=1, interleaved_overlap=True),
    weight=dict(size=1, overlap=True, launch_allgather_before="wo", forward_overlap_per="layer"),
)
cudnn_deterministic = False
cudnn_benchmark = False
monitor = dict(
    alert=dict(enable_feishu_alert=DO_ALERT, feishu_alert_address=None, light_monitor_address=None,
               alert_file_path=f"llm_alter/{JOB_NAME}_alert.log"),
    tensorboard=dict(queue_max_length=10),
)
generation = dict(ckpt_folder="/path/to/saved/ckpt", output_folder="/path/to/save/generation", batch_size=1, eos_id=[2, 0],
                  bos_id=1, max_length=100, do_sample=True, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1,
                  length_penalty=1.0)
"""


def tiny(**changes: Any) -> Config:
    return validate(conftest.tiny(**changes))


def test_an_internevo_file_works_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "7B_sft.py"
    path.write_text(INTERNEVO)
    config = load_config(path)
    check(config, 8)
    assert decoder_config(config.model_type, config.model).parameters() == 7_737_708_544
    assert config.ckpt.save_ckpt_folder == "llm_ckpts"
    assert config.lr_scheduler.total_steps == 20
    silent = {"ckpt.async_upload", "model.use_flash_attn", "parallel.weight.layer_fuse_isp_comm"}
    said = {line.split()[0] for line in notices(config)}
    assert "ckpt.async_upload" in said and "model.use_flash_attn" in said
    assert "parallel.weight.layer_fuse_isp_comm" in silent - said  # the file does not set it, so there is no notice
    (tmp_path / "config.json").write_text(dump(config))  # the resolved config of a run, in which every key is set
    resolved = {line.split()[0] for line in notices(load_config(tmp_path / "config.json"))}
    assert "ckpt.async_upload" in resolved and not silent - said & resolved


@pytest.mark.parametrize("changes", [{"eta_min": 1.0}, {"total_steps": 3}])
def test_what_a_constant_schedule_does_not_use_is_not_checked(changes: dict[str, Any]) -> None:
    for kind in ("constant", "cosine"):
        found = problems(tiny(lr_scheduler={"kind": kind, **changes}), 1)
        assert bool(found) == (kind == "cosine"), found


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("key", ["decay_steps", "decay_ratio", "decay_type"])
def test_a_decay_that_the_schedule_does_not_have_is_named(kind: str, key: str) -> None:
    value = {"decay_steps": 2, "decay_ratio": 0.2, "decay_type": "1-sqrt"}[key]
    line = f"lr_scheduler.{key} has no effect without lr_scheduler.kind='wsd'"
    assert notices(tiny(lr_scheduler={"kind": kind, key: value})) == ([line] if kind != "wsd" else [])


def test_read_base_works_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "configs" / "_base_"
    base.mkdir(parents=True)
    (base / "shape.py").write_text("model_type = 'LLAMA2'\nmodel = " + repr(TINY["model"]) + "\n")
    (tmp_path / "configs" / "demo.py").write_text(
        "from internlm.utils.utils import read_base\nwith read_base():\n    from configs._base_.shape import *\n"
        f"data = {TINY['data']!r}\nadam = dict(lr=1)\n"
    )
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "configs" / "demo.py").model.hidden_size == 32


def test_a_config_takes_its_own_modules_but_replaces_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    for name in ("colorsys", "numpy"):  # one of Python's own, and an installed one
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a module of the user')\n")
    (tmp_path / "users_shape.py").write_text("model = " + repr(TINY["model"]) + "\n")
    (tmp_path / "c.py").write_text(
        f"import colorsys, numpy\nfrom users_shape import *\ndata = {TINY['data']!r}\nadam = dict(lr=1)\n"
    )
    assert load_config(tmp_path / "c.py").model.hidden_size == 32


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ({"data__micro_nun": 2}, "data.micro_num"),
        ({"model__num_layer": 2}, "model.num_layers"),
        ({"parallel__tensor__sise": 2}, "parallel.tensor.size"),
        ({"modle": {}}, "model"),
        ({"seq_len": 3}, "data.seq_len"),
        ({"beta2_scheduler": {"init_beta": 0.9}}, "beta2_scheduler.init_beta2"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_what_was_meant(change: dict[str, Any], meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key; did you mean {meant}"):
        tiny(**change)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(data__micro_nun=2, adam__lr=-1, model__dtype="torch.int3")
    assert all(key in str(caught.value) for key in ("data.micro_nun", "adam.lr", "model.dtype", "3 problems"))


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (3, {"parallel__tensor": 2}, "3 processes cannot be divided into groups"),
        (1, {"model__num_attention_heads": 5}, "not a multiple of model.num_attention_heads"),
        (1, {"model__num_kv_attention_heads": 3}, "not a multiple of model.num_kv_attention_heads"),
        (
            2,
            {"parallel__tensor": {"size": 2, "mode": "msp"}, "data__seq_len": 31},
            "data.seq_len = 31 is not divisible",
        ),
        (4, {"parallel__zero1": 3}, "does not divide 4, the number of ranks that hold the same part"),
        (5, {}, "data.global_batch_size = 12 is not a multiple of data.micro_bsz * data ranks = 1 * 5; use a multiple of 5"),
        (4, {"data__micro_bsz": 6}, "= 6 * 4; use data.micro_bsz=3, or a multiple of 24"),
        (2, {"parallel__weight__size": 2}, "needs parallel.tensor.mode = 'isp'"),
        (
            4,
            {
                "parallel__tensor": {"size": 2, "mode": "isp"},
                "parallel__weight__size": 4,
                "model__num_kv_attention_heads": 1,
                "model__head_dim": 10,
                "model__vocab_size": 100,
            },
            "the width of all key/value heads (model.num_kv_attention_heads * size of a head) = 10 is not divisible",
        ),
        (2, {"model__num_chunks": 2}, "model.num_chunks = 2 needs parallel.pipeline.size > 1"),
        (2, {"parallel__pipeline": {"size": 2, "mode": "zbv"}}, "mode = 'ZBV' needs model.num_chunks = 2, not 1"),
        (2, {"parallel__pipeline": {"size": 2, "mode": "ZBH1"}, "model__num_chunks": 2}, "'ZBH1' needs model.num_chunks = 1"),
        (
            4,
            {"parallel__pipeline": {"size": 2, "mode": "ZBH1"}, "parallel__zero1": {"size": -1, "fsdp": True}},
            "'ZBH1' does not work with parallel.zero1.fsdp = True",
        ),
        (2, {"parallel__pipeline": {"size": 2, "layers": [1, 2]}}, "must be 2 numbers"),
        (2, {"parallel__pipeline__layers": [1, 1]}, "layers = [1, 1] needs parallel.pipeline.size > 1"),
        (2, {"parallel__pipeline": {"size": 2, "layers": [2, 0]}}, "each at least 1"),
        (4, {"parallel__pipeline": 4}, "each stage needs at least one layer"),
        (
            4,
            {"model_type": "MIXTRALMOE", "model__num_experts": 6, "parallel__expert": {"size": 4}},
            "must divide model.num_experts = 6 and the number of ranks that can have different experts, 4; use a divisor of 2",
        ),
        (
            4,
            {"model_type": "MIXTRALMOE", "model__num_experts": 4, "parallel__expert": 2, "parallel__expert_zero1": {"size": 4}},
            "parallel.expert_zero1.size = 4 does not divide 2, the number of ranks that have the same experts",
        ),
        (
            1,
            {"model_type": "LLAMA2", "model__use_alibi": True},
            "model.use_alibi = True is not supported by model_type = 'LLAMA2'",
        ),
        (1, {"model_type": "GEMMA", "model__use_swiglu": True}, "is not supported by model_type = 'GEMMA'"),
        (1, {"model_type": "LLAMA2", "model__num_experts": 4}, "model.num_experts = 4 is not supported by"),
        (
            1,
            {"model__moe_layer_kwargs": {"bias_update_speed": 0.1}},
            "model.moe_layer_kwargs = {'bias_update_speed': 0.1} is not supported by",
        ),
        (
            1,
            {"model_type": "QWEN3MOE", "model__num_shared_experts": 1, "model__num_experts": 4},
            "num_shared_experts = 1 is not",
        ),
        (1, {"model_type": "LAMA2"}, "did you mean LLAMA2"),
        (1, {"data__skip_batches": "5,3"}, "ascending"),
        (1, {"data__rampup_batch_size": "4 4"}, "three positive integers"),
        (4, {"data__rampup_batch_size": "4 2 9"}, "are rows of the global batch, and must be multiples of"),
        (1, {"lr_scheduler__total_steps": 3}, "ends before data.total_steps"),
        (
            1,
            {"lr_scheduler__warmup_steps": 21},
            "the warm-up (lr_scheduler.warmup_steps = 21) together are longer than 20 steps",
        ),
        (
            1,
            {"lr_scheduler": {"kind": "wsd", "decay_steps": 9}},
            "the decay (lr_scheduler.decay_steps = 9) together are longer",
        ),
        (
            1,
            {"lr_scheduler": {"kind": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.7}},
            "lr_scheduler.init_steps = 0, the warm-up (lr_scheduler.warmup_ratio = 0.5) and the decay "
            "(lr_scheduler.decay_ratio = 0.7) together are longer than 8 steps",
        ),
        (1, {"model__rope_scaling": {"rope_type": "magic"}}, "its rope_type must be one of default, linear"),
        (1, {"monitor__sample_prompts": ["a"]}, "needs data.tokenizer_path"),
    ],
)
def test_contradictions_are_found_before_anything_starts(world: int, changes: dict[str, Any], message: str) -> None:
    assert any(message in line for line in problems(tiny(**changes), world)), problems(tiny(**changes), world)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model__num_layers", "x", "must be a whole number"),
        ("model__num_layers", 2.5, "must be a whole number"),
        ("adam__lr", "high", "must be a number"),
        ("parallel__pipeline__layers", [True, True], "must have no True or False in it"),
        ("model__mlp_only_layers", [0, True], "must have no True or False in it"),
        ("enable_tb", "maybe", "must be True or False"),
        ("data__template_date", "2024-7-1", 'must be a date, as in "2024-07-26"'),
    ],
)
def test_a_value_of_another_type_is_described_in_plain_words(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{key.replace('__', '.')}: {message} (got {value!r})")):
        tiny(**{key: value})


def test_processes_that_do_not_fit_are_named_once() -> None:
    changes: dict[str, Any] = {"parallel__pipeline": 2, "data__global_batch_size": None}
    assert len(problems(tiny(**changes), 3)) == 1
    changes |= {"parallel__tensor": {"size": 2, "mode": "isp"}, "parallel__weight__size": 2}
    assert sum("use a multiple of 4 processes" in line for line in problems(tiny(**changes), 6)) == 2


@pytest.mark.parametrize(
    ("changes", "smallest"),
    [
        ({"parallel__tensor": 2}, 2),
        ({"parallel__tensor": {"size": 2, "mode": "isp"}, "parallel__weight__size": 4, "parallel__zero1": 4}, 16),
        ({"parallel__tensor": {"size": 4, "mode": "isp"}, "parallel__weight__size": 2, "parallel__zero1": 3}, 12),
        ({"parallel__tensor": 2, "parallel__zero1": 4}, 8),
        ({"parallel__tensor": 2, "parallel__pipeline": 2}, 4),
    ],
)
def test_without_a_world_size_a_config_is_checked_on_the_smallest_that_fits(changes: dict[str, Any], smallest: int) -> None:
    config = tiny(
        **changes, model__vocab_size=96, model__num_layers=4, data__global_batch_size=48, model__num_kv_attention_heads=4
    )
    assert smallest_world(config) == smallest and not problems(config, smallest)
    assert all(problems(config, world) for world in range(1, smallest))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "INTERNLM_MoE"},
        {"model_type": "MIXTRALMOE", "model__num_experts": 4, "model__moe_layer_kwargs": {"noisy_gate_policy": "Jitter"}},
        {"model__norm_type": "layernorm"},
        {"fp8": {"margin": 0}},
    ],
)
def test_a_feature_that_is_not_available_yet_validates_but_does_not_train(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    assert missing_features(config)
    with pytest.raises(NotAvailableYet, match="not available yet"):
        check(config, 4)


def test_missing_folders_are_named() -> None:
    with pytest.raises(ConfigError, match="data.train_folder = '/no/such' does not exist"):
        check(tiny(data__train_folder="/no/such"), 1)


def test_yaml_toml_json_and_python_give_the_same_config(tmp_path: Path) -> None:
    import yaml

    body: dict[str, Any] = {"model_type": "LLAMA2", "model": TINY["model"], "data": TINY["data"], "adam": {"lr": 0.5}}
    toml = "model_type = 'LLAMA2'\n" + "".join(
        f"[{name}]\n" + "".join(f"{k} = {v!r}\n" for k, v in body[name].items()) for name in ("model", "data", "adam")
    )
    texts = {
        "a.yaml": yaml.safe_dump(body), "a.json": json.dumps(body), "a.toml": toml,
        "a.py": "".join(f"{k} = {v!r}\n" for k, v in body.items()),
    }  # fmt: skip
    found = []
    for name, text in texts.items():
        for mark in ("", "\ufeff"):  # some editors put a byte order mark in front
            (tmp_path / name).write_text(mark + text, encoding="utf-8")
            found.append(
                load_config(tmp_path / name, ["data.seq_len=4096", "parallel.tensor.size=2", "ckpt.enable_save_ckpt=false"])
            )
    assert all(config == found[0] for config in found)
    assert found[0].data.seq_len == 4096 and found[0].parallel.tensor.size == 2


def test_every_field_has_a_description() -> None:
    for key, field, _, _ in walk(tiny()):
        assert field.description and field.description.endswith((".", ":", '".')), key


def test_the_demo_is_small() -> None:
    config = load_config(ROOT / "configs" / "demo.py")
    assert not problems(config, 2) and not missing_features(config)
    assert 5e6 <= decoder_config(config.model_type, config.model).parameters() <= 15e6


def test_config_command(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        textwrap.dedent("""
        model_type: LLAMA2
        model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, vocab_size: 97}
        data: {seq_len: 32, micro_bsz: 1, total_steps: 8, train_folder: /no/such}
        adam: {lr: 0.1}
    """)
    )
    done = run("config", path, "data.micro_num=3")
    assert json.loads(done.stdout)["data"]["micro_num"] == 3
    assert "/no/such" in done.stderr
    done = run("config", path, "--world-size", 4, "parallel.zero1.size=2")
    assert "zero" in done.stdout and "4  rows of 32 tokens" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["all-gather", "zero", "2", "4"] in [row[:4] for row in rows] and "MiB on rank 0" in done.stdout
    assert "did you mean data.seq_len" in run("config", path, "data.seqlen=3", code=2).stderr
    assert "does not exist" in run("train", path, code=2).stderr


@pytest.mark.parametrize("tied", [True, False])
def test_the_layout_of_experts_in_a_long_pipeline_is_printed(tied: bool) -> None:
    config = tiny(
        model_type="MIXTRALMOE", model__num_experts=4, model__num_layers=4, model__tie_word_embeddings=tied,
        parallel__pipeline=4, parallel__tensor={"size": 2, "mode": "isp"}, parallel__expert_weight={"size": 2},
        data__global_batch_size=16,
    )  # fmt: skip
    assert not problems(config, 16)
    text = layout_lines(config, 16, 8)
    lines = [line.split() for line in text]
    assert ["expert", "2"] in [line[:2] for line in lines] and ["expert", "weight", "2"] in [line[:3] for line in lines]
    assert any(line[:2] == ["4", "0"] and line[-1] == "-" for line in lines) == tied, "a rank in the middle has neither end"
    assert any("first and last" in line for line in text) == tied, "the group exists for tied embeddings only"
    assert len({line.index(" groups  ") for line in text if " groups  " in line}) == 1, "the columns are aligned"
    assert any("(8 micro-batches of 1 on each of 2 data ranks)" in line for line in text)
    assert any(line.split()[:1] == ["MiB"] for line in text), "a small model is not 0.00 GiB"


@pytest.mark.parametrize(("ramp", "micro_batches"), [("", 8), ("2 2 3", 4), ("2 2 1", 8)])
def test_the_layout_of_a_pipeline_is_that_of_the_last_step(ramp: str, micro_batches: int) -> None:
    """Its rows, the bubble, the messages, and the memory of each rank."""
    pipeline = {"size": 2, "mode": "ZBV"}
    config = tiny(
        parallel__pipeline=pipeline, model__num_chunks=2, model__num_layers=4, data__rampup_batch_size=ramp,
        data__total_steps=6, data__micro_num=8, data__global_batch_size=None,
    )  # fmt: skip
    lines = layout_lines(config, 4, 8)
    assert any(f"({micro_batches} micro-batches of" in line for line in lines)
    assert any(line.startswith("  bubble") and f"with {micro_batches} micro-batches," in line for line in lines)
    assert any(line.split()[:4] == ["send", "pipeline", "2", str(2 * micro_batches)] for line in lines)
    first = next(n for n, line in enumerate(lines) if line.split()[:2] == ["MiB", "rank"])
    rows = [line.split() for line in lines[first + 1 : first + 3]]
    assert [row[0] for row in rows] == ["0", "1"] and all("pass of micro-batch" in " ".join(row) for row in rows)


def test_targets_of_adapters_have_several_names_and_are_checked() -> None:
    config = tiny(model__lora={"rank": 2, "targets": ["w1", "wqkv", "o_proj"]})
    assert config.model.lora is not None
    assert config.model.lora.targets == ("q", "k", "v", "o", "gate") and not problems(config, 1)
    with pytest.raises(ConfigError, match="must be some of q, k, v, o, gate, up, down, not 'w9'"):
        tiny(model__lora={"targets": ["w9"]})
    with pytest.raises(ConfigError, match=r"data\.mixture\.0\.wieght: unknown key; did you mean data\.mixture\.0\.weight\?"):
        tiny(data__mixture=[{"folder": "a", "wieght": 1}])
    experts = tiny(model_type="MIXTRALMOE", model__num_experts=4, model__lora={"targets": ["q", "up"]})
    assert any("experts cannot have adapters" in line for line in problems(experts, 1))


def test_people_see_what_differs_from_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal; scripts get all of it, as people do with --all. The differences, as overrides, make the same config."""
    (tmp_path / "c.json").write_text(json.dumps(conftest.tiny(data__train_folder=None)))
    show(tmp_path / "c.json", ["ckpt.keep_last=3"], 4)
    layout, whole = capsys.readouterr().out.split("\n\n")
    assert layout.startswith("layout on 4 processes") and json.loads(whole)["data"]["seq_len"] == 32
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(tmp_path / "c.json", ["ckpt.keep_last=3"], None, everything=True)
    assert capsys.readouterr().out == whole
    show(tmp_path / "c.json", ["ckpt.keep_last=3"], 4)
    title, rates, rest = capsys.readouterr().out.split("\n", 2)
    assert title == "tiny: LLAMA2, 21,728 parameters; 2 layers of 32, float32" and rest.startswith(layout)
    assert rates == "  learning rate: 0.01, then cosine to 0 at step 20"
    lines = [line.strip() for line in rest.split("(--all prints everything):\n")[1].splitlines()]
    assert "ckpt.keep_last = 3" in lines and "data.seq_len = 32" in lines and not any("keep_every" in line for line in lines)
    (tmp_path / "empty.json").write_text("{}")
    assert dump(load_config(tmp_path / "empty.json", [line.replace(" = ", "=", 1) for line in lines])) == whole
