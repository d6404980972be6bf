"""Another generation of flash attention (``model.flash_attention``) on NVIDIA GPUs, from a package of its own.

PyTorch has generation 2 (https://arxiv.org/abs/2307.08691). It can call generation 3 for Hopper
(https://arxiv.org/abs/2407.08608) and 4 for Hopper and Blackwell, where their packages are installed. That is a switch of the
process, which ``choose`` sets. It computes a small example with both first, because PyTorch calls these two prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, InternEvoError
from .attention import attention


class Package(NamedTuple):
    """Where a generation comes from."""

    name: str
    """PyTorch's name of it."""
    install: str
    capabilities: tuple[int, ...]
    """Major compute capabilities of the GPUs that it runs on."""


PACKAGES = {
    3: Package("FA3", "build it from the folder hopper of github.com/Dao-AILab/flash-attention", (9,)),
    4: Package("FA4", "pip install 'internevo[flash4]'", (9, 10)),
}
DIFFERENCE = 0.02
"""Largest difference of results from those of generation 2, as a share of the largest number. Both round to bf16, whose
precision is 2^-8 = 0.004."""
LENGTHS = (1, 200, 64, 375)
"""Lengths of the documents of the example."""


class Heads(NamedTuple):
    """The attention of a model."""

    queries: int
    keys: int
    size: int
    windows: tuple[int, ...]
    """Of the layers; none: no layer has one."""


def choose(generation: int, heads: Heads, device: torch.device) -> None:
    """Makes this process use a generation of flash attention on its GPU, after a check on an example with these heads.

    Raises:
        ConfigError: if the package is not installed, or does not run on this GPU.
        InternEvoError: if it cannot compute the example, or computes something else than generation 2.
    """
    from torch.nn import attention as switches

    if switches.current_flash_attention_impl() is not None:
        switches.restore_flash_attention_impl()
    if generation == 2:
        return
    package, remove = PACKAGES[generation], f"remove model.flash_attention = {generation}"
    if torch.cuda.get_device_capability(device)[0] not in package.capabilities:
        raise ConfigError(
            f"flash attention {generation} does not run on {torch.cuda.get_device_name(device)}; it needs a GPU of compute "
            f"capability {' or '.join(f'{major}.x' for major in package.capabilities)}; {remove}"
        )
    inputs, windows = example(heads, device), sorted({*heads.windows} or {0})
    expected = {window: results(*inputs, window) for window in windows}
    try:
        switches.activate_flash_attention_impl(package.name)
    except ImportError as error:
        raise ConfigError(
            f"flash attention {generation} is a package that is not installed ({error}); {package.install}; or {remove}"
        ) from error
    try:
        found = {window: results(*inputs, window) for window in windows}
    except Exception as error:
        switches.restore_flash_attention_impl()
        raise InternEvoError(
            f"flash attention {generation} cannot compute {heads.queries} heads of {heads.size} ({heads.keys} of keys and "
            f"values, windows {windows}): {error}; {remove}"
        ) from error
    wrong = [text for window in windows for text in differences(expected[window], found[window])]
    if wrong:
        switches.restore_flash_attention_impl()
        raise InternEvoError(f"flash attention {generation} does not compute what flash attention 2 does: {wrong[0]}; {remove}")


def example(heads: Heads, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Makes random q, k and v [1, T, H or K, N] in bf16, and where the documents of a row begin and end."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(device, torch.int32)
    q, k, v = (
        torch.randn(1, sum(LENGTHS), number, heads.size, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for number in (heads.queries, heads.keys, heads.keys)
    )
    return q, k, v, ends


def results(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, window: int) -> dict[str, Tensor]:
    """Computes attention, and the gradients of the sum of its squares."""
    out = attention(q, k, v, ends, max(LENGTHS), window=window)
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    return {"output": out.detach(), **dict(zip(("gradient of q", "gradient of k", "gradient of v"), gradients, strict=True))}


def differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Returns what differs by more than its precision, and by how much."""
    shares = {
        name: float((found[name].float() - right.float()).abs().max() / right.float().abs().max())
        for name, right in expected.items()
    }
    return [
        f"its {name} differs by {share:.2g} of the largest number" for name, share in shares.items() if not share <= DIFFERENCE
    ]
