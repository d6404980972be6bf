"""Reads the config of a run: the config file, and what the Hugging Face model has that ``model.from_hf`` names.

``model.from_hf`` only fills in keys that are not set: ``model_type``, the shape, ``model.dtype``, ``data.tokenizer_path``, and
``ckpt.load_ckpt_info``, which makes a new run start from the model's weights. So the resolved config says all that a run does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.load import read_values, validate
from ..config.model import Model
from ..config.option import DTYPES
from ..config.rope import SHARE
from ..config.run import MAY_DIFFER, LoadCkptInfo
from ..config.schema import Config
from ..errors import ConfigError, UsageError
from ..models.config import DecoderConfig
from ..models.families.hf_values import read_config
from ..models.families.registry import decoder_config, decoder_from_hf, family
from ..models.huggingface.tokenizer import has_tokenizer
from ..storage.hub import model_folder
from .compare import compare_models, differences

OTHER_NAMES = {
    "intermediate_size": ("mlp_ratio", "multiple_of"),
    "qkv_bias": ("no_bias",),
    "o_bias": ("no_bias",),
    "rope_scaling": ("use_dynamic_ntk_rope", "rope_type", "rope_scaling_factor"),
    "layer_windows": ("use_sliding_window", "sliding_window", "max_window_layers"),
    "sliding_window": ("use_sliding_window", "layer_windows", "max_window_layers"),
    "shared_expert_intermediate_size": ("num_shared_experts",),
    "mlp_only_layers": ("decoder_sparse_step",),
}
"""Key of ``model`` -> other keys that say the same. If one of these is set, the key is not filled in."""


def load_config(
    path: str | Path | dict[str, Any], overrides: list[str] | tuple[str, ...] = (), to_train: bool = False
) -> Config:
    """Reads a config file (.py, .yaml, .yml, .toml or .json), applies ``key.path=value`` overrides, fills in what
    ``model.from_hf`` has, and validates the result.

    Args:
        to_train: also download the tokenizer, if the run needs it and ``data.tokenizer_path`` is a name on the hub.

    Raises:
        ConfigError: if the config has mistakes; one line for each. Also if a key contradicts the weights of ``model.from_hf``.
        UsageError: if ``model.from_hf`` is not a model that can be read.
    """
    values = read_values(path, overrides)
    model, found = values.get("model"), None
    if isinstance(model, dict) and isinstance(model.get("from_hf"), str):
        found = HfModel.find(values)
        values = found.fill(values)
    config = validate(values, source="the config" if isinstance(path, dict) else str(path))
    if found is not None:
        found.check(config)
    tokenizer = config.data.tokenizer_path
    if to_train and tokenizer and (config.data.streams or config.monitor.needs_tokenizer):
        data = config.data.model_copy(update={"tokenizer_path": str(model_folder(tokenizer, weights=False))})
        config = config.model_copy(update={"data": data})
    return config


@dataclass(frozen=True)
class HfModel:
    """What ``model.from_hf`` names."""

    name: str
    """The value of the key."""
    folder: Path
    decoder: DecoderConfig
    """The shape of the model."""
    dtype: str | None
    """The dtype in which it was trained, if the folder says so."""
    starts: bool
    """Whether a new run starts from its weights."""
    given: frozenset[str]
    """The keys of ``model`` that the config sets, and ``model_type`` if it does."""

    @classmethod
    def find(cls, values: dict[str, Any]) -> HfModel:
        """Reads the model that the values of a config name, downloading it if it is on the hub (but not yet its weights).

        Raises:
            UsageError: if it is not a model that can be read. The message names the folder or file and what is wrong.
        """
        model, ckpt = values["model"], values.get("ckpt")
        info = ckpt.get("load_ckpt_info") if isinstance(ckpt, dict) else None
        starts = model.get("pretrained", True) is True and not (isinstance(info, dict) and info.get("path"))
        name = str(Path(model["from_hf"]).expanduser()) if model["from_hf"].startswith("~") else model["from_hf"]
        folder = model_folder(name, weights=False)
        if not folder.is_dir():
            what = "is a file; give its folder" if folder.exists() else "does not exist, and is no name on the hub (owner/name)"
            raise UsageError(f"model.from_hf = {name!r} {what}")
        if (folder / "metrics.jsonl").is_file() or (folder / "manifest.json").is_file():
            raise UsageError(
                f"model.from_hf = {name!r} is a run folder or checkpoint: leave model.from_hf out and give it as "
                "ckpt.load_ckpt_info.path, or convert it first (internevo convert --to hf)"
            )
        hf = read_config(folder)
        decoder = decoder_from_hf(hf, str(folder))
        if starts and folder == Path(name):  # the weights of a model on the hub are downloaded when a run starts
            from ..models.huggingface.folder import HfFolder

            decoder = HfFolder(folder).config
        dtype = DTYPES.get(str(hf.get("dtype") or hf.get("torch_dtype")), hf.get("dtype") or hf.get("torch_dtype"))
        given = frozenset(model) | ({"model_type"} if values.get("model_type") is not None else set())
        return cls(name, folder, decoder, dtype if dtype in DTYPES.values() else None, starts, given)

    def fill(self, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the values of a config with those of the model for the keys that are not set.

        Raises:
            ConfigError: if a config has no keys for the model's shape.
        """
        shape = self.shape()
        own = {key for key in shape if not self.given & {key, *OTHER_NAMES.get(key, ())}}
        if "use_alibi" in self.given:
            own -= {"rope_base", "rope_scaling"}
        dtype = {"dtype": self.dtype} if self.dtype and "dtype" not in self.given else {}
        model = {**{key: shape[key] for key in shape if key in own}, **dtype, **values["model"]}
        filled = {**values, "model": model, "model_type": values.get("model_type") or self.decoder.family}
        if isinstance(data := values.get("data", {}), dict):
            tokenizer = {"tokenizer_path": str(self.folder)} if has_tokenizer(self.folder) else {}
            filled["data"] = {**tokenizer, **data}
        if self.starts and isinstance(ckpt := values.get("ckpt", {}), dict):
            filled["ckpt"] = {**ckpt, "load_ckpt_info": self._info().model_dump()}
        return filled

    def _info(self) -> LoadCkptInfo:
        differ = tuple(key for key in MAY_DIFFER if self.given & {key, *OTHER_NAMES.get(key, ())})
        return LoadCkptInfo(path=self.name, content=("model",), ckpt_type="hf", may_differ=differ)

    def shape(self) -> dict[str, Any]:
        """Returns the keys of ``model`` that describe the shape.

        Raises:
            ConfigError: if there are none for some of it; the message names it.
        """
        decoder, moe = self.decoder, self.decoder.experts
        stated = {key.removeprefix("model."): value for key, value in decoder.settings().items() if key.startswith("model.")}
        values = {key: value for key, value in stated.items() if key in Model.model_fields and value is not None}
        values |= {"intermediate_size": decoder.intermediate_size, "use_sliding_window": False}
        if decoder.rope and getattr(family(decoder.family), "PARTIAL_ROTARY", False):  # their defaults are less than 1
            values["rope_scaling"] = {"rope_type": "default", **values.get("rope_scaling", {}), SHARE: decoder.rope.share}
        if windows := values.pop("sliding_window", None):
            values["layer_windows"] = windows
        if moe is None:
            values.pop("num_experts")
        else:
            values["moe_type"] = "Dropless"
            values = {key: value for key, value in values.items() if key != "shared_expert_intermediate_size" or value}
        described = decoder_config(decoder.family, Model.model_validate(values))
        if wrong := list(differences(described, decoder, str(self.folder))):
            raise ConfigError(f"a config cannot describe the model {self.folder}: {'; '.join(line for _, line in wrong)}")
        return values

    def check(self, config: Config) -> None:
        """Checks that the keys that a config sets do not contradict the model's weights.

        Raises:
            ConfigError: if they do. The message names them.
        """
        if self.starts:
            mine = decoder_config(config.model_type, config.model)
            advice = "Leave these keys out, or take only the shape of model.from_hf, not its weights (model.pretrained=False)"
            compare_models(mine, self.decoder, self.folder, self._info(), advice)
