"""What PyTorch remembers of the layouts of tensors, longer than the process groups of a run live."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, _redistribute
from torch.distributed.tensor._collective_utils import MeshTopoInfo


def forget_layouts() -> None:
    """Frees what DTensor remembers of its operators: the meshes, and with them the process groups.

    A gloo group has two threads, one of which wakes up a hundred times a second. A process that trains several times would
    keep those of all its runs, and the layouts that operators return would have the groups of an earlier one.
    (``torch.distributed.tensor.debug`` clears the first two, too, but imports the compiler.)
    """
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()
    MeshTopoInfo.build_from_mesh.cache_clear()
