"""A schedule runs micro-batches through the model: what it passes to ``on_loss``, and which gradients the masters have."""

import torch

from internevo.data.batches import MicroBatch
from internevo.models.config import DecoderConfig
from internevo.models.decoder import Decoder
from internevo.models.losses import HandedOn, Loss, LossTerms
from internevo.parallel.data_axis import SingleProcess
from internevo.parallel.schedule import OneStage

CONFIG = DecoderConfig("LLAMA2", 97, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def micro_batches(count: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        tokens = torch.randint(0, 97, (1, 24), generator=generator)
        boundaries = torch.tensor([0, 11, 24], dtype=torch.int32)
        made.append(MicroBatch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), boundaries))
    return made


def make(dtype: torch.dtype) -> tuple[OneStage, SingleProcess, Decoder]:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(CONFIG)
    axis = SingleProcess(model, torch.device("cpu"), dtype)
    for master in axis.masters.values():
        torch.nn.init.normal_(master, std=0.1)
    axis.masters_changed()
    return OneStage(model, axis, torch.device("cpu")), axis, model


def test_training_adds_up_the_gradients_of_all_micro_batches() -> None:
    schedule, axis, model = make(torch.float32)
    passed: list[tuple[MicroBatch, Loss | HandedOn]] = []
    schedule.train(micro_batches(3), LossTerms(), 0.5, lambda micro_batch, loss: passed.append((micro_batch, loss)))
    assert [micro_batch.tokens.tolist() for micro_batch, _ in passed] == [m.tokens.tolist() for m in micro_batches(3)]
    found = {name: master.grad.clone() for name, master in axis.masters.items() if master.grad is not None}
    model.zero_grad()
    total = sum(model(m.tokens, cu_seqlens=m.cu_seqlens, labels=m.labels).total for m in micro_batches(3))
    (0.5 * total).backward()
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_masters_get_the_gradients_of_half_precision_weights() -> None:
    schedule, axis, model = make(torch.bfloat16)
    schedule.train(micro_batches(2), LossTerms(), 1.0, lambda micro_batch, loss: None)
    assert all(weight.grad is None and weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert all(master.grad is not None and master.grad.dtype == torch.float32 for master in axis.masters.values())


def test_after_evaluation_there_is_no_gradient_and_the_model_is_in_training_mode() -> None:
    schedule, axis, model = make(torch.float32)
    losses: list[Loss | HandedOn] = []
    schedule.evaluate(iter(micro_batches(2)), lambda micro_batch, loss: losses.append(loss))
    assert len(losses) == 2 and model.training and isinstance(losses[0], Loss)
    assert all(master.grad is None for master in axis.masters.values()) and not losses[0].total.requires_grad
