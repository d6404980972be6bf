"""The value and the gradient of every collective, compared with its definition on one process.

All numbers are small integers, so that sums are exact in every dtype, and the comparison is bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from internevo.parallel import collectives
from internevo.parallel.world import World
from tests.pool import Pool

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def summed(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).sum(0, dtype=xs[0].dtype)


def gathered(xs: list[Tensor], dim: int) -> list[Tensor]:
    return [torch.cat(xs, dim)] * len(xs)


def scattered(xs: list[Tensor], dim: int) -> list[Tensor]:
    return list(summed(xs).chunk(len(xs), dim))


def exchanged(xs: list[Tensor]) -> list[Tensor]:
    return [torch.stack([x[rank] for x in xs]) for rank in range(len(xs))]


PLAIN: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "all_gather": lambda xs: gathered(xs, 0),
    "reduce_scatter": lambda xs: scattered(xs, 0),
    "all_reduce": lambda xs: [summed(xs)] * len(xs),
}
"""Collectives without gradients: the inputs of all ranks -> the outputs of all ranks."""
DIFFERENTIABLE: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "copy": lambda xs: xs,
    "reduce": lambda xs: [summed(xs)] * len(xs),
    "gather": lambda xs: gathered(xs, 0),
    "gather_tokens": lambda xs: gathered(xs, 1),
    "scatter_tokens": lambda xs: scattered(xs, 1),
    "exchange": exchanged,
}


@dataclass
class Case:
    """One call on every rank of a group of ``ranks``."""

    name: str
    ranks: int
    shape: tuple[int, ...]
    """Shape of a rank's input."""
    dtype: torch.dtype
    transposed: bool
    """Whether the input is not contiguous in memory."""
    seed: int

    def draw(self, shape: tuple[int, ...], count: int, part: int) -> list[Tensor]:
        """Integers, for ``count`` ranks."""
        generator = torch.Generator().manual_seed(self.seed * 2 + part)
        return [torch.randint(-4, 5, shape, generator=generator).to(self.dtype) for _ in range(count)]

    def inputs(self, world: int) -> list[Tensor]:
        """The inputs of all ranks of the world. The input of ``copy`` is the same on all ranks of a group."""
        xs = self.draw(self.shape, world, 0)
        return [xs[rank // self.ranks * self.ranks] for rank in range(world)] if self.name == "copy" else xs

    def output_gradients(self, shape: torch.Size, world: int) -> list[Tensor]:
        """The gradients of the outputs of all ranks. That of ``reduce`` is the same on all ranks of a group."""
        grads = self.draw(shape, world, 1)
        return [grads[rank // self.ranks * self.ranks] for rank in range(world)] if self.name == "reduce" else grads


@st.composite
def cases(draw: st.DrawFn, names: list[str], dtypes: list[torch.dtype], ranks: int) -> Case:
    name = draw(st.sampled_from(names))
    sizes = st.integers(1, 5)
    if name in ("gather_tokens", "scatter_tokens"):
        shape = [draw(sizes), draw(sizes), draw(sizes)]
        shape[1] *= ranks if name == "scatter_tokens" else 1
    else:
        shape = draw(st.lists(sizes, min_size=1, max_size=4))
        shape[0] = ranks if name == "exchange" else shape[0] * (ranks if name == "reduce_scatter" else 1)
    dtype, transposed = draw(st.sampled_from(dtypes)), draw(st.booleans())
    return Case(name, ranks, tuple(shape), dtype, transposed, draw(st.integers(0, 10**6)))


def call(world: World, batch: list[Case]) -> list[tuple[Tensor, Tensor | None]]:
    """Calls the collectives. Returns the value and the gradient of each on this rank."""
    ranks = batch[0].ranks
    mesh = init_device_mesh(world.device.type, (world.size // ranks, ranks), mesh_dim_names=("outer", "inner"))
    group, found = mesh["inner"].get_group(), []
    for case in batch:
        x = case.inputs(world.size)[world.rank].to(world.device)
        if case.transposed:
            x = x.movedim(0, -1).contiguous().movedim(-1, 0)
        differentiable = case.name in DIFFERENTIABLE
        x.requires_grad_(differentiable)
        out = getattr(collectives, case.name)(x, group)
        if differentiable:
            out.backward(case.output_gradients(out.shape, world.size)[world.rank].to(world.device))
        found.append((out.detach().cpu(), None if x.grad is None else x.grad.cpu()))
    return found


def defined(case: Case, world: int) -> list[tuple[Tensor, Tensor | None]]:
    """Returns the value and the gradient for every rank, computed by the definition on one process."""
    found: list[tuple[Tensor, Tensor | None]] = []
    inputs = case.inputs(world)
    for first in range(0, world, case.ranks):
        xs = inputs[first : first + case.ranks]
        if case.name in PLAIN:
            found += [(out, None) for out in PLAIN[case.name](xs)]
            continue
        xs = [x.clone().requires_grad_() for x in xs]
        if case.name == "copy":
            xs = [xs[0]] * case.ranks  # one tensor, which every rank has
        outs = DIFFERENTIABLE[case.name](xs)
        out_grads = case.output_gradients(outs[0].shape, world)[first : first + case.ranks]
        if case.name == "reduce":
            outs[0].backward(out_grads[0])  # one result, which every rank has
        else:
            torch.autograd.backward(outs, out_grads)
        found += [(out.detach(), x.grad) for out, x in zip(outs, xs, strict=True)]
    return found


def compare(pool: Pool, processes: int, batch: list[Case]) -> None:
    results = pool.run(call, processes, batch)
    for number, case in enumerate(batch):
        wanted = defined(case, processes)
        assert len(results) == len(wanted) == processes
        for rank, (out, grad) in enumerate(wanted):
            found, found_grad = results[rank][number]
            assert found.dtype == out.dtype and torch.equal(found, out), (case, rank)
            assert (found_grad is None) == (grad is None)
            assert grad is None or torch.equal(found_grad, grad), (case, rank)


@pytest.mark.parametrize(("processes", "ranks"), [(2, 2), (3, 3), (4, 4), (4, 2)])
@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_values_and_gradients_are_those_of_the_definition(pool: Pool, processes: int, ranks: int, data: Any) -> None:
    """In groups of all ranks and in smaller groups; also with inputs that are not contiguous."""
    batch = []
    for name in (*DIFFERENTIABLE, *PLAIN):
        dtypes = FLOATS if name in DIFFERENTIABLE else [*FLOATS, torch.int64, torch.int32]
        batch += data.draw(st.lists(cases([name], dtypes, ranks), min_size=1, max_size=4))
    compare(pool, processes, batch)


def results_stay(world: World) -> list[Tensor]:
    """Changes the input of a collective before its result is read."""
    group = torch.distributed.group.WORLD
    x = torch.full((4,), float(world.rank + 1), device=world.device)
    kept = []
    for name in PLAIN:
        out = getattr(collectives, name)(x, group)
        x.zero_()
        kept.append(out.cpu())
        x.fill_(world.rank + 1)
    return kept


def test_a_result_is_complete_when_it_is_returned(pool: Pool) -> None:
    one, two = pool.run(results_stay, 2)
    assert [x.tolist() for x in one] == [[1.0] * 4 + [2.0] * 4, [3.0] * 2, [3.0] * 4]
    assert [x.tolist() for x in two] == [[1.0] * 4 + [2.0] * 4, [3.0] * 2, [3.0] * 4]


def test_tokens_first_makes_the_sequence_dimension_0() -> None:
    x = torch.arange(24).view(2, 3, 4)
    first = collectives.tokens_first(x)
    assert first.is_contiguous() and torch.equal(first, torch.stack([x[:, s] for s in range(3)]))
