"""What a pipeline copies to the device, and when."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from internevo.data.batches import MicroBatch
from internevo.models.config import DecoderConfig, Experts, Stage
from internevo.models.decoder import Decoder
from internevo.models.losses import HandedOn, Loss, LossTerms
from internevo.parallel import messages, pipeline
from internevo.parallel.data_axis import SingleProcess
from internevo.parallel.deferred import Deferred
from internevo.parallel.messages import Channels
from internevo.parallel.orders import Action
from internevo.parallel.pipeline import Chunk, Chunks, Pipeline, to_device

CONFIG = DecoderConfig("LLAMA2", 97, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
STAGES = [Stage(range(1), heads=False), Stage(range(1, 2), embeds=False)]


def micro_batch(seed: int = 0) -> MicroBatch:
    tokens = torch.randint(0, 97, (1, 24), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens, dtype=torch.int16), torch.tensor([0, 11, 24]))


@pytest.mark.parametrize(("embeds", "heads", "experts", "fields"), [
    (True, False, False, {"tokens"}), (False, False, False, set()), (False, True, False, {"labels", "types"}),
    (True, True, False, {"tokens", "labels", "types"}), (False, False, True, {"labels"}),
])  # fmt: skip
def test_a_stage_copies_only_what_it_needs(embeds: bool, heads: bool, experts: bool, fields: set[str]) -> None:
    config = DecoderConfig(
        "LLAMA2", 97, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        experts=Experts(4, 2, 16) if experts else None,
    )  # fmt: skip
    with torch.device("meta"):
        model = Decoder(config, Stage(range(1), embeds, heads))
    batch = micro_batch()
    copied = to_device(batch, model, torch.device("cpu"))
    assert copied.cu_seqlens is batch.cu_seqlens
    for name in ("tokens", "labels", "types"):
        mine, all_of_it = getattr(copied, name), getattr(batch, name)
        assert (mine.shape, mine.dtype) == (all_of_it.shape, all_of_it.dtype)
        if name in fields:
            assert torch.equal(mine, all_of_it)
        else:
            assert mine.untyped_storage().nbytes() <= 8


@pytest.mark.parametrize("mode", ["1F1B", "ZBV"])
def test_micro_batches_are_copied_one_by_one_when_they_are_needed(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Both stages are on one rank, so that no messages are sent."""
    groups: Any = SimpleNamespace(get=lambda ranks: None)
    monkeypatch.setattr(messages, "dist", SimpleNamespace(get_rank=lambda: 0))
    channels = Channels(groups, [[0]], [0, 0], torch.device("cpu"), torch.float32)
    chunks = []
    for number, stage in enumerate(STAGES):
        with torch.device("meta"):
            model = Decoder(CONFIG, stage)
        deferred = Deferred() if mode == "ZBV" else None
        if deferred is not None:
            deferred.apply(model)
        chunks.append(Chunk(number, model, SingleProcess(model, torch.device("cpu"), torch.float32), deferred))
        for master in model.parameters():
            torch.nn.init.normal_(master, std=0.1)
    schedule = Pipeline(mode, chunks, Chunks([chunk.axis for chunk in chunks], None), channels, 1)
    events: list[Any] = []
    batches = [micro_batch(seed) for seed in range(3)]

    def spy(batch: MicroBatch, model: Decoder, device: torch.device) -> MicroBatch:
        events.append((model.stage.heads, next(n for n, other in enumerate(batches) if other is batch)))
        return to_device(batch, model, device)

    def on_result(batch: MicroBatch, result: Loss | HandedOn) -> None:
        assert isinstance(result, HandedOn) or bool((batch.labels >= 0).all())

    monkeypatch.setattr(pipeline, "to_device", spy)
    schedule.after_pass = events.append
    schedule.train(batches, LossTerms(), 1.0, on_result)
    forwards = [n for n, event in enumerate(events) if isinstance(event, Action) and event.kind == "F"]
    assert len(forwards) == 6 and len(events) == 6 + (12 if mode == "1F1B" else 18)
    for n in forwards:
        assert events[n - 1] == (events[n].stage == 1, events[n].micro_batch)
