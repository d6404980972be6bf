"""The memory of a step: what is recorded, to which module it belongs, and that nothing is registered if nothing is measured."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from internevo.config.run import Monitor
from internevo.measure.allocator import watch
from internevo.measure.probes import Probes
from internevo.measure.profile import CUDA_BLOCK, Profile
from internevo.measure.replay import by_layer, replay
from internevo.parallel.orders import BACKWARD, FORWARD, Action
from internevo.parallel.schedule import nothing

ROWS, SIZE = 8, 16
ACTIVATION, WEIGHT = 4 * ROWS * SIZE, 4 * SIZE * SIZE


class Branches(nn.Module):
    """Two linears with the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y: Tensor = self.a(x).sigmoid() + self.b(x)
        return y


class Model(nn.Module):
    """Layers as those of a decoder."""

    def __init__(self, recomputed: bool) -> None:
        super().__init__()
        self.layers, self.recomputed = nn.ModuleList(Branches() for _ in range(2)), recomputed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer.forward, x, use_reentrant=False) if self.recomputed else layer(x)
        return x.sum()


def take_step(model: nn.Module, **more: Any) -> tuple[Profile, dict[str, Any]]:
    """Records the forward and the backward pass of a model, which is its own master."""
    masters = dict(model.named_parameters())
    state = {f"model/{name}": weight.detach() for name, weight in masters.items()}
    profile = Profile([model], state, masters, (), torch.device("cpu"))
    with profile.recording(**more):
        loss = model(torch.ones(ROWS, SIZE))
        profile.end_pass(Action(FORWARD, 0, 0))
        loss.backward()
        profile.end_pass(Action(BACKWARD, 0, 0))
        profile.end_phase("reduction of the gradients")
        model.zero_grad()
        profile.end_phase("optimizer")
    return profile, replay(profile)


def test_what_is_saved_belongs_to_the_module_that_saved_it_first_and_counts_once() -> None:
    model = Model(recomputed=False)
    for weight in model.parameters():
        nn.init.ones_(weight)
    _, found = take_step(model)
    kept = found["kept"]["modules"]
    # a and b save the same input; the sigmoid saves its output in the layer.
    for layer in range(2):
        assert kept[f"layers.{layer}.a"] == {"masters": WEIGHT, "activations": ACTIVATION}
        assert kept[f"layers.{layer}.b"] == {"masters": WEIGHT}
        assert kept[f"layers.{layer}"] == {"activations": ACTIVATION}
    assert by_layer(kept)["layers.0"] == {"masters": 2 * WEIGHT, "activations": 2 * ACTIVATION}


def test_the_phases_say_what_is_alive_before_and_after_the_optimizer() -> None:
    _, found = take_step(Model(recomputed=False))
    ends = {phase["name"]: phase["alive"] for phase in found["phases"]}
    forward, backward, reduction, optimizer, end = ends.values()
    assert list(ends)[2:] == ["reduction of the gradients", "optimizer", "end"]
    assert forward["activations"] == 4 * ACTIVATION + 4 and forward["gradients"] == 0  # and the loss
    assert backward["activations"] == 4 and backward["gradients"] == reduction["gradients"] == 4 * WEIGHT
    assert optimizer["gradients"] == end["gradients"] == 0
    assert found["peak"]["total"] == max(phase["peak"]["total"] for phase in found["phases"])
    assert found["peak"]["masters"] == 4 * WEIGHT == end["masters"]
    assert [row[1] for row in found["timeline"]] == sorted(row[1] for row in found["timeline"])


def test_a_recomputed_layer_keeps_its_input_and_in_the_backward_pass_its_activations() -> None:
    profile, found = take_step(Model(recomputed=True))
    kept = {path: kinds.get("activations", 0) for path, kinds in found["kept"]["modules"].items()}
    assert sum(kept.values()) <= 2 * ACTIVATION + 8  # the inputs of the layers, of which the first exists before
    phase = found["phases"][1]
    assert phase["peak"]["activations"] >= 2 * ACTIVATION  # those of one layer at a time
    recomputed = [block for block in profile.blocks if block.kind(profile.phases) == "activations" and block.phase == 1]
    assert len(recomputed) in (3, 4)  # of each layer, its sum and the sigmoid; the first sum needs no gradient


def test_storages_that_are_emptied_and_filled_again_are_followed() -> None:
    """As ``fully_shard`` does with gathered weights."""
    profile = Profile([], {}, {}, (), torch.device("cpu"))
    with profile.recording():
        tensor = torch.empty(1000)
        profile._units.append([(number, reference) for reference, number in profile._known.values()])
        for size in (0, 4000, 0):
            tensor.untyped_storage().resize_(size)
            torch.ones(1)
        profile.end_pass(Action(FORWARD, 0, 0))
    sizes = [event.size for event in profile.events if profile.blocks[event.block].operator == "aten::empty"]
    assert sizes == [4000, -4000, 4000, -4000]


def test_what_a_gpu_has_allocated_before_and_is_not_known_is_a_part() -> None:
    _, found = take_step(Model(recomputed=False), allocated=4 * WEIGHT + 1000)
    assert found["peak"]["other"] == 1000
    profile = Profile([], {}, {}, (), torch.device("cuda", 0))
    assert profile._size(torch.empty(3).untyped_storage()) == CUDA_BLOCK


def test_nothing_is_left_registered() -> None:
    model = Model(recomputed=False)
    profile, _ = take_step(model)
    assert_nothing_is_registered(model)
    assert not profile._known
    before = len(profile.events)
    take = model(torch.ones(ROWS, SIZE))
    take.backward()
    assert len(profile.events) == before


def assert_nothing_is_registered(model: nn.Module) -> None:
    assert _get_current_dispatch_mode() is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert not any(parameter._backward_hooks for parameter in model.parameters())


class NoSchedule:
    """A schedule that only has what a probe changes."""

    after_pass: Callable[[Action], None] = staticmethod(nothing)


@pytest.mark.parametrize("monitor", [Monitor(), Monitor(comm=True, trace=True)])
def test_a_step_whose_memory_is_not_measured_has_no_hooks(tmp_path: Path, monitor: Monitor) -> None:
    model, schedule = Model(recomputed=False), NoSchedule()
    anything: Any = None
    probes = Probes(
        monitor, anything, model, anything, schedule, {}, anything, tmp_path, 0, torch.device("cpu"), False  # type: ignore[arg-type]
    )  # fmt: skip
    with probes(1, 1):
        assert_nothing_is_registered(model)
        assert schedule.after_pass is nothing
        probes.end_phase("optimizer")
    assert not list(tmp_path.iterdir()) and not probes.lines


@pytest.mark.parametrize("compiles", [False, True])
def test_the_measured_step_is_compared_with_one_that_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    """In a run that was resumed after step 6. With ``model.compile``, the step after the measured one compiles the layers."""
    anything, said = cast(Any, None), {}
    device = torch.device("cpu")
    probes = Probes(
        Monitor(memory=True), anything, anything, anything, anything, {}, anything, tmp_path, 0, device, compiles
    )  # fmt: skip

    @contextmanager
    def measure(self: Probes, micro_batches: int) -> Iterator[None]:
        yield
        self._measured = self.step, 1.0

    monkeypatch.setattr(Probes, "_memory", measure)
    for step in (7, 8, 9):
        with probes(1, step):
            pass
        said[step] = probes.lines
    (line,) = said.pop(9 if compiles else 8)
    assert line.startswith("step 7, whose memory was measured, took 1.00 s") and f"as step {9 if compiles else 8}:" in line
    assert not any(said.values())


def test_a_gpu_is_asked_for_its_peak_and_its_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[str]()

    def answer(name: str, value: int = 0) -> Callable[..., int]:
        def function(*arguments: Any, **options: Any) -> int:
            calls.append(name + ("(None)" if arguments == (None,) else ""))
            return value

        return function

    values = {"memory_allocated": 7, "max_memory_allocated": 50, "max_memory_reserved": 64}
    for name in ("synchronize", "reset_peak_memory_stats", *values):
        monkeypatch.setattr(torch.cuda, name, answer(name, values.get(name, 0)))
    for name in ("_record_memory_history", "_dump_snapshot"):
        monkeypatch.setattr(torch.cuda.memory, name, answer(name))
    with pytest.raises(ZeroDivisionError), watch(torch.device("cuda", 0), tmp_path / "a"):
        raise ZeroDivisionError
    assert calls[-1] == "_record_memory_history(None)" and "_dump_snapshot" not in calls
    with watch(torch.device("cuda", 0), tmp_path / "a") as usage:
        assert usage.before == 7
    assert (usage.peak, usage.reserved) == (50, 64) and calls[-2:] == ["_dump_snapshot", "_record_memory_history(None)"]
    with watch(torch.device("cpu"), tmp_path / "a") as usage:
        pass
    assert usage.peak == 0
