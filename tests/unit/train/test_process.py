"""How the process is set up for training: the garbage collector, imports, flash attention, deterministic computation."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import internevo
from internevo.config import Config, validate
from internevo.errors import ConfigError
from internevo.observe.record import StepRecord
from internevo.ops import flash
from internevo.ops.precision import COMPUTE
from internevo.train import process
from internevo.train.process import DETERMINISTIC, WORKSPACE, GarbageCollector, determinism
from tests.conftest import tiny


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generation of each garbage collection so far."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def make_garbage() -> None:
    """Makes reference cycles, enough for Python to start a collection."""
    for _ in range(20_000):
        cycle: list[object] = []
        cycle.append(cycle)


def test_collections_run_after_the_first_step_and_then_only_every_few_steps(collections: list[int]) -> None:
    garbage = GarbageCollector()
    try:
        make_garbage()
        assert collections  # automatic collection is on
        first, seen = 7, {}
        for step in range(first, 2 * garbage.EVERY + 1):
            collections.clear()
            make_garbage()
            seen[step] = list(collections)
            garbage.after_step(step)
            seen[step] = list(collections[len(seen[step]) :])
            if step > first:
                assert len(collections) == len(seen[step])  # none during the step
        assert [step for step, found in seen.items() if found] == [first, garbage.EVERY, 2 * garbage.EVERY]
        assert {generation for found in seen.values() for generation in found} == {2}
    finally:
        garbage.release()


def test_objects_that_exist_after_the_first_step_are_not_visited_again() -> None:
    garbage = GarbageCollector()
    kept = [[n] for n in range(1000)]
    try:
        garbage.after_step(1)
        assert gc.get_freeze_count() > len(kept) and len(gc.get_objects()) < len(kept)
    finally:
        garbage.release()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_release_without_a_step_changes_nothing() -> None:
    GarbageCollector().release()
    assert gc.isenabled()


def test_a_run_that_compiles_nothing_does_not_import_the_compiler() -> None:
    """It takes a second of each process's start."""
    unused = ["torch._dynamo", "torch.distributed.pipelining", "plotly"]
    code = f"import sys, internevo.train.trainer; print([name for name in {unused} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def config(*, tensor: int = 1, **model: Any) -> Config:
    """A small model."""
    shape = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    return validate(
        {
            "model_type": "BAICHUAN2" if "use_alibi" in model else "LLAMA2",
            "model": {**shape, **model},
            "parallel": {"tensor": {"size": tensor, "mode": "mtp"}},
            "data": {"seq_len": 8, "micro_bsz": 1, "total_steps": 1},
            "adam": {"lr": 1e-3},
        }
    )


@pytest.mark.parametrize(
    ("model", "device", "has_effect"),
    [
        ({"dtype": "torch.bfloat16"}, "cuda", True), ({"dtype": "torch.float16"}, "cuda", True),
        ({"dtype": "torch.float32"}, "cuda", False), ({"dtype": "tf32"}, "cuda", False),
        ({"dtype": "torch.float32"}, "cpu", False), ({"dtype": "torch.bfloat16", "use_alibi": True}, "cuda", False),
    ],
)  # fmt: skip
def test_flash_attention_is_set_up_where_it_has_an_effect_and_else_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], device: str, has_effect: bool
) -> None:
    chosen, restored = list[object](), list[int]()
    monkeypatch.setattr(flash, "choose", lambda *args: chosen.append(args))
    monkeypatch.setattr(flash, "restore", lambda: restored.append(1))
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    of, on = config(flash_attention=4, **model), torch.device(device)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        process.prepare(of, on)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    heads = flash.Heads(2, 2, 8, (), COMPUTE[of.model.dtype])
    assert chosen == ([(4, heads, on)] if has_effect else []) and len(restored) == (device == "cuda")
    warned = [line for line in process.unsuited(of, on) if "flash_attention" in line]
    assert [line.split(" has")[0] for line in warned] == ["warning: model.flash_attention = 4"] * (not has_effect)
    assert not any("flash" in line for line in process.unsuited(config(**model), on))


def test_a_rank_checks_its_own_heads() -> None:
    of = config(tensor=4, num_attention_heads=8, num_kv_attention_heads=2, flash_attention=3, dtype="torch.bfloat16")
    assert process._flash_attention(of) == flash.Heads(2, 1, 2, (), torch.bfloat16)


Modes = tuple[bool, bool, bool, str | None]
MEMORY: Any = torch.utils.deterministic


def modes() -> Modes:
    """What is in force in this process."""
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        MEMORY.fill_uninitialized_memory, os.environ.get(WORKSPACE),
    )  # fmt: skip


@pytest.fixture(params=["none", "warn", "error"])
def before(request: pytest.FixtureRequest) -> Iterator[Modes]:
    """The modes of a program that trains: PyTorch's own, or others that it has chosen."""
    old = modes()
    torch.use_deterministic_algorithms(request.param != "none", warn_only=request.param == "warn")
    MEMORY.fill_uninitialized_memory = request.param != "warn"
    yield modes()
    torch.use_deterministic_algorithms(old[0], warn_only=old[1])
    MEMORY.fill_uninitialized_memory = old[2]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("workspace", [None, ":4096:8", ":16:8"])
def test_computation_is_deterministic_in_the_context_and_afterwards_as_before(
    monkeypatch: pytest.MonkeyPatch, before: Modes, workspace: str | None, gpu: bool
) -> None:
    monkeypatch.setattr(process, "has_gpu", lambda: gpu)
    monkeypatch.delenv(WORKSPACE, raising=False)
    if workspace is not None:
        monkeypatch.setenv(WORKSPACE, workspace)
    old = (*before[:3], workspace)
    with determinism(validate(tiny())):
        assert modes() == old
    with determinism(validate(tiny(deterministic=True))):
        assert modes() == (True, False, False, (workspace or DETERMINISTIC[0]) if gpu else workspace)
    assert modes() == old
    with pytest.raises(KeyError), determinism(validate(tiny(deterministic=True))):
        raise KeyError
    assert modes() == old


def test_a_workspace_of_cublas_that_is_not_deterministic_is_refused_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":4096:2")
    monkeypatch.setattr(process, "has_gpu", lambda: True)
    old = modes()
    message = "deterministic = True does not work with CUBLAS_WORKSPACE_CONFIG=:4096:2 in the environment"
    with pytest.raises(ConfigError, match=message), determinism(validate(tiny(deterministic=True))):
        pass
    assert modes() == old
    for deterministic, gpu in ((False, True), (True, False)):
        monkeypatch.setattr(process, "has_gpu", lambda gpu=gpu: gpu)
        with determinism(validate(tiny(deterministic=deterministic))):
            assert modes()[0] == deterministic and os.environ[WORKSPACE] == ":4096:2"


@pytest.mark.parametrize("deterministic", [False, True])
def test_steps_are_deterministic_if_the_config_says_so(tmp_path: Path, dataset: Path, deterministic: bool) -> None:
    seen, old = list[Modes](), modes()

    def on_step(record: StepRecord) -> None:
        seen.append(modes())

    places = {"data__train_folder": str(dataset), "ckpt__save_ckpt_folder": str(tmp_path / "run"), "data__total_steps": 2}
    internevo.train(validate(tiny(**places, deterministic=deterministic)), on_step)
    assert [(on, filled) for on, _, filled, _ in seen] == [(deterministic, not deterministic)] * 2
    assert modes() == old
