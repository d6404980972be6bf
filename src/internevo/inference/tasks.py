"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on our models, on any number of ranks.

lm-eval makes the requests of all documents on every rank. The ranks divide them here, if each can compute alone, and gather the
answers; so lm-eval need not know of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..data.encoding.questions import Ending
from ..errors import UsageError
from ..models.generate import Sampling, longest_text
from ..parallel.layout import Layout
from ..parallel.world import World
from ..text.chat import ChatTemplate
from .scoring import LogLikelihood, Scored, log_likelihoods, windows
from .text import Prompt, TextModel

DEFAULT_LENGTH = 4096
"""Longest context, if the model's positions have no end, in tokens."""
DEFAULT_NEW_TOKENS = 256
"""Number of tokens to generate, if a task does not say it, as in lm-eval."""
TASK_ROWS, TASK_TOKENS = 16, 2048
"""Number of texts that go through the model at once, and of their tokens, whose logits are in memory at once."""
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
T = TypeVar("T")
S = TypeVar("S")


class Request(Protocol):
    """A request of lm-eval."""

    args: tuple[Any, ...]


class Requests:
    """Answers the requests of lm-eval: its model class without the base class."""

    def __init__(self, model: TextModel, batch_size: int, tokens_at_once: int, share: tuple[int, int] = (0, 1)) -> None:
        """
        Args:
            batch_size, tokens_at_once: texts that are computed together, and their tokens.
            share: (number, count): which part of the requests this rank computes.
        """
        super().__init__()
        self.text, self.tokens_at_once, self.share = model, tokens_at_once, share
        self.batch_rows = model.batch_size(batch_size)
        self.longest = longest_text(model.config) or DEFAULT_LENGTH
        tokenizer = model.tokenizer
        self.prefix: int = next((id_ for id_ in (tokenizer.bos_id, tokenizer.eos_id) if id_ is not None), 0)
        """The id before a text without a context."""
        bos = tokenizer.special_tokens.get("bos_token")
        self.bos = bos if tokenizer.bos else None
        self.ending = Ending()
        """What ends an answer, if the texts of requests are chats."""

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's caches."""
        return str(self.text.tokenizer.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns a name of the chat template for lm-eval's results."""
        return self.tokenizer_name if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a chat."""
        return ChatTemplate.load(self.text.tokenizer).render(chat_history, prompt=add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answers requests (context, continuation): (log-likelihood of the continuation, whether it is the most likely one)."""
        spans = [self._span(*request.args) for request in requests]
        return [(float(value), bool(greedy)) for value, greedy in self._divided(spans, self._log_likelihoods)]

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """Answers requests (text,): the log-likelihood of the whole text, of each token with as much context as fits."""
        texts = [windows(self.prefix, self.text.tokenizer.encode(request.args[0]), self.longest) for request in requests]
        found = iter(self._divided([span for spans in texts for span in spans], self._log_likelihoods))
        return [sum(next(found).value for _ in spans) for spans in texts]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Answers requests (context, options): the text after the context, up to one of the texts in ``until``."""
        return self._divided([request.args for request in requests], self._generate)

    def _divided(self, items: list[S], answer: Callable[[list[S]], list[T]]) -> list[T]:
        """Answers all items, each on one of the shares, and gathers the answers."""
        number, count = self.share
        mine = answer(items[number::count])
        if count == 1:
            return mine
        parts: list[tuple[int, list[T]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (number, mine))
        shares = dict(part for part in parts if part is not None)
        return [shares[place % count][place // count] for place in range(len(items))]

    def _encode(self, text: str) -> list[int]:
        """Returns the ids of a text that begins a document. (A chat template may have put the token at its beginning.)"""
        tokenizer = self.text.tokenizer
        return tokenizer.encode(text) if self.bos and text.startswith(self.bos) else [*tokenizer.bos, *tokenizer.encode(text)]

    def _span(self, context: str, continuation: str) -> Scored:
        """Encodes a request. A space between both texts belongs to the continuation, as tokenizers have it."""
        bare = context.rstrip()
        context, continuation = bare, context[len(bare) :] + continuation
        before = self._encode(context) if context else [self.prefix]
        after = self._encode(context + continuation)[len(before) :] if context else self.text.tokenizer.encode(continuation)
        if not context and after[:1] == before:
            after = after[1:]
        after = after or self.text.tokenizer.encode(continuation)
        return Scored([*before, *after][-(max(self.longest, len(after)) + 1) :], len(after))

    def _log_likelihoods(self, spans: list[Scored]) -> list[LogLikelihood]:
        with self.text.whole_sequences():
            return log_likelihoods(self.text.model, spans, self.tokens_at_once, self.batch_rows, self.text.dtype)

    def _generate(self, items: list[tuple[str, dict[str, Any]]]) -> list[str]:
        ends = {*self.text.tokenizer.eos, *self.text.eos_ids, *self.ending.stop_ids}
        texts = [""] * len(items)
        limits = [_new_tokens(options) for _, options in items]
        ids = [self._encode(context) or [self.prefix] for context, _ in items]
        prompts = [
            Prompt(context[-max(1, self.longest - limit) :], ends, (*_stops(options), *self.ending.stop))
            for context, limit, (_, options) in zip(ids, limits, items, strict=True)
        ]
        order = sorted(range(len(items)), key=lambda number: (repr(_sampling(items[number][1])), -len(prompts[number].ids)))
        while order:
            sampling = _sampling(items[order[0]][1])
            alike = [number for number in order[: self.batch_rows] if _sampling(items[number][1]) == sampling]
            order = order[len(alike) :]
            chosen = [prompts[number] for number in alike]
            for place, piece in self.text.stream(chosen, [limits[number] for number in alike], sampling, [0] * len(alike)):
                texts[alike[place]] += piece
        return texts


def _new_tokens(options: dict[str, Any]) -> int:
    return next((int(options[key]) for key in NEW_TOKENS if options.get(key) is not None), DEFAULT_NEW_TOKENS)


def _stops(options: dict[str, Any]) -> tuple[str, ...]:
    until = options.get("until") or ()
    return (until,) if isinstance(until, str) else tuple(until)


def _sampling(options: dict[str, Any]) -> Sampling:
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    elif options.get("do_sample") and not options.get("temperature"):
        temperature = 1.0
    return Sampling(temperature, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0))


def requests_of(model: TextModel, layout: Layout, world: World, batch_size: int = TASK_ROWS) -> Requests:
    """Returns what answers requests with the model of a layout. Every rank must call it.

    The data ranks divide the requests, unless ranks need each other for every forward pass; then each computes all of them.
    """
    alone = not layout.fsdp and layout.expert == layout.pipeline == layout.weight == 1
    if not alone or layout.data == 1:
        return Requests(model, batch_size, TASK_TOKENS)
    # The first forward pass gathers the weights, for which all ranks are needed.
    requests = Requests(model, batch_size, TASK_TOKENS, (layout.data_rank(world.rank), layout.data))
    with model.whole_sequences():
        log_likelihoods(model.model, [Scored([0, 0], 1)], 1, 1, model.dtype)
    return requests


def check_tasks(names: Sequence[str], folder: str | Path | None) -> Any:
    """Returns lm-eval's ``TaskManager``.

    Raises:
        UsageError: if lm-eval is not installed, the folder does not exist, or a task is not known.
    """
    if find_spec("lm_eval") is None:
        raise UsageError("tasks need the package lm-eval: pip install 'internevo[eval]'")
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"the folder of tasks {folder} does not exist")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        where = f" nor in {folder}" if folder else "; the folder of your own tasks is given by --task-folder"
        raise UsageError(f"lm-eval has no task {', '.join(unknown)}{where}")
    return manager


def run_tasks(
    requests: Requests,
    names: Sequence[str],
    folder: str | Path | None = None,
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, dict[str, float]]:
    """Evaluates on tasks of lm-eval. Every rank must call it.

    Args:
        names: names of tasks or groups.
        folder: a folder with task files of your own.
        fewshot: number of examples in a prompt; None: as each task says.
        limit: use only the first documents of each task.
        chat: apply the chat template.

    Returns:
        Task -> metric -> value, and its standard error as METRIC_stderr; the same on every rank.

    Raises:
        UsageError: as ``check_tasks``.
    """
    manager = check_tasks(names, folder)
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    adapter: Any = type("InternEvoLM", (Requests, LM), {})
    model = adapter(requests.text, requests.batch_rows, requests.tokens_at_once, requests.share)
    if chat:
        model.ending = Ending.usual(requests.text.tokenizer)
    with _random_states_kept(next(requests.text.model.parameters()).device):
        found = simple_evaluate(
            model=model, tasks=list(names), num_fewshot=fewshot, limit=limit, task_manager=manager, log_samples=False,
            apply_chat_template=chat,
        )  # fmt: skip
    scores = [_scores(found["results"]) if found else None]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(scores)
    assert scores[0] is not None
    return scores[0]


def _scores(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the numbers among lm-eval's results. Its keys are METRIC,FILTER."""
    found: dict[str, dict[str, float]] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if comma and isinstance(value, int | float):
                found.setdefault(task, {})[metric if name == "none" else f"{metric} ({name})"] = float(value)
    return found


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """lm-eval seeds all generators of random numbers; after this context they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
