"""Orders of pipeline schedules: complete, without a deadlock, and with the bubbles that their papers state."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo.parallel.orders import Action, Order, bubble, forwards, most_in_flight, orders, play, sends_before, stages_on

MODES = [("1F1B", 1), ("1F1B", 2), ("1F1B", 3), ("ZBH1", 1), ("ZBV", 2)]
ranks = st.integers(1, 7)
micro_batches = st.integers(1, 24)


def end(all_orders: list[Order], times: dict[str, float]) -> float:
    return max(timed.end for timeline in play(all_orders, lambda action: times[action.kind]) for timed in timeline)


@given(mode=st.sampled_from(MODES), ranks=ranks, micro_batches=micro_batches)
def test_every_pass_runs_once_on_the_rank_of_its_stage_in_the_order_of_micro_batches(
    mode: tuple[str, int], ranks: int, micro_batches: int
) -> None:
    all_orders = orders(mode[0], ranks, mode[1], micro_batches)
    kinds = "FB" if mode[0] == "1F1B" else "FBW"
    for rank, order in enumerate(all_orders):
        stages = stages_on(rank, ranks, mode[1], mode[0])
        assert sorted(order) == sorted(Action(k, s, n) for k in kinds for s in stages for n in range(micro_batches))  # type: ignore[arg-type]
        for kind in kinds:
            for stage in stages:
                assert [a.micro_batch for a in order if a[:2] == (kind, stage)] == list(range(micro_batches))


@given(mode=st.sampled_from(MODES), ranks=ranks, micro_batches=micro_batches, message=st.floats(0, 3))
def test_no_order_makes_the_ranks_wait_for_each_other(
    mode: tuple[str, int], ranks: int, micro_batches: int, message: float
) -> None:
    """``play`` raises if they would. It looks at what each rank receives in the order in which its sender sends it."""
    all_orders = orders(mode[0], ranks, mode[1], micro_batches)
    played = play(all_orders, lambda action: 1.0, message)
    assert [[timed.action for timed in timeline] for timeline in played] == all_orders


@given(ranks=ranks, rounds=st.integers(1, 4), chunks=st.integers(1, 4), f=st.floats(0.5, 2), b=st.floats(0.5, 4))
def test_bubble_of_1f1b_and_of_interleaved_stages(ranks: int, rounds: int, chunks: int, f: float, b: float) -> None:
    count = rounds * ranks
    times = {"F": f / chunks, "B": b / chunks}
    assert end(orders("1F1B", ranks, chunks, count), times) == pytest.approx((f + b) * (count + (ranks - 1) / chunks))


@given(ranks=ranks, more=st.integers(0, 10), f=st.floats(0.5, 1), b=st.floats(1, 2))
def test_bubble_of_zbh1(ranks: int, more: int, f: float, b: float) -> None:
    times, count = {"F": f, "B": b, "W": f}, ranks + more
    assert end(orders("ZBH1", ranks, 1, count), times) <= sum(times.values()) * count + (ranks - 1) * b + 1e-9


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 8])
def test_zbv_is_nearly_without_a_bubble_and_keeps_no_more_than_1f1b(ranks: int) -> None:
    for count in range(2 * ranks, 6 * ranks):
        all_orders = orders("ZBV", ranks, 2, count)
        idle = end(all_orders, {"F": 0.5, "B": 0.5, "W": 0.5}) - 3 * count
        assert (ranks - 1) / 2 <= idle <= ranks - 1  # 1F1B: 3 (ranks - 1)
        for order in all_orders:
            kept = [sum({"F": 1, "B": 0, "W": -1}[a.kind] for a in order[:n]) for n in range(len(order))]
            assert max(kept) <= 2 * ranks  # of half of the layers of a rank each


def test_1f1b_keeps_the_activations_of_p_minus_r_micro_batches() -> None:
    assert [most_in_flight(order) for order in orders("1F1B", 4, 1, 9)] == [4, 3, 2, 1]


def test_forward_passes_alone() -> None:
    assert forwards("ZBV", 2, 2, 2)[0] == [Action("F", 0, 0), Action("F", 0, 1), Action("F", 3, 0), Action("F", 3, 1)]


def test_a_deadlock_is_found() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        play([[Action("B", 0, 0), Action("F", 0, 0)]], lambda action: 1.0)


def test_the_share_of_idle_time() -> None:
    played = play(orders("1F1B", 2, 1, 2), lambda action: 1.0)
    assert bubble(played) == pytest.approx(1 / 3)  # 2 ranks, each busy for 4 of 6


def test_what_a_result_waits_for() -> None:
    """1F1B on 3 ranks: rank 1 runs two forward passes before its first backward pass, which therefore waits for both."""
    all_orders = orders("1F1B", 3, 1, 4)
    of_rank_0, of_rank_1 = sends_before(all_orders, 0), sends_before(all_orders, 1)
    assert [of_rank_0[Action("B", 1, n)] for n in range(4)] == [2, 3, 4, 4]
    # Rank 1 sends two results on, and then the first gradient, which rank 0 needs before its fourth forward pass.
    assert [of_rank_1[Action("F", 0, n)] for n in range(4)] == [0, 0, 0, 3]
