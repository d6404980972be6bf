"""Other generations of flash attention: chosen, checked against generation 2, or refused by name. (Here without a GPU.)"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import (
    _registry,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)

from internevo.errors import ConfigError, InternEvoError
from internevo.ops import flash
from internevo.ops.attention import attention as plain

HEADS = flash.Heads(4, 2, 16, ())
CPU = torch.device("cpu")


class Handle:
    """What PyTorch keeps of an implementation."""

    def remove(self) -> None:
        pass


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A card on which all run, and PyTorch's implementations as they were."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    before = dict(_registry._FLASH_ATTENTION_IMPLS)
    yield
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    _registry._FLASH_ATTENTION_IMPLS.update(before)


def install(monkeypatch: pytest.MonkeyPatch, name: str, kernel: Callable[..., torch.Tensor]) -> None:
    """An implementation with which attention is what ``kernel`` makes of its result."""

    def attention(*args: object, **kwargs: object) -> torch.Tensor:
        out = plain(*args, **kwargs)  # type: ignore[arg-type]
        return kernel(out) if current_flash_attention_impl() == name else out

    register_flash_attention_impl(name, register_fn=Handle)
    monkeypatch.setattr(flash, "attention", attention)


@pytest.mark.parametrize(("generation", "name"), [(3, "FA3"), (4, "FA4")])
def test_chosen_and_given_up_again(monkeypatch: pytest.MonkeyPatch, generation: int, name: str) -> None:
    install(monkeypatch, name, lambda out: out * 1.001)
    flash.choose(generation, HEADS, CPU)
    assert current_flash_attention_impl() == name
    flash.choose(2, HEADS, CPU)
    assert current_flash_attention_impl() is None


def test_generation_2_is_pytorch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "results", None)  # nothing is computed
    flash.choose(2, HEADS, CPU)
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize(
    "kernel", [lambda out: out * 1.1, lambda out: out * float("nan"), lambda out: torch.cat((out[:, :-1], out[:, :1]), 1)]
)
@pytest.mark.parametrize("windows", [(), (64, 0)])
def test_wrong_results_are_refused(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[[torch.Tensor], torch.Tensor], windows: tuple[int, ...]
) -> None:
    install(monkeypatch, "FA4", kernel)
    with pytest.raises(InternEvoError, match=r"flash attention 4 does not compute .* its output differs .* remove model\."):
        flash.choose(4, HEADS._replace(windows=windows), CPU)
    assert current_flash_attention_impl() is None


def test_each_window_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, results = list[int](), flash.results

    def note(*args: Any) -> dict[str, torch.Tensor]:
        seen.append(args[-1])
        return results(*args)

    install(monkeypatch, "FA4", lambda out: out)
    monkeypatch.setattr(flash, "results", note)
    flash.choose(4, HEADS._replace(windows=(64, 0, 64)), CPU)
    assert seen == [0, 64, 0, 64]


def test_a_kernel_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("head size not supported")

    install(monkeypatch, "FA3", kernel)
    with pytest.raises(InternEvoError, match=r"cannot compute 4 heads of 16 .*head size not supported"):
        flash.choose(3, HEADS, CPU)
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize(("generation", "told"), [(3, "build it from"), (4, r"internevo\[flash4\]")])
def test_a_package_that_is_missing(generation: int, told: str) -> None:
    try:
        activate_flash_attention_impl(flash.PACKAGES[generation].name)
    except ImportError:
        with pytest.raises(ConfigError, match=rf"is a package that is not installed .*{told}"):
            flash.choose(generation, HEADS, CPU)
    else:
        pytest.skip("the package is installed")


def test_another_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"does not run on NVIDIA A100; it needs .* 9\.x or 10\.x"):
        flash.choose(4, HEADS, CPU)
