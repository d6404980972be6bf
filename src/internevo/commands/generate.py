"""``internevo generate``: continues a text, or answers a question."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.open import load_model, open_source
from ..data.encoding.formats import END_OF_ANSWER, FormatName
from ..errors import UsageError
from ..models.generate import Sampling, generate
from ..models.source import most_common_dtype
from ..parallel.world import pick_device
from ..text.tokenizer import load_tokenizer


def continue_text(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    tokenizer: Path | None = None,
    format: FormatName = "text",
) -> str:
    """The text that a model in ``folder`` puts behind ``prompt``.

    Args:
        folder: a checkpoint, a run folder or a Hugging Face folder.
        tokenizer: by default the one that lies with the model.
        format: what ``prompt`` is: a text to continue, or what the user asks in an Alpaca instruction or in a chat.
    """
    source = open_source(folder)
    path = tokenizer or source.tokenizer
    if path is None:
        raise UsageError(f"{folder} has no tokenizer with it; give --tokenizer PATH")
    text = load_tokenizer(path)
    device = pick_device(0)
    model = load_model(folder, dtype=most_common_dtype(source), device=device)
    ids, stop_ids = encode_prompt(format, prompt, text)
    out = generate(model, ids, max_new_tokens, sampling, seed=seed, eos_ids=tuple(stop_ids))
    answer = text.decode([i for i in out if i not in stop_ids])
    return answer.partition(END_OF_ANSWER)[0].strip() if format == "alpaca" else answer
