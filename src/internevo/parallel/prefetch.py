"""What ``fully_shard`` gathers in advance: the next unit in a forward pass, the one before in a backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..models.moe import ExpertMLPs
from ..ops.compiler import not_compiled


def experts_in(modules: Sequence[nn.Module]) -> list[ExpertMLPs]:
    """Returns the experts of all layers in a unit."""
    return [part for module in modules for part in module.modules() if isinstance(part, ExpertMLPs)]


def set_forward_prefetch(units: Sequence[FSDPModule], apart: bool) -> None:
    """Makes each unit gather the next one, and the experts that come before it, in the forward pass.

    Experts gather nothing: when their layer is recomputed, their forward pass runs again, and what follows is not needed then.
    """
    dense = [n for n, unit in enumerate(units) if not (apart and isinstance(unit, ExpertMLPs))]
    for number, following in itertools.zip_longest(dense, dense[1:], fillvalue=len(units) - 1):
        units[number].set_modules_to_forward_prefetch(list(units[number + 1 : following + 1]))


def set_backward_prefetch(joined: list[list[nn.Module]], apart: bool) -> None:
    """Makes each unit gather the one that follows in the backward pass.

    ``fully_shard`` would do so by the order of the forward passes; in a pipeline it would find that of another micro-batch. The
    last unit of the backward pass names itself, which is gathered already.
    """
    order = [unit for modules in reversed(joined) for unit in (modules[0], *(reversed(experts_in(modules)) if apart else ()))]
    for unit, following in itertools.zip_longest(order, order[1:], fillvalue=order[-1]):
        if apart and isinstance(following, ExpertMLPs):
            _gather_once(unit, cast(FSDPModule, following))
            following = unit
        cast(FSDPModule, unit).set_modules_to_backward_prefetch([cast(FSDPModule, following)])


def _gather_once(layer: nn.Module, experts: FSDPModule) -> None:
    """Gathers the experts of a layer when the gradient of its residual stream arrives.

    The prefetch of ``fully_shard`` runs for the gradient of each output. A router's sums are outputs, too, and their gradients
    may arrive after the backward pass of the experts, which would be gathered once more for nothing. Experts that are there
    when their layer is recomputed stay until their backward pass.
    """

    def gather(gradient: Tensor) -> None:
        experts.unshard(async_op=True)

    @not_compiled
    def after_forward(module: nn.Module, arguments: Any, output: tuple[Tensor, Any]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(gather)

    layer.register_forward_hook(after_forward)
