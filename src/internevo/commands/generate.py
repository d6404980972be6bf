"""``internevo generate``: generates text after a prompt, or an answer to a question."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.open import load_model, open_source
from ..data.encoding.formats import END_OF_ANSWER, FormatName, encode_prompt
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
    """Generates text after ``prompt`` with the model in ``folder``, and returns the new text.

    Args:
        folder: a checkpoint, a run folder or a Hugging Face folder.
        prompt: a text, or a question.
        max_new_tokens: maximum number of tokens to generate.
        sampling: temperature, top-k and top-p.
        seed: seed of the random numbers.
        tokenizer: path of the tokenizer; None: the one in ``folder``.
        format: "text" if the prompt is a text to continue; "alpaca" or "chat" if it is a question in the form of such data.

    Raises:
        UsageError: if there is no tokenizer.
    """
    source = open_source(folder)
    path = tokenizer or source.tokenizer
    if path is None:
        raise UsageError(f"there is no tokenizer in {folder}; use --tokenizer PATH")
    text = load_tokenizer(path)
    device = pick_device(0)
    model = load_model(folder, dtype=most_common_dtype(source), device=device)
    ids, stop_ids = encode_prompt(format, prompt, text)
    out = generate(model, ids, max_new_tokens, sampling, seed=seed, eos_ids=tuple(stop_ids))
    answer = text.decode([i for i in out if i not in stop_ids])
    return answer.partition(END_OF_ANSWER)[0].strip() if format == "alpaca" else answer
