"""The parts of a run on this rank: data, model, optimizer, counters."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.finish import Extras
from ..config import Config, dump
from ..config.hub import may_be_on_hub
from ..data.batches import BatchSizes
from ..data.build import load_stream, train_source, valid_rows
from ..data.rows import Rows
from ..data.source import Source
from ..data.streaming.exchange import Exchange
from ..data.streaming.stream import Stream
from ..models.config import DecoderConfig
from ..models.decoder import Decoder, balance_biases
from ..models.families.registry import decoder_config
from ..models.losses import LossTerms
from ..observe.console import log
from ..ops.precision import COMPUTE
from ..parallel import gloo, plan
from ..parallel.data_axis import Weights
from ..parallel.launcher import local_world_size
from ..parallel.layout import Layout
from ..parallel.pipeline import PipelinedModel
from ..parallel.schedule import Schedule
from ..parallel.turns import Doing, in_turns
from ..parallel.world import World
from .optimizer import Optimizer, Orthogonal
from .resume import TOKENIZER
from .scaler import LossScaler
from .state import RunState


@dataclass
class Parts:
    """Everything that the loop works with. ``restore`` loads a checkpoint into it."""

    config: Config
    world: World
    layout: Layout
    source: Source
    """The source of the training data."""
    valid: Rows | None
    """The validation data, if there is any."""
    sizes: BatchSizes
    decoder: DecoderConfig
    model: Decoder | PipelinedModel
    axis: Weights
    """The data axis, which owns the weights."""
    schedule: Schedule
    optimizer: Optimizer
    scaler: LossScaler
    state: RunState
    stated: Config | None = None
    """As in ``Trainer``."""

    @classmethod
    def build(cls, config: Config, world: World, doing: Doing = nullcontext, stated: Config | None = None) -> Parts:
        """Opens the data, and builds the model with its initial weights. Every rank must call it.

        Args:
            doing: a context that shows what is being done.
            stated: as in ``Trainer``.
        """
        layout = Layout.from_config(config, world.size)
        with doing(_what_is_read(config)):
            source, valid = _open_data(config, world, layout, doing)
        with doing("building the model"):
            parts = cls.without_weights(config, world, layout, source, valid)
            plan.fill(parts.axis, parts.decoder, config)
        parts.stated = stated
        return parts

    @classmethod
    def without_weights(cls, config: Config, world: World, layout: Layout, source: Source, valid: Rows | None) -> Parts:
        """Builds everything, but does not fill in the weights. Every rank must call it."""
        decoder = decoder_config(config.model_type, config.model)
        model, axis, schedule, teams = plan.build(decoder, config, layout, world.device)
        orthogonal, muon, adam = None, config.muon, config.adam
        if muon is not None:
            share = muon.lr / adam.lr if muon.lr is not None and adam.lr else 1.0
            exact = COMPUTE[config.model.dtype] == torch.float32
            orthogonal = Orthogonal(muon, teams, torch.float32 if exact else torch.bfloat16, share)
        optimizer = Optimizer(axis.masters, adam, axis.model_weights, orthogonal)
        scaler = LossScaler.from_config(config.grad_scaler, config.model.dtype)
        sizes = BatchSizes.from_config(config.data, layout.data)
        return cls(config, world, layout, source, valid, sizes, decoder, model, axis, schedule, optimizer, scaler, RunState())

    @property
    def recorded(self) -> Config:
        """The config that the run folder and the checkpoints have."""
        return self.stated or self.config

    @property
    def terms(self) -> LossTerms:
        """The weights of the terms of the loss."""
        return LossTerms.from_config(self.config.loss)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the weights, balance biases and moments under their names in a checkpoint."""
        return {**self.optimizer.checkpoint_tensors(), **self.biases()}

    def biases(self) -> dict[str, Tensor]:
        """Returns the balance biases of this rank's layers, under their names in a checkpoint. They are never sharded."""
        return {f"model/{name}": bias for name, bias in balance_biases(self.model.numbered_layers()).items()}

    def extras(self) -> Extras:
        """Returns what a checkpoint contains besides tensors: counters, the model's shape, the config, and the tokenizer."""
        path = self.config.data.tokenizer_path
        places = (self.config.run_folder / TOKENIZER, Path(path)) if path else ()
        state = {
            **self.state.to_dict(), "updates": self.optimizer.steps, "scaler": self.scaler.state(),
            "data": self.source.fingerprint(), "global_rows": self.sizes.rows(self.state.cursor.batch),
            "batches": self.sizes.in_rows(),
        }  # fmt: skip
        files = {
            "state.json": state,
            "model.json": self.decoder.to_dict(),
            "config.json": json.loads(dump(self.recorded)),
        }
        return Extras(files, next((place for place in places if place.exists()), None))


def _what_is_read(config: Config) -> str:
    """Says which data is opened: its index is read, or made the first time; of a stream, the list of its files."""
    data = config.data
    folders = [part.folder for part in data.mixture or ()] or [data.folders[0]]
    names = dict.fromkeys(str(folder) for folder in [*folders, data.folders[1] if data.valid_every else None] if folder)
    on_hub = [name for name in names if may_be_on_hub(name)]
    here = ", ".join(name for name in names if name not in on_hub)
    said = [f"reading the index of {here}"] if here else []
    said += [f"downloading what is not here yet of {', '.join(on_hub)} (Hugging Face Hub)"] if on_hub else []
    return ", ".join(said) or "preparing random data"


def _open_data(config: Config, world: World, layout: Layout, doing: Doing) -> tuple[Source, Rows | None]:
    data, vocab = config.data, config.model.vocab_size
    reports = layout.is_first_with_its_rows(world.rank)
    streams = [_exchange(world) for _ in range(data.streams)]
    local_size = local_world_size(os.environ)

    def work() -> tuple[Source, Rows | Stream | None]:
        source = train_source(data, vocab, streams.pop, local_size, reports)
        return source, valid_rows(data, vocab, streams.pop, local_size, _left_out if reports else None)

    source, valid = in_turns(world, "opening the data", work, doing)
    return source, load_stream(valid, data.valid_max_rows, _left_out)


def _left_out(message: str) -> None:
    log.warning(f"left out of the validation data: {message}")


def _exchange(world: World) -> Exchange:
    """Makes the exchange of a stream, over all ranks: each of them tokenizes a share of the stream."""
    return Exchange(gloo.new_group() if world.size > 1 else None)
