"""When Python's garbage collector runs."""

import gc
from collections.abc import Iterator

import pytest

from internevo.train.process import GarbageCollector


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that are collected, one after another."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def make_garbage() -> None:
    """More objects in circles than Python lets be."""
    for _ in range(20_000):
        circle: list[object] = []
        circle.append(circle)


def test_collections_come_after_the_first_step_and_at_set_steps_alone(collections: list[int]) -> None:
    garbage = GarbageCollector()
    try:
        make_garbage()
        assert collections  # by itself
        first, seen = 7, {}
        for step in range(first, 2 * garbage.EVERY + 1):
            collections.clear()
            make_garbage()
            seen[step] = list(collections)
            garbage.after_step(step)
            seen[step] = list(collections[len(seen[step]) :])
            if step > first:
                assert len(collections) == len(seen[step])  # none while the step made its garbage
        assert [step for step, found in seen.items() if found] == [first, garbage.EVERY, 2 * garbage.EVERY]
        assert {generation for found in seen.values() for generation in found} == {2}
    finally:
        garbage.release()


def test_what_is_there_after_the_first_step_is_not_looked_at_again() -> None:
    garbage = GarbageCollector()
    kept = [[n] for n in range(1000)]
    try:
        garbage.after_step(1)
        assert gc.get_freeze_count() > len(kept) and len(gc.get_objects()) < len(kept)
    finally:
        garbage.release()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_without_a_step_nothing_is_changed() -> None:
    GarbageCollector().release()
    assert gc.isenabled()
