"""The optimizer compared with PyTorch's plain AdamW with two parameter groups; scaled gradients and skipped steps; the
names of its state; frozen parameters."""

import copy
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from internevo.config.training import Adam
from internevo.train.optimizer import Optimizer

SHAPES = {"experts": (2, 3, 4), "matrix": (5, 3), "row": (1, 4), "norm": (4,), "scalar": ()}
FROZEN = "frozen"


def parameters(seed: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Makes a parameter for each number of dimensions, and a frozen one."""
    draw = torch.Generator().manual_seed(seed)
    named = {name: nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for name, shape in SHAPES.items()}
    return {**named, FROZEN: nn.Parameter(torch.randn(3, 3, generator=draw, dtype=dtype), requires_grad=False)}


def reference(named: dict[str, nn.Parameter], config: Adam) -> torch.optim.AdamW:
    """Makes PyTorch's AdamW, neither fused nor foreach, with weight decay for parameters of two or more dimensions."""
    trained = [parameter for parameter in named.values() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, eps=config.adam_eps, foreach=False, fused=False)


def give_gradients(*models: dict[str, nn.Parameter], draw: torch.Generator) -> None:
    """Gives all models the same random gradients."""
    for name, shape in SHAPES.items():
        gradient = torch.randn(shape, generator=draw, dtype=models[0][name].dtype)
        for model in models:
            model[name].grad = gradient.clone()


@settings(max_examples=6)
@given(
    seed=st.integers(0, 10**6),
    beta1=st.floats(0, 0.99),
    eps=st.sampled_from([1e-8, 1e-3]),
    decay=st.floats(0, 0.5),
    rates=st.lists(st.floats(0, 0.1), min_size=50, max_size=50),
    betas=st.lists(st.floats(0.5, 0.999), min_size=50, max_size=50),
)
def test_50_steps_are_those_of_pytorchs_adamw(
    seed: int, beta1: float, eps: float, decay: float, rates: list[float], betas: list[float]
) -> None:
    config = Adam(lr=1, adam_beta1=beta1, adam_eps=eps, weight_decay=decay)
    mine, theirs = parameters(seed, torch.float64), parameters(seed, torch.float64)
    optimizer, wanted = Optimizer(mine, config), reference(theirs, config)
    draw = torch.Generator().manual_seed(seed)
    for lr, beta2 in zip(rates, betas, strict=True):
        give_gradients(mine, theirs, draw=draw)
        for group in wanted.param_groups:
            group.update(lr=lr, betas=(beta1, beta2))
        wanted.step()
        optimizer.step(lr, beta2)
    assert optimizer.steps == 50
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine[name], parameter, rtol=1e-9, atol=1e-9, msg=name)
        for moment in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
            torch.testing.assert_close(optimizer.state()[f"{name}.{moment}"], wanted.state[parameter][moment])


def test_steps_in_fp32_stay_close_to_pytorchs() -> None:
    config = Adam(lr=1, weight_decay=0.1)
    mine, theirs = parameters(0, torch.float32), parameters(0, torch.float32)
    optimizer, wanted = Optimizer(mine, config), reference(theirs, config)
    draw = torch.Generator().manual_seed(0)
    for group in wanted.param_groups:
        group.update(lr=1e-2, betas=(0.9, 0.95))
    for _ in range(50):
        give_gradients(mine, theirs, draw=draw)
        wanted.step()
        optimizer.step(1e-2, 0.95)
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine[name], parameter, rtol=1e-5, atol=1e-6)


def test_weight_decay_applies_only_to_parameters_of_two_or_more_dimensions() -> None:
    mine = parameters(1, torch.float64)
    before = copy.deepcopy(mine)
    optimizer = Optimizer(mine, Adam(lr=1, weight_decay=0.5))
    for name in SHAPES:
        mine[name].grad = torch.zeros_like(mine[name])
    optimizer.step(0.1, 0.95)
    for name, shape in SHAPES.items():
        torch.testing.assert_close(mine[name], before[name] * (0.95 if len(shape) >= 2 else 1.0))


def test_the_state_has_the_names_and_shapes_of_the_trained_parameters_only() -> None:
    mine = parameters(0, torch.float32)
    optimizer = Optimizer(mine, Adam(lr=1))
    shapes = {f"{name}.{moment}": torch.Size(shape) for name, shape in SHAPES.items() for moment in ("exp_avg", "exp_avg_sq")}
    assert {name: tensor.shape for name, tensor in optimizer.state().items()} == shapes
    stored = optimizer.checkpoint_tensors()
    assert stored.keys() == {f"model/{name}" for name in mine} | {f"optimizer/{name}" for name in shapes}
    assert all(stored[f"model/{name}"].data_ptr() == parameter.data_ptr() for name, parameter in mine.items())
    assert not any(tensor.requires_grad for tensor in stored.values())


def test_frozen_parameters_do_not_change() -> None:
    mine = parameters(0, torch.float32)
    before = mine[FROZEN].clone()
    optimizer = Optimizer(mine, Adam(lr=1, weight_decay=0.5))
    give_gradients(mine, draw=torch.Generator())
    assert optimizer.gradients().keys() == SHAPES.keys()
    optimizer.step(0.1, 0.95)
    assert torch.equal(mine[FROZEN], before)


def test_a_step_multiplies_the_gradients_by_a_factor_and_writes_the_models_weights() -> None:
    config = Adam(lr=1, weight_decay=0.1)
    mine, other = parameters(0, torch.float32), parameters(0, torch.float32)
    weights = {name: torch.zeros_like(mine[name], dtype=torch.bfloat16, requires_grad=False) for name in SHAPES}
    optimizer, wanted = Optimizer(mine, config, weights), Optimizer(other, config)
    for seed in range(3):
        give_gradients(mine, other, draw=torch.Generator().manual_seed(seed))
        for name in SHAPES:
            other[name].grad = optimizer.gradients()[name] / 4
        optimizer.step(0.1, 0.95, torch.tensor(0.25), torch.tensor(1.0))
        wanted.step(0.1, 0.95)
        assert all(torch.equal(mine[name], parameter) for name, parameter in other.items())
        assert all(torch.equal(weight, other[name].bfloat16()) for name, weight in weights.items())
    assert all(torch.equal(moment, wanted.state()[name]) for name, moment in optimizer.state().items())


def test_a_step_with_gradients_that_are_not_finite_changes_nothing() -> None:
    mine = parameters(0, torch.float32)
    weights = {name: torch.full_like(mine[name], 7.0, dtype=torch.bfloat16, requires_grad=False) for name in SHAPES}
    optimizer = Optimizer(mine, Adam(lr=1), weights)
    give_gradients(mine, draw=torch.Generator().manual_seed(1))
    optimizer.step(0.1, 0.95)
    before = {name: tensor.detach().clone() for name, tensor in optimizer.checkpoint_tensors().items()}
    give_gradients(mine, draw=torch.Generator().manual_seed(2))
    optimizer.gradients()["norm"].fill_(math.inf)
    optimizer.step(0.1, 0.95, torch.tensor(math.nan), torch.tensor(0.0))
    optimizer.skipped()
    assert optimizer.steps == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.checkpoint_tensors().items())
    assert all(torch.equal(weight, mine[name].bfloat16()) for name, weight in weights.items())


def test_gradients_are_freed() -> None:
    mine = parameters(0, torch.float64)
    optimizer = Optimizer(mine, Adam(lr=1))
    give_gradients(mine, draw=torch.Generator().manual_seed(1))
    assert optimizer.gradients()
    optimizer.zero_grad()
    assert not optimizer.gradients() and all(parameter.grad is None for parameter in mine.values())


def test_a_loaded_optimizer_continues_bit_for_bit() -> None:
    config = Adam(lr=1, weight_decay=0.1)
    whole, halves = parameters(2, torch.float32), parameters(2, torch.float32)

    def train(named: dict[str, nn.Parameter], optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            give_gradients(named, draw=torch.Generator().manual_seed(step))
            optimizer.step(0.01, 0.95)

    train(whole, Optimizer(whole, config), range(6))
    first = Optimizer(halves, config)
    train(halves, first, range(3))
    second = Optimizer(halves, config)
    for name, moment in second.state().items():
        moment.copy_(first.state()[name])
    second.steps = first.steps
    train(halves, second, range(3, 6))
    assert second.steps == 6
    assert all(torch.equal(halves[name], parameter) for name, parameter in whole.items())
