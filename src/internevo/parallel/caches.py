"""What PyTorch remembers of the layouts of tensors, longer than the process groups of a run live."""

from __future__ import annotations

from torch.distributed.tensor import _redistribute, debug
from torch.distributed.tensor._collective_utils import MeshTopoInfo


def forget_layouts() -> None:
    """Frees what DTensor remembers of its operators: the meshes, and with them the process groups.

    A gloo group has two threads, one of which wakes up a hundred times a second. A process that trains several times would
    keep those of all its runs, and the layouts that operators return would have the groups of an earlier one.
    """
    debug._clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()
    MeshTopoInfo.build_from_mesh.cache_clear()
