"""Translates InternEvo's older config keys into the schema's keys. No other file knows the older keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ConfigError

MODEL_TYPES = {
    "INTERNLM2_PUBLIC": "INTERNLM2", "INTERNLM2_5": "INTERNLM2", "LLAMA": "LLAMA2", "LLAMA3": "LLAMA2", "QWEN2_5": "QWEN2",
    "MIXTRAL": "MIXTRALMOE",
}  # fmt: skip
DEPTH = 20
"""How many dicts and lists may be inside each other."""


def translate(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of ``raw`` in which all older keys are replaced by the schema's.

    Raises:
        ConfigError: if an older and a newer key have different values, or a value contains itself.
    """
    config: dict[str, Any] = _copy(raw)
    if isinstance(config.get("model_type"), str):
        config["model_type"] = MODEL_TYPES.get(config["model_type"], config["model_type"])
    for rule in (_sizes, _fsdp, _renamed, _old_moe, _old_loading, _accumulation, _alerts):
        rule(config)
    return config


def _copy(value: Any, path: tuple[str, ...] = ()) -> Any:
    """Copies dicts and lists, with texts as keys. Texts must be Unicode: the resolved config is written to a file."""
    if len(path) > DEPTH:
        raise ConfigError(f"config key {'.'.join(path[:3])}...: it contains itself, or is nested too deeply")
    if isinstance(value, dict):
        return {str(key): _copy(item, (*path, str(key))) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(item, (*path, str(number))) for number, item in enumerate(value))
    if isinstance(value, str) and not value.isascii() and value != value.encode(errors="replace").decode():
        raise ConfigError(f"{'.'.join(path)} = {value!r} is not Unicode text")
    return value


def _section(config: dict[str, Any], *path: str) -> dict[str, Any]:
    """Returns a section, which is added if it is missing. (If something else has its place, it is reported by the schema.)"""
    for name in path:
        if config.get(name) is None:
            config[name] = {}
        config = config[name] if isinstance(config[name], dict) else {}
    return config


def _rename(config: dict[str, Any], old: str, new: str, change: Callable[[Any], Any] = lambda value: value) -> None:
    """Moves the value of one key to another.

    Args:
        old, new: dotted keys.
        change: function value of the old key -> value of the new one.
    """
    *path, last = old.split(".")
    node: Any = config
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        return
    given = node.pop(last)
    *path, last = new.split(".")
    section, wanted = _section(config, *path), change(given)
    kept = section.setdefault(last, wanted)
    if kept is not wanted and kept != wanted:
        raise ConfigError(f"{old} = {given!r} and {new} = {kept!r} are two names for one option, but differ: leave out {old}")


def _sizes(config: dict[str, Any]) -> None:
    """``parallel.tensor = 4`` is short for ``parallel.tensor = dict(size=4)``."""
    parallel = config.get("parallel")
    for axis in ("zero1", "tensor", "pipeline", "weight", "expert", "expert_weight", "expert_zero1"):
        if isinstance(parallel, dict) and isinstance(parallel.get(axis), int) and not isinstance(parallel[axis], bool):
            parallel[axis] = {"size": parallel[axis]}


def _fsdp(config: dict[str, Any]) -> None:
    parallel = config.get("parallel")
    newer = parallel.get("fsdp") if isinstance(parallel, dict) else None
    if isinstance(newer, dict) and newer.get("enable"):
        zero1 = _section(config, "parallel", "zero1")
        if zero1.setdefault("fsdp", True) is False:
            raise ConfigError(
                "parallel.fsdp.enable = True and parallel.zero1.fsdp = False contradict each other: leave one out"
            )


def _renamed(config: dict[str, Any]) -> None:
    def opposite(value: Any) -> Any:
        return not value if isinstance(value, bool) else value

    _rename(config, "hybrid_zero_optimizer.zero_overlap_communication", "hybrid_zero_optimizer.overlap_sync_grad")
    if config.get("reduce_comm_dtype", "") is None:
        del config["reduce_comm_dtype"]
    _rename(config, "reduce_comm_dtype", "hybrid_zero_optimizer.grad_dtype")
    _rename(config, "model.adapt_hf", "model.qk_interleaved", opposite)
    _rename(config, "ckpt.load_given_ckpt", "ckpt.auto_resume", opposite)
    _rename(config, "data.hf_dataset_name", "data.train_folder")
    _rename(config, "data.hf_tokenizer_name", "data.tokenizer_path")


def _old_moe(config: dict[str, Any]) -> None:
    """The top-level section ``moe``, which InternEvo had until mid-2024."""
    old = config.get("moe")
    if isinstance(old, dict):
        for key in list(old):
            _rename(config, f"moe.{key}", "model.top_k" if key == "top_k" else f"model.moe_layer_kwargs.{key}")
    if old is None or old == {}:
        config.pop("moe", None)
    model = config.get("model")
    if isinstance(model, dict) and model.pop("moe_use_residual", False):
        model.setdefault("num_shared_experts", 1)


def _old_loading(config: dict[str, Any]) -> None:
    """Older keys that are not needed stay in ``ckpt``, where the schema has a notice for each."""
    ckpt = config.get("ckpt")
    if not isinstance(ckpt, dict):
        return
    for key in ("load_ckpt_folder", "load_model_only_folder"):
        if key in ckpt and ckpt[key] is None:
            del ckpt[key]
    if ckpt.get("load_ckpt_info") is None and isinstance(ckpt.get("load_ckpt_folder"), str | dict):
        folder = ckpt.pop("load_ckpt_folder")
        everything = ("model", "optimizer", "scheduler", "sampler") if ckpt.pop("load_optimizer", True) else ("model",)
        as_info = {"path": folder, "content": everything, "ckpt_type": "internevo"}
        ckpt["load_ckpt_info"] = folder if isinstance(folder, dict) else as_info
    elif ckpt.get("load_ckpt_info") is None and isinstance(ckpt.get("load_model_only_folder"), str):
        folder = ckpt.pop("load_model_only_folder")
        ckpt["load_ckpt_info"] = {"path": folder, "content": ("model",), "ckpt_type": "internevo"}
    info = ckpt.get("load_ckpt_info")
    if isinstance(info, dict) and isinstance(info.get("path"), str):
        info["path"] = info["path"].removeprefix("local:")


def _accumulation(config: dict[str, Any]) -> None:
    data = config.get("data")
    if isinstance(data, dict) and data.get("gradient_accumulation") is not None:
        number = data["gradient_accumulation"]
        _rename(config, "data.gradient_accumulation", "data.micro_num")
        data["gradient_accumulation"] = number


def _alerts(config: dict[str, Any]) -> None:
    if config.get("alert_address") is not None:
        _rename(config, "alert_address", "monitor.alert.feishu_alert_address")
        _section(config, "monitor", "alert").setdefault("enable_feishu_alert", True)
    config.pop("alert_address", None)
