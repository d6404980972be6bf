"""A training run, from a checked config to the last checkpoint. ``Trainer.fit`` is the loop."""

from __future__ import annotations

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
from ..data.batches import StepBatch, TrainBatches, parse_skip_batches
from ..data.build import checked_tokenizer
from ..errors import InternEvoError
from ..measure.probes import Probes
from ..models.families.registry import decoder_config
from ..observe.background import Tracked
from ..observe.console import Console, log, start_log
from ..observe.observers import Observers, Progress
from ..observe.record import StepRecord, memory_peak, peak_tflops
from ..ops.precision import COMPUTE
from ..parallel import gloo
from ..parallel.world import World
from ..storage.lock import FileLock
from ..storage.naming import naming
from ..text.tokenizer import Tokenizer
from ..wording import counted
from .about import axis_sizes, facts_of, title
from .answers import note_end_of_answers
from .between import Between
from .due import Due, is_due
from .folder import CONFIG, FINETUNE
from .lr_schedule import beta2, describe, learning_rate
from .parts import Parts
from .process import GarbageCollector, prepare, unsuited
from .restore import restore
from .resume import TOKENIZER, keep_tokenizer
from .shared import Shared
from .step import Stepper, StepResult, formulas
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
        self.trains = self.state.step < self.batches.last_step
        """Whether there is a step to train. If not, the run's record (its config, its tokenizer, ...) stays as it is."""
        if self.trains:
            _keep_tokenizer(config, world)
        self.left_over = Due.left_over_on_all(config, world, self.state.step, self.batches.last_step)
        """What is due after the last step that was trained, and was not done before the process ended."""
        self.tokenizer = _sample_tokenizer(config)
        self.exporter = Exporter(self.run, COMPUTE[config.model.dtype], log.warning)
        after = self.exporter if config.ckpt.enable_internevo2hf_ckpt else lambda folder: None
        group, identity = gloo.new_group(), self.state.run
        stager = stager_for(world.device) if config.ckpt.enable_save_ckpt else None
        self.saver = Saver(self.run, config.ckpt, world.rank, axis_sizes(self.parts.layout), group, after, identity, stager)
        watchdog.before_end = self.saver.finish
        self.garbage = GarbageCollector()
        self.between = Between(self.parts, self.tokenizer, doing, self.garbage)
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
        data = self.config.data
        if not self.trains and not self.left_over:
            self._tell_nothing_to_train()
            return
        observers = self._observers()
        try:
            first = self.state.step
            if data.valid_at_start and data.valid_every and not first:
                self.between(0, Due(valid=True), observers)
            self.between(first, self.left_over, observers)
            self.left_over, begin = Due(), time.perf_counter()
            clock = begin
            for batch in self.batches.prefetch(self.state.cursor):
                record, stop, save = self._step(batch, time.perf_counter() - clock)
                step, last = record.step, record.step == self.batches.last_step
                if observers:
                    observers.step(record)
                    for line in [*self.probes.lines, *self.stop_time.lines(record, self.saver.seconds, stop)]:
                        observers.console.say(line)
                self._check_progress(step)
                if on_step is not None and on_step(record) is True:
                    self.stops.asked = self.stops.asked or "on_step"
                self._save_and_evaluate(step, last, stop, save, observers)
                self.saver.check()
                self._tell_saved(observers)
                self.garbage.after_step(step)
                if stop:
                    break
                clock = time.perf_counter()
            with self._doing("finishing the checkpoint"):
                self.saver.close()
            self._tell_saved(observers)
            if observers:
                observers.summary(self._progress(first), time.perf_counter() - begin, self._how_to_go_on())
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

    def _save_and_evaluate(self, step: int, last: bool, stop: bool, save: bool, observers: Observers | None) -> None:
        """Begins the checkpoint that is due, and then evaluates and samples where that is due.

        In this order, an evaluation that fails, or during which the process is killed, loses no step. After a request to stop,
        nothing but the checkpoint is waited for; whoever goes on with the run does what is left over (``Due.left_over``).
        """
        ckpt = self.config.ckpt
        if ckpt.enable_save_ckpt and (is_due(step, ckpt.checkpoint_every, last or stop) or save):
            self._save(step)
        elif ckpt.enable_save_ckpt and ckpt.oss_snapshot_freq and step % ckpt.oss_snapshot_freq == 0:
            self.saver.snapshot(step, self.parts.tensors(), self.parts.extras())
        due = Due.after(self.config, step, last)
        if stop and ckpt.enable_save_ckpt:
            self.left_over = due
        else:
            self.between(step, due, observers)

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
            f"the run has diverged: it has skipped {counted(row, 'step')} in a row, until step {step}, because the gradients "
            f"were not finite (monitor.max_skipped_steps = {limit}). {advice}"
        )

    def _save(self, step: int) -> None:
        # While steps are skipped, no older checkpoint is deleted: they are what a run that diverges can go back to.
        self.saver.save(step, self.parts.tensors(), self.parts.extras(), keep_all=self.state.skipped_in_a_row > 0)
        self.garbage.collect()

    def _observers(self) -> Observers | None:
        """On rank 0, makes the observers, and prints the first lines of the run."""
        if self.world.rank:
            for line in self.start_lines:
                log.info(line)
            return None
        if self.trains:
            with naming(self.run / "config.json"):
                (self.run / "config.json").write_text(dump(self.parts.recorded), encoding="utf-8")
        config = self.config
        assert self.console is not None
        tracked = Tracked(self.run, config.JOB_NAME, self.state.run, self.state.step, flat(self.parts.recorded))
        observers = Observers(self.console, config.monitor, tracked, config.enable_tb)
        observers.start(facts_of(self.parts))
        self.exporter.warn = self.console.warn
        for line in [title(self.parts, self.state.cursor.batch), f"learning rate: {describe(config)}", *self.start_lines]:
            self.console.say(line)
        if self.left_over:
            self.console.say(f"step {self.state.step} was trained before; what is left of it comes first: {self.left_over}")
        if self.trains and config.model.compile:
            self.console.say("the first step compiles the layers, which may take minutes (model.compile)")
        self.console.begin(self.state.step + 1)
        self.stops.on_signal = self._tell_signal
        if self.stops.asked:  # while the run was starting
            self._tell_signal(self.stops.asked)
        return observers

    def _tell_nothing_to_train(self) -> None:
        step, total = self.state.step, self.config.data.total_steps
        why = f"step {step} is done, and data.total_steps = {total}" if step else "data.skip_batches leaves out every batch"
        for line in [
            *self.start_lines,
            f"nothing to train: {why}. Give more steps, or for a new run another ckpt.save_ckpt_folder",
        ]:
            self.console.say(line) if self.console else log.info(line)
        self.batches.source.close()
        self.saver.close()

    def _doing(self, what: str) -> AbstractContextManager[Any]:
        """Shows on rank 0 what is being done."""
        return self.console.doing(what) if self.console else nullcontext()

    def _tell_signal(self, name: str) -> None:
        """Says what a signal does, as soon as it comes. Is called from another thread."""
        assert self.console is not None
        step, saves = max(self.state.step, self.asked_step) + 1, self.config.ckpt.enable_save_ckpt
        now = self.console.doing_now
        first = [f"{now} to the end"] if now.startswith(("evaluating", "generating")) else []
        first += [f"finishing step {step}"] if step <= self.batches.last_step else []
        self.console.say(f"{name}: {', then '.join([*first, *(['saving'] if saves else []), 'ending the run'])}")

    def _tell_saved(self, observers: Observers | None) -> None:
        for record in self.saver.take_saved():
            if observers:
                observers.saved(record)

    @property
    def is_complete(self) -> bool:
        """Whether every step is trained, and nothing that is due after the last one is left over."""
        return self.state.step >= self.batches.last_step and not self.left_over

    def _progress(self, first: int) -> Progress:
        """Returns how far the run has come. ``first``: the step after which this process began."""
        step, total = self.state.step, self.config.data.total_steps
        return Progress(total, step - first, self.batches.skipped_until(total), step >= self.batches.last_step)

    def _how_to_go_on(self) -> str:
        total = self.config.data.total_steps
        if self.state.step < self.batches.last_step:
            return "the same command goes on from there"
        if self.left_over:
            return f"the same command does what is left of the last step: {self.left_over}"
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
        except OSError as error:
            log.warning(f"what a killed process has left in the run folder cannot be removed, and training goes on: {error}")
    dist.barrier()  # after it, all ranks find the same checkpoints


def _keep_tokenizer(config: Config, world: World) -> None:
    """Copies the tokenizer into the run folder, on rank 0."""
    if not config.ckpt.enable_save_ckpt or world.rank:
        return
    try:  # no step needs this
        keep_tokenizer(config.run_folder, config.data.tokenizer_path)
        note_end_of_answers(config.run_folder / TOKENIZER, config.data)
    except (OSError, InternEvoError) as error:
        log.warning(f"the run folder keeps no copy of the tokenizer (data.tokenizer_path), and training goes on: {error}")


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
