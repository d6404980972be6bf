"""Writes models as GGUF files, which llama.cpp and programs like it read, with the ``gguf`` library (an optional extra).

The forms are those that llama.cpp expects of each architecture (``gguf_forms``): the rows of q and k are in
pairs of neighbours where it rotates such pairs, norms that multiply by 1 + weight have 1 added, the experts of a layer are one
tensor, the rows of a normalised head are divided by their norms. Matrices are in the chosen dtype; vectors and routers are in
fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import __version__
from ...errors import UsageError
from ..config import DecoderConfig, Latent, Rope
from ..decoder import stored_shapes
from ..rotary import inverse_frequencies, longrope_scale
from ..source import ParameterSource, most_common_dtype
from .gguf_forms import Form, form_of, name_of
from .gguf_tokenizer import write_tokenizer
from .naming import row_count
from .owned import owned_target

NAME = "model.gguf"
"""The name of the file in the folder."""


def write_gguf(
    source: ParameterSource,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes ``model.gguf``. One tensor is in memory at a time.

    Args:
        dtype: dtype of matrices. None: the one that most weights have.
        overwrite: a file that this program has written to ``folder`` before may be replaced.
        progress: called with (bytes written, bytes in all).

    Raises:
        UsageError: if llama.cpp does not have the family, or something of the model, which the message names; or the folder
            cannot be written, or the library is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError("--to gguf needs the gguf library: pip install 'internevo[gguf]'") from error
    config, form = source.config, form_of(source.config)
    dtype = dtype or most_common_dtype(source)
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if dtype not in kinds:
        raise UsageError(f"a GGUF file cannot have matrices in {dtype}; use --dtype float32, float16 or bfloat16")
    tensors = list(_tensors(source, form, dtype))
    total, done = sum(one.nbytes for one in tensors), 0
    with owned_target(folder, NAME, [NAME], overwrite) as new:
        writer = gguf.GGUFWriter(new / NAME, form.arch)
        writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}[kinds[dtype]]])
        _metadata(writer, config, form)
        write_tokenizer(writer, source.tokenizer, config.vocab_size)
        for one in tensors:
            kind = gguf.GGMLQuantizationType[kinds[one.dtype]]
            number = _array(torch.empty(0, dtype=one.dtype)).dtype
            writer.add_tensor_info(one.name, one.shape, number, one.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in tensors:
            writer.write_tensor_data(_array(one.read()))
            done += one.nbytes
            progress(done, total)
        writer.close()


def open_gguf(path: Path) -> Any:
    """Opens a GGUF file with the gguf library, as ``gguf.GGUFReader``.

    Raises:
        UsageError: if it cannot be read, is not a GGUF file or is cut off, or the library is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(f"reading {path} needs the gguf library: pip install 'internevo[gguf]'") from error
    try:
        reader = gguf.GGUFReader(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise UsageError(f"{path} is not a whole GGUF file: {error}") from error
    if "general.architecture" not in reader.fields:
        raise UsageError(f"{path} is a GGUF file, but has no general.architecture")
    return reader


@dataclass(frozen=True)
class _Out:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _tensors(source: ParameterSource, form: Form, dtype: torch.dtype) -> Iterator[_Out]:
    config, shapes, together = source.config, stored_shapes(source.config), dict[str, list[str]]()
    for name, factors in _rope_factors(config).items():
        yield _Out(name, tuple(factors.shape), torch.float32, partial(torch.as_tensor, factors))
    for name in shapes:
        together.setdefault(name_of(name, form, config), []).append(name)
    for name, parts in together.items():
        first = shapes[parts[0]]
        shape = (sum(shapes[part][0] for part in parts), *first[1:])
        matrix = len(shape) > 1 and not parts[0].endswith((".router.weight", ".shared_gate.weight"))
        out = shape[1:] if parts[0].endswith(".shared_gate.weight") else shape
        kind = dtype if matrix else torch.float32
        one = _Out(name, out, kind, partial(_join, source, form, {part: shapes[part] for part in parts}, kind, out))
        if config.latent is not None and name.endswith(".attn_kv_b.weight"):
            yield from _keys_and_values(config, config.latent, one)
        else:
            yield one


def _join(
    source: ParameterSource, form: Form, parts: dict[str, torch.Size], dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """Reads the parameters of one tensor: names and shapes."""
    tensors = [_read(source, form, name, size) for name, size in parts.items()]
    together = tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # experts are large, and cat would copy them
    return together.to(dtype).reshape(shape)


def _keys_and_values(config: DecoderConfig, latent: Latent, both: _Out) -> Iterator[_Out]:
    """Yields the matrices of each head that make its keys from the latent, transposed, and its values."""
    heads, plain = config.num_heads, latent.plain_dim

    def keys() -> Tensor:
        return both.read().unflatten(0, (heads, -1))[:, :plain].transpose(1, 2)

    def values() -> Tensor:
        return both.read().unflatten(0, (heads, -1))[:, plain:]

    yield _Out(both.name.replace("kv_b", "k_b"), (heads, latent.rank, plain), both.dtype, keys)
    yield _Out(both.name.replace("kv_b", "v_b"), (heads, latent.value_dim, latent.rank), both.dtype, values)


def _read(source: ParameterSource, form: Form, name: str, shape: torch.Size) -> Tensor:
    """Reads a parameter, and makes it as llama.cpp expects it."""
    config, linear = source.config, name.split(".")[-2]
    rope, latent = config.rope, config.latent
    tensor = source.read(name, 0, row_count(shape)).view(shape)
    if config.norm_unit_offset and "norm" in linear:
        return tensor.float() + 1
    if config.norm_head and linear == "head":
        return F.normalize(tensor.float(), dim=1)
    rotated = {"q": (config.num_heads, 0), "k": (config.num_kv_heads, 0)}
    if latent is not None:
        rotated = {"q": (config.num_heads, latent.plain_dim), "kv_a": (1, latent.rank)}
    if form.neighbours and rope is not None and not rope.interleaved and linear in rotated:
        heads, first = rotated[linear]
        return _as_neighbours(tensor.unflatten(0, (heads, -1)), first).flatten(0, 1)
    return tensor


def _as_neighbours(rows: Tensor, first: int) -> Tensor:
    """Orders the rows of each head [H, N, ...] from ``first`` on so that the pairs that rotate, which are half of them apart,
    are neighbours."""
    pairs = rows[:, first:].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat((rows[:, :first], pairs), dim=1)


def _rope_factors(config: DecoderConfig) -> dict[str, Tensor]:
    """Returns by what llama.cpp divides the angle of each pair: how Llama 3.1 and LongRoPE scale them."""
    rope, options = config.rope, config.rope.options if config.rope else {}
    if rope is not None and rope.kind == "longrope":
        return {f"rope_factors_{which}.weight": torch.tensor(options[f"{which}_factor"]) for which in ("long", "short")}
    if rope is None or rope.kind != "llama3":
        return {}
    device, size = torch.device("cpu"), rope.size(config.head_dim)
    scaled, _ = inverse_frequencies(rope, size, config.max_position_embeddings, device)
    plain, _ = inverse_frequencies(Rope(rope.base), size, config.max_position_embeddings, device)
    return {"rope_freqs.weight": plain / scaled}


def _array(tensor: Tensor) -> Any:
    """Returns a tensor as an array; NumPy has no bf16, so its 16 bits are an integer."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def _metadata(writer: Any, config: DecoderConfig, form: Form) -> None:
    """Adds the shape of the model."""
    writer.add_string("general.quantized_by", f"internevo {__version__}")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in {**_shape(config, form), **_rope(config), **_experts(config, form)}.items():
        if value is not None:
            add[type(value)](f"{form.arch}.{key}", value)


def _shape(config: DecoderConfig, form: Form) -> dict[str, Any]:
    """Returns keys and values of the shape; None: the key is left out. With latents, llama.cpp computes attention in their
    space, in which all heads have the same keys and values."""
    latent, window = config.latent, max(config.windows, default=0)
    gemma2 = config.family == "GEMMA2"
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.sliding_window": window if window or form.pattern is None else None,
        "attn_logit_softcapping": float(config.attention_softcap) if gemma2 else None,
        "final_logit_softcapping": float(config.logit_softcap) if gemma2 else None,
    }
    if form.arch == "granite":
        values |= {
            "embedding_scale": config.embedding_multiplier,
            "attention.scale": config.score_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if latent is not None:
        values |= {
            "attention.head_count_kv": 1,
            "attention.key_length": latent.rank + latent.rotary_dim,
            "attention.value_length": latent.rank,
            "attention.key_length_mla": config.head_dim,
            "attention.value_length_mla": latent.value_dim,
            "attention.q_lora_rank": latent.query_rank,
            "attention.kv_lora_rank": latent.rank,
        }
    return values


def _rope(config: DecoderConfig) -> dict[str, Any]:
    """Returns keys and values of the rotary embedding."""
    rope, inner, longest = config.rope or Rope(), config.window_rope, config.max_position_embeddings
    values: dict[str, Any] = {
        "rope.dimension_count": rope.size(config.rotary_dim),
        "rope.freq_base": float(rope.base),
        "rope.freq_base_swa": float(inner.base) if inner else None,
    }
    if rope.kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind in ("yarn", "longrope"):
        original = rope.options.get("original_max_position_embeddings", longest)
        values |= {"rope.scaling.original_context_length": original}
    if rope.kind == "longrope":
        values |= {"rope.scaling.attn_factor": float(longrope_scale(rope, longest))}
    if rope.kind == "yarn" and rope.factor > 1:
        _, scale = inverse_frequencies(rope, values["rope.dimension_count"], longest, torch.device("cpu"))
        if config.latent is None:  # llama.cpp multiplies its factor by the usual one
            values |= {"rope.scaling.attn_factor": scale / (1 + 0.1 * math.log(rope.factor))}
        else:  # it multiplies scores by (attn_factor * (1 + yarn_log_multiplier * log(factor))) ** 2
            weight = (math.sqrt(rope.latent_scale) / scale - 1) / math.log(rope.factor)
            values |= {"rope.scaling.attn_factor": scale, "rope.scaling.yarn_log_multiplier": weight}
    return values


def _experts(config: DecoderConfig, form: Form) -> dict[str, Any]:
    """Returns keys and values of the experts. The architecture of Llama has no other width for them."""
    moe = config.experts
    if moe is None:
        return {}
    values: dict[str, Any] = {"expert_count": moe.count, "expert_used_count": moe.top_k}
    if form.arch == "llama":
        return {**values, "feed_forward_length": moe.size}
    values["expert_feed_forward_length"] = moe.size
    if config.latent is None:
        return {**values, "expert_shared_feed_forward_length": moe.shared_size or None}
    grouped = moe.top_groups < moe.groups
    return {
        **values,
        "leading_dense_block_count": len(moe.dense_layers),
        "expert_shared_count": moe.shared_size // moe.size,
        "expert_weights_scale": float(moe.scale),
        "expert_weights_norm": moe.normalize,
        "expert_gating_func": {"softmax": 1, "sigmoid": 2}[moe.scoring],
        "expert_group_count": moe.groups if grouped else None,
        "expert_group_used_count": moe.top_groups if grouped else None,
    }
