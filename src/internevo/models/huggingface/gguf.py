"""Writes models as GGUF files, which llama.cpp and programs like it read, with the ``gguf`` library (an optional extra).

The forms are those that llama.cpp expects of each architecture: the rows of q and k are in pairs of neighbours where it rotates
such pairs, norms that multiply by 1 + weight have 1 added, the experts of a layer are one tensor. Matrices are in the chosen
dtype; vectors and routers are in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...errors import UsageError
from ..config import DecoderConfig, Rope
from ..decoder import parameter_shapes
from ..rotary import inverse_frequencies
from ..source import ParameterSource, most_common_dtype
from .gguf_tokenizer import write_tokenizer
from .naming import row_count
from .owned import owned_target

NAME = "model.gguf"
"""The name of the file in the folder."""


@dataclass(frozen=True)
class Form:
    """How llama.cpp has a family."""

    arch: str
    permuted: bool = False
    """Whether it rotates pairs of neighbours, so that the rows of q and k have another order."""
    biases: tuple[str, ...] = ()
    """Biases that it knows: some of qkv, o, mlp."""
    normalize: bool | None = None
    """Whether it divides the weights of a token's experts by their sum; None: it has no experts."""
    pattern: int = 0
    """Every layer has a sliding window, except each N-th, for this N; 0: none has."""
    large: int = 0
    """The number of layers of the model whose scores it divides by sqrt(hidden size / heads), not by sqrt(head size)."""
    tied: bool = False
    """Whether the head must be tied to the embedding."""


FORMS = {
    "LLAMA2": Form("llama", permuted=True, biases=("qkv", "o", "mlp")),
    "INTERNLM2": Form("internlm2", permuted=True),
    "MIXTRALMOE": Form("llama", permuted=True, normalize=True),
    "QWEN2": Form("qwen2", biases=("qkv",)),
    "QWEN3": Form("qwen3"),
    "QWEN2MOE": Form("qwen2moe", biases=("qkv",), normalize=False),
    "QWEN3MOE": Form("qwen3moe", normalize=True),
    "GEMMA": Form("gemma", tied=True),
    "GEMMA2": Form("gemma2", pattern=2, large=46, tied=True),
    "GEMMA3": Form("gemma3", pattern=6, large=62),
}  # fmt: skip
LAYER = {
    "attn_norm": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm", "mlp_norm": "ffn_norm", "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up", "mlp.down": "ffn_down", "attn_out_norm": "post_attention_norm", "mlp_out_norm": "post_ffw_norm",
    "mlp.router": "ffn_gate_inp", "mlp.experts.gate": "ffn_gate_exps", "mlp.experts.up": "ffn_up_exps",
    "mlp.experts.down": "ffn_down_exps", "mlp.shared.gate": "ffn_gate_shexp", "mlp.shared.up": "ffn_up_shexp",
    "mlp.shared.down": "ffn_down_shexp", "mlp.shared_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
ENDS = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}


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


def form_of(config: DecoderConfig) -> Form:
    """Returns how llama.cpp has a model.

    Raises:
        UsageError: if it does not. The message names the family, or what of the model it does not have.
    """
    form = FORMS.get(config.family)
    if form is None:
        raise UsageError(f"--to gguf does not support {config.family} (supported: {', '.join(FORMS)})")
    if wrong := list(_problems(config, form)):
        raise UsageError(f"a GGUF file cannot describe this {config.family} model: {'; '.join(wrong)}")
    return form


def _problems(config: DecoderConfig, form: Form) -> Iterator[str]:
    """Yields what of a model llama.cpp computes in another way, or not at all."""
    for name, given in (("qkv", config.qkv_bias), ("o", config.o_bias), ("mlp", config.mlp_bias)):
        if given and name not in form.biases:
            yield f"it has {name} biases"
    if form.biases == ("qkv",) and not config.qkv_bias:
        yield "it has no qkv biases"
    window = max(config.windows, default=0)
    expected = tuple(window if form.pattern and (layer + 1) % form.pattern else 0 for layer in range(config.num_layers))
    if window and config.windows != expected:
        yield f"its sliding windows {list(config.windows)} are not in the architecture's layers"
    if form.pattern and not window:
        yield "it has no sliding windows"
    large = config.num_layers == form.large
    if config.query_scalar != (config.hidden_size // config.num_heads if large else config.head_dim):
        yield f"its scores are divided by sqrt({config.query_scalar})"
    if form.tied and not config.tie_embeddings:
        yield "its head is not tied to the embedding"
    if config.rope is None or config.rope.kind not in ("default", "linear", "yarn", "llama3"):
        yield f"rotary scaling {config.rope.kind if config.rope else None!r}"
    if config.window_rope and (config.window_rope.kind != "default"):
        yield f"rotary scaling {config.window_rope.kind!r} in layers with a window"
    moe = config.experts
    if moe and (moe.normalize != form.normalize or moe.dense_layers or moe.balance_bias):
        yield "its experts choose in another way, or some layers have none (norm_topk_prob, mlp_only_layers, bias_update_speed)"


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
    config = source.config
    if config.rope is not None and config.rope.kind == "llama3":
        factors = _rope_factors(config.rope, config)
        yield _Out("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors)
    for name, size in parameter_shapes(config).items():
        shape = tuple(size)
        matrix = len(shape) > 1 and not name.endswith((".router.weight", ".shared_gate.weight"))
        kind = dtype if matrix else torch.float32
        out = shape[1:] if name.endswith(".shared_gate.weight") else shape

        def read(name: str = name, shape: tuple[int, ...] = shape, kind: torch.dtype = kind, out: Any = out) -> Tensor:
            tensor = source.read(name, 0, row_count(shape)).view(shape)
            heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(name.split(".")[-2], 0)
            if form.permuted and heads:
                tensor = tensor.view(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)
            if config.norm_unit_offset and "norm" in name.split(".")[-2]:
                tensor = tensor.float() + 1
            return tensor.to(kind).reshape(out)

        yield _Out(_name(name), out, kind, read)


def _name(name: str) -> str:
    """Returns the name of a parameter in the file."""
    if name in ENDS:
        return ENDS[name]
    _, layer, *path, kind = name.split(".")
    return f"blk.{layer}.{LAYER['.'.join(path)]}.{kind}"


def _rope_factors(rope: Rope, config: DecoderConfig) -> Tensor:
    """Returns by what llama.cpp divides the angle of each pair: how Llama 3.1 scales them."""
    device, size = torch.device("cpu"), rope.size(config.head_dim)
    scaled, _ = inverse_frequencies(rope, size, config.max_position_embeddings, device)
    plain, _ = inverse_frequencies(Rope(rope.base), size, config.max_position_embeddings, device)
    return plain / scaled


def _array(tensor: Tensor) -> Any:
    """Returns a tensor as an array; NumPy has no bf16, so its 16 bits are an integer."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def _metadata(writer: Any, config: DecoderConfig, form: Form) -> None:
    """Adds the shape of the model."""
    rope, window = config.rope or Rope(), max(config.windows, default=0)
    writer.add_string("general.quantized_by", f"internevo {__version__}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    mixtral = config.experts if config.family == "MIXTRALMOE" else None
    writer.add_feed_forward_length(mixtral.size if mixtral else config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope.base)
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(_scaling_type(rope.kind))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        original = rope.options.get("original_max_position_embeddings", config.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(original)
    if window:
        writer.add_sliding_window(window)
    if config.window_rope:
        writer.add_rope_freq_base_swa(config.window_rope.base)
    if config.family == "GEMMA2":
        writer.add_attn_logit_softcapping(config.attention_softcap)
        writer.add_final_logit_softcapping(config.logit_softcap)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.top_k)
        if mixtral is None:
            writer.add_expert_feed_forward_length(config.experts.size)
        if config.experts.shared_size:
            writer.add_expert_shared_feed_forward_length(config.experts.shared_size)


def _scaling_type(kind: str) -> Any:
    import gguf

    return gguf.RopeScalingType(kind)
