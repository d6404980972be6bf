"""Rules that involve several fields of a config, the world size, or files. (A model family has further rules; ``train.check``
applies both.)

Each rule yields one message per problem, which says what does not fit and what to change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from ..wording import counted
from . import divided, rope
from .axes import data_size, expert_inner_size, expert_ranks, expert_size, inner_size
from .data import STREAMS
from .hub import may_be_on_hub
from .option import MAX_SIZE, unavailable
from .schema import Config
from .training import LrScheduler

NUMBER = "[0-9]{1,18}"
"""A number in a text, which fits in 64 bits."""


def missing_features(config: Config) -> list[str]:
    """Returns one line for each feature that the config asks for and that this version does not have."""
    lines = unavailable(config)
    info = config.ckpt.load_ckpt_info
    if info and info.path and info.ckpt_type in ("llama", "LLAMA", "normal"):
        lines.append(f"not available yet: loading checkpoints of ckpt.load_ckpt_info.ckpt_type = {info.ckpt_type!r}")
    return lines


def problems(config: Config, world_size: int) -> list[str]:
    """Returns one line for each contradiction inside the config, or between it and the world size."""
    rules = (
        _lora,
        _muon,
        divided.heads,
        _rope,
        _axes,
        _zero,
        _experts,
        _batch,
        _sizes,
        _ramp,
        _skip,
        _pipeline,
        divided.sequence,
        divided.sequence_2d,
        _schedule,
        _precision,
        _load,
        _data,
    )
    return [line for rule in rules for line in rule(config, world_size)]


def missing_paths(config: Config, new: bool = True) -> list[str]:
    """Returns one line for each file or folder that the run would read and that does not exist.

    A folder may also be the path of Megatron's files without ".bin".

    Args:
        new: whether the run is new; one that goes on from its own checkpoint reads no other.
    """
    data, info = config.data, config.ckpt.load_ckpt_info
    train, valid = data.folders
    stream = data.type in STREAMS
    paths = {
        "data.train_folder": None if data.mixture or (stream and may_be_on_hub(train)) else train,
        "data.valid_folder": valid if data.valid_every and not (stream and may_be_on_hub(valid)) else None,
        "data.tokenizer_path": data.tokenizer_path if _needs_tokenizer(config) else None,
        "ckpt.load_ckpt_info.path": None if not info or not new or (info.is_hf and may_be_on_hub(info.path)) else info.path,
        "monitor.task_folder": config.monitor.task_folder,
    }
    for number, part in enumerate(data.mixture or []):
        if part.kind != "mocked" and not (part.kind in STREAMS and may_be_on_hub(part.folder)):
            paths[f"data.mixture.{number}.folder"] = part.folder
    return [
        f"{key} = {path!r} does not exist"
        for key, path in paths.items()
        if path and not Path(path).exists() and not (key.endswith("folder") and Path(f"{path}.bin").exists())
    ]


def _needs_tokenizer(config: Config) -> bool:
    """Whether the run opens ``data.tokenizer_path``, and it is not a name on the hub."""
    return bool(config.monitor.needs_tokenizer or config.data.streams) and not may_be_on_hub(config.data.tokenizer_path)


def _data(config: Config, world: int) -> Iterator[str]:
    data = config.data
    if data.streams and not data.tokenizer_path:
        yield "streaming data needs data.tokenizer_path"
    if data.streams and data.use_packed_dataset and not data.split_documents:
        yield "data.split_documents = False is not available for streams yet: tokenize the data first (internevo tokenize)"
    if data.type in STREAMS and not data.mixture and not data.train_folder:
        yield f"data.type = {data.type!r} needs data.train_folder"
    for number, part in enumerate(data.mixture or []):
        if part.kind != "mocked" and not part.folder:
            yield f"data.mixture.{number} needs a folder"
        if part.kind in STREAMS and part.epochs and part.epochs % 1:
            yield f"data.mixture.{number}.epochs = {part.epochs} must be a whole number, because this part is a stream"


def _lora(config: Config, world: int) -> Iterator[str]:
    lora = config.model.lora
    if lora is None:
        return
    if config.model.num_experts > 1 and set(lora.targets) & {"gate", "up", "down"}:
        yield f"model.lora.targets = {lora.targets}: experts cannot have adapters; choose from q, k, v, o"


def _muon(config: Config, world: int) -> Iterator[str]:
    muon = config.muon
    if muon is not None and config.model.lora is not None:
        yield "muon does not update adapters (model.lora): leave one of them out"
    if muon is not None and muon.lr is not None and config.adam.lr == 0:
        yield f"muon.lr = {muon.lr} follows the schedule of adam.lr, which is 0: leave out muon.lr, or set adam.lr"


def _rope(config: Config, world: int) -> Iterator[str]:
    for line in rope.problems(config.model.rope_scaling) if config.model.rope_scaling is not None else ():
        yield f"model.rope_scaling: {line}"


def _axes(config: Config, world: int) -> Iterator[str]:
    parallel = config.parallel
    tensor, weight, pipeline = parallel.tensor.size, parallel.weight.size, parallel.pipeline.size
    if world % (tensor * pipeline):
        yield (
            f"{counted(world, 'process')} cannot be divided into groups of parallel.tensor.size * parallel.pipeline.size = "
            f"{tensor} * {pipeline}; use a multiple of {tensor * pipeline} processes"
        )
    if weight > 1 and parallel.tensor.mode != "isp":
        yield f"parallel.weight.size = {weight} needs parallel.tensor.mode = 'isp', not {parallel.tensor.mode!r}"
    if weight > 1 and world % (weight * pipeline):
        yield (
            f"{counted(world, 'process')} cannot be divided into groups of parallel.weight.size * parallel.pipeline.size = "
            f"{weight} * {pipeline}; use a multiple of {weight * pipeline} processes"
        )


def _zero(config: Config, world: int) -> Iterator[str]:
    size, parallel = config.parallel.zero1.size, config.parallel
    ranks = max(1, world // (inner_size(config) * parallel.pipeline.size))
    if size > 0 and ranks % size:
        yield (
            f"parallel.zero1.size = {size} does not divide {ranks}, the number of ranks that hold the same part of the "
            f"weights; use a divisor of {ranks}, or -1 for all"
        )


def _experts(config: Config, world: int) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    weight, tensor = parallel.expert_weight.size, parallel.tensor
    if weight > 1 and tensor.mode != "isp":
        yield f"parallel.expert_weight.size = {weight} needs parallel.tensor.mode = 'isp', not {tensor.mode!r}"
        return
    if model.num_experts == 1 or world % parallel.pipeline.size:
        return
    if world % (parallel.pipeline.size * weight):
        yield (
            f"{counted(world, 'process')} cannot be divided into groups of parallel.expert_weight.size * "
            f"parallel.pipeline.size = {weight} * {parallel.pipeline.size}; use a multiple of "
            f"{weight * parallel.pipeline.size} processes"
        )
        return
    size, ranks = parallel.expert.size, expert_ranks(config, world)
    if size > 0 and (model.num_experts % size or ranks % size):
        yield (
            f"parallel.expert.size = {size} must divide model.num_experts = {model.num_experts} and the number of ranks that "
            f"can have different experts, {ranks}; use a divisor of {math.gcd(model.num_experts, ranks)}, or -1"
        )
        return
    expert = expert_size(config, world)
    rest = ranks // expert
    if parallel.expert_zero1.size > 0 and rest % parallel.expert_zero1.size:
        yield (
            f"parallel.expert_zero1.size = {parallel.expert_zero1.size} does not divide {rest}, the number of ranks that have "
            f"the same experts; use a divisor of {rest}, or -1 for all"
        )
    yield from _expert_widths(config, model.num_experts // expert)
    if tensor.mode == "mtp" and parallel.expert.no_tp and config.data.seq_len % tensor.size:
        yield (
            f"data.seq_len = {config.data.seq_len} is not divisible by parallel.tensor.size = {tensor.size}, as "
            "parallel.expert.no_tp needs, which divides the tokens among the ranks of the tensor axis"
        )


def _expert_widths(config: Config, experts: int) -> Iterator[str]:
    """Yields the sizes of experts that cannot be divided among the ranks over which an expert is sharded.

    Args:
        experts: number of experts on a rank.
    """
    parallel, model = config.parallel, config.model
    inner, isp = expert_inner_size(config), parallel.tensor.mode == "isp"
    key = "parallel.expert_weight.size" if isp else "parallel.tensor.size"
    width = model.moe_intermediate_size or model.mlp_width
    sizes = [(width, "the width of an expert (model.moe_intermediate_size)")]
    if isp:
        sizes = [] if experts % inner == 0 else [*sizes, (model.hidden_size, "model.hidden_size")]
    for size, what in sizes:
        if size % inner:
            yield f"{what} = {size} is not divisible by {key} = {inner}"
    shared = model.shared_expert_intermediate_size or width * (model.num_shared_experts or 0)
    if shared % inner_size(config):
        yield (
            f"the width of the shared expert = {shared} is not divisible by parallel.{'weight' if isp else 'tensor'}.size = "
            f"{inner_size(config)}"
        )


def _batch(config: Config, world: int) -> Iterator[str]:
    data, ranks = config.data, data_size(config, world)
    if data.global_batch_size and data.global_batch_size % (data.micro_bsz * ranks):
        share, rest = divmod(data.global_batch_size, ranks)
        fitting = "" if rest else f"data.micro_bsz={math.gcd(share, data.micro_bsz)}, or "
        yield (
            f"data.global_batch_size = {data.global_batch_size} is not a multiple of data.micro_bsz * data ranks = "
            f"{data.micro_bsz} * {ranks}; use {fitting}a multiple of {data.micro_bsz * ranks}"
        )
    schedule = config.lr_scheduler
    if schedule.kind != "constant" and schedule.total_steps is not None and schedule.total_steps < data.total_steps:
        yield (
            f"lr_scheduler.total_steps = {schedule.total_steps} ends before data.total_steps = {data.total_steps}; "
            "leave it out, or set it to at least data.total_steps"
        )


def _sizes(config: Config, world: int) -> Iterator[str]:
    data, model = config.data, config.model
    if data.seq_len * data.micro_bsz > MAX_SIZE:
        yield (
            f"data.seq_len * data.micro_bsz = {data.seq_len} * {data.micro_bsz} is more than {MAX_SIZE} tokens, the most that "
            "a micro-batch may have; use a smaller data.micro_bsz and a larger data.micro_num"
        )
    for number in model.mlp_only_layers:
        if number >= model.num_layers:
            yield f"model.mlp_only_layers: there is no layer {number} (model.num_layers = {model.num_layers}, from 0)"


def _ramp(config: Config, world: int) -> Iterator[str]:
    text = config.data.rampup_batch_size
    if not text:
        return
    parts = text.split()
    if len(parts) != 3 or not all(re.fullmatch(NUMBER, part) and int(part) for part in parts):
        yield f'data.rampup_batch_size = {text!r} must be three positive integers, "start increment every", as in "2 2 100"'
        return
    ranks, size = data_size(config, world), config.data.micro_bsz
    if config.data.global_batch_size and any(int(rows) % (size * ranks) for rows in parts[:2]):
        yield (
            f"data.rampup_batch_size = {text!r}: with data.global_batch_size its first two numbers are rows of the global "
            f"batch, and must be multiples of data.micro_bsz * data ranks = {size} * {ranks}; change them or data.micro_bsz. "
            f"(If they are meant as micro-batches of each rank, multiply them by {size * ranks}.)"
        )


def _skip(config: Config, world: int) -> Iterator[str]:
    last = -1
    for part in filter(None, (p.strip() for p in config.data.skip_batches.split(","))):
        ends = part.split("-")
        if len(ends) > 2 or not all(re.fullmatch(NUMBER, end.strip()) for end in ends):
            yield f'data.skip_batches: {part!r} is neither a number nor a range like "10-20"'
            return
        first, end = int(ends[0]), int(ends[-1])
        if first <= last or end < first:
            yield f"data.skip_batches = {config.data.skip_batches!r}: numbers must be ascending, and ranges must not overlap"
            return
        last = end


def _pipeline(config: Config, world: int) -> Iterator[str]:
    pipeline, chunks, layers = config.parallel.pipeline, config.model.num_chunks, config.model.num_layers
    stages = pipeline.size * chunks
    if chunks > 1 and pipeline.size == 1:
        yield f"model.num_chunks = {chunks} needs parallel.pipeline.size > 1"
    if pipeline.mode == "ZBV" and pipeline.size > 1 and chunks != 2:
        yield f"parallel.pipeline.mode = 'ZBV' needs model.num_chunks = 2, not {chunks}"
    if pipeline.mode == "ZBH1" and chunks != 1:
        yield f"parallel.pipeline.mode = 'ZBH1' needs model.num_chunks = 1, not {chunks}"
    if pipeline.mode != "1F1B" and pipeline.size > 1 and config.parallel.zero1.fsdp:
        yield (
            f"parallel.pipeline.mode = {pipeline.mode!r} does not work with parallel.zero1.fsdp = True, which frees "
            "weights before their gradients are computed; use ZeRO (fsdp = False), or mode = '1F1B'"
        )
    if stages > layers:
        yield (
            f"model.num_layers = {layers} is less than parallel.pipeline.size * model.num_chunks = {pipeline.size} * {chunks}: "
            "each stage needs at least one layer"
        )
    if pipeline.layers and pipeline.size == 1:
        yield f"parallel.pipeline.layers = {pipeline.layers} needs parallel.pipeline.size > 1"
    elif pipeline.layers and (len(pipeline.layers) != stages or sum(pipeline.layers) != layers or min(pipeline.layers) < 1):
        yield (
            f"parallel.pipeline.layers = {pipeline.layers} must be {stages} numbers, one for each of "
            f"parallel.pipeline.size * model.num_chunks stages, each at least 1, that add up to model.num_layers = {layers}"
        )


def _schedule(config: Config, world: int) -> Iterator[str]:
    schedule = config.lr_scheduler
    total = schedule.total_steps or config.data.total_steps
    warmup, decay = schedule.warmup(total), schedule.decay(total)
    if schedule.init_steps + warmup + decay > total:
        parts = [f"lr_scheduler.init_steps = {schedule.init_steps}", f"the warm-up ({_length(schedule, 'warmup')})"]
        if schedule.kind == "wsd":
            parts.append(f"the decay ({_length(schedule, 'decay')})")
        those = f"{', '.join(parts[:-1])} and {parts[-1]}"
        yield f"{those} together are longer than {counted(total, 'step')}; make one of them shorter"
    if schedule.eta_min > config.adam.lr and schedule.kind != "constant":
        yield f"lr_scheduler.eta_min = {schedule.eta_min} is greater than adam.lr = {config.adam.lr}"


def _length(schedule: LrScheduler, part: str) -> str:
    """Returns the key, with its value, that says how long the warm-up or the decay is."""
    key = f"{part}_ratio" if getattr(schedule, f"{part}_steps") is None else f"{part}_steps"
    return f"lr_scheduler.{key} = {getattr(schedule, key)}"


def _precision(config: Config, world: int) -> Iterator[str]:
    scaler = config.grad_scaler
    if scaler.fp16.min_scale is not None and scaler.fp16.min_scale > scaler.fp16.initial_scale:
        yield (
            f"grad_scaler.fp16.min_scale = {scaler.fp16.min_scale} is greater than grad_scaler.fp16.initial_scale = "
            f"{scaler.fp16.initial_scale}"
        )
    if scaler.max_scale is not None and scaler.max_scale < scaler.fp16.initial_scale:
        yield (
            f"grad_scaler.max_scale = {scaler.max_scale} is less than grad_scaler.fp16.initial_scale = "
            f"{scaler.fp16.initial_scale}"
        )


def _load(config: Config, world: int) -> Iterator[str]:
    info = config.ckpt.load_ckpt_info
    if info and info.path and info.is_hf and info.content != ("model",):
        yield 'ckpt.load_ckpt_info: a Hugging Face folder contains only weights; write content=("model",)'
    if config.monitor.needs_tokenizer and not config.data.tokenizer_path:
        yield f"monitor.{'sample_prompts' if config.monitor.sample_prompts else 'tasks'} needs data.tokenizer_path"
