"""The cost model: formulas against examples that are computed by hand, and properties that any machine has."""

import math
from collections import Counter
from dataclasses import fields, replace
from itertools import product

import pytest

from internevo.models.config import DecoderConfig, Experts, Latent
from internevo.parallel import orders, plan
from internevo.parallel.layout import Layout
from internevo.parallel.strategy import Workload, add_up
from internevo.planner import counts, flops, kernels, links, step, timing
from internevo.planner.calibration import EFFICIENCIES, Calibration
from internevo.planner.flops import Amounts
from internevo.planner.hardware import GPUS
from internevo.planner.job import Again, Job
from internevo.planner.links import Group

DENSE = DecoderConfig("llama", 32000, 4096, 11008, 32, 32, 8, 128)
TINY = DecoderConfig("llama", 96, 64, 96, 6, 4, 2, 16)
SPARSE = replace(TINY, experts=Experts(8, 2, 48, shared_size=32))
IDEAL = Calibration(*(1.0 if field.name in EFFICIENCIES else 0.0 for field in fields(Calibration)))
A100 = GPUS["a100"]


def job(
    layout: Layout, decoder: DecoderConfig = DENSE, micro_batches: int = 4, seq_len: int = 2048, recomputed: float = 0.0
) -> Job:
    return Job(Workload(decoder, layout, seq_len, micro_batches, 2, 4, recomputed, False, None, "cuda"), seq_len)


def one() -> Layout:
    return Layout(1, 1, "mtp", 1, 1, 1, False)


def forward_flops_per_token(job: Job) -> float:
    """FLOPs of the forward pass of the whole model for one token, on all ranks together."""
    passes = flops.stage(job, range(job.work.decoder.num_layers), True).forward
    return (passes.products + passes.head + passes.attention) * job.work.layout.tensor / job.work.tokens


@pytest.mark.parametrize("windows", [(), (256,) * 32], ids=["all", "windows"])
def test_forward_flops_are_a_third_of_those_of_training(windows: tuple[int, ...]) -> None:
    decoder = replace(DENSE, windows=windows)
    norms = 2 * (2 * decoder.num_layers + 1) * decoder.hidden_size  # counted as weights there
    expected = decoder.flops_per_token(2048) / 3 - norms
    assert forward_flops_per_token(job(one(), decoder)) == pytest.approx(expected, rel=1e-12)


def test_the_chosen_experts_alone_compute() -> None:
    norms = 2 * (2 * SPARSE.num_layers + 1) * SPARSE.hidden_size + 2 * SPARSE.num_layers * SPARSE.hidden_size  # and the gate
    expected = SPARSE.flops_per_token(128) / 3 - norms
    assert forward_flops_per_token(job(one(), SPARSE, seq_len=128)) == pytest.approx(expected, rel=1e-12)


def test_documents_shorten_attention_and_nothing_else() -> None:
    rows = job(one())
    whole, parts = (flops.layer(j, 0, False).forward for j in (rows, replace(rows, document_len=512)))
    assert parts.attention == whole.attention / 4 and parts._replace(attention=whole.attention) == whole


@pytest.mark.parametrize("mode", ["mtp", "msp", "fsp", "isp"])
def test_a_tensor_group_divides_the_products_among_its_ranks(mode: str) -> None:
    alone = flops.stage(job(one()), range(32), True)
    shared = flops.stage(job(Layout(4, 4, mode, 4 if mode == "isp" else 1, 1, 1, False)), range(32), True)
    for whole, part in zip(alone, shared, strict=True):
        assert part.products == pytest.approx(whole.products / 4)
        assert part.attention == pytest.approx(whole.attention / 4)


@pytest.mark.parametrize(("recomputed", "products"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_recomputation_stops_at_the_input_of_the_last_linear(recomputed: float, products: float) -> None:
    passes = flops.stage(job(one(), recomputed=recomputed), range(32), False)
    down = 2 * 2048 * 4096 * 11008 * 32
    assert passes.again.products == pytest.approx(products * (passes.forward.products - down))
    assert passes.again.attention == pytest.approx(products * passes.forward.attention)


LATENT = replace(DENSE, num_kv_heads=32, head_dim=192, latent=Latent(512, 1536, 128, 64, 128))


@pytest.mark.parametrize("decoder", [DENSE, LATENT], ids=["grouped", "latent"])
def test_recomputed_attention_computes_all_its_linears_but_the_last(decoder: DecoderConfig) -> None:
    this = job(one(), decoder)
    again = flops.layer(replace(this, work=replace(this.work, recomputed="attention")), 0, False).again
    expected = sum(2 * 2048 * linear.inputs * linear.outputs for name, linear in decoder.projections().items() if name != "o")
    assert again.products == pytest.approx(expected)


def test_what_is_recomputed_can_be_given() -> None:
    passes = flops.layer(replace(job(one()), again=Again(0.5, 0.0, 1.0)), 0, False)
    assert passes.again.products == passes.forward.products / 2 and passes.again.attention == 0


def test_kept_scores_are_moved_and_the_masked_half_is_computed() -> None:
    this = job(one())
    fused, scores = (flops.layer(j, 0, False) for j in (this, replace(this, keeps_scores=True)))
    pairs = 2048 * 2048 * 32
    assert scores.forward.attention == 4 * pairs * 128 == 2 * fused.forward.attention
    assert scores.inputs.attention == 2 * scores.forward.attention  # and not 2.5 times: the scores are there
    assert scores.forward.memory - fused.forward.memory == pytest.approx(11 * pairs)
    odd = job(one(), replace(DENSE, head_dim=108))
    assert flops.layer(replace(odd, keeps_scores=True), 0, False).forward.attention == 4 * 4 * pairs * 108
    assert flops.layer(odd, 0, False).forward.attention == 2 * pairs * 108  # one kernel pads it in registers


def test_the_first_unit_communicates_alone() -> None:
    half = replace(IDEAL, overlap=0.5)
    assert step.exposed(4.0, 10.0, half) == 2.0 and step.exposed(4.0, 1.0, half) == 3.5
    assert step.exposed(4.0, 10.0, IDEAL, 1.0) == 1.0 and step.exposed(4.0, 10.0, IDEAL, 4.0) == 4.0
    embedding, rest = 32000 * 4096, 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 11008 + 2 * 4096)
    (stage,) = counts.count(job(Layout(8, 1, "mtp", 1, 1, 8, False))).stages
    assert stage.first == pytest.approx(embedding / (2 * embedding + rest + 4096))


def test_a_roofline_by_hand() -> None:
    # 312e12 FLOPs take a second, 2039e9 bytes another one, and attention at the half of its peak a third and a fourth.
    amounts = Amounts(products=156e12, head=156e12, moved=1000e9, memory=1039e9, attention=312e12)
    assert kernels.seconds(amounts, A100, replace(IDEAL, attention=0.5)) == pytest.approx(4.0)
    assert kernels.seconds(Amounts(kernels=100), A100, replace(IDEAL, launch=1e-5)) == pytest.approx(1e-3)


H100 = GPUS["h100"]  # 450 GB/s inside, 50 GB/s across


@pytest.mark.parametrize(
    ("kind", "group", "expected"),
    [
        ("all-gather", Group(8, 1), 7 / 8 / 450),
        ("all-reduce", Group(8, 1), 2 * 7 / 8 / 450),
        ("reduce-scatter", Group(16, 1), 15 / 16 / 400),  # eight network cards of 50 GB/s
        ("all-gather", Group(16, 8), 15 / 16 / 50),  # one rank in each node: one card
        ("all-gather", Group(8, 2), 7 / 8 / 200),  # four ranks in each of two nodes
        ("all-gather", Group(12, 1), 11 / 12 / 200),  # eight ranks in one node and four in another
        ("all-gather", Group(3, 1), 2 / 3 / 50),  # ranks 6, 7 | 8
        ("all-to-all", Group(16, 1), 8 / 16 / 50),
        ("all-to-all", Group(8, 1), 7 / 8 / 450),
        ("send", Group(2, 1), 1 / 450),
        ("send", Group(2, 8), 1 / 50),
        ("all-gather", Group(1, 1), 0.0),
    ],
)
def test_bytes_of_collectives_by_hand(kind: str, group: Group, expected: float) -> None:
    assert links.seconds(kind, 1, 1e9, group, H100, IDEAL) == pytest.approx(expected)


@pytest.mark.parametrize("node", [3, 4, 8])
def test_the_ranks_of_a_group_in_a_node_are_the_fewest_of_all_groups(node: int) -> None:
    world = 24 * node
    for size, stride in product(range(1, 13), range(1, 9)):
        if world % (size * stride) == 0:
            starts = [block + place for block in range(0, world, size * stride) for place in range(stride)]
            groups = [Counter((start + number * stride) // node for number in range(size)) for start in starts]
            fewest = min(min(group.values()) for group in groups)
            assert Group(size, stride).in_node(node) == fewest


def test_a_world_that_is_smaller_than_a_node_is_inside_it() -> None:
    this = replace(H100, network_gb_per_s=1e-6)
    layout = Layout(7, 1, "mtp", 1, 1, 7, False)
    inside, across = (step.predict(job(layout, DENSE), replace(this, gpus_per_node=n), IDEAL).step for n in (8, 1))
    assert inside < 10 < across


@pytest.mark.parametrize(
    ("stride", "hops"), [(1, 6 * [450]), (2, 6 * [450]), (4, 2 * [450, 50, 450]), (8, 6 * [50]), (3, 6 * [50])]
)
def test_some_messages_of_a_pipeline_go_to_another_node(stride: int, hops: list[int]) -> None:
    """One micro-batch goes through four ranks and back. Two of them are in a node, if four GPUs are between neighbours."""
    found = step.hops_of(counts.Message("send", 1, 1e9, Group(2, stride)), H100, IDEAL)
    passes = timing.seconds("1F1B", 4, 1, 1, 4 * [1.0, 2.0, 0.0], found)
    assert passes == pytest.approx(12 + sum(1 / gb_per_s for gb_per_s in hops))


def test_latencies_of_collectives_by_hand() -> None:
    slow = replace(IDEAL, hop_inside=1.0, hop_across=100.0)
    assert links.seconds("all-gather", 3, 0, Group(8, 1), H100, slow) == 3 * 7
    assert links.seconds("all-gather", 1, 0, Group(16, 1), H100, slow) == 15 * 100  # each step is as slow as its slowest link
    assert links.seconds("all-reduce", 1, 0, Group(1024, 8), H100, slow) == 2 * 1023 * 100
    assert links.seconds("all-to-all", 1, 0, Group(16, 1), H100, slow) == 4 * 100
    assert links.seconds("send", 2, 0, Group(2, 8), H100, slow) == 200


def test_a_collective_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="gossip"):
        links.seconds("gossip", 1, 1, Group(2, 1), H100, IDEAL)


@pytest.mark.parametrize(
    ("mode", "pipeline", "chunks", "micro_batches"), [("1F1B", 4, 1, 7), ("1F1B", 3, 2, 6), ("ZBH1", 4, 1, 6), ("ZBV", 3, 2, 6)]
)
def test_a_schedule_takes_as_long_as_it_does_when_played(mode: str, pipeline: int, chunks: int, micro_batches: int) -> None:
    times = [1.0 + 0.1 * n for n in range(3 * pipeline * chunks)]
    for n in range(2, len(times), 3):
        times[n] *= mode != "1F1B"
    played = orders.play(
        orders.orders(mode, pipeline, chunks, micro_batches), lambda a: times[3 * a.stage + "FBW".index(a.kind)], 0.3
    )
    expected = max(rank[-1].end for rank in played)
    assert timing.seconds(mode, pipeline, chunks, micro_batches, times, timing.Hops(across=0.3)) == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["1F1B", "ZBH1", "ZBV"])
@pytest.mark.parametrize("micro_batches", [16, 19, 64])
def test_many_micro_batches_need_not_be_played(mode: str, micro_batches: int) -> None:
    chunks = 2 if mode == "ZBV" else 1
    times = [1.0, 2.0 if mode == "1F1B" else 1.0, float(mode != "1F1B")] * 4 * chunks
    played = timing.compiled(mode, 4, chunks, micro_batches, 1).seconds(times, timing.Hops(across=0.01), 4)
    assert timing.seconds(mode, 4, chunks, micro_batches, times, timing.Hops(across=0.01)) == pytest.approx(played, rel=0.02)


def test_the_bubble_of_1f1b() -> None:
    """(p - 1) (F + B), arXiv:2104.04473."""
    assert timing.seconds("1F1B", 4, 1, 8, [1.0, 2.0, 0.0] * 4, timing.Hops()) == pytest.approx((8 + 3) * 3.0)


LAYOUTS = [
    Layout(8, 1, "mtp", 1, 1, 8, False), Layout(8, 1, "mtp", 1, 1, 4, True), Layout(8, 2, "mtp", 1, 1, 4, False),
    Layout(8, 2, "fsp", 1, 2, 2, False), Layout(8, 2, "msp", 1, 1, 2, True), Layout(8, 2, "isp", 4, 1, 2, False),
    Layout(8, 1, "mtp", 1, 1, 8, False, expert=4, expert_zero=2), Layout(8, 2, "isp", 2, 1, 4, False, expert=2, expert_zero=4),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("recomputed", [0.0, 1.0])
def test_what_it_counts_is_what_the_strategies_say(layout: Layout, recomputed: float) -> None:
    """The same bytes over the same axes as ``plan.traffic`` for one stage, in one step of one micro-batch."""
    decoder = SPARSE if layout.expert > 1 else TINY
    one_step = job(layout, decoder, 1, 32, recomputed=recomputed)
    counted = dict[tuple[str, int, int], float]()
    stage = counts.count(one_step).stages[0]
    for m in (*stage.waited, *stage.prefetched, *stage.gathered, *stage.reduced):
        key = m.kind, m.group.size, m.group.stride
        counted[key] = counted.get(key, 0) + m.nbytes
    work = replace(one_step.work, stages=(one_step.stages()[0],))
    groups, expected = counts.groups_of(layout), dict[tuple[str, int, int], float]()
    for row in add_up(plan.traffic(work), layout):
        if row.axis in groups and row.kind != "send":
            key = row.kind, *groups[row.axis]
            expected[key] = expected.get(key, 0) + row.nbytes
    for key in counted.keys() | expected.keys():  # shards of uneven size and sums of the gradients of norms are left out
        assert counted.get(key, 0) == pytest.approx(expected.get(key, 0), rel=0.02, abs=0.01 * sum(expected.values())), key


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_add_up_and_better_machines_are_faster(layout: Layout) -> None:
    decoder = replace(DENSE, experts=Experts(8, 2, 4096)) if layout.expert > 1 else DENSE
    this = job(layout, decoder)
    before = step.predict(this, A100, Calibration())
    parts = before.compute + before.communication + before.bubble + before.optimizer + before.other
    assert parts == pytest.approx(before.step, rel=0.05) and before.bubble >= -1e-12
    for name in ("bf16_tflops", "memory_gb_per_s", "node_gb_per_s", "network_gb_per_s"):
        faster = replace(A100, **{name: 2 * getattr(A100, name)})
        assert step.predict(this, faster, Calibration()).step <= before.step
    for name in EFFICIENCIES:
        assert step.predict(this, A100, replace(Calibration(), **{name: 0.95})).step <= before.step
    longer = step.predict(replace(this, work=replace(this.work, micro_batches=8)), A100, Calibration())
    assert longer.step > before.step and longer.tgs >= before.tgs


def test_unbalanced_experts_take_longer() -> None:
    this = job(LAYOUTS[-2], replace(DENSE, experts=Experts(8, 2, 4096)))
    even, uneven = (step.predict(replace(this, imbalance=n), A100, Calibration()) for n in (1.0, 1.5))
    assert uneven.step > even.step


def test_a_perfect_gpu_has_an_mfu_of_almost_one() -> None:
    gpu = replace(A100, memory_gb_per_s=1e12)
    found = step.predict(job(one(), seq_len=256), gpu, IDEAL)
    assert found.mfu == pytest.approx(1.0, abs=0.01)
    assert found.tflops * 1e12 == pytest.approx(found.tgs * DENSE.flops_per_token(256))


def test_a_budget_by_hand() -> None:
    prediction = replace(step.predict(job(one()), A100, Calibration()), tgs=1000.0)
    costs = step.budget(36e9, prediction, 100, A100)
    assert (costs.hours, costs.gpu_hours, costs.megawatt_hours, costs.dollars) == pytest.approx((100, 1e4, 4.0, 2e4))
    assert math.isfinite(costs.dollars)
