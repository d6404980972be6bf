"""The memory of a rank, by formula. (``tests/parallel/test_memory.py`` compares it with real steps.)"""

import math
import random
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from internevo.config import validate
from internevo.models.config import DecoderConfig, Experts, Latent, Rope, Stage
from internevo.models.decoder import Decoder
from internevo.models.families.registry import decoder_config
from internevo.models.layers import DecoderLayer
from internevo.models.linear import Linear
from internevo.models.moe import ExpertLinear
from internevo.parallel import data_axis, expert, isp, plan, prefetch, tensor
from internevo.parallel.layout import Layout
from internevo.parallel.memory import Elements
from internevo.parallel.pretended import NoMemory, pretend
from internevo.parallel.stages import split
from internevo.parallel.strategy import Workload
from tests.conftest import tiny
from tests.parallel.layouts import EXPERTS


def work(mode: str, chunks: int, ranks: int, micro_batches: int, rank: int = 0, **changes: object) -> Workload:
    pipeline = {"size": ranks, "mode": mode}
    config = validate(tiny(model__num_layers=6, model__num_chunks=chunks, parallel__pipeline=pipeline, **changes))
    decoder, layout = decoder_config(config.model_type, config.model), Layout.from_config(config, 2 * ranks)
    return Workload.from_config(decoder, config, layout, micro_batches, "cpu", 2 * rank)


@pytest.mark.parametrize(("mode", "chunks"), [("1F1B", 1), ("1F1B", 2), ("ZBH1", 1), ("ZBV", 2)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_few_micro_batches_say_what_many_need(
    monkeypatch: pytest.MonkeyPatch, mode: str, chunks: int, recomputed: bool
) -> None:
    more = {"model__checkpoint": recomputed, "model__dtype": "torch.bfloat16"}
    asked = [work(mode, chunks, 3, count, rank, **more) for rank in range(3) for count in (36, 37, 38)]
    short = [plan.memory(each) for each in asked]
    monkeypatch.setattr(plan, "enough", lambda micro_batches, ranks: micro_batches)
    for mine, theirs in zip(short, map(plan.memory, asked), strict=True):
        assert (mine.total, mine.state) == (theirs.total, theirs.state)
        assert mine.after.micro_batch <= theirs.after.micro_batch


def test_any_number_of_micro_batches_takes_no_time() -> None:
    assert plan.memory(work("ZBV", 2, 3, 10**9)) == plan.memory(work("ZBV", 2, 3, 10**9 + 3))
    assert plan.memory(work("1F1B", 1, 1, 10**9)).after.kind == "F"


def test_later_ranks_of_1f1b_keep_fewer_micro_batches() -> None:
    kept = [plan.memory(work("1F1B", 1, 3, 6, rank)).activations for rank in range(3)]
    assert kept[0] > kept[1] > kept[2]


# The parameters of a rank, without building its model ------------------------------------------------------------------


def of_a_model(work: Workload, stage: Stage) -> tuple[list[list[plan.OnRank]], list[list[plan.OnRank]]]:
    """What ``plan._on_rank`` says, from a model on the meta device."""
    layout, inner = work.layout, isp if work.layout.mode == "isp" else tensor
    with torch.device("meta"):
        model = Decoder(work.decoder, stage)
    found: dict[int, plan.OnRank] = {}
    for module in model.modules():
        axes = tuple(getattr(module, "axes", ()))
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, ExpertLinear):
                on_rank = plan.OnRank(expert.shape_on_rank(parameter.shape, axes, layout), None, True, True, True)
            else:
                shape, partial = (
                    inner.shape_on_rank(parameter.shape, axes, name, layout),
                    inner.partial_axis(axes, name, layout),
                )
                weight = isinstance(module, Linear) and name == "weight"
                on_rank = plan.OnRank(shape, partial, weight, False, weight and axes[0] != "one")
            found[id(parameter)] = on_rank
    bucket = None if layout.fsdp else work.bucket_elements
    joined = data_axis.units(model, bucket, lambda p: math.prod(found[id(p)].shape), layout.experts_apart)
    experts = prefetch.experts_in([model]) if layout.experts_apart else []
    of_experts = [[found.pop(id(parameter)) for parameter in unit.parameters()] for unit in experts]
    return [[found.pop(id(p)) for m in unit for p in m.parameters() if id(p) in found] for unit in joined], of_experts


DENSE = DecoderConfig("llama", 96, 64, 128, 6, 8, 4, 8, qkv_bias=True)
SHAPES = [
    DENSE,
    replace(DENSE, tie_embeddings=True, qk_norm=True, windows=(4, 0) * 3, rope=Rope(kind="linear", factor=2.0)),
    replace(DENSE, experts=Experts(8, 2, 32, shared_size=32, dense_layers=(0, 3))),
    replace(DENSE, num_kv_heads=2, experts=Experts(4, 2, 32)),
    replace(
        DENSE, num_kv_heads=8, head_dim=12, latent=Latent(12, 16, 8, 4, 8),
        experts=Experts(8, 2, 32, shared_size=32, shared_gate=False, dense_layers=(0,)),
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(24))
def test_the_parameters_of_a_rank_are_those_of_its_model(number: int) -> None:
    drawn = random.Random(number)
    mode, tensor_ranks, decoder = drawn.choice(["mtp", "msp", "fsp", "isp"]), drawn.choice([1, 2, 4]), drawn.choice(SHAPES)
    weight = drawn.choice([1, 2, 4]) if mode == "isp" else 1
    inner = weight if mode == "isp" else tensor_ranks
    expert_ranks, expert_inner = (drawn.choice([1, 2, 4]), drawn.choice([1, inner])) if decoder.experts else (1, inner)
    pipeline, chunks, schedule = drawn.choice([(1, 1, "1F1B"), (2, 1, "1F1B"), (3, 1, "ZBH1"), (2, 3, "1F1B"), (3, 2, "ZBV")])
    layout = Layout(
        pipeline * 16, tensor_ranks, mode, weight, pipeline, drawn.choice([1, 2, 4]),
        drawn.random() < 0.4 and schedule == "1F1B",
        max(1, tensor_ranks // decoder.num_kv_heads) if mode != "isp" else 1, chunks, schedule, expert_ranks, expert_inner, 2,
    )  # fmt: skip
    bucket = drawn.choice([None, 30_000, 100_000])
    work = Workload(decoder, layout, 64, 8, 2, 4, 0.0, False, bucket, "cuda")
    for stage in split(decoder, layout.stages, 32):
        units, experts = of_a_model(work, stage)
        units = [unit for unit in units if unit]
        found, of_experts = plan._on_rank(work, stage)
        assert [sorted(unit, key=str) for unit in found] == [sorted(unit, key=str) for unit in units]
        assert of_experts == experts
        dense, routed = list(chain(*units)), list(chain(*experts))
        deferred = [parameter.shape for parameter in (*dense, *routed) if parameter.deferred]
        expected = Elements.of(work, [p.shape for p in dense], [p.shape for p in routed], deferred)
        if stage.heads:
            expected = expected._replace(head=Elements.of(work, [p.shape for p in units[-1]], [], []).gathered)
        assert plan.elements(replace(work, stages=(stage,))) == expected


@pytest.mark.parametrize("changes", [{}, EXPERTS, {**EXPERTS, "parallel__expert": {"size": 1, "no_tp": True}}], ids=str)
def test_a_layer_is_compiled_as_a_whole_if_no_hook_of_the_data_axis_is_inside(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Compiled code that must be whole cannot call the hooks of ``fully_shard``."""
    asked = dict[DecoderLayer, bool]()
    monkeypatch.setattr(DecoderLayer, "compile", lambda layer, fullgraph: asked.update({layer: fullgraph}))
    split = {"parallel__tensor": {"size": 2, "mode": "msp"}, "model__vocab_size": 104, "model__compile": True}
    config = validate(tiny(**{**split, **changes}))
    with pretend(0, 4) as world, NoMemory().building():
        layout = Layout.from_config(config, 4)
        plan.build(decoder_config(config.model_type, config.model), config, layout, world.device)
    assert len(asked) == config.model.num_layers
    for layer, whole in asked.items():
        assert whole is not any(isinstance(part, FSDPModule) for part in layer.modules() if part is not layer)
