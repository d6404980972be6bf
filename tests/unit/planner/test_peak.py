"""The most memory within a pass, by formula."""

from dataclasses import replace

import pytest

from internevo.config import validate
from internevo.models.config import DecoderConfig
from internevo.parallel.layout import Layout
from internevo.parallel.strategy import Workload
from internevo.planner.dryrun import dry_run
from internevo.planner.peak import peak
from tests.conftest import tiny
from tests.parallel.layouts import composition

TINY = DecoderConfig("llama", 1024, 64, 96, 6, 4, 2, 16)


def test_the_fullest_moment_by_hand() -> None:
    """One process in bf16, one layer: the logits of a large vocabulary, or the gradients of an MLP."""
    decoder = replace(TINY, num_layers=1)
    work = Workload(decoder, Layout(1, 1, "mtp", 1, 1, 1, False), 256, 1, 2, 4, 0.0, False, None, "cuda")
    weights = 2 * (2 * 1024 * 64 + 64 * (64 + 2 * 32 + 64) + 3 * 64 * 96 + 3 * 64)
    norm, angles = 256 * (2 * 64 + 4), 2 * 256 * 16
    attention = 2 * 256 * (64 + 64 + 2 * 32 + 64) + 4 * 256 * 4  # input, q, k, v, output and log-sum-exp
    mlp = 2 * 256 * (64 + 3 * 96)
    layer, head = 2 * norm + attention + mlp, norm + 2 * 64 * (256 + 1024)
    # Logits and their gradient in fp32 and bf16, and a product, the sum of products and the input of the head.
    logits = 256 * 1024 * (4 + 2) + 1024 * 64 * (4 + 2) + 2 * 256 * 64
    assert peak(work) == weights + layer + head + angles + 4 + logits


@pytest.mark.parametrize("seed", [1002, 1003, 1006, 1009, 1015])
def test_the_formula_is_near_the_fullest_moment_of_a_dry_run(seed: int) -> None:
    """Zero-bubble with and without ZeRO, recomputed experts over ranks, an interleaved pipeline, FSDP with isp."""
    drawn = composition(seed)
    data = drawn.processes // drawn.layout["parallel__tensor"]["size"] // drawn.layout["parallel__pipeline"]["size"]
    sizes = {"data__micro_bsz": 1, "data__global_batch_size": 4 * data, "data__total_steps": 2, "data__type": "mocked"}
    found = dry_run(validate(tiny(**{**drawn.changes, **sizes})), drawn.processes, drawn.processes - 1)
    assert found.stated_peak == pytest.approx(found.peak.nbytes, rel=0.04)
    assert found.memory == found.stated_memory
