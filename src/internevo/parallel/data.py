"""The data axis: ZeRO-1.5, plain data parallel and FSDP, as policies of one ``fully_shard``.

Every decoder layer is a unit, and embedding, last norm and head are one more. Parameters, gradients and optimizer state
are DTensors sharded over ``zero`` and replicated over ``replicate``; compute happens on full tensors in the model's dtype.

| policy   | parameters gathered                   | gradients                                            |
|----------|---------------------------------------|------------------------------------------------------|
| ZeRO-1.5 | once per step, at the first forward   | once per step: reduce-scatter over zero,             |
|          |                                       | all-reduce of the shard over replicate               |
| FSDP     | per use: each forward, each backward  | the same, per micro-batch                            |

Gradients are summed, not averaged: the loss is already divided by the global number of tokens. They are reduced in fp32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

COMPUTE = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shard(model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, dtype: str, fsdp: bool) -> None:
    """Shards ``model`` in place over the mesh ("replicate", "zero").

    Args:
        layers: the units besides the rest of the model.
        dtype: of the computation, by its name in the config; parameters stay fp32.
        fsdp: gather per use rather than once per step.
    """
    precision = MixedPrecisionPolicy(param_dtype=COMPUTE[dtype], reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in [*layers, model]:
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=fsdp)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        # A divide factor would use PREMUL_SUM, which gloo has not.
        unit.set_force_sum_reduction_for_comms(True)


def units(model: nn.Module) -> list[FSDPModule]:
    """Every module that ``fully_shard`` has wrapped."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def set_last_micro_batch(model: nn.Module, last: bool, fsdp: bool) -> None:
    """Tells the units whether the coming backward ends the step: only then does ZeRO-1.5 reduce and free."""
    assert isinstance(model, FSDPModule)
    if not fsdp:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def reshard(model: nn.Module) -> None:
    """Frees the gathered parameters, after forwards that no backward follows."""
    for unit in units(model):
        unit.reshard()
