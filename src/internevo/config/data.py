"""The ``data`` section: where the tokens come from, and how many of them a step has."""

from __future__ import annotations

import datetime
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from .option import MAX_SIZE, REQUIRED, PathText, Section, option

LOADER = "data is read through a memory map and by one prefetch thread"
Kind = Literal["tokenized", "streaming", "megatron", "mocked", "hf"]
STREAMS = ("streaming", "hf")
TEMPLATE_DATE = "2024-07-26"
"""Today, for chat templates in training data. Llama's templates have the same date where they are not told another."""


def is_date(text: str) -> bool:
    """Whether a text is a date in the form YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _date(text: str) -> str:
    if not is_date(text):
        raise ValueError(f'must be a date, as in "{TEMPLATE_DATE}"')
    return text


class MixturePart(Section):
    """One source of ``data.mixture``. If content_name, subset_name or format is None, the value in ``data`` is used."""

    folder: PathText | None = option(
        None, "Folder of tokenized data, or folder or name of a streaming dataset; mocked data needs none."
    )
    kind: Kind = option("tokenized", "Kind of data; the values are those of data.type.")
    weight: float = option(
        1.0, "Weight of this source: its share of the rows is its weight divided by the sum of all weights.", gt=0
    )
    epochs: float | None = option(
        None,
        "Maximum number of passes over this source; afterwards the other sources get its share. A stream needs a whole number. "
        "None: no maximum.",
        gt=0,
    )
    name: str | None = option(None, "Name under which the losses of this source are reported. None: the folder's name.")
    content_name: str | None = option(None, "The same as data.content_name, for this source.")
    subset_name: str | None = option(None, "The same as data.subset_name, for this source.")
    format: Literal["text", "alpaca", "chat"] | None = option(None, "The same as data.format, for this source.")


class Data(Section):
    """The datasets and the batch size. Names and defaults are InternEvo's."""

    type: Kind = option(
        "tokenized",
        "Kind of data. tokenized or megatron: folders of tokenized .bin files. streaming or hf: raw files that are tokenized "
        "during training. mocked: random rows; the folders are not read.",
    )
    train_folder: PathText | None = option(
        None,
        "Folder of the training data. For streaming: the folder of a Hugging Face dataset, or its name on the Hub "
        "(owner/name). None: random data.",
        unless="data.mixture",
    )
    mixture: list[MixturePart] | None = option(None, "Several sources and their weights, used in place of train_folder.")
    valid_folder: PathText | None = option(
        None,
        "Folder of the validation data. None: no evaluation, or random data if the training data is random.",
        needs="data.valid_every",
    )
    tokenizer_path: PathText | None = option(
        None,
        "Folder or file of the tokenizer. It tokenizes streams, writes samples, and is copied into checkpoints and exports.",
    )
    seq_len: int = option(REQUIRED, "Length of a row, and so the longest context of a token.", unit="tokens", ge=1, le=MAX_SIZE)
    micro_bsz: int = option(
        REQUIRED, "Rows of a micro-batch, which go through the model at once.", unit="rows", ge=1, le=MAX_SIZE
    )
    micro_num: int = option(1, "Micro-batches per step on each data rank.", ge=1, le=MAX_SIZE, unless="data.global_batch_size")
    global_batch_size: int | None = option(
        None,
        "Rows per step over all ranks. If it is set, micro_num is computed from it and from the number of data ranks, so that "
        "the same config trains on the same batches with any number of processes.",
        unit="rows",
        ge=1,
        le=MAX_SIZE,
    )
    total_steps: int = option(REQUIRED, "Number of batches to train on, including skipped batches.", unit="steps", ge=1)
    seed: int = option(1024, "Seed of the order of the data; the top-level seed is the seed of the initial weights.", ge=0)
    use_packed_dataset: bool = option(
        True, "Pack several documents into each row. False: each row has one document and is padded to seq_len."
    )
    pack_sample_into_one: bool = option(
        False, "Let tokens attend to earlier documents in their row. False: only to tokens of their own document."
    )
    split_documents: bool = option(
        True,
        "With use_packed_dataset: a document that does not fit into the rest of a row continues in the next one. False: it "
        "begins the next row, and the rest is padding; only documents longer than seq_len are split.",
    )
    min_length: int = option(0, "Training documents that are shorter than this are dropped.", unit="tokens", ge=0)
    min_length_dict: dict[str, Annotated[int, Field(ge=0)]] | None = option(
        None, "Minimum lengths that replace min_length for some files: a part of the file's path -> minimum length."
    )
    skip_batches: str = option(
        "", 'Numbers of batches, from 0, that are drawn from the data but not trained on, for example "3,10-20".'
    )
    rampup_batch_size: str | None = option(
        None,
        'Batch size ramp-up, as "start increment every": micro_num starts at "start" and grows by "increment" after each '
        '"every" steps, up to its final value. If global_batch_size is set, start and increment are rows of the global batch, '
        "so that the batches do not depend on the number of processes.",
    )
    valid_every: int = option(0, "Number of steps between evaluations; 0: no evaluation.", unit="steps", ge=0)
    valid_at_start: bool = option(
        False, "Also evaluate before the first step, which shows what the training changes.", needs="data.valid_every"
    )
    valid_micro_num: int | None = option(
        None, "Micro-batches of a validation batch in InternEvo.", ignored="an evaluation uses every row once"
    )
    valid_max_rows: int | None = option(
        None, "Maximum number of rows to evaluate on, for each validation set. None: all.", unit="rows", ge=1
    )
    fixed_random_dataset_seqlen: bool = option(
        True, "All documents of random data have seq_len tokens. False: their lengths are random."
    )
    on_change: Literal["stop", "continue"] = option(
        "stop",
        "What to do if a run resumes from a checkpoint of different training data. stop: end with an error. continue: go on "
        "where it was in what is the same (parts of a mixture, the documents of a stream); in other tokenized data after the "
        "same number of rows; in other streams at the next epoch.",
    )

    @model_validator(mode="after")
    def _distinct(self) -> Data:
        names = [name_of(part) for part in self.mixture or []]
        if len(set(names)) < len(names):
            raise ValueError(f"data.mixture: two parts have the same name ({', '.join(names)}); give each its own name")
        if self.mixture is not None and not self.mixture:
            raise ValueError("data.mixture is empty")
        return self

    @property
    def streams(self) -> int:
        """How many sources, for training and evaluation, are streams."""
        training = [part.kind for part in self.mixture] if self.mixture else [self.type]
        validation = [self.type] if self.valid_every and self.folders[1] else []
        return sum(kind in STREAMS for kind in training + validation)

    @property
    def folders(self) -> tuple[str | None, str | None]:
        """The folders of training and validation data that the run reads; None for random data."""
        return (None, None) if self.type == "mocked" else (self.train_folder, self.valid_folder)

    gradient_accumulation: int | None = option(
        None, "InternEvo's other name for micro_num. If both are set, they must be equal.", ge=1, le=MAX_SIZE
    )
    packed_length: int | None = option(None, "Tokens per micro-batch.", ignored="it is always seq_len * micro_bsz")
    batch_size: int | None = option(None, "InternEvo's internal name for micro_num.", ignored="micro_num is used")
    empty_cache_and_diag_interval: int = option(
        50, "Steps between clearings of PyTorch's memory cache.", ignored="the cache need not be cleared"
    )
    diag_outlier_ratio: float = option(
        1.1, "How much slower than the others a rank must be to be reported.", ignored="slow ranks are not reported yet"
    )
    num_worker: int = option(
        4, "Processes on each rank that tokenize a stream (at most one per core). 0: a thread tokenizes.", ge=0
    )
    format: Literal["text", "alpaca", "chat"] = option(
        "text",
        "What a document of a stream is: a text, an instruction in Alpaca's form, or a chat, to which the tokenizer's chat "
        "template is applied.",
    )
    template_date: Annotated[str, AfterValidator(_date)] = option(
        TEMPLATE_DATE,
        "The date (YYYY-MM-DD) that a chat template takes for today (strftime_now) in a stream of chats. It is fixed, so that "
        "the same data gives the same tokens on any day.",
    )
    on_error: Literal["stop", "skip"] = option(
        "stop",
        "What to do with data that cannot be read. stop: end with an error. skip: leave it out, count it in the metrics and "
        "name it in the log.",
    )
    use_shm: bool = option(False, "Keep the index in shared memory.", ignored=LOADER)
    shm_path: str | None = option(None, "Folder of the index in shared memory.", ignored=LOADER)
    bucket_size: int = option(0, "Size of the loader's buckets.", ignored=LOADER)
    content_name: str | None = option(
        None,
        "Column of a stream that has the text (None: content, or else text) or the chat (None: messages, or else "
        "conversations).",
    )
    subset_name: str | None = option(None, "Sub-folder of a streaming dataset to read. None: the whole dataset.")
    is_multimodal: bool = option(False, "Train on images and text.", not_available="multimodal data")
    image_folder: str | None = option(None, "Folder of images.", not_available="multimodal data")
    image_size: int | None = option(None, "Size of the images.", not_available="multimodal data")
    patch_size: int | None = option(None, "Size of the image patches.", not_available="multimodal data")
    unit_schedule_size: int | None = option(None, "Unit of ZeroPP's schedule.", not_available="ZeroPP schedules")


def name_of(part: MixturePart) -> str:
    """Returns the name under which a part's losses are reported."""
    return part.name or (PurePath(part.folder).name if part.folder else part.kind)
