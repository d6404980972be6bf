"""How the next token is drawn."""

from typing import Any

import pytest
import torch

from internevo.errors import InternEvoError, UsageError
from internevo.models.generate import Sampling, choose


def test_sampling_depends_on_the_seed_and_respects_its_limits() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    draw = lambda **k: {choose(logits, Sampling(**k), torch.Generator().manual_seed(s)) for s in range(1000)}  # noqa: E731
    assert draw(temperature=0.0) == {0}
    assert draw(top_k=2) == {0, 1}
    assert draw(top_p=0.5) == {0}  # its probability is 0.64
    assert draw(top_p=0.0) == draw(top_p=1e-30) == draw(temperature=1e-30) == draw(temperature=1e-320) == draw(top_k=1) == {0}
    assert draw(temperature=1e30) == draw() == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": float("nan")}, "temperature = nan must be a finite number of at least 0"),
        ({"temperature": float("inf")}, "temperature = inf must be"),
        ({"temperature": -1.0}, "temperature = -1.0 must be"),
        ({"top_p": float("nan")}, "top_p = nan must be a number from 0 to 1"),
        ({"top_p": 1.5}, "top_p = 1.5 must be"),
        ({"top_k": -1}, "top_k = -1 must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**values)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_with_logits_that_are_not_finite_is_named_as_the_cause(temperature: float) -> None:
    with pytest.raises(InternEvoError, match="logits that are not finite"):
        choose(torch.tensor([1.0, float("nan")]), Sampling(temperature), torch.Generator())
