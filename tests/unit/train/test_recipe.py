"""The values that are chosen for fine-tuning are in the ranges that people use, and fit together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internevo.config import validate
from internevo.config.training import LrScheduler
from internevo.data.encoding.tokenize import is_valid, valid_ratio_for
from internevo.train import fit, recipe
from internevo.train.lr_schedule import learning_rate
from tests.conftest import tiny


def test_larger_models_have_smaller_learning_rates() -> None:
    for adapters, rates in ((False, [1e-4, 5e-5, 2e-5, 6e-6]), (True, [1e-3, 5e-4, 2e-4, 6e-5])):
        assert [recipe.learning_rate(int(size), adapters) for size in (135e6, 1.1e9, 7e9, 70e9)] == rates
        found = [recipe.learning_rate(10**power, adapters) for power in range(3, 13)]
        assert found == sorted(found, reverse=True)


@given(longest=st.integers(1, 10**6), share=st.floats(0.001, 1), limit=st.none() | st.integers(1, 10**6), texts=st.booleans())
def test_rows_have_room_for_the_longest_document_or_are_as_long_as_the_model_allows(
    longest: int, share: float, limit: int | None, texts: bool
) -> None:
    row = recipe.row_length(longest, max(1, share * longest), limit, texts)
    most = min(limit or 10**9, recipe.TEXT_ROW if texts else recipe.ROW)
    assert 1 <= row <= most and (row >= longest or row == most)
    assert row % recipe.ROUND == 0 or row == most


@given(documents=st.integers(1, 10**6), rows=st.integers(1, 10**6), seq_len=st.integers(1, 8192), ranks=st.integers(1, 64))
def test_a_step_has_the_same_rows_on_each_rank(documents: int, rows: int, seq_len: int, ranks: int) -> None:
    per_step = recipe.rows_per_step(rows, documents, seq_len, ranks)
    assert per_step % ranks == 0
    assert per_step == ranks or (per_step * seq_len <= 2 * recipe.STEP_TOKENS and per_step <= rows / 5)
    sizes = recipe.micro_batches(per_step // ranks, seq_len, "cpu")
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 and not any(per_step // ranks % size for size in sizes)


@pytest.mark.parametrize("documents", [0, 1, 2, 3, 5, 10, 200, 5000, 10**6])
def test_some_documents_are_held_out_if_there_are_a_few(documents: int) -> None:
    ratio = valid_ratio_for(documents)
    held_out = sum(is_valid(number, ratio) for number in range(min(documents, 20_000)))
    assert (held_out > 0) == (documents > 2) and (held_out < documents or not documents)
    assert ratio * documents <= 1500


def test_a_run_is_made_to_fit_without_changing_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate(tiny())
    for limit in (0, 10**15):
        monkeypatch.setattr(fit, "free_memory", lambda device, processes, limit=limit: limit)
        for checkpoint in (0.0, 0.5, 1.0):
            model = config.model.model_copy(update={"checkpoint": checkpoint})
            tried = config.model_copy(update={"model": model})
            found, enough = fit.fitted(tried, [2, 1], 2, torch.device("cpu"), {fit.CHECKPOINT, fit.FSDP})
            assert enough == (limit > 0) and found.model.checkpoint == checkpoint
            assert found.parallel.zero1.fsdp == config.parallel.zero1.fsdp
            assert found.data.micro_bsz == (2 if enough else 1)
    monkeypatch.setattr(fit, "free_memory", lambda device, processes: 0)
    found, _ = fit.fitted(config, [1], 2, torch.device("cpu"))
    assert found.model.checkpoint == 1.0 and found.parallel.zero1.fsdp


@given(steps=st.integers(1, 10**6))
def test_the_rate_rises_for_a_twentieth_of_the_steps_but_for_two_at_least(steps: int) -> None:
    schedule = LrScheduler(warmup_ratio=recipe.warmup_ratio(steps))
    first = [learning_rate(step, steps, 1.0, schedule) for step in range(min(steps, 2))]
    assert first == [1.0] if steps == 1 else first[0] < first[1]
    rising = int(steps * schedule.warmup_ratio)
    assert min(2, steps) <= rising <= max(2, steps / 20)
