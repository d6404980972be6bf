"""How the state is copied before it is written. (What each rank copies, and when: tests/parallel/test_saving.py.)"""

import warnings
from concurrent.futures import Future

import pytest
import torch

from internevo.checkpoint.staging import PinnedStager, stager_for


class Stream:
    """In place of a GPU's stream."""

    events: list[str]

    def __enter__(self) -> None:
        self.events.append("copies")

    def __exit__(self, *error: object) -> None:
        pass

    def synchronize(self) -> None:
        self.events.append("copied")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on a GPU that is not there."""
    Stream.events = []
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: Stream.events.append("the last update is finished"))
    return Stream.events


def test_a_gpu_copies_on_another_stream_after_the_last_update_and_into_the_same_memory_at_each_save(events: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Ignoring pin_memory flag", category=UserWarning)
        stager = stager_for(torch.device("cuda"))
    assert isinstance(stager, PinnedStager)
    state, addresses = torch.zeros(100), set()
    for step in range(3):
        state.fill_(step)
        staged = stager.stage({"model/weight": state})
        assert isinstance(staged, Future), "the run goes on meanwhile"
        copy = staged.result()["model/weight"]
        state.fill_(-1)
        assert torch.equal(copy, torch.full((100,), float(step)))
        addresses.add(copy.data_ptr())
    assert events == ["the last update is finished", "copies", "copied"] * 3
    assert len(addresses) == 1
    stager.close()


def test_on_a_cpu_the_step_that_saves_copies() -> None:
    assert stager_for(torch.device("cpu")) is None
