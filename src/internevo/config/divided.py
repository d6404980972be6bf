"""Rules about what the tensor and the weight axis divide: heads, widths, the vocabulary, and sequences. (See ``check``.)"""

from __future__ import annotations

from collections.abc import Iterator

from .axes import context_size, head_size
from .model import attention_widths
from .schema import Config


def heads(config: Config, world: int) -> Iterator[str]:
    """Heads, widths and the vocabulary: one line for each that does not fit."""
    model, tensor = config.model, config.parallel.tensor
    count, kv = model.num_attention_heads, model.num_kv_attention_heads or model.num_attention_heads
    if model.head_dim is None and model.kv_lora_rank is None and model.hidden_size % count:
        yield (
            f"model.hidden_size = {model.hidden_size} is not a multiple of model.num_attention_heads = {count}; "
            "change one of them or give model.head_dim"
        )
    elif model.kv_lora_rank is None and (model.head_dim or model.hidden_size // count) % 2:
        yield "the size of a head (model.head_dim) must be even for the rotary embedding; change model.head_dim"
    if count % kv:
        yield f"model.num_attention_heads = {count} is not a multiple of model.num_kv_attention_heads = {kv}"
    ranks, key = head_size(config), "sequence_2D.head_size" if context_size(config) > 1 else "tensor.size"
    ranks = ranks if ranks * context_size(config) == tensor.size else 0  # otherwise ``sequence_2d`` says what is wrong
    if ranks and kv % ranks and ranks % kv:
        yield f"model.num_kv_attention_heads = {kv} and parallel.{key} = {ranks}: one must be a multiple of the other"
    has_mlps = any(n in model.mlp_only_layers or (n + 1) % model.decoder_sparse_step for n in range(model.num_layers))
    widths = [(model.mlp_width, "the MLP's width")] if has_mlps or model.num_experts == 1 else []
    if tensor.mode != "isp" and widths and model.mlp_width % tensor.size:
        yield f"the MLP's width {model.mlp_width} is not divisible by parallel.tensor.size = {tensor.size}"
    ends = ((model.hidden_size, "model.hidden_size"), (model.vocab_size, "model.vocab_size"))
    for size, what in (*widths, *ends, *attention_widths(model)):
        if size % config.parallel.weight.size:
            yield f"{what} = {size} is not divisible by parallel.weight.size = {config.parallel.weight.size}"
    if ranks and count % ranks:
        more = "; parallel.sequence_2D is for more ranks than heads" if tensor.mode == "isp" and ranks > count else ""
        yield f"model.num_attention_heads = {count} is not divisible by parallel.{key} = {ranks}{more}"
    if tensor.mode != "isp" and model.vocab_size % tensor.size:
        yield f"model.vocab_size = {model.vocab_size} is not divisible by parallel.tensor.size = {tensor.size}"


def sequence(config: Config, world: int) -> Iterator[str]:
    """The same for the rows of the tensor axis."""
    tensor = config.parallel.tensor
    if tensor.mode != "mtp" and config.data.seq_len % tensor.size:
        yield (
            f"data.seq_len = {config.data.seq_len} is not divisible by parallel.tensor.size = {tensor.size}, "
            f"as parallel.tensor.mode = {tensor.mode!r} needs"
        )


def sequence_2d(config: Config, world: int) -> Iterator[str]:
    """The same for 2D sequence parallelism."""
    two, tensor = config.parallel.sequence_2D, config.parallel.tensor
    if not two.enable:
        return
    if tensor.mode != "isp":
        yield f"parallel.sequence_2D.enable = True needs parallel.tensor.mode = 'isp', not {tensor.mode!r}"
    if two.head_size * two.context_size != tensor.size:
        yield (
            f"parallel.sequence_2D.head_size * context_size = {two.head_size} * {two.context_size} must be "
            f"parallel.tensor.size = {tensor.size}"
        )
    if two.context_size > 1 and config.data.seq_len % (2 * two.context_size):
        yield (
            f"data.seq_len = {config.data.seq_len} is not divisible by 2 * parallel.sequence_2D.context_size = "
            f"{2 * two.context_size}: rows are divided into two chunks for each context rank"
        )
