"""Other generations of flash attention: chosen, checked against generation 2, or refused by name. (Here without a GPU.)"""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import _fa4, _registry, current_flash_attention_impl, register_flash_attention_impl

from internevo.errors import ConfigError, InternEvoError
from internevo.ops import flash
from internevo.ops.attention import attention as plain

HEADS = flash.Heads(4, 2, 16, (), torch.bfloat16)
CPU = torch.device("cpu")


class Handle:
    """What PyTorch keeps of an implementation."""

    def __init__(self, module_path: str = "") -> None:
        pass

    def remove(self) -> None:
        pass


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A card on which all run, and PyTorch's implementations as they were."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    before = dict(_registry._FLASH_ATTENTION_IMPLS)
    yield
    flash.restore()
    _registry._FLASH_ATTENTION_IMPLS.update(before)


def install(monkeypatch: pytest.MonkeyPatch, generation: int, kernel: Callable[..., Tensor]) -> None:
    """A package with which attention is what ``kernel`` computes."""
    name = flash.PACKAGES[generation].name

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return (kernel if current_flash_attention_impl() == name else plain)(*args, **kwargs)

    register_flash_attention_impl("FA3", register_fn=Handle)
    monkeypatch.setattr(_fa4, "register_flash_attention_fa4", Handle)
    monkeypatch.setattr(flash, "attention", attention)


@pytest.mark.parametrize("generation", [3, 4])
def test_chosen_and_given_up_again(monkeypatch: pytest.MonkeyPatch, generation: int) -> None:
    install(monkeypatch, generation, lambda *args, **kwargs: plain(*args, **kwargs) * 1.001)
    flash.choose(generation, HEADS._replace(windows=(4096, 0)), CPU)
    assert current_flash_attention_impl() == flash.PACKAGES[generation].name
    flash.restore()
    assert current_flash_attention_impl() is None


class Scaled(torch.autograd.Function):
    """An attention whose gradients are wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.1


WRONG: dict[str, Callable[..., Tensor]] = {
    "its output": lambda *args, **kwargs: plain(*args, **kwargs) * 1.1,
    "its output ": lambda *args, **kwargs: plain(*args, **kwargs) * float("nan"),
    "its output  ": lambda *args, window=0, **more: plain(*args, window=window + 1 if window else 0, **more),
    "its output   ": lambda *args, window=0, **more: plain(*args, window=0, **more),
    "its output for a part of the row": lambda *args, **kwargs: plain(*args, **kwargs) * (1.1 if kwargs.get("part") else 1),
    "its gradient of q": lambda *args, **kwargs: Scaled.apply(plain(*args, **kwargs)),
    "its output of a whole row": lambda *args, **kwargs: plain(*args, **kwargs) * (1 if len(args) > 3 else 1.1),
    "its output of one token": lambda *args, **kwargs: plain(*args, **kwargs) * (1.1 if args[0].shape[1] == 1 else 1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_are_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    install(monkeypatch, 4, WRONG[wrong])
    with pytest.raises(
        InternEvoError, match=rf"flash attention 4 does not compute .* {wrong.strip()} differs .* remove model\."
    ):
        flash.choose(4, HEADS._replace(windows=(1024,)), CPU)
    assert current_flash_attention_impl() is None


def test_a_kernel_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("head size not supported")

    install(monkeypatch, 3, kernel)
    with pytest.raises(InternEvoError, match=r"cannot compute 4 heads of 16 .*head size not supported"):
        flash.choose(3, HEADS, CPU)
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize(("generation", "told"), [(3, "build it from"), (4, r"internevo\[flash4\]")])
def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, generation: int, told: str) -> None:
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # Python finds no such module
    with pytest.raises(ConfigError, match=rf"is a package that is not installed .*{told}"):
        flash.choose(generation, HEADS, CPU)


def test_a_package_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    with pytest.raises(ConfigError, match=r"flash attention 3 cannot be loaded: RuntimeError: .*FA3"):
        flash.choose(3, HEADS, CPU)


def test_another_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"does not run on NVIDIA A100; it needs .* 9\.x or 10\.x"):
        flash.choose(4, HEADS, CPU)


@pytest.mark.parametrize("returned", [("out", "lse"), ("out", "lse", "p", "row_max", "learnable")])
def test_generation_4_gives_what_pytorch_expects(monkeypatch: pytest.MonkeyPatch, returned: tuple[str, ...]) -> None:
    """Its versions return different numbers of results."""
    package, cute, interface = (ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"))
    interface.__dict__.update(_flash_attn_fwd=lambda q, *, causal: returned, _flash_attn_bwd=lambda: ("dq", "dk", "dv"))
    cute.__dict__.update(interface=interface)
    for module in (package, cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "internevo.ops.flash4", raising=False)
    module = _fa4._fa4_import_module.__wrapped__("internevo.ops.flash4")  # as PyTorch loads it
    monkeypatch.delitem(sys.modules, "internevo.ops.flash4")
    assert module._flash_attn_fwd("q", causal=True) == ("out", "lse")
    assert module._flash_attn_bwd() == ("dq", "dk", "dv")
