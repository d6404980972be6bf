"""Translates InternEvo's older config keys into the schema's keys. No other file knows the older keys."""

from __future__ import annotations

import copy
from typing import Any

from ..errors import ConfigError

MODEL_TYPES = {"INTERNLM2_PUBLIC": "INTERNLM2", "LLAMA": "LLAMA2", "MIXTRAL": "MIXTRALMOE"}


def translate(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of ``raw`` in which all older keys are replaced by the schema's."""
    config = copy.deepcopy(_plain(raw))
    if isinstance(config.get("model_type"), str):
        config["model_type"] = MODEL_TYPES.get(config["model_type"], config["model_type"])
    for rule in (_sizes, _fsdp, _optimizer, _rotary, _old_moe, _old_loading, _old_data, _alerts):
        rule(config)
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _sizes(config: dict[str, Any]) -> None:
    """``parallel.tensor = 4`` is short for ``parallel.tensor = dict(size=4)``."""
    parallel = _section(config, "parallel")
    for axis in ("zero1", "tensor", "pipeline", "weight", "expert", "expert_weight", "expert_zero1"):
        if isinstance(parallel.get(axis), int) and not isinstance(parallel[axis], bool):
            parallel[axis] = {"size": parallel[axis]}


def _fsdp(config: dict[str, Any]) -> None:
    parallel = _section(config, "parallel")
    if _section(parallel, "fsdp").get("enable"):
        zero1 = parallel.setdefault("zero1", {})
        zero1["fsdp"] = True


def _optimizer(config: dict[str, Any]) -> None:
    zero = _section(config, "hybrid_zero_optimizer")
    if "zero_overlap_communication" in zero:
        zero.setdefault("overlap_sync_grad", zero.pop("zero_overlap_communication"))
    dtype = config.pop("reduce_comm_dtype", None)
    if dtype is not None:
        config.setdefault("hybrid_zero_optimizer", {}).setdefault("grad_dtype", dtype)


def _rotary(config: dict[str, Any]) -> None:
    model = _section(config, "model")
    if "adapt_hf" in model:
        model.setdefault("qk_interleaved", not model.pop("adapt_hf"))


def _old_moe(config: dict[str, Any]) -> None:
    """The top-level section ``moe``, which InternEvo had until mid-2024."""
    old = config.pop("moe", None)
    if isinstance(old, dict):
        model = config.setdefault("model", {})
        old.pop("parallel_mode", None)
        if "top_k" in old:
            model.setdefault("top_k", old.pop("top_k"))
        model.setdefault("moe_layer_kwargs", old)
    model = _section(config, "model")
    if model.pop("moe_use_residual", False):
        model.setdefault("num_shared_experts", 1)


def _old_loading(config: dict[str, Any]) -> None:
    ckpt = _section(config, "ckpt")
    folder = ckpt.pop("load_ckpt_folder", None)
    model_only = ckpt.pop("load_model_only_folder", None)
    with_optimizer = ckpt.pop("load_optimizer", True)
    if "load_given_ckpt" in ckpt:
        ckpt.setdefault("auto_resume", not ckpt.pop("load_given_ckpt"))
    info = ckpt.get("load_ckpt_info")
    if info is None and isinstance(folder, dict):
        info = folder
    elif info is None and isinstance(folder, str):
        everything = ("model", "optimizer", "scheduler", "sampler") if with_optimizer else ("model",)
        info = {"path": folder, "content": everything, "ckpt_type": "internevo"}
    elif info is None and isinstance(model_only, str):
        info = {"path": model_only, "content": ("model",), "ckpt_type": "internevo"}
    if isinstance(info, dict) and isinstance(info.get("path"), str):
        info["path"] = info["path"].removeprefix("local:")
    if ckpt and info is not None:
        ckpt["load_ckpt_info"] = info


def _old_data(config: dict[str, Any]) -> None:
    data = _section(config, "data")
    for old, new in (("hf_dataset_name", "train_folder"), ("hf_tokenizer_name", "tokenizer_path")):
        if old in data:
            data.setdefault(new, data.pop(old))
    accumulation = data.get("gradient_accumulation")
    if accumulation is not None and "micro_num" in data and accumulation != data["micro_num"]:
        raise ConfigError(
            f"data.gradient_accumulation = {accumulation} differs from data.micro_num = {data['micro_num']}; "
            "they are two names for the same number: leave out data.gradient_accumulation"
        )
    if accumulation is not None:
        data.setdefault("micro_num", accumulation)


def _alerts(config: dict[str, Any]) -> None:
    address = config.pop("alert_address", None)
    if address is not None:
        alert = config.setdefault("monitor", {}).setdefault("alert", {})
        alert.setdefault("feishu_alert_address", address)
        alert.setdefault("enable_feishu_alert", True)
