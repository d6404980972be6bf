"""What a run does between steps: it evaluates, takes samples, and evaluates on tasks. A checkpoint of the same step is begun
before; so nothing of this may change what a checkpoint contains."""

from __future__ import annotations

import math
import time

from ..data.batches import valid_batches
from ..inference.tasks import requests_of, run_tasks
from ..inference.text import TextModel, eos_ids
from ..models.generate import Sampling, generate
from ..observe.observers import Observers
from ..observe.record import TaskRecord, ValidRecord
from ..ops.precision import COMPUTE
from ..parallel.turns import Doing
from ..text.tokenizer import Tokenizer
from .due import Due
from .parts import Parts
from .process import GarbageCollector
from .step import evaluate


class Between:
    """Does what is due after a step. All ranks take part, because the weights may be sharded over all."""

    def __init__(self, parts: Parts, tokenizer: Tokenizer | None, doing: Doing, garbage: GarbageCollector) -> None:
        """``tokenizer``: for samples and tasks."""
        self.parts, self.tokenizer, self.doing, self.garbage = parts, tokenizer, doing, garbage

    def __call__(self, step: int, due: Due, observers: Observers | None) -> None:
        """Does it after ``step``, and tells the observers, on rank 0."""
        if due.valid:
            self._evaluate(step, observers)
        if due.prompts:
            self._sample(step, due.prompts, observers)
        if due.tasks:
            self._evaluate_tasks(step, observers)

    def _evaluate(self, step: int, observers: Observers | None) -> None:
        parts, layout, data = self.parts, self.parts.layout, self.parts.config.data
        valid, world = parts.valid, parts.world
        if valid is None:
            return
        rank = layout.data_rank(world.rank)
        batches = valid_batches(valid, data.micro_bsz, rank, layout.data, data.use_packed_dataset, data.valid_max_rows)
        with self.doing("evaluating"):
            losses = evaluate(parts.schedule, layout, world.device, batches, len(valid.types))
        self.garbage.collect()
        if observers:
            by_type = losses.by_type(valid.types)
            ppl = {name: _perplexity(loss) for name, loss in by_type.items()}
            loss = losses.mean()
            observers.valid(ValidRecord(step, loss, _perplexity(loss), time.time(), by_type, ppl))

    def _sample(self, step: int, prompts: tuple[str, ...], observers: Observers | None) -> None:
        config, tokenizer, parts = self.parts.config, self.tokenizer, self.parts
        if tokenizer is None:
            return
        dtype, ends = COMPUTE[config.model.dtype], {*tokenizer.eos, *eos_ids(tokenizer.path)}
        for prompt in prompts:
            ids = tokenizer.with_bos(prompt)
            sampling = Sampling(temperature=0.8, top_p=0.95)
            with self.doing("generating samples"), parts.axis.unsharded_sequences():
                out = generate(
                    parts.model, ids, config.monitor.sample_tokens, sampling, seed=config.seed, eos_ids=ends,
                    vocab_size=tokenizer.vocab_size, dtype=dtype,
                )  # fmt: skip
            if observers:
                observers.sample(step, prompt, tokenizer.decode([i for i in out if i not in ends]))
        parts.axis.after_forwards()

    def _evaluate_tasks(self, step: int, observers: Observers | None) -> None:
        monitor, tokenizer, parts = self.parts.config.monitor, self.tokenizer, self.parts
        assert tokenizer is not None
        text = TextModel(
            parts.decoder, tokenizer, lambda: parts.model, eos_ids(tokenizer.path), COMPUTE[parts.config.model.dtype],
            parts.axis.unsharded_sequences,
        )  # fmt: skip
        with self.doing(f"evaluating on {', '.join(monitor.tasks)}"):
            requests = requests_of(text, parts.layout, parts.world)
            scores = run_tasks(requests, monitor.tasks, monitor.task_folder, limit=monitor.task_limit)
        parts.axis.after_forwards()
        self.garbage.collect()
        if observers:
            observers.tasks(TaskRecord(step, scores, time.time()))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
