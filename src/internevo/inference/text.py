"""Text from a model: what follows a prompt, the answer to a question, the next message of a chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint.open import load_model, open_source
from ..data.encoding.formats import FormatName, check_format
from ..data.encoding.questions import encode_messages, encode_prompt
from ..errors import UsageError, expect, expect_texts
from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from ..models.generate import Continuation, LanguageModel, Sampling, longest_text
from ..models.source import most_common_dtype
from ..parallel.world import pick_device
from ..storage.hub import model_folder
from ..text.chat import Messages, is_chat
from ..text.pieces import Pieces
from ..text.special_tokens import model_eos_ids
from ..text.tokenizer import Tokenizer, as_tokenizer
from ..wording import counted


class Prompt(NamedTuple):
    """What a model continues."""

    ids: list[int]
    stop_ids: set[int]
    """Ids that end the text."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    continues: bool = True
    """Whether the new text is appended to that of the prompt; otherwise it is an answer."""
    strip: bool = False
    """Whether white space at the ends of the answer is left out."""


@dataclass
class TextModel:
    """A model and its tokenizer."""

    config: DecoderConfig
    tokenizer: Tokenizer
    get: Callable[[], LanguageModel] = field(repr=False)
    """Loads the model."""
    eos_ids: frozenset[int] = frozenset()
    """The ids that end a text, by the model's ``generation_config.json``."""
    dtype: torch.dtype | None = None
    """Dtype of the cache; None: that of the weights."""
    whole_sequences: Callable[[], AbstractContextManager[None]] = nullcontext
    """A context in which every rank computes all tokens, if the model is sharded."""

    @classmethod
    def open(cls, model: Decoder | str | Path, tokenizer: Tokenizer | str | Path | None = None) -> TextModel:
        """Opens a model. The weights of a folder are loaded when they are first used, in the dtype that most of them have.

        Args:
            model: a Hugging Face folder, a checkpoint, a run folder, or a model in memory.
            tokenizer: None: the one in the folder.

        Raises:
            UsageError, CheckpointError: if the folder cannot be used, or there is no tokenizer.
        """
        if isinstance(model, Decoder):
            if tokenizer is None:
                raise UsageError("a model in memory has no tokenizer: give tokenizer=, its folder or a Tokenizer")
            found = as_tokenizer(tokenizer)
            return cls(model.config, found, lambda: model, eos_ids(found.path))
        expect(model, (str, Path), "a model is a path, or what load_model returned")
        folder = Path(model)
        source = open_source(folder)
        given = tokenizer or source.tokenizer
        if given is None:
            raise UsageError(f"there is no tokenizer in {folder}; use --tokenizer PATH")

        def load() -> Decoder:
            return load_model(folder, dtype=most_common_dtype(source), device=pick_device(0))

        found = as_tokenizer(given)
        return cls(source.config, found, load, eos_ids(model_folder(folder), source.tokenizer, found.path))

    @cached_property
    def model(self) -> LanguageModel:
        """The model, with its weights."""
        return self.get()

    def prompt(
        self,
        text: str | Messages,
        format: FormatName = "text",
        stop: Sequence[str] = (),
        values: dict[str, Any] | None = None,
    ) -> Prompt:
        """Encodes a prompt.

        Args:
            text: a text to continue or a question, as ``format`` says; or the messages of a chat.
            stop: the new text ends before the first of these.
            values: fields next to the messages of a chat: {"tools": [...], ...}.

        Raises:
            UsageError: if it is too long for the model, or has ids that the model does not have, or an argument is wrong.
            DataError: if the chat template cannot render a chat, or does not use all that it says.
        """
        check_format(format)
        expect_texts(stop, "stop")
        if isinstance(text, str):
            question = encode_prompt(format, text, self.tokenizer, values)
        else:
            question = encode_messages(text, self.tokenizer, values)
        continues = isinstance(text, str) and format == "text"
        stop_ids, texts = question.stop_ids | self.eos_ids, (*stop, *question.stop)
        prompt = Prompt(question.ids, stop_ids, texts, continues, strip=format == "alpaca")
        self.room(prompt)
        return prompt

    def room(self, prompt: Prompt) -> int | None:
        """Returns how many tokens can follow a prompt; None if there is no limit.

        Raises:
            UsageError: if the prompt has ids that the model does not have, or is too long.
        """
        largest, longest, tokenizer = max(prompt.ids), longest_text(self.config), self.tokenizer
        if largest >= self.config.vocab_size:
            raise UsageError(
                f"the prompt has the token id {largest}, but the model's vocabulary has {self.config.vocab_size} entries: the "
                f"tokenizer {tokenizer.path} ({tokenizer.vocab_size} entries) is not this model's; use --tokenizer PATH"
            )
        if longest is not None and len(prompt.ids) >= longest:
            raise UsageError(
                f"the prompt has {counted(len(prompt.ids), 'token')}, and the model is made for texts of up to {longest}, "
                "the answer included (max_position_embeddings and rope scaling); shorten it"
            )
        return None if longest is None else longest - len(prompt.ids)

    def stream(
        self, prompts: Sequence[Prompt], max_new_tokens: int | Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """Continues several prompts together. Yields (number of the prompt, next piece of its text) as they come; the last
        piece of each may be empty.

        No text gets longer than the model's positions reach.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        rooms = [self.room(prompt) for prompt in prompts]
        limits = [limit if room is None else min(limit, room) for limit, room in zip(limits, rooms, strict=True)]
        texts = [Pieces(self.tokenizer, p.ids if p.continues else (), p.stop, p.strip) for p in prompts]
        vocab = min(self.tokenizer.vocab_size, self.config.vocab_size)
        with self.whole_sequences():
            together = Continuation(
                self.model, [p.ids for p in prompts], limits, sampling, seeds=seeds, vocab_size=vocab, dtype=self.dtype
            )  # fmt: skip
        while together.rows:
            with self.whole_sequences():
                new = together.step()
            for number, id_ in new:
                ended = id_ in prompts[number].stop_ids
                if piece := "" if ended else texts[number].add(id_):
                    yield number, piece
                if ended or texts[number].stopped:
                    together.end([number])
                if number not in together.rows:
                    yield number, texts[number].finish()

    def batch_size(self, wanted: int) -> int:
        """Returns how many texts can be generated together: one, if others would change it because experts have a capacity."""
        experts = self.config.experts
        return 1 if experts is not None and experts.eval_capacity_factor else wanted


def eos_ids(*paths: Path | None) -> frozenset[int]:
    """Returns the ids that end a text, by the ``generation_config.json`` or ``config.json`` of the model.

    Args:
        paths: where these files may be, the first first: the model's folder, and the file or folder of its tokenizer.
    """
    folders = [path if path.is_dir() else path.parent for path in paths if path is not None]
    return next((frozenset(ids) for folder in folders if (ids := model_eos_ids(folder))), frozenset())


def generate(
    model: Decoder | str | Path | TextModel,
    prompt: str,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    format: FormatName = "text",
) -> Iterator[str]:
    """Continues a text. ``"".join(internevo.generate(...))`` is the whole of what the model adds to it.

    Args:
        model: a Hugging Face folder, a checkpoint, a run folder, or what ``load_model`` returned.
        prompt: the text, or a question.
        tokenizer: the tokenizer, or its path; None: the one in the folder.
        max_new_tokens: the maximum number of tokens to generate.
        temperature, top_k, top_p: how tokens are drawn (``Sampling``).
        seed: seed of the random draws.
        stop: the text ends before the first of these.
        format: "text" if the prompt is a text to continue; "alpaca" or "chat" if it is a question in the form of such data.

    Yields:
        Pieces of text, as the model generates them.

    Raises:
        UsageError, CheckpointError: if the folder cannot be used, there is no tokenizer, it is not the model's, or the prompt
            is too long for the model. They are raised at once, before the first piece is asked for.
    """
    expect(prompt, str, "a prompt is a text (one at a time; chat takes messages)")
    sampling = Sampling(temperature, top_k, top_p)
    return _continue(model, tokenizer, prompt, format, stop, max_new_tokens, sampling, seed)


def chat(
    model: Decoder | str | Path | TextModel,
    messages: Messages,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    max_new_tokens: int = 1000,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Answers the last message of a chat, with the chat template of the model's tokenizer.

    Args:
        model, tokenizer: as for ``generate``.
        messages: {"role": "system", "user" or "assistant", "content": text} of each message, the last one the user's.
        max_new_tokens, temperature, top_k, top_p, seed, stop: as for ``generate``.

    Yields:
        Pieces of the answer, as the model generates them.

    Raises:
        UsageError, DataError: as ``generate``; also if there is no chat template, or it cannot render the messages.
    """
    if not is_chat(messages):
        raise UsageError(f'messages must be a list of {{"role": ..., "content": ...}}, and not {messages!r}')
    sampling = Sampling(temperature, top_k, top_p)
    return _continue(model, tokenizer, messages, "text", stop, max_new_tokens, sampling, seed)


def _continue(
    model: Decoder | str | Path | TextModel,
    tokenizer: Tokenizer | str | Path | None,
    text: str | Messages,
    format: FormatName,
    stop: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[str]:
    """Checks the arguments of ``generate`` and ``chat``, and returns the pieces of the text."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    found = model if isinstance(model, TextModel) else TextModel.open(model, tokenizer)
    encoded = found.prompt(text, format, stop)
    return (piece for _, piece in found.stream([encoded], max_new_tokens, sampling, [seed]))
