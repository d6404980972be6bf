"""Reads the config of a run: the config file, and what the Hugging Face model has that ``model.from_hf`` names.

``model.from_hf`` only fills in keys that are not set: ``model_type``, the shape, ``model.dtype``, ``data.tokenizer_path``, and
``ckpt.load_ckpt_info``, which makes a new run start from the model's weights. So the resolved config says all that a run does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config.hub import may_be_on_hub
from ..config.load import read_values, validate
from ..config.model import Model
from ..config.option import DTYPES
from ..config.rope import SHARE
from ..config.run import MAY_DIFFER, LoadCkptInfo
from ..config.schema import Config
from ..errors import ConfigError, UsageError
from ..models.config import DecoderConfig
from ..models.families.hf_values import read_config, what_else
from ..models.families.registry import decoder_config, decoder_from_hf, family
from ..models.huggingface.tokenizer import has_tokenizer
from ..models.settings import settings
from ..storage.hub import model_folder
from .compare import compare_models, differences
from .resume import TOKENIZER, Recorded

OTHER_NAMES = {
    "intermediate_size": ("mlp_ratio", "multiple_of"),
    "qkv_bias": ("no_bias",),
    "o_bias": ("no_bias",),
    "rope_scaling": ("use_dynamic_ntk_rope", "rope_type", "rope_scaling_factor"),
    "layer_windows": ("use_sliding_window", "sliding_window", "max_window_layers"),
    "no_rope_layers": ("no_rope_layer_interval",),
    "sliding_window": ("use_sliding_window", "layer_windows", "max_window_layers"),
    "shared_expert_intermediate_size": ("num_shared_experts",),
    "mlp_only_layers": ("decoder_sparse_step",),
}
"""Key of ``model`` -> other keys that say the same. If one of these is set, the key is not filled in."""

MORE_KEYS = {"intermediate_size", "dtype", "use_sliding_window", "layer_windows", "moe_type"}
"""Keys of ``model`` that are filled in, besides those by which a decoder describes itself."""


def load_config(path: str | Path | dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a config file (.py, .yaml, .yml, .toml or .json), applies ``key.path=value`` overrides, fills in what
    ``model.from_hf`` has, and validates the result.

    If the run has a checkpoint, and the model is no folder here any more, it is filled in from there. The tokenizer need not be
    here either (see ``local_tokenizer``).

    Raises:
        ConfigError: if the config has mistakes; one line for each. Also if a key contradicts the weights of ``model.from_hf``.
        UsageError: if ``model.from_hf`` is not a model that can be read.
    """
    values = read_values(path, overrides)
    model, found = values.get("model"), None
    if isinstance(model, dict) and isinstance(model.get("from_hf"), str):
        found, values = _filled(values)
    config = validate(values, source="the config" if isinstance(path, dict) else str(path))
    if found is not None:
        found.check(config)
    return config


def with_tokenizer(config: Config, path: str) -> Config:
    """Returns a config with another ``data.tokenizer_path``."""
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer_path": path})})


def local_tokenizer(config: Config, record: Recorded | None, say: Callable[[str], None] = lambda line: None) -> Config:
    """Returns a config whose ``data.tokenizer_path`` can be opened. What the config itself says is recorded, and not this.

    It is the run's own copy, if the tokenizer is not here or on the hub; and that of a new run is downloaded from there.

    Args:
        record: what the run goes on from.
        say: is called with a line if a tokenizer that the run does not need cannot be downloaded.

    Raises:
        UsageError: if it cannot be downloaded, and the run needs it.
    """
    path = config.data.tokenizer_path
    if path and record is not None and (copy := record.tokenizer(path)):
        return with_tokenizer(config, str(copy))
    if not path or not may_be_on_hub(path):
        return config
    try:
        return with_tokenizer(config, str(model_folder(path, weights=False)))
    except UsageError as error:
        if config.data.streams or config.monitor.needs_tokenizer:
            raise
        kept = config.run_folder / TOKENIZER
        get = f"get that in {kept}" if kept.is_dir() else "get no tokenizer"
        say(f"note: the checkpoints {get} (data.tokenizer_path): {error}")
        return config


def _filled(values: dict[str, Any]) -> tuple[HfModel | None, dict[str, Any]]:
    """Returns what ``model.from_hf`` names, and the values of a config with what that has.

    The model is not read, and is None, if the run goes on from a checkpoint and the model is no folder here, or lacks its
    weights: then the checkpoint has the values. Nor if it isn't here and the config is the resolved one of a run.
    """
    model, record = values["model"], Recorded.find(values)
    here = Path(model["from_hf"]).expanduser().exists()
    if record is None or (record.values.get("model") or {}).get("from_hf") != model["from_hf"]:
        if Model.model_fields.keys() <= model.keys() and not here:
            return None, values
        found = HfModel.find(values)
        return found, found.fill(values)
    try:
        read = HfModel.find(values) if here else None
    except UsageError:
        read = None
    if read is None:
        return None, {**values, **_recorded_keys(values, record)}
    return read, _with_recorded(read.fill(values), record, "data", "tokenizer_path")


def _recorded_keys(values: dict[str, Any], record: Recorded) -> dict[str, Any]:
    """Returns the sections of a config with what ``model.from_hf`` would fill in, from the checkpoint that it goes on from.

    Raises:
        ConfigError: if another version wrote the checkpoint, and this one does not have its keys.
    """
    model, known, given = values["model"], record.values["model"], _given(values)
    try:
        stated = settings(decoder_config(record.values["model_type"], Model.model_validate(known)))
    except (KeyError, ValidationError) as error:
        wrong = [".".join(map(str, e["loc"])) for e in error.errors()] if isinstance(error, ValidationError) else [str(error)]
        raise ConfigError(
            f"{record.checkpoint / 'config.json'} is of another version, whose keys this one does not have (model: "
            f"{', '.join(wrong)}). So model.from_hf = {model['from_hf']!r} must be here: copy it there, or give its folder"
        ) from error
    shape = {key.removeprefix("model.") for key in stated} | MORE_KEYS
    own = {key for key in shape & known.keys() if not given & {key, *OTHER_NAMES.get(key, ())}}
    filled: dict[str, Any] = {"model": {**{key: known[key] for key in own}, **model}}
    filled["model_type"] = values.get("model_type") or record.values["model_type"]
    for section, key in (("data", "tokenizer_path"), ("ckpt", "load_ckpt_info")):
        if section in (more := _with_recorded(values, record, section, key)):
            filled[section] = more[section]
    return filled


def _with_recorded(values: dict[str, Any], record: Recorded, section: str, key: str) -> dict[str, Any]:
    """Returns the values of a config with a key of the checkpoint, if it is not set."""
    own = values.get(section, {})
    return {**values, section: {key: (record.values.get(section) or {}).get(key), **own}} if isinstance(own, dict) else values


def _given(values: dict[str, Any]) -> frozenset[str]:
    """Returns the keys of ``model`` that a config sets, and ``model_type`` if it does."""
    return frozenset(values["model"]) | ({"model_type"} if values.get("model_type") is not None else set())


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
    def find(cls, values: dict[str, Any], said: str = "model.from_hf") -> HfModel:
        """Reads the model that the values of a config name, downloading it if it is on the hub (but not yet its weights).

        Args:
            said: the key or the argument with which the user has named it.

        Raises:
            UsageError: if it is not a model that can be read. The message names the folder or file and what is wrong.
        """
        model, ckpt = values["model"], values.get("ckpt")
        info = ckpt.get("load_ckpt_info") if isinstance(ckpt, dict) else None
        starts = model.get("pretrained", True) is True and not (isinstance(info, dict) and info.get("path"))
        name = str(Path(model["from_hf"]).expanduser()) if model["from_hf"].startswith("~") else model["from_hf"]
        folder = model_folder(name, weights=False)
        if not folder.is_dir():
            what = (
                f"is a file{what_else(folder)}" if folder.exists() else "does not exist, and is no name on the hub (owner/name)"
            )
            raise UsageError(f"{said} = {name!r} {what}")
        if (folder / "metrics.jsonl").is_file() or (folder / "manifest.json").is_file():
            other = f"leave {said} out and give it as ckpt.load_ckpt_info.path, or " if said == "model.from_hf" else ""
            raise UsageError(
                f"{said} = {name!r} is a run folder or checkpoint: {other}convert it first (internevo convert --to hf)"
            )
        hf = read_config(folder)
        decoder = decoder_from_hf(hf, str(folder))
        if starts and folder == Path(name):  # the weights of a model on the hub are downloaded when a run starts
            from ..models.huggingface.folder import HfFolder

            decoder = HfFolder(folder).config
        dtype = DTYPES.get(str(hf.get("dtype") or hf.get("torch_dtype")), hf.get("dtype") or hf.get("torch_dtype"))
        return cls(name, folder, decoder, dtype if dtype in DTYPES.values() else None, starts, _given(values))

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
        stated = {key.removeprefix("model."): value for key, value in settings(decoder).items() if key.startswith("model.")}
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
