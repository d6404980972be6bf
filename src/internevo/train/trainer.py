"""A training run, from a checked config to its last checkpoint. ``Trainer.fit`` is the loop."""

from __future__ import annotations

import json
import math
import os
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from ..checkpoint.export import Exporter, check_export
from ..checkpoint.finish import Extras
from ..checkpoint.folder import remove_leftovers
from ..checkpoint.saver import Saver
from ..config import Config, dump
from ..config.training import Loss as LossSection
from ..data.batches import BatchSizes, StepBatch, TrainBatches, parse_skips, valid_batches
from ..data.build import fitting_tokenizer, in_memory, train_source, valid_rows
from ..data.streaming.exchange import Exchange
from ..measure.probes import Probes
from ..models.families.registry import decoder_config
from ..models.generate import Sampling, generate
from ..models.losses import LossTerms
from ..observe.console import log, start_log
from ..observe.observers import Observers
from ..observe.record import StepRecord, ValidRecord, memory_peak, peak_tflops
from ..ops.precision import COMPUTE, is_slow
from ..parallel import plan
from ..parallel.layout import Layout
from ..parallel.world import World, ranks_here
from ..text.tokenizer import Tokenizer
from .lr_schedule import beta2, learning_rate
from .optimizer import Optimizer
from .process import prepare
from .restore import restore
from .scaler import LossScaler
from .state import RunState
from .step import Stepper, StepResult, evaluate
from .stop import StopRequests


class Trainer:
    """All parts of a run, put together for this rank."""

    def __init__(self, config: Config, world: World, stops: StopRequests) -> None:
        self.config, self.world, self.stops = config, world, stops
        self.run = config.run_folder
        self.layout = Layout.of(config, world.size)
        start_log(self.run / "log", world.rank, config.monitor.alert.alert_file_path)
        prepare(config, world.device)
        self.decoder = decoder_config(config.model_type, config.model)
        if config.ckpt.enable_save_ckpt:
            self._prepare_saving()
        self._open_data()
        self.model, self.axis = plan.build(self.decoder, config, self.layout, world.device)
        self.optimizer = Optimizer(self.axis.masters, config.adam)
        self.scaler = LossScaler.of(config.grad_scaler, config.model.dtype)
        self.state = RunState()
        self.news = restore(self)
        if is_slow(config.model.dtype, world.device):
            self.news.append(
                f"warning: this CPU has no instructions for model.dtype = {config.model.dtype!r}; "
                "model.dtype=torch.float32 is hundreds of times faster here"
            )
        self.axis.masters_changed()
        assert dist.group.WORLD is not None
        self.stepper = Stepper(
            self.model, self.axis, self.optimizer, self.scaler, self.layout, dist.group.WORLD, world.device,
            len(self.source.types), config.hybrid_zero_optimizer.clip_grad_norm, _terms(config.loss),
        )  # fmt: skip
        self.exporter = Exporter(self.run, COMPUTE[config.model.dtype], log.warning)
        after = self.exporter if config.ckpt.enable_internevo2hf_ckpt else lambda folder: None
        self.saver = Saver(self.run, config.ckpt, world.rank, _sizes(self.layout), after=after)
        self.saved_step = self.state.step
        self.probes = Probes(config, self.layout, self.model, self.optimizer.checkpoint_tensors(), self.run, world.rank)
        self.peak = peak_tflops(world.device, config.model.dtype, config.monitor.peak_tflops)
        if config.ckpt.stop_file_path and world.rank == 0:
            stops.watch(config.ckpt.stop_file_path)

    def _prepare_saving(self) -> None:
        """Before anything is loaded: what can be known to go wrong with saving, and what a killed run has left."""
        if self.config.ckpt.enable_internevo2hf_ckpt:
            check_export(self.decoder, self.config.data.tokenizer_path)
        if self.world.rank == 0:
            remove_leftovers(self.run)
        dist.barrier()  # now every rank finds the same checkpoints

    def _open_data(self) -> None:
        data, vocab = self.config.data, self.config.model.vocab_size
        streams = [_exchange(self.world) for _ in range(data.streams)]
        here = ranks_here(os.environ)
        if self.world.rank > 0:
            dist.barrier()  # rank 0 makes the index, the others find it
        self.source = train_source(data, vocab, streams.pop, here)
        valid = valid_rows(data, vocab, streams.pop, here)
        if self.world.rank == 0:
            dist.barrier()
        self.valid = in_memory(valid, data.valid_max_rows)
        self.sizes = BatchSizes.of(data, self.layout.data)
        rank = self.layout.data_rank(self.world.rank)
        self.batches = TrainBatches(
            self.source, self.sizes, rank, data.use_packed_dataset, data.total_steps,
            parse_skips(data.skip_batches), pin=self.world.device.type == "cuda",
        )  # fmt: skip
        self.tokenizer: Tokenizer | None = None
        if self.config.monitor.sample_prompts and data.tokenizer_path:
            self.tokenizer = fitting_tokenizer(data.tokenizer_path, vocab)

    # The loop --------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the end, or until asked to stop; then saves."""
        config, data = self.config, self.config.data
        observers = self._observers()
        try:
            clock = time.perf_counter()
            for batch in self.batches.prefetch(self.state.cursor):
                record, stop, save = self._step(batch, time.perf_counter() - clock)
                step, last = record.step, stop or record.step == data.total_steps
                if observers:
                    observers.step(record)
                    for line in self.probes.lines:
                        observers.console.say(line)
                if _due(step, data.valid_every, last and not stop):
                    self._evaluate(step, observers)
                if _due(step, config.monitor.sample_every, last):
                    self._sample(step, observers)
                if config.ckpt.enable_save_ckpt and (_due(step, config.ckpt.checkpoint_every, last) or save):
                    self._save(step)
                elif config.ckpt.enable_save_ckpt and _due(step, config.ckpt.oss_snapshot_freq, False):
                    self.saver.snapshot(step, self._tensors(), self._extras())
                self.saver.check()
                if stop:
                    break
                clock = time.perf_counter()
            if config.ckpt.enable_save_ckpt and self.saved_step < self.state.step:
                self._save(self.state.step)  # batches at the very end were skipped
            self.saver.wait()
        finally:
            if observers:
                observers.close()

    def _step(self, batch: StepBatch, data_time: float) -> tuple[StepRecord, bool, bool]:
        """One step; its record, and whether to stop and to save behind it."""
        config, begin = self.config, time.perf_counter()
        lr = learning_rate(batch.number, config.data.total_steps, config.adam.lr, config.lr_scheduler)
        with self.probes(batch):
            share = partial(self._share, len(batch.bad))
            result = self.stepper(batch, lr, beta2(batch.number, config.adam, config.beta2_scheduler), share)
        self.state.cursor = batch.after
        self.state.consumed_tokens += batch.tokens
        self.state.skipped_steps += result.skipped
        self.state.data_skipped += int(result.shared[-self.world.size - 1])
        for message in batch.bad:
            log.warning(f"left out: {message}")
        record = self._record(batch, result, lr, time.perf_counter() - begin, data_time)
        return record, *self.stops.decide(record.step, result.shared)

    def _share(self, bad: int) -> list[float]:
        """What this rank tells all others with each step: requests to stop, what it has left out, and its memory in a place of
        its own."""
        memory = [0.0] * self.world.size
        memory[self.world.rank] = float(memory_peak(self.world.device))
        return [*self.stops.share(), float(bad), *memory]

    def _record(self, batch: StepBatch, result: StepResult, lr: float, step_time: float, data_time: float) -> StepRecord:
        tgs = batch.tokens / (step_time + data_time) / self.world.size
        tflops = tgs * self.decoder.flops_per_token(self.config.data.seq_len) / 1e12
        memory = result.shared[-self.world.size :]
        types = self.source.types
        return StepRecord(
            step=self.state.step, loss=result.losses.mean(), grad_norm=result.grad_norm, lr=lr, tokens=batch.tokens,
            consumed_tokens=self.state.consumed_tokens, tgs=tgs, tflops=tflops,
            mfu=tflops / self.peak if self.peak else None, step_time=step_time, data_time=data_time,
            memory_peak=int(memory[self.world.rank]), memory_peak_max=int(max(memory)), skipped=result.skipped,
            time=time.time(), loss_by_type=result.losses.by_type(types) if len(types) > 1 else {},
            loss_scale=self.scaler.scale if self.scaler.enabled else None, skipped_steps=self.state.skipped_steps,
            moe=result.routing, data_skipped=self.state.data_skipped,
        )  # fmt: skip

    # What happens between steps --------------------------------------------------------------------------------------

    def _evaluate(self, step: int, observers: Observers | None) -> None:
        if self.valid is None:
            return
        data = self.config.data
        batches = valid_batches(
            self.valid, data.micro_bsz, self.layout.data_rank(self.world.rank), self.layout.data,
            data.use_packed_dataset, data.valid_max_rows,
        )  # fmt: skip
        losses = evaluate(
            self.model, self.axis, batches, len(self.valid.types), self.world.device, self.stepper.group, self.layout
        )
        if observers:
            by_type = losses.by_type(self.valid.types)
            ppl = {name: _perplexity(loss) for name, loss in by_type.items()}
            loss = losses.mean()
            observers.valid(ValidRecord(step, loss, _perplexity(loss), time.time(), by_type, ppl))

    def _sample(self, step: int, observers: Observers | None) -> None:
        """Continues the configured prompts. Every rank takes part, since the weights may be spread over all."""
        monitor, tokenizer = self.config.monitor, self.tokenizer
        if tokenizer is None:
            return
        dtype = COMPUTE[self.config.model.dtype]
        for prompt in monitor.sample_prompts:
            ids = tokenizer.with_bos(prompt)
            ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
            sampling = Sampling(temperature=0.8, top_p=0.95)
            with self.axis.whole_sequences():
                out = generate(
                    self.model, ids, monitor.sample_tokens, sampling, seed=self.config.seed, eos_ids=ends, dtype=dtype
                )
            if observers:
                observers.sample(step, prompt, tokenizer.decode([i for i in out if i not in ends]))
        self.axis.after_forwards()

    def _save(self, step: int) -> None:
        self.saver.save(step, self._tensors(), self._extras())
        self.saved_step = step

    def _tensors(self) -> dict[str, Tensor]:
        """Weights and moments, under the names they have in a checkpoint."""
        return self.optimizer.checkpoint_tensors()

    def _extras(self) -> Extras:
        path = self.config.data.tokenizer_path
        state = {
            **self.state.to_dict(), "updates": self.optimizer.steps, "scaler": self.scaler.state(),
            "data": self.source.fingerprint(), "global_rows": self.sizes.rows(self.state.cursor.batch),
        }  # fmt: skip
        files = {
            "state.json": state,
            "model.json": self.decoder.to_dict(),
            "config.json": json.loads(dump(self.config)),
        }
        return Extras(files, Path(path) if path and Path(path).exists() else None)

    def _observers(self) -> Observers | None:
        """On rank 0, with the run's first lines said."""
        for line in self.news:
            log.info(line)
        if self.world.rank:
            return None
        (self.run / "config.json").write_text(dump(self.config), encoding="utf-8")
        config, total = self.config, self.config.data.total_steps
        observers = Observers(self.run, config.monitor, self.state.step, total, config.enable_tb)
        say, self.exporter.warn = observers.console.say, observers.console.warn
        rows = self.sizes.rows(self.state.cursor.batch)
        trained = sum(self.optimizer.named[name].numel() for name in self.optimizer.moments)
        adapters = f" and {trained:,} in adapters" if self.decoder.lora else ""
        say(
            f"{config.JOB_NAME}: {self.decoder.family}, {self.decoder.parameters():,} parameters{adapters}, "
            f"{config.model.dtype}, on {self.world.size} x {self.world.device.type}; {rows} rows of {config.data.seq_len} "
            f"tokens per step; {self.run}/"
        )
        for line in self.news:
            say(line)
        if self.state.step >= total:
            say(f"all {total} steps are trained already")
        return observers


def _exchange(world: World) -> Exchange:
    """Over all ranks, whatever they are to each other: each tokenizes a share of a stream."""
    return Exchange(dist.new_group(backend="gloo") if world.size > 1 else None)


def _terms(loss: LossSection) -> LossTerms:
    return LossTerms(loss.label_smoothing, loss.moe_loss_coeff, loss.moe_loss_kind, loss.moe_z_loss_coeff)


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _sizes(layout: Layout) -> dict[str, int]:
    return {axis: size for axis, size, _ in layout.describe()}
