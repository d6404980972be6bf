"""Another generation of flash attention (``model.flash_attention``) on NVIDIA GPUs, from a package of its own.

PyTorch has generation 2 (https://arxiv.org/abs/2307.08691). It can call generation 3 for Hopper
(https://arxiv.org/abs/2407.08608) and 4 for Hopper and Blackwell, where their packages are installed. That is a switch of the
process, which ``choose`` sets. It computes an example with both first, because PyTorch calls these two prototypes.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, InternEvoError
from .attention import attention


class Heads(NamedTuple):
    """The attention of a model on one rank."""

    queries: int
    keys: int
    size: int
    windows: tuple[int, ...]
    """Of the layers; none: no layer has one."""
    dtype: torch.dtype


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
LENGTHS = (1, 400, 64, 1200, 383)
"""Lengths of the documents of the example."""
PART = slice(430, 1400)
"""The queries of a part of the example, which begins after a long document, and ends in a document before the last one."""
WINDOW = 257
"""The largest window of the example: larger ones use the same kernels, and would change nothing in documents as short."""
SHARPNESS = 4.0
"""The random queries of the example are multiplied by this, so that single keys count: an error at the edge of a window changes
results by a third of the largest number."""
PRECISION = {"output": 0.02, "gradient": 0.04}
"""Largest differences from generation 2, as shares of the largest number. Rounding to bf16 gives at most 0.003 in the output
and 0.011 in gradients."""


def restore() -> None:
    """Makes this process use PyTorch's own flash attention."""
    from torch.nn import attention as switches

    if switches.current_flash_attention_impl() is not None:
        switches.restore_flash_attention_impl()


def choose(generation: int, heads: Heads, device: torch.device) -> None:
    """Makes this process use another generation of flash attention on its GPU, after a check on an example with these heads.

    Before, the process must use PyTorch's own (``restore``).

    Raises:
        ConfigError: if the package is not installed, or does not run on this GPU.
        InternEvoError: if it cannot compute the example, or computes something else than generation 2.
    """
    package, remove = PACKAGES[generation], f"remove model.flash_attention = {generation}"
    if torch.cuda.get_device_capability(device)[0] not in package.capabilities:
        raise ConfigError(
            f"flash attention {generation} does not run on {torch.cuda.get_device_name(device)}; it needs a GPU of compute "
            f"capability {' or '.join(f'{major}.x' for major in package.capabilities)}; {remove}"
        )
    inputs, windows = example(heads, device), sorted({min(window, WINDOW) for window in heads.windows} or {0})
    expected = {window: results(*inputs, window) for window in windows}
    try:
        activate(generation)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"flash attention {generation} is a package that is not installed ({error}); {package.install}; or {remove}"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"flash attention {generation} cannot be loaded: {type(error).__name__}: {error}; {remove}"
        ) from error
    try:
        wrong = [text for window in windows for text in differences(expected[window], results(*inputs, window))]
    except Exception as error:
        restore()
        raise InternEvoError(
            f"flash attention {generation} cannot compute {heads.queries} heads of {heads.size} ({heads.keys} of keys and "
            f"values, windows {windows}): {type(error).__name__}: {error}; {remove}"
        ) from error
    if wrong:
        restore()
        raise InternEvoError(f"flash attention {generation} does not compute what flash attention 2 does: {wrong[0]}; {remove}")


def activate(generation: int) -> None:
    """Switches to a generation."""
    from torch.nn import attention as switches

    if generation == 4:
        from torch.nn.attention._fa4 import register_flash_attention_fa4

        register = partial(register_flash_attention_fa4, module_path=f"{__package__}.flash4")
        switches.register_flash_attention_impl("FA4", register_fn=register)
    switches.activate_flash_attention_impl(PACKAGES[generation].name)


def example(heads: Heads, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Makes random q, k and v [1, T, H or K, N], and where the documents of the row begin and end."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(device, torch.int32)
    q, k, v = (
        torch.randn(1, sum(LENGTHS), number, heads.size, generator=generator).to(device, heads.dtype)
        for number in (heads.queries, heads.keys, heads.keys)
    )
    return (q * SHARPNESS).requires_grad_(), k.requires_grad_(), v.requires_grad_(), ends


def results(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, window: int) -> dict[str, Tensor]:
    """Computes attention of packed documents and the gradients of the sum of its squares, of all queries and of those of a part
    of the row; and, as text is generated, that of a whole row, and of its last token alone with the keys in a larger buffer."""
    longest, found = 1 << (max(LENGTHS) - 1).bit_length(), dict[str, Tensor]()  # as a training step rounds it
    for part, queries in (("", slice(0, q.shape[1])), (" for a part of the row", PART)):
        inputs = q[:, queries], k[:, : queries.stop], v[:, : queries.stop]
        out = attention(*inputs, ends, longest, window=window, part=queries is PART)
        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        found[f"output{part}"] = out.detach()
        found |= {f"gradient of {x}{part}": gradient for x, gradient in zip("qkv", gradients, strict=True)}
    with torch.no_grad():
        keys, values = (torch.cat((x, x), dim=1)[:, : x.shape[1]] for x in (k, v))
        return {**found, "output of a whole row": attention(q, k, v), "output of one token": attention(q[:, -1:], keys, values)}


def differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Returns what differs by more than its precision, and by how much."""
    shares = {
        name: float((found[name].float() - right.float()).abs().max() / right.float().abs().max())
        for name, right in expected.items()
    }
    return [
        f"its {name} differs by {share:.2g} of the largest number"
        for name, share in shares.items()
        if not share <= PRECISION[name.split()[0]]
    ]
