"""A step compared with PyTorch: the mean loss of all micro-batches, ``clip_grad_norm_``, AdamW; and skipped steps."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from internevo.config import validate
from internevo.data.batches import Cursor, MicroBatch, StepBatch
from internevo.models.decoder import Decoder
from internevo.parallel.world import World, join
from internevo.train.parts import Parts
from internevo.train.scaler import LossScaler
from internevo.train.shared import Shared
from internevo.train.step import Stepper, StepResult, clip_factor, evaluate
from tests.conftest import tiny

BETA1, BETA2, EPS, DECAY, LR = 0.8, 0.9, 1e-3, 0.1, 1e-2
TYPES = ["code", "text"]
Make = Callable[..., Stepper]
BALANCED = {
    "model_type": "MIXTRALMOE", "model__num_experts": 4, "model__top_k": 2, "model__moe_type": "Dropless",
    "model__moe_layer_kwargs": {"bias_update_speed": 0.25},
}  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "SLURM_STEP_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("INTERNEVO_DEVICE", "cpu")
        with join() as world:
            yield world


@pytest.fixture
def make(world: World) -> Make:
    """A function that makes a stepper of a small model; ``scale``: a loss scale as in fp16; ``changes`` to the config."""

    def stepper(clip: float = 0.0, scale: float | None = None, **changes: Any) -> Stepper:
        config = validate(tiny(
            adam={"lr": LR, "adam_beta1": BETA1, "adam_eps": EPS, "weight_decay": DECAY}, model__num_layers=1,
            hybrid_zero_optimizer__clip_grad_norm=clip, data__mixture=[{"kind": "mocked", "name": name} for name in TYPES],
            **changes,
        ))  # fmt: skip
        parts = Parts.build(config, world)
        if scale is not None:
            parts.scaler = LossScaler(config.grad_scaler, True, scale)
        return Stepper(parts)

    return stepper


def shared(stop_asked: float, stop_at: float, data_skipped: float) -> Shared:
    return Shared(stop_asked, 0.0, stop_at, data_skipped, [7.0])


def micro_batch(draw: torch.Generator, masked: float, packed: bool) -> MicroBatch:
    """Makes two rows of 16 tokens with random types. ``masked``: share of the labels that are masked."""
    tokens, labels = (torch.randint(0, 97, (2, 16), generator=draw) for _ in range(2))
    labels[torch.rand(2, 16, generator=draw) < masked] = -100
    types = torch.randint(0, len(TYPES), (2, 16), generator=draw)
    if not packed:
        return MicroBatch(tokens, labels, types, None)
    boundaries = torch.tensor([0, 5, 16, 17, 32], dtype=torch.int32)
    return MicroBatch(tokens.view(1, -1), labels.view(1, -1), types.view(1, -1), boundaries)


def step_batch(seed: int, masked: list[float], packed: bool = False) -> StepBatch:
    """Makes one micro-batch for each share of masked labels."""
    draw = torch.Generator().manual_seed(seed)
    made = [micro_batch(draw, share, packed) for share in masked]
    return StepBatch(made, 0, Cursor(), 32 * len(made))


class Reference:
    """A step with PyTorch alone, in one graph over all micro-batches."""

    def __init__(self, stepper: Stepper, clip: float) -> None:
        parts = stepper.parts
        self.model, self.clip = Decoder(parts.decoder), clip or math.inf
        self.model.load_state_dict(parts.model.state_dict())
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(BETA1, BETA2), eps=EPS)

    def losses(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Returns the losses of all predicted tokens of a step, and their types."""
        found, types = [], []
        for micro in batch.micro_batches:
            logits = self.model(micro.tokens, cu_seqlens=micro.cu_seqlens).flatten(0, 1)
            predicted = micro.labels.flatten() != -100
            found.append(F.cross_entropy(logits[predicted], micro.labels.flatten()[predicted], reduction="none"))
            types.append(micro.types.flatten()[predicted])
        return torch.cat(found), torch.cat(types)

    def step(self, batch: StepBatch) -> tuple[float, float]:
        """Takes a step. Returns the mean loss, and the norm before clipping."""
        loss = self.losses(batch)[0].mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item(), norm.item()


def take(stepper: Stepper, batch: StepBatch) -> StepResult:
    return stepper(batch, LR, BETA2, lambda: shared(0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("clip", "scale", "packed"),
    [(0.0, None, False), (0.05, None, False), (0.05, 2.0**12, True), (1e3, 2.0**12, False)],
)
def test_a_step_is_pytorchs_clipping_and_adamw_for_the_mean_loss_of_all_predicted_tokens(
    make: Make, clip: float, scale: float | None, packed: bool
) -> None:
    """For any number of micro-batches, with any number of predicted tokens in each."""
    stepper = make(clip, scale)
    reference = Reference(stepper, clip)
    for seed, masked in enumerate([[0.0], [0.1, 0.9, 0.5], [1.0, 0.3]]):
        batch = step_batch(seed, masked, packed)
        result = take(stepper, batch)
        loss, norm = reference.step(batch)
        assert not result.skipped
        assert result.losses.mean() == pytest.approx(loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)
        assert (clip < norm) == (clip < 1e3)  # norms above and below the limit are tested
        for name, parameter in reference.model.named_parameters():
            for moment, wanted in ((m, reference.optimizer.state[parameter][m]) for m in ("exp_avg", "exp_avg_sq")):
                mine = stepper.parts.optimizer.state()[f"{name}.{moment}"]
                assert (mine - wanted).abs().max() <= 1e-4 * wanted.abs().max(), (name, moment)
            torch.testing.assert_close(dict(stepper.parts.axis.masters)[name], parameter, rtol=1e-5, atol=1e-5)
    assert stepper.parts.optimizer.steps == 3


@given(norms=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=4), limit=st.floats(1e-3, 1e3))
def test_the_clip_factor_is_that_of_clip_grad_norm_(norms: list[float], limit: float) -> None:
    gradients = [torch.tensor([norm, 0.0], dtype=torch.float64) for norm in norms]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient * clip_factor(norm, limit))
    assert clip_factor(norm, 0.0) == 1.0


def test_the_result_has_the_mean_loss_of_each_type_and_the_shared_numbers(make: Make) -> None:
    stepper = make()
    batch = step_batch(3, [0.2, 0.6])
    losses, types = Reference(stepper, 0.0).losses(batch)
    result = stepper(batch, LR, BETA2, lambda: shared(1.0, -4.0, 3.0))
    found = result.losses.by_type(TYPES)
    assert found == {name: pytest.approx(losses[types == n].mean().item(), rel=1e-5) for n, name in enumerate(TYPES)}
    assert result.losses.counts.tolist() == torch.bincount(types).tolist()
    assert result.shared == shared(1.0, -4.0, 3.0)


def test_a_step_without_predicted_tokens_only_applies_weight_decay(make: Make) -> None:
    stepper = make(clip=1.0)
    before = {name: master.detach().clone() for name, master in stepper.parts.axis.masters.items()}
    result = take(stepper, step_batch(0, [1.0, 1.0]))
    assert (result.grad_norm, result.losses.by_type(TYPES), result.skipped) == (0.0, {}, False)
    assert math.isnan(result.losses.mean())
    for name, master in stepper.parts.axis.masters.items():
        torch.testing.assert_close(master.detach(), before[name] * (1 - LR * DECAY if master.dim() >= 2 else 1))


@pytest.mark.parametrize("changes", [{}, BALANCED], ids=["dense", "balance biases"])
def test_a_step_with_gradients_that_are_not_finite_changes_nothing(make: Make, changes: dict[str, Any]) -> None:
    """A loss scale above the range of fp32 overflows. With a smaller one, the same batch trains as if it were the first."""
    stepper, other = make(clip=1.0, scale=2.0**128, **changes), make(clip=1.0, **changes)
    before = {name: tensor.detach().clone() for name, tensor in stepper.parts.tensors().items()}
    batch = step_batch(1, [0.3, 0.3])
    result = take(stepper, batch)
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert math.isfinite(result.losses.mean())
    after = stepper.parts.tensors()
    assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert stepper.parts.optimizer.steps == 0 and not stepper.parts.optimizer.gradients()
    assert (stepper.parts.scaler.overflows, stepper.parts.scaler.clean) == (1, 0)

    stepper.parts.scaler.scale = 2.0**10
    again, wanted = take(stepper, batch), take(other, batch)
    assert not again.skipped and again.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
    for name, tensor in other.parts.tensors().items():
        torch.testing.assert_close(stepper.parts.tensors()[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("speed", [0.25, 0.0])
def test_a_step_moves_balance_biases_by_the_load_of_all_its_micro_batches(make: Make, speed: float) -> None:
    """Recomputation does not count twice, and a speed of 0 moves nothing."""
    kwargs = {"model__moe_layer_kwargs": {"bias_update_speed": speed}, "model__checkpoint": True}
    stepper = make(**{**BALANCED, **kwargs})
    batch = step_batch(1, [0.3, 1.0, 0.0])
    sums = [Decoder.__call__(stepper.parts.model, m.tokens, labels=m.labels).routed.sums[0].load for m in batch.micro_batches]
    take(stepper, batch)
    load = torch.stack(sums).sum(0)
    assert load.sum() == 3 * 32 * 2
    assert stepper.parts.biases()["model/layers.0.mlp.router.bias"].equal(speed * (load.mean() - load).sign())


def test_a_step_with_a_loss_that_is_not_finite_is_skipped(make: Make) -> None:
    stepper = make()
    with torch.no_grad():
        next(iter(stepper.parts.axis.masters.values())).fill_(math.nan)
    assert take(stepper, step_batch(0, [0.0])).skipped
    assert stepper.parts.optimizer.steps == 0


def test_evaluation_is_the_mean_over_all_batches_and_changes_nothing(make: Make) -> None:
    stepper = make()
    batch = step_batch(5, [0.1, 0.8, 0.4])
    losses, types = Reference(stepper, 0.0).losses(batch)
    parts = stepper.parts
    found = evaluate(parts.schedule, parts.layout, torch.device("cpu"), batch.micro_batches, len(TYPES))
    assert found.mean() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.counts.tolist() == torch.bincount(types).tolist()
    assert stepper.parts.model.training and not stepper.parts.optimizer.gradients()
