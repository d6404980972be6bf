"""Training measurements that others published, as jobs of the planner: which rows of a table it can express.

The table is a CSV file with one measurement a row; its columns are read here and nowhere else. What a source does not
print in a row, but says once for all of its rows, is in ``SOURCES``.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from pathlib import Path

from internevo.models.config import DecoderConfig, Experts, Latent
from internevo.parallel.layout import Layout
from internevo.parallel.strategy import Workload
from internevo.planner import memory as planned
from internevo.planner.hardware import GPU, GPUS
from internevo.planner.job import Again, Job

Row = dict[str, str]


class NotExpressibleError(Exception):
    """Why a row is not predicted."""


@dataclass(frozen=True)
class Measured:
    """A row that the planner can express."""

    row: Row
    source: str
    gpu: GPU
    job: Job
    tgs: float
    """Measured tokens per GPU and second."""

    @property
    def name(self) -> str:
        return self.row["id"]

    @property
    def group(self) -> tuple[str, str]:
        """The rows that have a calibration of their own."""
        return self.source, self.gpu.name


@dataclass(frozen=True)
class Source:
    """What holds for all rows of a source."""

    attention: float = 1.0
    """For rows without tokens per second: the part of full attention that its FLOPs count. 0.5: what the causal mask leaves."""
    selective: Again | None = None
    """What "selective" recomputes there; None: it is not known."""
    stops_early: bool = False
    """Whether full recomputation stops at the input of the last linear (PyTorch's non-reentrant checkpoints)."""
    overlaps: bool = True
    """Whether the data axis communicates while something computes."""
    unstated: str = "?"
    """What is recomputed if the column is empty."""
    sequence: str = "n"
    """Whether tensor parallelism shards the sequence, too, if the column is empty: "y", "n" or "?"."""
    gradient_bytes: int = 4
    """Of an element of a gradient when it is reduced."""
    vocab: int = 51200
    """If the column is empty."""
    model_gradients: int = 0
    """Bytes of an element of the gradients that it has besides those that are reduced (in the dtype of the model)."""
    later_stages_have_more: bool = False
    """Where layers go that cannot be divided evenly: to the last stages, one each. Otherwise they are divided by cost."""
    step_bytes: int = 0
    """What the optimizer allocates in its step for each element of a shard, in bytes."""
    both_dtypes: bool = False
    """Whether there are gradients in fp32 besides those in the dtype of the model (FSDP: shards of weights and gradients in the
    dtype of the model besides those in fp32)."""
    blocks_stay: bool = False
    """Whether memory is what the allocator has reserved: the step does not get the blocks in which activations were."""
    gib: bool = False
    """Whether memory is in GiB, although it is called GB."""
    logit_bytes: int = 0
    """What a loss that is not computed in chunks keeps for each logit, in bytes."""
    no_memory: str = ""
    """Why memory is not predicted."""
    ulysses: bool = False
    """Whether "cp" shards the sequence as DeepSpeed-Ulysses does, and isp."""
    sharding: str = ""
    """If the column is empty."""
    keeps_scores: bool = False
    """Whether attention keeps its scores."""
    network: float = 0.0
    """Network of a GPU in 10^9 bytes per second; 0: as usual with that GPU."""


BY_OPERATOR = Again(0.5, 0.0, 1.0)  # torchtitan keeps every second matrix product, and attention
EVERY_SECOND_LAYER = Again(0.5, 0.5, 0.5)
NORMS = Again(0.0, 0.0, 0.7)  # norms and the activation
CORE = Again(0.0, 1.0, 0.3)  # the core of attention, arXiv:2205.05198
NODES = "nvidia-smi on some nodes: with what the allocator keeps, and not of the most loaded rank"
ADAMW = 8  # the two intermediate results of PyTorch's foreach AdamW
LOGITS = 10  # in the dtype of the model and in fp32, and their gradient
SOURCES = {
    "foundry": Source(unstated="none"),
    "internevo": Source(
        network=6.25, gradient_bytes=2, later_stages_have_more=True, logit_bytes=LOGITS,
        step_bytes=ADAMW, both_dtypes=True, blocks_stay=True, gib=True,
    ),
    "bridge": Source(attention=0.5),
    "automodel": Source(attention=0.5, unstated="none"),
    "titan": Source(selective=BY_OPERATOR, stops_early=True, sequence="y", logit_bytes=LOGITS),
    "fms": Source(stops_early=True),
    "nemolauncher": Source(unstated="none", vocab=50304, sequence="y"),
    "moezoo": Source(attention=0.5, selective=NORMS),
    "xtuner-moe": Source(attention=0.5, selective=NORMS, unstated="none"),
    "xtuner-long": Source(ulysses=True, sharding="zero3", unstated="full"),  # 70B fit no other way; its FLOPs count it
    "kwai": Source(attention=0.5, selective=NORMS, network=12.5),
    "zerobubble": Source(unstated="none", vocab=50304, keeps_scores=True, gradient_bytes=2),
    "korthikanti": Source(selective=CORE, overlaps=False, keeps_scores=True),
    "ptdp": Source(overlaps=False, keeps_scores=True),
    "megascale": Source(vocab=64000, unstated="none"),
    "bloom": Source(overlaps=False, vocab=250880, network=6.25, keeps_scores=True, no_memory=NODES),
    "nanotron": Source(unstated="none", sequence="?", logit_bytes=LOGITS, model_gradients=2),
    "maxtext": Source(selective=Again(0.0, 0.0, 1.0)),
    "torchao": Source(selective=BY_OPERATOR, stops_early=True),
}  # fmt: skip
GPU_NAMES = {
    "A100-40GB": "a100-40gb", "A100": "a100", "A800": "a800", "H100-96GB-HBM2e": "h100-hbm2e", "H100": "h100", "H800": "h800",
    "H200": "h200", "B200": "b200", "B300": "b300", "GB200": "gb200", "GB300": "gb300", "MI300X": "mi300x",
}  # fmt: skip
"""What a name in the table begins with -> the planner's."""
LATENT = Latent(rank=512, query_rank=1536, plain_dim=128, rotary_dim=64, value_dim=128)
LATENTS = {"DeepSeek-V3": LATENT, "Kimi-K2": LATENT}
"""What a model's name begins with -> its latent attention, from its public config; the table has no columns for it."""
OTHER_SHAPES = (
    "hybrid",
    "GPT-OSS",
    "sliding-window",
    "Llama-4",
    "Nemotron-3",
    "gated delta",
    "parallel transformer block",
)
OTHER_RUNS = {
    "async TP": "asynchronous tensor parallelism",
    "rowwise": "fp8 with a scale for each row",
    "routing not forced": "unbalanced routing, by an unknown amount",
    "natural routing": "unbalanced routing, by an unknown amount",
    "DeepEP": "another exchange of experts: a token is sent once to each node, while others compute",
    "deepep": "another exchange of experts: a token is sent once to each node, while others compute",
    "HybridEP": "another exchange of experts: a token is sent once to each node, while others compute",
    "as in Table 1": "number of model chunks not stated",
    "split not in the copy": "layout not stated",
    "heading says": "the source contradicts itself",
    "shifted cells": "the source contradicts itself",
}
"""Part of a note -> why the row is not predicted."""
EXPLANATIONS = {
    "bloom-065": "the source itself calls it off the trend of the other batch sizes",
    "bloom-090": "other runs with micro-batches of one row lose 5 to 15 % to those with two, this one 30 %: not explained",
    "bloom-126": "not explained: 112 heads in place of 104 (bloom-132) fit to 2 %",
    "bloom-054": "not explained: the same 112 heads with four tensor ranks (bloom-132) fit to 2 %",
    "fms-002": "one of two rows on this GPU: its calibration comes from other sources",
    "foundry-080": "30 billion parameters on eight GPUs, at the end of their memory: 574 TGS, with half the length 814",
    "foundry-120": "an outlier of the source: slower than its neighbours with half and with twice the length",
    "foundry-140": "70 billion parameters on GPUs of 40 GB; the only run of this model on them",
    "foundry-179": "an outlier of the source: 15,555 on 32 GPUs, but 19,001 on 64 and 18,647 on 128",
    "internevo-022": "an outlier of the source: 256 GPUs lose more to 64 than the trend from 16 to 1,024 says",
    "nemolauncher-006": "tensor parallelism that overlaps with products; ours waits",
    "ptdp-016": "ZeRO-3 of 2021 on 2,240 GPUs, from a second-hand copy",
    "titan-007": "the only row of its source with 32,768 tokens: no other says how fast its attention is",
    "foundry-079": "one of two rows of this GPU with several nodes: without it, one row says all about the network",
    "xtuner-long-010": "slower than -011, which has as many tokens per GPU, more attention and exchanges: not explained",
    "xtuner-long-011": "faster than -010, see there",
    "titan-039": "one of five rows on this GPU, and the largest model: the calibration has only seen smaller ones",
}
"""Large errors -> what is known about them, by row."""
MEMORY_EXPLANATIONS = {
    "internevo-058": "5 bytes for each parameter more than ZeRO needs in internevo-055 and -070: not explained",
    "internevo-065": "6 bytes for each parameter more than ZeRO needs in internevo-055 and -070: not explained",
    "internevo-069": "the least memory of the table, of which the buffers of communicators are the largest share",
    "nanotron-014": "the 3.57B model keeps 40 % more for each layer than the 1.34B and 8.86B models do: not explained",
    "nanotron-018": "as nanotron-014",
    "nanotron-025": "as nanotron-014",
    "nanotron-026": "not explained: with two stages in place of four (nanotron-019), the same model fits to 4 %",
    "nanotron-021": "the source has one more GB on 16 GPUs than on 32; its shards explain 0.6 GB",
    "titan-007": "reserved, not allocated: 32,768 tokens leave large blocks of different sizes",
}
"""The same for memory."""
ENDS_HAVE_FEWER = ("first and last stage have one layer fewer", "embeddings as own slots")
"""In a note: the embedding and the head count as a layer, where layers are dealt to stages."""
LOW_GRADIENTS = "mp_mode=PURE"
"""In a note: Composer reduces gradients in the dtype of the model, and not in fp32."""
WITHOUT_GATE = ("GPT", "MPT")
PRECISIONS = {"": "bf16", "bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "mxfp8": "fp8"}


CONTEXT = 1.5e9
"""Bytes of CUDA, its libraries and NCCL, which a source that does not count the allocator's bytes alone has on top."""


def memory(row: Row) -> tuple[float, float]:
    """Returns the predicted and the measured bytes of the most loaded rank.

    Raises:
        NotExpressibleError: with the reason.
    """
    source, note = SOURCES.get(row["id"].rpartition("-")[0]), row["note"]
    if source is not None and source.no_memory:
        raise NotExpressibleError(source.no_memory)
    job = measured({**row, "metric_tokens_per_s_per_gpu": "1"}).job  # any, if it has none
    assert source is not None
    if job.again is not None and not job.work.recomputed:
        raise NotExpressibleError("what selective recomputation keeps")
    allocator = any(word in note for word in ("allocated=", "reserved", "as drawn", "torchtitan"))
    predicted = max(_rank_memory(job, rank, source) for rank in range(job.work.layout.pipeline))
    unit = 2**30 if "GiB" in note or source.gib else 1e9
    return predicted + (0 if allocator else CONTEXT), float(row["metric_memory_gb"]) * unit


def _rank_memory(job: Job, rank: int, source: Source) -> int:
    """Returns the bytes of a rank with what a source has besides what InternEvo has."""
    layout = job.work.layout
    work = replace(job.work, gradient_bytes=job.work.gradient_bytes + source.model_gradients)
    found = planned.on_rank(replace(job, work=work), rank)
    kept, elements = found.kept, found.kept.masters // 4
    passes = found.total
    if rank == layout.rank_of_stage(layout.stages - 1):
        passes += source.logit_bytes * work.tokens * work.decoder.vocab_size // layout.tensor
    if layout.world == layout.pipeline:  # then ours are in fp32
        passes += (source.gradient_bytes - 4) * elements
    if source.both_dtypes:
        passes += 4 * elements
    if source.blocks_stay:
        return passes + source.step_bytes * elements
    return max(passes, passes - kept.activations - found.temporary + source.step_bytes * elements)


def read(path: Path) -> tuple[list[Measured], dict[str, str]]:
    """Returns the rows that can be predicted, and row -> reason for the others. ``derived.csv`` beside it is read, too."""
    derived = path.with_name("derived.csv")
    tgs = {row["id"]: float(row["tokens_per_s_per_gpu_derived"]) for row in rows(derived)} if derived.is_file() else {}
    found, reasons = list[Measured](), dict[str, str]()
    for row in rows(path):
        try:
            found.append(measured(row, tgs.get(row["id"])))
        except NotExpressibleError as reason:
            reasons[row["id"]] = str(reason)
    return found, reasons


def rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(row: Row, derived: float | None = None) -> Measured:
    """Returns a row as a job.

    Raises:
        NotExpressibleError: with the reason.
    """
    name = row["id"].rpartition("-")[0]
    source = SOURCES.get(name)
    if source is None:
        raise NotExpressibleError("the source does not say how it runs")
    note = row["note"]
    if (
        not any(row[f"metric_{key}"] for key in ("tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "iteration_s"))
        and not derived
    ):
        raise NotExpressibleError("no throughput")
    if "LoRA" in note:
        raise NotExpressibleError("LoRA")
    if "task=SFT" in note:
        raise NotExpressibleError("documents of unknown length")
    if any(other in note or other in row["model"] for other in OTHER_SHAPES):
        raise NotExpressibleError("another architecture")
    if row["precision"] not in PRECISIONS:
        raise NotExpressibleError(f"precision {row['precision']}")
    for sign, reason in OTHER_RUNS.items():
        if sign in note:
            raise NotExpressibleError(reason)
    if _number(row, "cp", 1) > 1 and not source.ulysses:
        raise NotExpressibleError("context parallelism")
    if "offload_alpha" in note and float(_item(note, "offload_alpha")) > 0:
        raise NotExpressibleError("activations offloaded to the host")
    gpu = _gpu(row, source)
    decoder = _decoder(row, source)
    job = _job(row, source, decoder)
    return Measured(row, name, gpu, job, _tgs(row, source, job, gpu, derived))


def _number(row: Row, key: str, default: int | None = None) -> int:
    if row[key] in ("", "dp"):
        if default is None:
            raise NotExpressibleError(f"no {key}")
        return default
    return int(float(row[key]))


def _item(note: str, key: str) -> str:
    return next(
        (part.split("=", 1)[1].strip().split(" ")[0] for part in note.split(";") if part.strip().startswith(f"{key}=")), ""
    )


def _gpu(row: Row, source: Source) -> GPU:
    for begin in sorted(GPU_NAMES, key=len, reverse=True):
        if row["gpu"].startswith(begin):
            gpu = GPUS[GPU_NAMES[begin]]
            return replace(gpu, network_gb_per_s=source.network) if source.network else gpu
    raise NotExpressibleError(f"GPU {row['gpu'] or 'not stated'}")


def _decoder(row: Row, source: Source) -> DecoderConfig:
    """A MLP without a gate is as one with a gate and 2/3 of its width: the same FLOPs, weights and activations."""
    d, heads, note = _number(row, "hidden"), _number(row, "heads"), row["note"]
    latent = next((latent for begin, latent in LATENTS.items() if row["model"].startswith(begin)), None)
    if ("MLA" in note) != (latent is not None):
        raise NotExpressibleError("another architecture")
    plain = row["model"].startswith(WITHOUT_GATE)
    ffn = _number(row, "ffn", 4 * d if plain else None)
    experts = None
    if row["experts"]:
        shared, dense = _number(row, "shared_expert_ffn", 0), re.search(r"first (?:(\d+) layers|layer) dense", note)
        experts = Experts(
            _number(row, "experts"), _number(row, "top_k"), _number(row, "expert_ffn", ffn), shared_size=shared,
            dense_layers=tuple(range(int(dense[1] or 1))) if dense and latent else (), shared_gate=latent is None,
        )  # fmt: skip
    return DecoderConfig(
        "llama", _number(row, "vocab", source.vocab), d, round(ffn * 2 / 3) if plain else ffn, _number(row, "layers"), heads,
        heads if latent else _number(row, "kv_heads", heads),
        latent.plain_dim + latent.rotary_dim if latent else _number(row, "head_dim", d // heads),
        tie_embeddings=plain or ("tied" in note and row["params_b"] in ("1.34", "3.57")), experts=experts, latent=latent,
    )  # fmt: skip


def _job(row: Row, source: Source, decoder: DecoderConfig) -> Job:
    gpus, pipeline = _number(row, "gpus"), _number(row, "pp", 1)
    tensor = _number(row, "cp" if source.ulysses else "tp", 1)
    chunks = _number(row, "vp", 1)
    per_chunk = _item(row["note"], "layers_per_virtual_stage")
    if per_chunk and pipeline > 1:
        chunks = decoder.num_layers // pipeline // int(per_chunk)
    if pipeline == 1:
        chunks = 1
    if pipeline > 1 and "chunks not listed" in row["note"]:
        raise NotExpressibleError("number of model chunks not stated")
    mode = {"ZB-1p": "ZBH1", "ZB-2p": "?"}.get(_item(row["note"], "schedule"), "1F1B")
    if mode == "?":
        raise NotExpressibleError("schedule ZB-2p")
    if _item(row["note"], "schedule").startswith("1F1B-I") or "interleaved" in _item(row["note"], "schedule").lower():
        chunks = (decoder.num_layers + 2) // pipeline  # one layer in each, also of the two that have none
    if gpus % (tensor * pipeline):
        raise NotExpressibleError("ranks that do not divide evenly")
    data, micro = gpus // (tensor * pipeline), _number(row, "micro_batch")
    steps = _number(row, "grad_accum", 0) or int(_item(row["note"], "microbatches") or 0)
    if not steps:
        batch = _number(row, "global_batch", micro * data)
        steps, rest = divmod(batch, micro * data)
        if rest or not steps:
            raise NotExpressibleError("a global batch that micro-batches do not divide")
    sequence = row["sp"] or source.sequence
    if tensor > 1 and sequence == "?":
        raise NotExpressibleError("tensor mode not stated")
    sharding = row["zero_stage_or_fsdp"] or source.sharding
    if sharding == "zero2":
        raise NotExpressibleError("ZeRO-2")
    shards = gpus // pipeline if source.ulysses else data
    zero = min(
        _number(row, "zero_group", shards if sharding in ("zero1", "fsdp", "zero3") else 8 if sharding == "hsdp" else 1), shards
    )
    expert = _number(row, "ep", 1)
    if shards % zero or (expert > 1 and gpus // pipeline % expert):
        raise NotExpressibleError("ranks that do not divide evenly")
    inner = tensor if decoder.experts is None or expert == 1 else _number(row, "etp", 1)
    layout = Layout(
        gpus, tensor, "isp" if source.ulysses else "fsp" if sequence == "y" else "mtp", 1, pipeline, zero,
        sharding in ("fsdp", "hsdp", "zero3"), max(1, tensor // decoder.num_kv_heads), chunks, mode,
        expert, inner, max(1, min(zero, gpus // pipeline // (expert * inner))),
    )  # fmt: skip
    if decoder.num_layers < layout.stages:
        raise NotExpressibleError("stages without layers")
    if layout.expert * layout.expert_inner * layout.expert_zero * pipeline > gpus:
        raise NotExpressibleError("ranks that do not divide evenly")
    recompute = row["recompute"] or source.unstated
    if recompute == "?":
        raise NotExpressibleError("recomputation not stated")
    again, share = None, 0.0
    if recompute == "full":
        share, again = 1.0, None if source.stops_early else Again(1.0, 1.0, 1.0)
    elif recompute == "selective":
        again = EVERY_SECOND_LAYER if "ac=selective layer" in row["note"] else source.selective
        hfu = _item(row["note"], "hfu")
        if again is None and hfu and row["metric_mfu"]:
            extra = min(1.0, max(0.0, 3 * (float(hfu) / float(row["metric_mfu"]) - 1)))
            again = Again(extra, extra, extra)
        if again is None:
            raise NotExpressibleError("what is recomputed selectively is not stated")
    fewer = 2 if any(sign in row["note"] for sign in ENDS_HAVE_FEWER) else 0
    each, uneven = divmod(decoder.num_layers + fewer, layout.stages)
    layers = () if uneven or pipeline == 1 else (each,) * layout.stages
    if uneven and source.later_stages_have_more:
        layers = (each,) * (layout.stages - uneven) + (each + 1,) * uneven
    if fewer and layers:
        layers = (each - 1, *layers[2:], each - 1)
    gradient = 2 if LOW_GRADIENTS in row["note"] else source.gradient_bytes
    work = Workload(decoder, layout, micro * _number(row, "seq_len"), steps, 2, gradient, share, False, None, "cuda")
    return Job(
        work, _number(row, "seq_len"), PRECISIONS[row["precision"]],
        overlaps_gradients=source.overlaps, overlaps_weights=source.overlaps and not row["id"].startswith("internevo"),
        compiled=row["compile"] == "y", keeps_scores=source.keeps_scores, again=again, layers=layers,
    )  # fmt: skip


def _tgs(row: Row, source: Source, job: Job, gpu: GPU, derived: float | None) -> float:
    if row["metric_tokens_per_s_per_gpu"]:
        return float(row["metric_tokens_per_s_per_gpu"])
    if row["metric_iteration_s"]:
        return job.global_tokens / job.work.layout.world / float(row["metric_iteration_s"])
    if derived:
        return derived
    decoder, seq_len = job.work.decoder, job.seq_len
    attention = 12.0 * decoder.num_heads * decoder.head_dim * seq_len * decoder.num_layers
    flops = decoder.flops_per_token(seq_len) + (source.attention - 0.5) * attention
    if row["id"].startswith("ptdp"):  # hardware FLOPs: the layers are counted four times, the head three times
        flops = flops * 4 / 3 - 2.0 * decoder.vocab_size * decoder.hidden_size
    if row["metric_mfu"]:
        return float(row["metric_mfu"]) * gpu.peak("bf16") / flops
    return float(row["metric_tflops_per_gpu"]) * 1e12 / flops
