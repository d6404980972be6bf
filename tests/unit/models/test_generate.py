"""How the next token is drawn."""

import torch

from internevo.models.generate import Sampling, choose


def test_sampling_depends_on_the_seed_and_respects_its_limits() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    draw = lambda **k: {choose(logits, Sampling(**k), torch.Generator().manual_seed(s)) for s in range(1000)}  # noqa: E731
    assert draw(temperature=0.0) == {0}
    assert draw(top_k=2) == {0, 1}
    assert draw(top_p=0.5) == {0}  # its probability is 0.64
    assert draw() == {0, 1, 2, 3, 4}
