"""A training run, from a checked config to the last checkpoint. ``Trainer.fit`` is the loop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch.distributed as dist

from ..checkpoint import Checkpoint
from ..checkpoint.export import Exporter, check_export
from ..checkpoint.folder import remove_leftovers, saved_checkpoints
from ..checkpoint.saver import Saver
from ..checkpoint.staging import stager_for
from ..config import Config, dump, flat
from ..data.batches import StepBatch, TrainBatches, parse_skip_batches, valid_batches
from ..data.build import checked_tokenizer
from ..errors import InternEvoError
from ..inference.tasks import requests_of, run_tasks
from ..inference.text import TextModel, eos_ids
from ..measure.probes import Probes
from ..models.families.registry import decoder_config
from ..models.generate import Sampling, generate
from ..observe.background import Tracked
from ..observe.console import Console, log, start_log
from ..observe.observers import Observers
from ..observe.record import StepRecord, TaskRecord, ValidRecord, memory_peak, peak_tflops
from ..ops.precision import COMPUTE
from ..parallel import gloo
from ..parallel.world import World
from ..storage.lock import FileLock
from ..storage.naming import naming
from ..text.tokenizer import Tokenizer
from .about import axis_sizes, facts_of, title
from .answers import note_end_of_answers
from .folder import CONFIG, FINETUNE
from .lr_schedule import beta2, describe, learning_rate
from .parts import Parts
from .process import GarbageCollector, prepare, unsuited
from .restore import restore
from .resume import TOKENIZER, keep_tokenizer
from .shared import Shared
from .step import Stepper, StepResult, evaluate, formulas
from .stop import StopRequests, StopTime
from .watchdog import Watchdog


class Trainer:
    """A training run on this rank."""

    def __init__(
        self, config: Config, world: World, stops: StopRequests, watchdog: Watchdog, lock: FileLock | None = None,
        stated: Config | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            lock: the lock of the run folder, on the rank that has it.
            stated: the config that is recorded, if the tokenizer is opened at another path than it says.
        """
        self.config, self.world, self.stops, self.watchdog, self.lock = config, world, stops, watchdog, lock
        self.run = config.run_folder
        start_log(self.run / "log", world.rank, config.monitor.alert.alert_file_path)
        self.console = Console(config.data.total_steps, config.monitor.log_every) if world.rank == 0 else None
        doing = self._doing
        prepare(config, world.device)
        _prepare_saving(config, world)
        self.parts = Parts.build(config, world, doing, stated)
        self.start_lines = [*restore(self.parts, self.run, doing), *unsuited(config, world.device)]
        self.parts.axis.masters_changed()
        self.state = self.parts.state
        self.batches = _batches(self.parts)
        self.tokenizer = _sample_tokenizer(config)
        self.exporter = Exporter(self.run, COMPUTE[config.model.dtype], log.warning)
        after = self.exporter if config.ckpt.enable_internevo2hf_ckpt else lambda folder: None
        group, identity = gloo.new_group(), self.state.run
        stager = stager_for(world.device) if config.ckpt.enable_save_ckpt else None
        self.saver = Saver(self.run, config.ckpt, world.rank, axis_sizes(self.parts.layout), group, after, identity, stager)
        watchdog.before_end = self.saver.finish
        self.garbage = GarbageCollector()
        self.saved_step = self.state.step
        self.asked_step = self.state.step
        """The last step in which the ranks have told each other of requests to stop. Later ones wait for the next step."""
        self.stop_time = StopTime("TORCHELASTIC_RUN_ID" in os.environ)
        parts = self.parts
        self.probes = Probes(
            config.monitor, parts.layout, parts.model, parts.axis, parts.schedule, parts.tensors(), partial(formulas, parts),
            self.run, world.rank, world.device, config.model.compile,
        )  # fmt: skip
        self.stepper = Stepper(parts, self.probes.end_phase, self.saver.wait_for_copies)
        self.peak = peak_tflops(world.device, config.model.dtype, config.monitor.peak_tflops)
        if config.ckpt.stop_file_path and world.rank == 0:
            stops.watch(config.ckpt.stop_file_path)

    # The loop --------------------------------------------------------------------------------------------------------

    def fit(self, on_step: Callable[[StepRecord], object] | None = None) -> None:
        """Trains to the last step, or until a request to stop, and saves a checkpoint at the end.

        Args:
            on_step: is called with the record of each step. If it returns True, the run stops after the next step.
        """
        config, data = self.config, self.config.data
        observers = self._observers()
        try:
            if data.valid_at_start and data.valid_every and not self.state.step:
                self._evaluate(0, observers)
            first, begin = self.state.step, time.perf_counter()
            clock = begin
            for batch in self.batches.prefetch(self.state.cursor):
                record, stop, save = self._step(batch, time.perf_counter() - clock)
                step, last = record.step, stop or record.step == data.total_steps
                if observers:
                    observers.step(record)
                    for line in [*self.probes.lines, *self.stop_time.lines(record, self.saver.seconds, stop)]:
                        observers.console.say(line)
                self._check_progress(step)
                if on_step is not None and on_step(record) is True:
                    self.stops.asked = self.stops.asked or "on_step"
                self._evaluate_and_sample(step, last, stop, observers)
                if config.ckpt.enable_save_ckpt and (_due(step, config.ckpt.checkpoint_every, last) or save):
                    self._save(step)
                elif config.ckpt.enable_save_ckpt and _due(step, config.ckpt.oss_snapshot_freq, False):
                    self.saver.snapshot(step, self.parts.tensors(), self.parts.extras())
                self.saver.check()
                self._tell_saved(observers)
                self.garbage.after_step(step)
                if stop:
                    break
                clock = time.perf_counter()
            if config.ckpt.enable_save_ckpt and self.saved_step < self.state.step:
                self._save(self.state.step)  # the last batches were skipped (data.skip_batches)
            with self._doing("finishing the checkpoint"):
                self.saver.close()
            self._tell_saved(observers)
            if observers:
                observers.summary(data.total_steps, self.state.step - first, time.perf_counter() - begin, self._how_to_go_on())
        finally:
            self.garbage.release()
            if observers:
                observers.close()

    def _step(self, batch: StepBatch, data_time: float) -> tuple[StepRecord, bool, bool]:
        """Takes one step. Returns its record, whether to stop after it, and whether to save after it."""
        config, begin = self.config, time.perf_counter()
        lr = learning_rate(batch.number, config.data.total_steps, config.adam.lr, config.lr_scheduler)
        with self.probes(len(batch.micro_batches), batch.number + 1), self.watchdog.step(batch.tokens):
            get_shared = partial(self._shared, len(batch.skipped))
            result = self.stepper(batch, lr, beta2(batch.number, config.adam, config.beta2_scheduler), get_shared)
        self.state.cursor = batch.next_cursor
        self.state.consumed_tokens += batch.tokens
        self.state.skipped_steps += result.skipped
        hopeless = result.skipped and self.parts.scaler.smallest
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if hopeless else 0
        self.state.data_skipped += int(result.shared.data_skipped)
        for message in batch.skipped:
            log.warning(f"left out: {message}")
        record = self._record(batch, result, lr, time.perf_counter() - begin, data_time)
        return record, *self.stops.decide(record.step, result.shared)

    def _shared(self, skipped: int) -> Shared:
        """Returns the numbers that this rank shares. ``skipped``: number of documents that it left out since the last step."""
        self.asked_step = self.state.step + 1
        memory = [0.0] * self.world.size
        memory[self.world.rank] = float(memory_peak(self.world.device))
        return Shared(*self.stops.requests(), float(skipped), memory)

    def _record(self, batch: StepBatch, result: StepResult, lr: float, step_time: float, data_time: float) -> StepRecord:
        tgs = batch.tokens / (step_time + data_time) / self.world.size
        tflops = tgs * self.parts.decoder.flops_per_token(self.config.data.seq_len) / 1e12
        memory = result.shared.memory_peak
        types, scaler = self.parts.source.types, self.parts.scaler
        return StepRecord(
            step=self.state.step, loss=result.losses.mean(), grad_norm=result.grad_norm, lr=lr, tokens=batch.tokens,
            consumed_tokens=self.state.consumed_tokens, tgs=tgs, tflops=tflops,
            mfu=tflops / self.peak if self.peak else None, step_time=step_time, data_time=data_time,
            memory_peak=int(memory[self.world.rank]), memory_peak_max=int(max(memory)), skipped=result.skipped,
            time=time.time(), loss_by_type=result.losses.by_type(types) if len(types) > 1 else {},
            loss_scale=scaler.scale if scaler.enabled else None, skipped_steps=self.state.skipped_steps,
            moe=result.routing, data_skipped=self.state.data_skipped,
        )  # fmt: skip

    # What happens between steps --------------------------------------------------------------------------------------

    def _evaluate_and_sample(self, step: int, last: bool, stop: bool, observers: Observers | None) -> None:
        """Evaluates and samples where that is due. After a request to stop, only samples are taken."""
        monitor = self.config.monitor
        if _due(step, self.config.data.valid_every, last and not stop):
            self._evaluate(step, observers)
        if _due(step, monitor.sample_every, last):
            self._sample(step, observers)
        if monitor.tasks and _due(step, monitor.evaluate_every, last and not stop):
            self._evaluate_tasks(step, observers)

    def _evaluate(self, step: int, observers: Observers | None) -> None:
        valid, layout, data = self.parts.valid, self.parts.layout, self.config.data
        if valid is None:
            return
        rank = layout.data_rank(self.world.rank)
        batches = valid_batches(valid, data.micro_bsz, rank, layout.data, data.use_packed_dataset, data.valid_max_rows)
        with self._doing("evaluating"):
            losses = evaluate(self.parts.schedule, layout, self.world.device, batches, len(valid.types))
        self.garbage.collect()
        if observers:
            by_type = losses.by_type(valid.types)
            ppl = {name: _perplexity(loss) for name, loss in by_type.items()}
            loss = losses.mean()
            observers.valid(ValidRecord(step, loss, _perplexity(loss), time.time(), by_type, ppl))

    def _sample(self, step: int, observers: Observers | None) -> None:
        """Generates text after ``monitor.sample_prompts``. All ranks take part, because the weights may be sharded over all."""
        monitor, tokenizer, parts = self.config.monitor, self.tokenizer, self.parts
        if tokenizer is None:
            return
        dtype, ends = COMPUTE[self.config.model.dtype], {*tokenizer.eos, *eos_ids(tokenizer.path)}
        for prompt in monitor.sample_prompts:
            ids = tokenizer.with_bos(prompt)
            sampling = Sampling(temperature=0.8, top_p=0.95)
            with self._doing("generating samples"), parts.axis.unsharded_sequences():
                out = generate(
                    parts.model, ids, monitor.sample_tokens, sampling, seed=self.config.seed, eos_ids=ends,
                    vocab_size=tokenizer.vocab_size, dtype=dtype,
                )  # fmt: skip
            if observers:
                observers.sample(step, prompt, tokenizer.decode([i for i in out if i not in ends]))
        parts.axis.after_forwards()

    def _evaluate_tasks(self, step: int, observers: Observers | None) -> None:
        """Evaluates on ``monitor.tasks``. All ranks take part."""
        monitor, tokenizer, parts = self.config.monitor, self.tokenizer, self.parts
        assert tokenizer is not None
        text = TextModel(
            parts.decoder, tokenizer, lambda: parts.model, eos_ids(tokenizer.path), COMPUTE[self.config.model.dtype],
            parts.axis.unsharded_sequences,
        )  # fmt: skip
        with self._doing(f"evaluating on {', '.join(monitor.tasks)}"):
            requests = requests_of(text, parts.layout, self.world)
            scores = run_tasks(requests, monitor.tasks, monitor.task_folder, limit=monitor.task_limit)
        parts.axis.after_forwards()
        self.garbage.collect()
        if observers:
            observers.tasks(TaskRecord(step, scores, time.time()))

    def _check_progress(self, step: int) -> None:
        """Ends a run that has lost its folder to another process, or that has diverged."""
        if self.lock is not None:
            self.lock.check()
        row, limit = self.state.skipped_in_a_row, self.config.monitor.max_skipped_steps
        if not limit or row < limit:
            return
        self.saver.wait()
        newest_first = reversed(saved_checkpoints(self.run, self.state.run).values())
        good = next((f for f in newest_first if not Checkpoint(f).json("state.json").get("skipped_in_a_row")), None)
        start = (
            f"Start a run in another folder (ckpt.save_ckpt_folder) from {good}, the last checkpoint from before, or from "
            f"an earlier one (ckpt.load_ckpt_info.path={good})"
            if good
            else "There is no checkpoint from before, so start again"
        )
        advice = (
            f"{start}, with a smaller adam.lr, with hybrid_zero_optimizer.clip_grad_norm, or without these batches "
            "(data.skip_batches)"
        )
        if (self.run / FINETUNE).is_file():
            advice = "Begin again with another --output and a smaller --lr"
        raise InternEvoError(
            f"the run has diverged: the last {row} steps, until step {step}, were skipped, because their gradients were not "
            f"finite (monitor.max_skipped_steps = {limit}). {advice}"
        )

    def _save(self, step: int) -> None:
        # While steps are skipped, no older checkpoint is deleted: they are what a run that diverges can go back to.
        self.saver.save(step, self.parts.tensors(), self.parts.extras(), keep_all=self.state.skipped_in_a_row > 0)
        self.saved_step = step
        self.garbage.collect()

    def _observers(self) -> Observers | None:
        """On rank 0, makes the observers, and prints the first lines of the run."""
        if self.world.rank:
            for line in self.start_lines:
                log.info(line)
            return None
        with naming(self.run / "config.json"):
            (self.run / "config.json").write_text(dump(self.parts.recorded), encoding="utf-8")
        config, total = self.config, self.config.data.total_steps
        assert self.console is not None
        tracked = Tracked(self.run, config.JOB_NAME, self.state.run, self.state.step, flat(self.parts.recorded))
        observers = Observers(self.console, config.monitor, tracked, config.enable_tb)
        observers.start(facts_of(self.parts))
        self.exporter.warn = self.console.warn
        for line in [title(self.parts, self.state.cursor.batch), f"learning rate: {describe(config)}", *self.start_lines]:
            self.console.say(line)
        if self.state.step >= total:
            self.console.say(
                f"nothing to train: step {self.state.step} is done, and data.total_steps = {total}. Give more steps, or for a "
                "new run another ckpt.save_ckpt_folder"
            )
        elif config.model.compile:
            self.console.say("the first step compiles the layers, which may take minutes (model.compile)")
        self.console.begin(self.state.step + 1)
        self.stops.on_signal = self._tell_signal
        if self.stops.asked:  # while the run was starting
            self._tell_signal(self.stops.asked)
        return observers

    def _doing(self, what: str) -> AbstractContextManager[Any]:
        """Shows on rank 0 what is being done."""
        return self.console.doing(what) if self.console else nullcontext()

    def _tell_signal(self, name: str) -> None:
        """Says what a signal does, as soon as it comes. Is called from another thread."""
        assert self.console is not None
        step, saves = max(self.state.step, self.asked_step) + 1, self.config.ckpt.enable_save_ckpt
        first = [f"finishing step {step}"] if step <= self.config.data.total_steps else []
        self.console.say(f"{name}: {', then '.join([*first, *(['saving'] if saves else []), 'ending the run'])}")

    def _tell_saved(self, observers: Observers | None) -> None:
        for record in self.saver.take_saved():
            if observers:
                observers.saved(record)

    def _how_to_go_on(self) -> str:
        total = self.config.data.total_steps
        if self.state.step < total:
            return "the same command goes on from there"
        if (self.run / FINETUNE).is_file():  # ``internevo finetune`` refuses other options
            return f"more steps: internevo train {self.run / CONFIG} data.total_steps={2 * total}"
        return "the same command goes on with more steps (data.total_steps)"


def _prepare_saving(config: Config, world: World) -> None:
    """Checks before the first step that the model can be exported, and removes what a killed run has left."""
    if not config.ckpt.enable_save_ckpt:
        return
    if config.ckpt.enable_internevo2hf_ckpt:
        check_export(decoder_config(config.model_type, config.model), config.data.tokenizer_path)
    if world.rank == 0:
        try:  # no step needs this, and the other ranks wait
            remove_leftovers(config.run_folder)
            keep_tokenizer(config.run_folder, config.data.tokenizer_path)
            note_end_of_answers(config.run_folder / TOKENIZER, config.data)
        except (OSError, InternEvoError) as error:
            log.warning(f"the run folder keeps no copy of the tokenizer (data.tokenizer_path), and training goes on: {error}")
    dist.barrier()  # after it, all ranks find the same checkpoints


def _batches(parts: Parts) -> TrainBatches:
    """Makes the batches of this rank."""
    data, world = parts.config.data, parts.world
    return TrainBatches(
        parts.source, parts.sizes, parts.layout.data_rank(world.rank), data.use_packed_dataset, data.total_steps,
        parse_skip_batches(data.skip_batches), pin_memory=world.device.type == "cuda",
    )  # fmt: skip


def _sample_tokenizer(config: Config) -> Tokenizer | None:
    """Opens the tokenizer for samples and tasks, if they are configured."""
    if not config.monitor.needs_tokenizer or not config.data.tokenizer_path:
        return None
    return checked_tokenizer(config.data.tokenizer_path, config.model.vocab_size)


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
