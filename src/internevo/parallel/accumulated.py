"""The gradients that ``fully_shard`` adds up over the passes of a step, if they are in another dtype than the weights.

PyTorch has no public way to them. A backward pass adds to them what the pass before it has computed, so that they need help if
some gradients are computed apart from backward passes (``deferred.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def accumulate_in_reduce_dtype(units: Iterable[FSDPModule]) -> None:
    """Adds the gradients of full weights to those of the step so far, in the dtype in which they are reduced.

    Otherwise the gradients of several passes would be added up in the dtype of the weights, and a reduction would find
    gradients of two dtypes.
    """
    for unit in units:
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            for sharded in group.fsdp_params:
                sharded.accumulate_unsharded_grad_if_needed()
                sharded.to_accumulated_grad_if_needed()


def accumulated_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields what has been added up so far, with the names of the parameters."""
    for path, module in model.named_modules():
        for group in module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else ():
            for sharded in group.fsdp_params:
                if sharded.unsharded_accumulated_grad is not None:
                    yield sharded._param_fqn or path, sharded.unsharded_accumulated_grad
