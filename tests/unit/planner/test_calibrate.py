"""Calibrations: the numbers predict the times that they were made from, and a card is not taken for another one."""

from types import SimpleNamespace

import pytest
import torch

from internevo.planner import calibrate, kernels, links
from internevo.planner.calibrate import Line, Measured
from internevo.planner.flops import Amounts
from internevo.planner.hardware import GPUS
from internevo.planner.links import Group


@pytest.mark.parametrize(
    ("card", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"), ("NVIDIA A100-SXM4-40GB", 39.5, "a100-40gb"), ("NVIDIA H200", 140.0, "h200"),
        ("NVIDIA H100 PCIe", 79.1, None), ("NVIDIA A100-PCIE-40GB", 39.5, None), ("NVIDIA H100 NVL", 93.0, None),
        ("NVIDIA GeForce RTX 4090", 24.0, None),
    ],
)  # fmt: skip
def test_a_card_for_pcie_is_none_of_the_table(monkeypatch: pytest.MonkeyPatch, card: str, gib: float, name: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))
    found = calibrate.known_gpu(torch.device("cuda"))
    assert (found and found.name) == name


def test_a_calibration_predicts_what_was_measured() -> None:
    gpu, line = GPUS["h100"], Line(3e-4, 1 / 300e9)
    lines = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce", "all-to-all"), line)
    measured = Measured({8192: 1.6e-3}, (2.0e12, 4e-3), 2.5e12, 5e-6, lines, {}, 8, 1)
    found = calibrate.calibration(measured, gpu)
    product = Amounts(products=2.0 * 8192**3, moved=3 * 2 * 8192**2, kernels=1)
    assert kernels.seconds(product, gpu, found) == pytest.approx(1.6e-3)
    assert kernels.seconds(Amounts(attention=2.0e12, kernels=1), gpu, found) == pytest.approx(4e-3)
    assert kernels.seconds(Amounts(memory=2.5e12), gpu, found) == pytest.approx(1.0)
    predicted = links.seconds("all-gather", 1, 1e9, Group(8, 1), gpu, found)
    assert predicted == pytest.approx(line.alpha + 1e9 * line.beta)


def test_both_passes_of_attention_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SECONDS", 0.01)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flops, seconds = calibrate._attention(torch.device("cpu"), 64, 2)
    assert seconds > 0 and flops == 7 * 64 * 64 * 2 * 128
    assert any("backward" in event.key and "attention" in event.key for event in profile.key_averages())
