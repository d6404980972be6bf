"""Sensible values for training that starts from a pretrained model: learning rate, length of rows, batch size, epochs."""

from __future__ import annotations

import math

ANCHOR = 7e9
"""Number of parameters of the model whose usual learning rate is ``FULL``."""
FULL, SMALLEST, LARGEST = 2e-5, 5e-6, 2e-4
"""The learning rate for all weights of that model, and its limits for other sizes."""
LORA_FACTOR, LORA_LARGEST = 10.0, 1e-3
"""Adapters learn best with about ten times the rate (https://thinkingmachines.ai/blog/lora)."""
EPOCHS, FEW = 3.0, 50_000
"""Number of epochs, if there are at most ``FEW`` documents; otherwise one."""
ROW, TEXT_ROW, ROUND = 8192, 2048, 64
"""The longest row that is chosen: for chats, and for texts, which may be cut; and what its length is a multiple of."""
STEP_TOKENS = 2**17
"""The most tokens of a step."""
MICRO_TOKENS = {"cuda": 16384, "cpu": 4096}
"""The most tokens of a micro-batch; more make no device faster."""


def learning_rate(parameters: int, adapters: bool) -> float:
    """Returns the highest learning rate for a model: the larger, the smaller it is. It has one digit.

    Args:
        adapters: only adapters (LoRA) are trained.
    """
    full = min(max(FULL * math.sqrt(ANCHOR / parameters), SMALLEST), LARGEST)
    return float(f"{min(full * LORA_FACTOR, LORA_LARGEST) if adapters else full:.0e}")


def epochs(documents: int) -> float:
    """Returns how often each document is seen."""
    return EPOCHS if documents <= FEW else 1.0


def warmup_ratio(steps: int) -> float:
    """Returns the share of the steps in which the learning rate rises: a twentieth, but at least two steps, the first of which
    has half of the rate. (One step alone would have the whole rate at once.)"""
    return max(0.05, math.ceil(10_000 * min(2, steps) / steps) / 10_000)  # rounded up: the schedule rounds down


def row_length(longest: int, mean: float, limit: int | None, texts: bool = False) -> int:
    """Returns a length of rows, in tokens, that has room for the longest document and for several of mean length.

    Args:
        longest, mean: lengths of documents.
        limit: the longest text that the model is made for; None: no limit.
        texts: the documents are texts, which may be cut.
    """
    row = TEXT_ROW if texts else ROW
    most = min(limit or row, row)
    wanted = max(longest, min(8 * mean, 1024))
    return most if wanted >= most else min(math.ceil(wanted / ROUND) * ROUND, most)


def rows_per_step(rows: int, documents: int, seq_len: int, ranks: int) -> int:
    """Returns rows per step: about a twentieth of the documents, but 8 to 64 of them; at most ``STEP_TOKENS``, and a tenth of
    the rows. Each rank has a power of two of rows.

    Args:
        rows, documents: those of an epoch.
    """
    wanted = min(min(max(documents / 20, 8), 64) * rows / documents, STEP_TOKENS / seq_len, rows / 10)
    return 2 ** max(0, round(math.log2(wanted / ranks))) * ranks


def micro_batches(rows: int, seq_len: int, device: str) -> list[int]:
    """Returns sizes of micro-batches that divide ``rows`` (those of a rank), the largest first; 1 is the last."""
    most = max(1, MICRO_TOKENS[device] // seq_len)
    return [size for size in range(rows, 0, -1) if rows % size == 0 and size <= most]
