"""Whether a change has cost speed: ``make bench`` compares with PyTorch and transformers, in a few minutes.

It measures ratios of speeds side by side on this machine and compares them with ``ratios.json``. If one is smaller by
more than 5%, the exit code is 1. ``--store`` writes the ratios of this machine, which the next call compares with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import vs_transformers
from ours import options
from turns import speed_ratio

import parallel

STORED = Path(__file__).with_name("ratios.json")
LOST = 0.95
"""A ratio below this share of the stored one is a loss."""


def main() -> None:
    parser = options(__doc__, ["S"], steps=6, rounds=3)
    parser.add_argument("--store", action="store_true", help="write the ratios, instead of comparing them")
    a = parser.parse_args()
    found = dict[str, float]()
    for shape in a.shapes:
        for dtype in vs_transformers.possible(["bf16", "fp32"]):
            times, _ = vs_transformers.compare(shape, dtype, a.steps, a.rounds, threads=2)
            for which in ("eager", "compiled"):
                found[f"{shape} {dtype} {which} / transformers"] = speed_ratio(times, which, "theirs")
        for which in ("zero", "fsdp"):
            found[f"{shape} {which} / {parallel.PEERS[which]}"] = parallel.compare(which, shape, a.steps, a.rounds)[2]
    stored = json.loads(STORED.read_text())
    if a.store:
        STORED.write_text(json.dumps({**stored, **{name: round(value, 3) for name, value in found.items()}}, indent=1) + "\n")
    lost = [name for name, value in found.items() if not a.store and value < LOST * stored.get(name, 0.0)]
    print(f"{'speed ratio':44}{'stored':>8}{'now':>8}")
    for name, value in found.items():
        before = f"{stored[name]:8.2f}" if name in stored else f"{'':8}"
        print(f"{name:44}{before}{value:8.2f}{'  lost' if name in lost else ''}")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
