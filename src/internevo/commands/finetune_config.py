"""What ``internevo finetune`` chooses where its options leave it open, and the config that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config
from ..config.check import problems
from ..config.load import apply_override, validate
from ..config.write import Code, readable
from ..data.encoding.encode import OnError
from ..data.rows import WholeRows
from ..data.tokenized.index import Index
from ..errors import ConfigError, UsageError
from ..models.generate import longest_text
from ..ops.precision import is_slow
from ..parallel.world import first_device
from ..storage.replace import replace_text
from ..train import recipe
from ..train.check import check_config
from ..train.config import HfModel
from ..train.fit import CHECKPOINT, FSDP, fitted
from ..train.folder import CONFIG
from ..train.resume import TOKENIZER
from ..wording import counted

DATA, MODEL = "data", "model"
"""What is in the run folder, besides what every run writes."""
RUN = "from pathlib import Path\n\nRUN = Path(__file__).parent"
"""The beginning of the config: paths are relative to it, so that the folder may move."""


@dataclass(frozen=True)
class Options:
    """What decides the result. The same options go on with a run; others are refused."""

    model: str
    data: str
    format: str = "auto"
    lora: int | None = None
    text_key: str | None = None
    subset: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    epochs: float | None = None
    lr: float | None = None
    seq_len: int | None = None
    valid_ratio: float | None = None
    on_error: OnError = "stop"
    overrides: list[str] = field(default_factory=list)


FIXED = (
    "ckpt.save_ckpt_folder", "ckpt.enable_save_ckpt", "ckpt.auto_resume", "ckpt.load_ckpt_info", "ckpt.load_ckpt_folder",
    "ckpt.load_model_only_folder", "model.from_hf", "model.pretrained", "data.train_folder", "data.type", "data.mixture",
    "data.tokenizer_path", "data.subset_name",
)  # fmt: skip
"""Keys that ``finetune`` decides, with all that is inside them: with other values, it would train something else than its
arguments say, or have nothing to export."""
MANY_STEPS = 10**9
"""Stands for a number of steps that is not known yet, and that no rule finds too small."""


def check_overrides(options: Options, found: HfModel, processes: int) -> None:
    """Checks the options and overrides, and that a config can describe the model, before anything is written. What depends on
    the data (the number of steps, and the size of a step) is checked when the config is written.

    Raises:
        ConfigError: if an override is wrong, or contradicts another key or the model's weights.
        UsageError: if an override is of a key that ``finetune`` decides, or of a whole section.
    """
    values: dict[str, Any] = {
        "model": {"from_hf": found.name, **_lora(options, found)},
        "data": {"seq_len": options.seq_len or recipe.ROW, "micro_bsz": 1, "total_steps": MANY_STEPS},
        "adam": {"lr": _given_lr(options, found)},
    }
    if options.tokenizer is not None:
        values["data"]["tokenizer_path"] = options.tokenizer
    for text in options.overrides:
        key = text.partition("=")[0]
        if any(_covers(name, key) for name in FIXED):
            raise UsageError(f"{text}: finetune decides this key itself; leave it out")
        apply_override(values, text)
        if "." not in key and isinstance(values[key], dict):
            raise UsageError(f"{text}: give single keys, as in {key}.KEY=VALUE, so that the others of this section stay")
    config = validate(found.fill(values), source="the options")
    found.check(config)
    if config.data.total_steps == MANY_STEPS and config.lr_scheduler.total_steps is not None:  # at most as many
        steps = {"total_steps": config.lr_scheduler.total_steps}
        config = config.model_copy(update={"data": config.data.model_copy(update=steps)})
    if wrong := problems(config, processes):
        raise ConfigError("the options cannot be trained with:\n" + "\n".join(f"  {line}" for line in wrong))


def _covers(name: str, key: str) -> bool:
    """Whether ``key`` is the key ``name``, or inside it."""
    return f"{key}.".startswith(f"{name}.")


def _lora(options: Options, found: HfModel) -> dict[str, Any]:
    """Returns the keys of ``model`` that are about adapters: none without ``--lora``."""
    if (rank := options.lora) is None:
        return {}
    attention = [name for name in ("q", "k", "v", "o") if name in found.decoder.projections()]
    targets = (*attention, *(() if found.decoder.experts else ("gate", "up", "down")))
    return {"lora": {"rank": rank, "alpha": 2.0 * rank, "targets": targets}}


def _given_lr(options: Options, found: HfModel) -> float:
    """Returns the highest learning rate, unless ``adam.lr`` is overridden."""
    if options.lr is not None:
        return options.lr
    return recipe.learning_rate(found.decoder.parameters(), options.lora is not None)


def _overridden(options: Options, key: str) -> Any:
    """Returns the value of a key that is overridden; None if it is not."""
    values: dict[str, Any] = {}
    for text in options.overrides:
        apply_override(values, text)
    section, _, name = key.partition(".")
    return values.get(section, {}).get(name)


@dataclass(frozen=True)
class Chosen:
    """The sizes and rates of a run."""

    options: Options
    found: HfModel
    documents: int
    mean: float
    """Tokens of a document."""
    longest: int
    cut: int
    """Number of documents that are longer than a row."""
    seq_len: int
    rows: int
    """Rows of an epoch."""
    padding: float
    """The share of padding in them."""
    per_step: int
    """Rows of a step, over all ranks."""
    steps: int
    lr: float

    @classmethod
    def of(cls, options: Options, found: HfModel, index: Index, processes: int) -> Chosen:
        """Chooses by the model, and by the lengths of the training documents."""
        lengths, decoder = index.documents[:, 1], found.decoder
        mean, longest = index.tokens / len(index), int(lengths.max())
        texts = index.types == ["text"]
        seq_len = (
            _overridden(options, "data.seq_len")
            or options.seq_len
            or recipe.row_length(longest, mean, longest_text(decoder), texts)
        )
        rows = len(WholeRows(index, seq_len, decoder.vocab_size))
        per_step = _overridden(options, "data.global_batch_size") or recipe.rows_per_step(rows, len(index), seq_len, processes)
        epochs = recipe.epochs(len(index)) if options.epochs is None else options.epochs
        lr = _overridden(options, "adam.lr")
        return cls(
            options, found, len(index), mean, longest, int((lengths > seq_len).sum()), seq_len, rows,
            1 - index.tokens / (rows * seq_len),
            per_step,
            _overridden(options, "data.total_steps") or max(1, round(epochs * rows / per_step)),
            _given_lr(options, found) if lr is None else lr,
        )  # fmt: skip

    @property
    def per_epoch(self) -> int:
        """The number of steps of an epoch."""
        return max(1, round(self.rows / self.per_step))

    @property
    def epochs(self) -> float:
        """The number of passes over the data."""
        return self.steps * self.per_step / self.rows

    def write_config(self, run: Path, tokenizer: Path, processes: int) -> Iterator[str]:
        """Writes RUN/config.py, and yields lines that say what was chosen.

        Raises:
            ConfigError: if the overrides are wrong, or contradict what was chosen.
        """
        values = self._values(run, tokenizer)
        for text in self.options.overrides:
            apply_override(values, text)
        config = validate(self.found.fill(_plain(values)), source="the config of this run")
        self.found.check(config)
        if not any(text.startswith("data.micro_bsz=") for text in self.options.overrides):
            config, enough = self._fitted(config, values, processes)
            if not enough:
                yield "note: by the formula, this machine has too little memory; try --lora 16, or a smaller --seq-len"
        check_config(config, processes)
        beginning = (
            f"Written by internevo finetune {self.options.model} {self.options.data}. To go on by hand:\n"
            f"internevo train {run / CONFIG}"
        )
        replace_text(run / CONFIG, readable(values, self._comments(), beginning, RUN))
        yield from self._lines(config)
        yield f"config: {run / CONFIG}"

    def _values(self, run: Path, tokenizer: Path) -> dict[str, Any]:
        """Returns the keys of the config. Micro-batches have one row."""
        found, steps, lr = self.found, self.steps, self.lr
        dtype = found.dtype or "bfloat16"
        values: dict[str, Any] = {
            "JOB_NAME": run.resolve().name,
            "model": {
                "from_hf": str(found.folder.resolve()) if found.folder == Path(found.name) else found.name,
                "dtype": "torch.float32" if is_slow(dtype, first_device()) else f"torch.{dtype}",
            },
            "data": {
                "train_folder": _path(run, f"{DATA}/train"),
                "seq_len": self.seq_len, "micro_bsz": 1, "global_batch_size": self.per_step, "total_steps": steps,
                "split_documents": False,
            },
            "adam": {"lr": lr, "adam_beta2": 0.999, "weight_decay": 0.0},
            "lr_scheduler": {"warmup_ratio": recipe.warmup_ratio(steps), "eta_min": lr / 10},
            "hybrid_zero_optimizer": {"clip_grad_norm": 1.0},
            "ckpt": {
                "save_ckpt_folder": _path(run), "checkpoint_every": max(1, min(self.per_epoch, steps // 4)), "keep_last": 2,
            },
        }  # fmt: skip
        if tokenizer.resolve() != found.folder.resolve():
            own = tokenizer == run / TOKENIZER
            values["data"]["tokenizer_path"] = _path(run, TOKENIZER) if own else str(tokenizer.resolve())
        if (run / DATA / "valid").is_dir():
            every = min(self.per_epoch, steps)
            valid = {"valid_folder": _path(run, f"{DATA}/valid"), "valid_every": every, "valid_at_start": True}
            values["data"] |= valid
        values["model"] |= _lora(self.options, found)
        return values

    def _fitted(self, config: Config, values: dict[str, Any], processes: int) -> tuple[Config, bool]:
        """Chooses the micro-batch by the memory, and writes it into ``values``. Returns the config, and whether it fits."""
        device = first_device()
        rows = max(1, (config.data.global_batch_size or processes) // processes)
        given = [text.partition("=")[0] for text in self.options.overrides]
        fixed = {key for key in (CHECKPOINT, FSDP) if any(_covers(name, key) for name in given)}
        sizes = recipe.micro_batches(rows, config.data.seq_len, device.type)
        config, enough = fitted(config, sizes, processes, device, fixed)
        values["data"]["micro_bsz"] = config.data.micro_bsz
        if config.model.checkpoint and CHECKPOINT not in fixed:
            values["model"]["checkpoint"] = True
        if config.parallel.zero1.fsdp and FSDP not in fixed:
            values.setdefault("parallel", {}).setdefault("zero1", {})["fsdp"] = True
        return config, enough

    def _comments(self) -> dict[str, str]:
        """Returns comments on what was chosen; none on what was given."""
        given = [text.partition("=")[0] for text in self.options.overrides]
        comments = {
            "data.seq_len": f"tokens of a row; documents have {self.mean:,.0f} on average, and at most {self.longest:,}",
            "data.global_batch_size": f"rows per step; about {self.per_step * self.documents / self.rows:.0f} documents",
            "data.total_steps": f"{_epochs(self.epochs)} of {counted(self.per_epoch, 'step')}",
            "data.split_documents": "documents are not cut at the end of a row",
            "adam.lr": "for adapters" if self.options.lora else "for all weights: the larger, the smaller the model",
        }
        return {key: text for key, text in comments.items() if key not in given}

    def _lines(self, config: Config) -> Iterator[str]:
        cut = f"{self.cut:,} longer documents are cut into pieces" if self.cut else "no document is cut"
        yield (
            f"rows: {self.rows:,} of {self.seq_len:,} tokens, with {self.documents / self.rows:.1f} documents on average, "
            f"{self.padding:.0%} padding; {cut}"
        )
        limit, longest = longest_text(self.found.decoder), min(self.longest, self.seq_len)
        if limit is not None and longest > limit:
            yield (
                f"note: there are documents of {longest:,} tokens in a row, and the model is made for at most {limit:,}: "
                f"--seq-len {limit} cuts them"
            )
        what = f"adapters of rank {self.options.lora}" if self.options.lora else "all weights"
        again = ", layers computed again" if config.model.checkpoint else ""
        data = config.data
        much = f"{_epochs(self.epochs)} = {counted(data.total_steps, 'step')} of {counted(data.global_batch_size or 1, 'row')}"
        yield (
            f"training: {what}, highest learning rate {config.adam.lr:g}, {much}, in micro-batches of {data.micro_bsz}{again}; "
            f"{config.model.dtype}"
        )


def _epochs(number: float) -> str:
    shown = f"{round(number, 1):g}" if number >= 1 else f"{number:.2g}"
    return f"{shown} epoch{'s' * (shown != '1')}"


def _path(run: Path, name: str = "") -> Code:
    """Returns a path in the run folder."""
    return Code(f'f"{{RUN}}/{name}"' if name else "str(RUN)", str(run / name) if name else str(run))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values for which the code in them stands."""
    return {
        key: _plain(value) if isinstance(value, dict) else value.value if isinstance(value, Code) else value
        for key, value in values.items()
    }
