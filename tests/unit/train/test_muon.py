"""Muon compared with PyTorch's, and what it must not change."""

import itertools

import pytest
import torch
from torch import nn

from internevo.config import validate
from internevo.config.training import Adam, Muon
from internevo.models.decoder import Decoder
from internevo.models.families.registry import decoder_config
from internevo.ops.muon import Scale, orthogonalized
from internevo.parallel.layout import Layout
from internevo.parallel.matrices import Matrix, deal, matrices, waves
from internevo.parallel.teams import Team
from internevo.train.check import problems
from internevo.train.optimizer import Optimizer, Orthogonal
from tests.conftest import tiny

ALONE = Layout(1, 1, "mtp", 1, 1, 1, False, muon=True)
SHAPES = {"wide": (6, 16), "tall": (16, 6), "square": (8, 8), "experts": (3, 5, 7), "norm": (4,), "embedding": (9, 4)}
BY_MUON = ("wide", "tall", "square", "experts")


def parameters(seed: int) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}


def muon_of(config: Muon, share: float = 1.0) -> Orthogonal:
    axes = {2: ("heads", "embed"), 3: ("expert", "mlp", "embed")}
    weights = [Matrix(name, SHAPES[name], axes[len(SHAPES[name])]) for name in BY_MUON]
    return Orthogonal(config, [Team(weights, ALONE, None, apart=False)], torch.bfloat16, share)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_steps_are_those_of_pytorchs_muon_and_adamw(scale: Scale, nesterov: bool) -> None:
    mine, theirs = parameters(0), parameters(0)
    experts = [nn.Parameter(expert.clone()) for expert in theirs.pop("experts").detach()]
    adam, config = Adam(lr=1, weight_decay=0.1), Muon(momentum=0.9, nesterov=nesterov, scale=scale)
    optimizer = Optimizer(mine, adam, None, muon_of(config))
    wanted = torch.optim.Muon(
        [*(theirs[name] for name in ("wide", "tall", "square")), *experts],
        lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=scale,
    )  # fmt: skip
    others = [{"params": [theirs["embedding"]], "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.95), eps=adam.adam_eps)
    draw, factor = torch.Generator().manual_seed(1), torch.tensor(0.25)
    for _ in range(8):
        gradients = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        for name, gradient in gradients.items():
            mine[name].grad = gradient * 4
            for parameter, its in zip(experts, gradient, strict=True) if name == "experts" else [(theirs[name], gradient)]:
                parameter.grad = its.clone()
        optimizer.step(0.02, 0.95, factor)
        wanted.step()
        adamw.step()
    theirs["experts"] = nn.Parameter(torch.stack([expert.detach() for expert in experts]))
    for name, parameter in mine.items():
        # Products in bf16 differ by their order. The updates are 8 * 0.02 times numbers up to 1.
        assert (parameter - theirs[name]).abs().max() < (4e-3 if name in BY_MUON else 1e-6), name


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64), (4, 32, 32)):
        x = torch.randn(shape)
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        out = orthogonalized(x, 5)
        values = torch.linalg.diagonal(u.mT @ out @ v.mT) if out.dim() == 2 else (u.mT @ out @ v.mT).diagonal(dim1=-2, dim2=-1)
        assert out.shape == x.shape and 0.3 < values.median() < 1.3 and values.max() < 1.3
        assert torch.linalg.svdvals(out).max() < 1.3


def test_a_step_that_is_skipped_changes_nothing() -> None:
    mine = parameters(0)
    optimizer = Optimizer(mine, Adam(lr=1, weight_decay=0.5), None, muon_of(Muon()))
    for parameter in mine.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1, 0.95)
    before = {name: tensor.clone() for name, tensor in optimizer.checkpoint_tensors().items()}
    for parameter in mine.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step(0.1, 0.95, finite=torch.zeros(()))
    optimizer.skipped()
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.checkpoint_tensors().items())
    assert {name for name in before if "wide" in name} == {"model/wide", "optimizer/wide.momentum_buffer"}
    assert {name for name in before if "norm" in name} == {"model/norm", "optimizer/norm.exp_avg", "optimizer/norm.exp_avg_sq"}


def test_its_own_learning_rate_is_a_share_of_that_of_the_step() -> None:
    updated = []
    for lr, share in ((0.1, 0.5), (0.05, 1.0)):
        mine = parameters(0)
        optimizer = Optimizer(mine, Adam(lr=1), None, muon_of(Muon(), share))
        for parameter in mine.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(lr, 0.95)
        updated.append(mine)
    assert torch.equal(updated[0]["wide"], updated[1]["wide"]) and not torch.equal(updated[0]["norm"], updated[1]["norm"])


def test_which_weights_are_matrices() -> None:
    config = validate(tiny(model_type="QWEN2MOE", model__num_experts=4, model__top_k=2, model__num_shared_experts=1))
    with torch.device("meta"):
        model = Decoder(decoder_config(config.model_type, config.model))
    names = {matrix.name for matrix in matrices(model.numbered_layers())}
    others = {name for name, _ in model.named_parameters()} - names
    assert {"layers.0.attn.q.weight", "layers.1.mlp.experts.gate.weight", "layers.1.mlp.shared.down.weight"} <= names
    assert {"embed.weight", "head.weight", "layers.0.mlp.router.weight", "layers.0.mlp.shared_gate.weight"} <= others
    assert not any(name.endswith("bias") or "norm" in name for name in names)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(8, 2, "mtp", 1, 1, 2, False, expert=1, expert_inner=2, expert_zero=2, muon=True),
        Layout(16, 4, "isp", 4, 1, 4, False, expert=2, expert_inner=4, expert_zero=1, muon=True),
        Layout(6, 1, "mtp", 1, 1, 3, False, expert=1, expert_inner=1, expert_zero=3, muon=True),
        Layout(8, 4, "msp", 1, 1, 2, False, kv_replicas=2, expert=1, expert_inner=4, expert_zero=2, muon=True),
    ],
    ids=str,
)
def test_every_matrix_is_computed_once_from_all_its_parts(layout: Layout) -> None:
    weights = tuple(Matrix(f"{n}", (40 + 8 * (n % 3), 24), (("heads", "kv_heads", "embed")[n % 3], "embed")) for n in range(20))
    jobs = deal(weights, layout, False)
    assert {job.name for job in jobs} == {weight.name for weight in weights} and len(jobs) == len(weights)
    places = [(job.replica, job.owner, job.wave) for job in jobs]
    assert len(set(places)) == len(places), "a rank has one matrix in a wave"
    for job in jobs:
        whole = torch.zeros(job.unit.shape, dtype=torch.int)
        for rank in range(layout.zero * layout.inner):
            if job.sends(rank):
                job.cut(whole, rank).add_(1)
        assert (whole == 1).all()
    view = layout.shards.axes
    everywhere = list(itertools.product(range(view["replicate"]), range(view["shards"])))
    loads = [sum((job.replica, job.owner) == place for job in jobs) for place in everywhere]
    assert max(loads) - min(loads) <= 1
    _agree(weights, layout, False)


def _agree(weights: tuple[Matrix, ...], layout: Layout, apart: bool) -> None:
    """What each rank sends to another one in a wave is what that one expects."""
    view = (layout.expert_shards if apart else layout.shards).axes
    for replica in range(view["replicate"]):
        of_ranks = [waves(weights, layout, apart, replica, rank) for rank in range(view["shards"])]
        for wave in zip(*of_ranks, strict=True):
            assert len({its.travels for its in wave}) == 1
            for a, b in itertools.product(wave, wave):
                assert a.sent[b.rank] == b.received[a.rank] and a.sent_back[b.rank] == b.received_back[a.rank]
            assert all(sum(its.sent) == sum(job.size(its.rank) for job in its.given) for its in wave if its.travels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"muon": {}, "model__lora": {"rank": 2}}, "muon does not update adapters"),
        ({"muon": {"lr": 0.1}, "adam__lr": 0}, "muon.lr = 0.1 follows the schedule of adam.lr, which is 0"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    assert any(message in line for line in problems(validate(tiny(**changes)), 1))


@pytest.mark.parametrize("zero", [2, 16])
def test_experts_that_few_ranks_have_are_computed_by_all(zero: int) -> None:
    layout = Layout(16, 1, "mtp", 1, 1, zero, False, muon=True)
    weights = tuple(Matrix(f"{n}", (4, 8, 6), ("expert", "mlp", "embed")) for n in range(16))
    jobs = deal(weights, layout, False)
    assert len({(job.replica, job.owner) for job in jobs}) == 16
    _agree(weights, layout, False)


def test_the_overflow_of_replicas_is_shared() -> None:
    """Each replica pads what it shares to the largest share."""
    layout = Layout(64, 1, "mtp", 1, 1, 8, False, muon=True)
    weights = tuple(Matrix(f"{n}", (64 * (1 + 2 * (n % 2)), 32), ("mlp", "embed")) for n in range(20))
    spaces = [wave.space * len(wave.shared) for wave in waves(weights, layout, False, 0, 0)]
    assert sum(spaces) <= 1.7 * sum(64 * (1 + 2 * (n % 2)) * 32 for n in range(20)) / 8


def test_parts_of_all_ranks_make_the_whole_of_experts() -> None:
    layout = Layout(8, 1, "mtp", 1, 1, 8, False, expert=2, expert_inner=1, expert_zero=4, muon=True)
    (weight,) = weights = (Matrix("experts", (4, 8, 6), ("expert", "mlp", "embed")),)
    jobs = deal(weights, layout, True)
    assert sum(job.unit.shape[0] for job in jobs) == weight.shape[0] and {job.unit.shape[1:] for job in jobs} == {(8, 6)}
    assert sorted(itertools.chain(*(job.unit.parts for job in jobs))) == list(range(8))
    _agree(weights, layout, True)
