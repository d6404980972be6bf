"""Collectives as autograd functions: the backward pass of each is the conjugate collective.

| function           | forward                        | backward                       |
|--------------------|--------------------------------|--------------------------------|
| ``copy``           | nothing                        | all-reduce                     |
| ``reduce``         | all-reduce                     | nothing                        |
| ``gather``         | all-gather along dimension 0   | reduce-scatter along it        |
| ``gather_tokens``  | all-gather of the sequence     | reduce-scatter of the sequence |
| ``scatter_tokens`` | reduce-scatter of the sequence | all-gather of the sequence     |
| ``exchange``       | all-to-all                     | all-to-all                     |
| ``Travel``         | all-to-all of uneven parts     | the same, back                 |
| ``share_tokens``   | nothing (own tokens)           | all-gather of the sequence     |
| ``join_tokens``    | all-gather of the sequence     | nothing (own tokens)           |

They use PyTorch's functional collectives, which ``torch.compile`` can trace. All functions but ``start_...`` return when their
result is complete; the results of ``start_...`` must be passed to ``wait``.
Shapes: B rows, S tokens, t ranks of the group, D any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

Group = dist.ProcessGroup


def wait(x: Tensor) -> Tensor:
    """Waits for the result of a started collective, and returns it."""
    return functional.wait_tensor(x)


def start_all_gather(parts: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Starts one all-gather of several tensors: [N, ...] of each rank -> [t * N, ...].

    ``wait`` for each result before its use.
    """
    inputs = [_as_input(part) for part in parts]
    if len(inputs) == 1:
        return [_unwrap(functional.all_gather_single(inputs[0], 0, group))]
    return [_unwrap(whole) for whole in functional.all_gather_single_coalesced(inputs, group)]


def start_reduce_scatter(wholes: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Starts one reduce-scatter of several tensors: [t * N, ...] of each rank -> this rank's [N, ...] of the sum.

    ``wait`` for each result before its use. The tensors must stay alive until then.
    """
    inputs = [_as_input(whole) for whole in wholes]
    if len(inputs) == 1:
        return [_unwrap(functional.reduce_scatter_single(inputs[0], "sum", 0, group))]
    return [_unwrap(part) for part in functional.reduce_scatter_single_coalesced(inputs, "sum", [0] * len(inputs), group)]


def _as_input(x: Tensor) -> Tensor:
    """Makes a tensor the input of a collective: contiguous, and detached, because autograd is on in gloo's threads, where it
    would record gloo's copies."""
    return x.detach().contiguous()


def _unwrap(x: Tensor) -> Tensor:
    """Removes the wrapper that waits at the first use. The callers here wait explicitly."""
    return x.elem if isinstance(x, functional.AsyncCollectiveTensor) else x


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Gathers along dimension 0, without autograd: [N, ...] of each rank -> [t * N, ...]."""
    return wait(functional.all_gather_single(_as_input(x), 0, group))


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Sums over the ranks and scatters along dimension 0, without autograd: [t * N, ...] -> this rank's [N, ...] of the sum."""
    return wait(functional.reduce_scatter_single(_as_input(x), "sum", 0, group))


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Returns the sum over the ranks of the group, without autograd."""
    return wait(functional.all_reduce(_as_input(x), "sum", group))


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """Sends x[r] to rank r, and receives the result's [r] from rank r, without autograd; both are [t, ...]."""
    return wait(functional.all_to_all_single(_as_input(x), None, None, group))


def send_parts(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Sends the first ``sent[0]`` elements of x to rank 0, and so on. Returns what this rank gets, ``received[r]`` from rank r.
    Without autograd."""
    return wait(functional.all_to_all_single(_as_input(x), received, sent, group))


def tokens_first(x_BSD: Tensor) -> Tensor:
    """Returns [S, B, D], since collectives work along dimension 0. With one (packed) row it copies nothing."""
    return x_BSD.transpose(0, 1).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[no-untyped-def]
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return all_gather(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return all_to_all(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return all_to_all(grad, ctx.group), None


class _ShareTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return x.chunk(group.size())[group.rank()].contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return all_gather(grad, ctx.group), None


class _JoinTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None


class Travel:
    """The way of rows to other ranks: an all-to-all of uneven parts, during which something else may be computed.

    The backward pass sends gradients back in the same way: what was computed between ``start`` and ``arrive`` has its backward
    pass while they travel.
    """

    def __init__(self, sent: list[int], received: list[int], group: Group) -> None:
        """
        Args:
            sent: how many rows this rank sends to each rank: first those for rank 0, and so on.
            received: how many rows it gets from each rank.
        """
        self.sent, self.received, self.group = sent, received, group
        self.arriving: Tensor | None = None
        """What other ranks send to this one."""

    def start(self, x_RD: Tensor) -> Tensor:
        """Starts to send rows. Returns them, to be passed to ``arrive``."""
        return _StartTravel.apply(x_RD, self)

    def arrive(self, x_RD: Tensor) -> Tensor:
        """Waits for the rows that other ranks have sent to this one, and returns them.

        Args:
            x_RD: what ``start`` has returned. It is kept alive until here, which the collective does not do.
        """
        return _Arrive.apply(x_RD, self)


class _StartTravel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, travel: Travel) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.travel, x = travel, x.contiguous()
        travel.arriving = _unwrap(functional.all_to_all_single(_as_input(x), travel.received, travel.sent, travel.group))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        ctx.travel.arriving = None
        return wait(grad), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, travel: Travel) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.travel = travel
        arrived, travel.arriving = travel.arriving, None
        assert arrived is not None
        return wait(arrived)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        travel: Travel = ctx.travel
        travel.arriving = grad = grad.contiguous()  # keeps it alive
        return _unwrap(functional.all_to_all_single(_as_input(grad), travel.sent, travel.received, travel.group)), None


def copy(x: Tensor, group: Group) -> Tensor:
    """Returns x, which is the same on all ranks. The gradient of x is summed over the ranks."""
    return _Copy.apply(x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    """Returns the sum of x over the ranks. The gradient of each summand is that of the sum."""
    return _Reduce.apply(x, group)


def gather(x: Tensor, group: Group) -> Tensor:
    """Gathers along dimension 0: [N, ...] of each rank -> [t * N, ...]."""
    return _Gather.apply(x, group)


def gather_tokens(x_BSD: Tensor, group: Group) -> Tensor:
    """Gathers the tokens of all ranks: [B, S/t, D] of each rank -> [B, S, D]."""
    return gather(tokens_first(x_BSD), group).transpose(0, 1)


def scatter_tokens(x_BSD: Tensor, group: Group) -> Tensor:
    """Sums [B, S, D] over the ranks, and returns this rank's tokens of the sum, [B, S/t, D]."""
    return _Scatter.apply(tokens_first(x_BSD), group).transpose(0, 1)


def exchange(x_tN: Tensor, group: Group) -> Tensor:
    """Sends x[r] to rank r, and receives the result's [r] from rank r; both are [t, ...]."""
    return _Exchange.apply(x_tN, group)


def share_tokens(x_BSD: Tensor, group: Group) -> Tensor:
    """Returns this rank's tokens [B, S/t, D] of x, which is the same on all ranks. The gradients of all tokens are gathered."""
    return _ShareTokens.apply(tokens_first(x_BSD), group).transpose(0, 1)


def join_tokens(x_BSD: Tensor, group: Group) -> Tensor:
    """Gathers the tokens of all ranks, [B, S/t, D] -> [B, S, D], whose gradients are the same on all ranks."""
    return _JoinTokens.apply(tokens_first(x_BSD), group).transpose(0, 1)
