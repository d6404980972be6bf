"""``internevo generate``: generates text after a prompt, or an answer to a question."""

from __future__ import annotations

import sys
from pathlib import Path

from ..checkpoint.open import load_model, open_source
from ..data.encoding.formats import END_OF_ANSWER, FormatName, encode_prompt
from ..errors import UsageError
from ..models.config import DecoderConfig
from ..models.generate import Sampling, generate, longest_text
from ..models.source import most_common_dtype
from ..parallel.world import pick_device
from ..text.special_tokens import model_eos_ids
from ..text.tokenizer import Tokenizer, load_tokenizer


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
        UsageError: if there is no tokenizer, it is not the model's, or the prompt is too long for the model.
    """
    source = open_source(folder)
    path = tokenizer or source.tokenizer
    if path is None:
        raise UsageError(f"there is no tokenizer in {folder}; use --tokenizer PATH")
    text = load_tokenizer(path)
    ids, stop_ids = encode_prompt(format, prompt, text)
    room = _room(source.config, ids, text)
    if room is not None and max_new_tokens > room:
        print(f"note: at most {room} tokens are generated, because the model's positions end there", file=sys.stderr)
        max_new_tokens = room
    if source.tokenizer is not None:
        home = source.tokenizer if source.tokenizer.is_dir() else source.tokenizer.parent
        stop_ids |= set(model_eos_ids(home))
    device = pick_device(0)
    model = load_model(folder, dtype=most_common_dtype(source), device=device)
    out = generate(
        model, ids, max_new_tokens, sampling, seed=seed, eos_ids=tuple(stop_ids), vocab_size=text.vocab_size,
    )  # fmt: skip
    answer = text.decode([i for i in out if i not in stop_ids])
    return answer.partition(END_OF_ANSWER)[0].strip() if format == "alpaca" else answer


def _room(config: DecoderConfig, ids: list[int], tokenizer: Tokenizer) -> int | None:
    """Returns how many tokens can follow a prompt; None if there is no limit.

    Raises:
        UsageError: if the prompt has ids that the model does not have, or is too long.
    """
    if max(ids) >= config.vocab_size:
        raise UsageError(
            f"the prompt has the token id {max(ids)}, but the model's vocabulary has {config.vocab_size} entries: the "
            f"tokenizer {tokenizer.path} ({tokenizer.vocab_size} entries) is not this model's; use --tokenizer PATH"
        )
    longest = longest_text(config)
    if longest is not None and len(ids) >= longest:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, and the model is made for texts of up to {longest}, the answer included "
            "(max_position_embeddings and rope scaling); shorten it"
        )
    return None if longest is None else longest - len(ids)
