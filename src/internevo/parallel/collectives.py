"""Collectives as autograd functions: what one does forward, its conjugate does backward.

| function           | forward                        | backward                       |
|--------------------|--------------------------------|--------------------------------|
| ``copy``           | nothing                        | all-reduce                     |
| ``reduce``         | all-reduce                     | nothing                        |
| ``gather``         | all-gather of the first axis   | reduce-scatter of it           |
| ``gather_tokens``  | all-gather of the sequence     | reduce-scatter of the sequence |
| ``scatter_tokens`` | reduce-scatter of the sequence | all-gather of the sequence     |
| ``exchange``       | all-to-all                     | all-to-all                     |

They are PyTorch's functional collectives, which a compiler can trace; each returns its result when it is there. Those that are
started here and waited for elsewhere have names of their own (``start_...``).
Shapes: B rows, S tokens, t ranks of the group, D anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

Group = dist.ProcessGroup


def wait(x: Tensor) -> Tensor:
    """What a started collective gives, when it is there."""
    return functional.wait_tensor(x)


def start_all_gather(parts: Sequence[Tensor], group: Group) -> list[Tensor]:
    """[N, ...] of each rank -> [t * N, ...], several tensors in one call. To be waited for with ``wait``."""
    given = [_given(part) for part in parts]
    if len(given) == 1:
        return [_plain(functional.all_gather_single(given[0], 0, group))]
    return [_plain(whole) for whole in functional.all_gather_single_coalesced(given, group)]


def start_reduce_scatter(wholes: Sequence[Tensor], group: Group) -> list[Tensor]:
    """[t * N, ...] of each rank -> the sums' [N, ...], several tensors in one call. To be waited for with ``wait``."""
    given = [_given(whole) for whole in wholes]
    if len(given) == 1:
        return [_plain(functional.reduce_scatter_single(given[0], "sum", 0, group))]
    return [_plain(part) for part in functional.reduce_scatter_single_coalesced(given, "sum", [0] * len(given), group)]


def _given(x: Tensor) -> Tensor:
    """A collective's input: contiguous, and outside autograd: gloo's threads have it on and would record their copies."""
    return x.detach().contiguous()


def _plain(x: Tensor) -> Tensor:
    """Without the wrapper that waits at first use: it is waited for explicitly."""
    return x.elem if isinstance(x, functional.AsyncCollectiveTensor) else x


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[N, ...] of each rank -> [t * N, ...]."""
    return wait(functional.all_gather_single(_given(x), 0, group))


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """[t * N, ...] of each rank -> the sum's [N, ...]."""
    return wait(functional.reduce_scatter_single(_given(x), "sum", 0, group))


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks."""
    return wait(functional.all_reduce(_given(x), "sum", group))


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """[t, ...] of each rank: part r goes to rank r."""
    return wait(functional.all_to_all_single(_given(x), None, None, group))


def tokens_first(x_BSD: Tensor) -> Tensor:
    """[S, B, D]: sequences are gathered and scattered along the first axis. Free of cost for one (packed) row."""
    return x_BSD.transpose(0, 1).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[override, no-untyped-def]
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        return reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        return all_gather(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.group = group
        return all_to_all(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        return all_to_all(grad, ctx.group), None


def copy(x: Tensor, group: Group) -> Tensor:
    """The same on every rank; its gradient is the sum of the ranks' parts."""
    return _Copy.apply(x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' parts; each part has the sum's gradient."""
    return _Reduce.apply(x, group)


def gather(x: Tensor, group: Group) -> Tensor:
    """[N, ...] of each rank -> [t * N, ...]."""
    return _Gather.apply(x, group)


def gather_tokens(x_BSD: Tensor, group: Group) -> Tensor:
    """[B, S/t, D] -> [B, S, D]."""
    return gather(tokens_first(x_BSD), group).transpose(0, 1)


def scatter_tokens(x_BSD: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' [B, S, D], of which each keeps its [B, S/t, D]."""
    return _Scatter.apply(tokens_first(x_BSD), group).transpose(0, 1)


def exchange(x_tN: Tensor, group: Group) -> Tensor:
    """[t, ...]: part r of every rank goes to rank r."""
    return _Exchange.apply(x_tN, group)
