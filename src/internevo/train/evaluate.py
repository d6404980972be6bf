"""Evaluates a model in a folder: loss, perplexity and bits per byte on tokenized data, and tasks of lm-eval, on any layout."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint.open import open_source
from ..config import Config, validate
from ..config.load import apply_override
from ..data.batches import valid_batches
from ..data.tokenized.index import list_files, open_index
from ..data.tokenized.made_with import tokenizer_of_data
from ..data.tokenized.vocabulary import check_ids
from ..data.windows import WholeDocuments, choose_documents, predicted_bytes
from ..errors import DataError, UsageError, expect, expect_texts
from ..inference.tasks import TASK_ROWS, check_tasks, requests_of, run_tasks
from ..inference.text import TextModel, eos_ids
from ..models.config import DecoderConfig
from ..models.decoder import Decoder, balance_biases
from ..models.generate import LanguageModel, longest_text
from ..models.settings import settings
from ..models.source import ModelInMemory, ParameterSource, most_common_dtype
from ..ops.precision import COMPUTE
from ..parallel import plan
from ..parallel.data_axis import Weights
from ..parallel.launcher import PARENT, LauncherInfo, read_launcher
from ..parallel.layout import Layout
from ..parallel.schedule import Schedule
from ..parallel.turns import in_turns
from ..parallel.world import World, join
from ..text.tokenizer import Tokenizer, as_tokenizer, load_tokenizer
from .check import check_config
from .process import prepare
from .restore import read_shards
from .step import evaluate as sum_losses
from .step import sum_over_ranks

LONGEST_ROW = 4096
"""Length of a row, if neither the model's positions nor the user say another one, in tokens."""
ROW_TOKENS = 8192
"""Number of tokens that go through the model at once on each rank, if the user does not say how many rows."""
OVERRIDABLE = ("parallel", "model.dtype", "hybrid_zero_optimizer")
"""What overrides may change: how the model is computed, and not what it is."""

NOT_NEEDED = ("sliding_window", "rope_", "moe_layer_kwargs")
"""Keys of the model that say nothing about its layouts. The model itself is built from its own description."""


@dataclass(frozen=True)
class Score:
    """How well a model predicts some documents."""

    documents: int
    tokens: int
    """Number of predicted tokens."""
    loss: float
    """Mean loss of these tokens, in nats."""
    perplexity: float
    bits_per_byte: float | None = None
    """Loss per byte (UTF-8) of the predicted text, in bits; None if the tokenizer is not known. Other than the loss, it can be
    compared between models with different tokenizers."""

    @classmethod
    def of(cls, documents: int, nats: float, tokens: float, nbytes: float | None) -> Score:
        """Makes it from the sum of the losses, and the numbers of predicted tokens and bytes."""
        loss = nats / tokens if tokens else math.nan
        bits = nats / math.log(2) / nbytes if nbytes else None
        return cls(documents, int(tokens), loss, math.exp(min(loss, 700.0)), bits)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    model: str
    data: str | None = None
    seq_len: int = 0
    """Length of the rows, which is the longest context, in tokens."""
    stride: int = 0
    total: Score = Score(0, 0, math.nan, math.nan)
    """The score of all documents; of none without data."""
    by_type: dict[str, Score] = field(default_factory=dict)
    """Dataset type -> its score."""
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """Task -> metric -> value, and its standard error as METRIC_stderr."""
    notes: tuple[str, ...] = ()
    """What could not be made sure of."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return asdict(self)


class Loaded(NamedTuple):
    """A model on the ranks of a layout."""

    config: Config
    model: LanguageModel
    axis: Weights
    schedule: Schedule
    layout: Layout
    world: World

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation."""
        return COMPUTE[self.config.model.dtype]


def evaluate(
    model: str | Path | Decoder,
    data: str | Path | None = None,
    *,
    tasks: Sequence[str] = (),
    task_folder: str | Path | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    tokenizer: Tokenizer | str | Path | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    launcher: LauncherInfo | None = None,
) -> Evaluation:
    """Computes the loss of a model on tokenized data, for each dataset type, and evaluates it on tasks of lm-eval.

    Every document is seen whole, if it has at most ``seq_len`` tokens; longer ones are divided into windows. All tokens are
    predicted but the first of a document and masked ones. In a program that torchrun or srun has started, this process is one
    rank, and all ranks get the same result.

    Args:
        model: a Hugging Face folder, a checkpoint, a run folder, or what ``load_model`` returned.
        data: a folder of tokenized data, or the path of one ``.bin`` file without its suffix.
        tasks: names of tasks or groups of lm-eval, which must be installed (``pip install 'internevo[eval]'``).
        task_folder: a folder with task files of your own.
        fewshot: number of examples in the prompts of tasks; None: as each task says.
        chat: apply the chat template in tasks.
        tokenizer: the tokenizer of data and tasks, or its path; None: the one with the data, or else the model's.
        seq_len: the longest context, in tokens; None: as far as the model's positions reach, but at most 4,096.
        stride: number of tokens by which the windows of long documents are apart; None: ``seq_len``, so that they do not
            overlap. A smaller one gives tokens more context and takes longer.
        batch_size: rows that go through the model at once on a rank; None: about 8,192 tokens.
        limit: use only the first ``limit`` documents of each dataset type and task.
        config: its layout and ``model.dtype`` say how the model is computed; None: a replica on every rank.
        overrides: KEY.PATH=VALUE overrides of these, such as "parallel.tensor.size=2".
        launcher: the rank of this process; None: found from the environment.

    Raises:
        UsageError, CheckpointError: if the model or an argument cannot be used.
        ConfigError: if the layout does not fit the model or the number of ranks.
        DataError: if the data cannot be read, or was made with another tokenizer.
    """
    info = launcher or read_launcher(os.environ)
    asked = Asked.checked(
        model, data, tasks=tasks, task_folder=task_folder, tokenizer=tokenizer, seq_len=seq_len, stride=stride,
        batch_size=batch_size, limit=limit, config=config, overrides=overrides, world_size=info.size,
        compares=PARENT not in os.environ,
    )  # fmt: skip
    result = Evaluation("model in memory" if isinstance(model, Decoder) else str(model), notes=asked.notes)
    with join(info) as world:
        loaded = load(asked.source, asked.config, world)
        if data is not None:
            stride = stride or asked.seq_len
            total, by_type = _score(loaded, asked, Path(data), stride, limit)
            result = replace(result, data=str(data), seq_len=asked.seq_len, stride=stride, total=total, by_type=by_type)
        if tasks:
            text = _text_model(loaded, asked, None if isinstance(model, Decoder) else Path(model))
            requests = requests_of(text, loaded.layout, world, batch_size or TASK_ROWS)
            scores = run_tasks(requests, tasks, task_folder, fewshot=fewshot, limit=limit, chat=chat)
            result = replace(result, tasks=scores)
    return result


@dataclass(frozen=True)
class Asked:
    """What is evaluated, after all that can be checked without processes and weights has been."""

    source: ParameterSource
    config: Config
    seq_len: int
    rows: int
    own_tokenizer: Tokenizer | None
    """The model's, for tasks."""
    data_tokenizer: Tokenizer | None
    """The one that the data was made with, for bits per byte."""
    notes: tuple[str, ...]

    @classmethod
    def checked(
        cls,
        model: str | Path | Decoder,
        data: str | Path | None,
        *,
        tasks: Sequence[str],
        task_folder: str | Path | None,
        tokenizer: Tokenizer | str | Path | None,
        seq_len: int | None,
        stride: int | None,
        batch_size: int | None,
        limit: int | None,
        config: Config | None,
        overrides: Sequence[str],
        world_size: int,
        compares: bool = True,
    ) -> Asked:
        """Checks the arguments of ``evaluate``, which also says what is raised.

        Args:
            compares: compare the tokenizers of data and model; the process that starts the ranks has done it before them.
        """
        expect(model, (str, Path, Decoder), "a model is a path, or what load_model returned")
        expect(config, (Config, type(None)), "config is what load_config returned")
        expect_texts(tasks, "tasks")
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"{name} = {value} must be at least 1")
        source = ModelInMemory(model.config, model) if isinstance(model, Decoder) else open_source(Path(model))
        size = seq_len or default_length(source.config)
        _check_numbers(data, tasks, stride, size, limit)
        rows = batch_size or max(1, ROW_TOKENS // size)
        chosen = evaluation_config(source, size, rows, config, overrides)
        check_config(chosen, world_size)
        given = None if tokenizer is None else as_tokenizer(tokenizer)
        own = _task_tokenizer(tasks, task_folder, source, given) if tasks else given
        found, notes = (given, []) if data is None else _check_data(Path(data), source, given, compares)
        return cls(source, chosen, size, rows, own, found, tuple(notes))


def _task_tokenizer(
    tasks: Sequence[str], folder: str | Path | None, source: ParameterSource, given: Tokenizer | None
) -> Tokenizer:
    """Checks that there are these tasks, and returns the tokenizer for them."""
    check_tasks(tasks, folder)
    own = given or (load_tokenizer(source.tokenizer) if source.tokenizer else None)
    if own is None:
        raise UsageError("tasks need the model's tokenizer: give it (--tokenizer PATH)")
    return own


def _check_data(
    data: Path, source: ParameterSource, given: Tokenizer | None, compares: bool
) -> tuple[Tokenizer | None, list[str]]:
    """Checks that the data is for this model. Returns the tokenizer that it was made with, and notes."""
    list_files(data)
    found, notes = (given, []) if given is not None else tokenizer_of_data(data, source.tokenizer, compares)
    check_ids(data, source.config.vocab_size, "of the model: the data was tokenized with another tokenizer")
    return found, notes


def _check_numbers(data: str | Path | None, tasks: Sequence[str], stride: int | None, size: int, limit: int | None) -> None:
    """Checks what can be checked without the model."""
    if data is None and not tasks:
        raise UsageError("nothing to evaluate on: give data, a folder of tokenized data, or the names of tasks")
    if stride is not None and not 0 < stride <= size:
        raise UsageError(f"stride = {stride} must be from 1 to seq_len = {size}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit = {limit} must be at least 1 document")


def _text_model(loaded: Loaded, asked: Asked, folder: Path | None) -> TextModel:
    """Returns the model as tasks need it. ``folder``: where it is from; None: from memory."""
    source, tokenizer = asked.source, asked.own_tokenizer
    assert tokenizer is not None
    return TextModel(
        source.config, tokenizer, lambda: loaded.model, eos_ids(folder, source.tokenizer, tokenizer.path), loaded.dtype,
        loaded.axis.unsharded_sequences,
    )  # fmt: skip


def _score(loaded: Loaded, asked: Asked, root: Path, stride: int, limit: int | None) -> tuple[Score, dict[str, Score]]:
    """Computes the scores of the documents below ``root``: of all, and of each dataset type. Every rank must call it."""
    layout, world, tokenizer = loaded.layout, loaded.world, asked.data_tokenizer
    index = in_turns(world, f"reading the index of {root}", partial(open_index, root))  # the first time it is written
    documents, kinds = choose_documents(index, limit), len(index.types)
    windows = WholeDocuments(index, documents, asked.seq_len, loaded.model.config.vocab_size, stride)
    if not len(windows):
        raise DataError(f"{root} has no token to predict: no document has two tokens")
    batches = valid_batches(windows, asked.rows, layout.data_rank(world.rank), layout.data, packed=True, limit=None)
    losses = sum_losses(loaded.schedule, layout, world.device, batches, kinds)
    counts, nbytes = torch.zeros(kinds, dtype=torch.float64), torch.zeros(kinds, dtype=torch.float64)
    for document in documents[world.rank :: world.size].tolist():
        kind = index.file_types[index.file_of(document)]
        counts[kind] += 1
        nbytes[kind] += predicted_bytes(index.read(document), tokenizer) if tokenizer else 0
    counts, nbytes = (x.cpu() for x in sum_over_ranks(counts.to(world.device), nbytes.to(world.device)))
    sums, tokens = losses.sums.cpu(), losses.counts.cpu()

    def score(kinds: slice) -> Score:
        known = float(nbytes[kinds].sum()) if tokenizer else None
        return Score.of(int(counts[kinds].sum()), float(sums[kinds].sum()), float(tokens[kinds].sum()), known)

    by_type = {name: score(slice(kind, kind + 1)) for kind, name in enumerate(index.types) if tokens[kind]}
    return score(slice(None)), by_type


def default_length(config: DecoderConfig) -> int:
    """Returns the length of the rows, if the user does not say it."""
    return min(longest_text(config) or LONGEST_ROW, LONGEST_ROW)


def evaluation_config(
    source: ParameterSource, seq_len: int, rows: int, given: Config | None, overrides: Sequence[str]
) -> Config:
    """Returns a config of a model for evaluation.

    Args:
        given: a config whose layout and dtype are used.
        overrides: overrides of these.

    Raises:
        UsageError: if an override changes something else.
    """
    for text in overrides:
        if not text.startswith(tuple(f"{key}{end}" for key in OVERRIDABLE for end in ".=")):
            raise UsageError(
                f"{text}: an evaluation can change only how the model is computed ({', '.join(OVERRIDABLE)}); lengths and "
                "batches are options of the command"
            )
    dtype = str(most_common_dtype(source)).removeprefix("torch.")
    raw: dict[str, Any] = {"model": {"dtype": given.model.dtype if given else dtype}}
    for key, value in settings(source.config).items():
        section, _, name = key.partition(".")
        if section == "model" and value and not name.startswith(NOT_NEEDED):
            raw["model"][name] = value
    if source.config.experts is not None:
        raw["model"]["moe_type"] = "Dropless"
    raw |= {
        "model_type": source.config.family,
        "data": {"seq_len": seq_len, "micro_bsz": rows, "total_steps": 1},
        "adam": {"lr": 1e-4},
        "enable_tb": False,
    }
    if source.config.experts is not None:
        raw["parallel"] = {"expert": {"size": 1}}  # every rank has all experts, and needs no other for a forward pass
    if given is not None:
        raw["parallel"] = given.parallel.model_dump()
        raw["hybrid_zero_optimizer"] = given.hybrid_zero_optimizer.model_dump()
    for text in overrides:
        apply_override(raw, text)
    return validate(raw, "the config of the evaluation")


def load(source: ParameterSource, config: Config, world: World) -> Loaded:
    """Loads a model on the ranks of a layout; each reads only its shards. Every rank must call it."""
    layout, decoder = Layout.from_config(config, world.size), source.config
    prepare(config, world.device)
    model, axis, schedule, _ = plan.build(decoder, config, layout, world.device, frozen=True)
    read_shards(axis.masters, source)
    axis.masters_changed()
    if decoder.experts is not None and decoder.experts.balance_bias:
        for name, bias in balance_biases(model.numbered_layers()).items():
            bias.copy_(source.read(name, 0, decoder.experts.count).view(bias.shape))
    return Loaded(config, model, axis, schedule, layout, world)
