"""The ``data`` section: where the tokens come from and how many make a step."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from pydantic import model_validator

from .option import REQUIRED, Section, option

LOADER = "the loader is a memory map and one prefetch thread"
Kind = Literal["tokenized", "streaming", "megatron", "mocked", "hf"]
STREAMS = ("streaming", "hf")


class MixturePart(Section):
    """One source of ``data.mixture``. What it leaves out is as in ``data``."""

    folder: str | None = option(None, "Folder of tokenized data, or dataset of a stream; None for mocked data.")
    kind: Kind = option("tokenized", "As data.type.")
    weight: float = option(1.0, "Share of the rows, beside the other parts' weights.", gt=0)
    epochs: float | None = option(
        None,
        "How often it is gone over at most; then its share goes to the others. Whole numbers for streams. None: no end.",
        gt=0,
    )
    name: str | None = option(None, "Under which its losses are reported. None: the folder's name.")
    content_name: str | None = option(None, "As data.content_name.")
    subset_name: str | None = option(None, "As data.subset_name.")
    format: Literal["text", "alpaca", "chat"] | None = option(None, "As data.format.")


class Data(Section):
    """The datasets and the batch. Names and defaults are InternEvo's."""

    type: Kind = option(
        "tokenized",
        "Kind of dataset. tokenized, megatron: folders of .bin files. streaming (and hf): raw files that are tokenized on "
        "the way. mocked: random rows, whatever the folders say.",
    )
    train_folder: str | None = option(
        None,
        "Folder of training data; None: random data. Of a stream: a Hugging Face dataset's folder, or its name (owner/name).",
    )
    mixture: list[MixturePart] | None = option(None, "Several sources in given shares, instead of train_folder.")
    valid_folder: str | None = option(None, "Folder of tokenized validation data; None: none (random when training is).")
    tokenizer_path: str | None = option(
        None, "Tokenizer folder or file: used to write samples and carried into checkpoints and exports."
    )
    seq_len: int = option(REQUIRED, "Length of a row: the longest context a token sees.", unit="tokens", ge=1)
    micro_bsz: int = option(REQUIRED, "Rows of seq_len that go through the model at once.", unit="rows", ge=1)
    micro_num: int = option(1, "Micro-batches per step and data rank.", ge=1)
    global_batch_size: int | None = option(
        None,
        "Rows per step over all ranks. When given, micro_num follows from it and the number of data ranks, so that the "
        "same config trains the same batches on any number of processes.",
        unit="rows",
        ge=1,
    )
    total_steps: int = option(REQUIRED, "Batches to train, skipped ones included.", unit="steps", ge=1)
    seed: int = option(1024, "Seed of the data order, apart from the weights' seed.")
    use_packed_dataset: bool = option(True, "Pack documents into full rows. False: one document per row, padded to seq_len.")
    pack_sample_into_one: bool = option(
        False, "Let tokens see the documents before theirs in the row. False: documents are kept apart."
    )
    min_length: int = option(0, "Shorter training documents are dropped.", unit="tokens", ge=0)
    min_length_dict: dict[str, int] | None = option(None, "Overrides of min_length for files whose path contains the key.")
    skip_batches: str = option("", 'Batch numbers, counted from 0, that are consumed but not trained: "3,10-20".')
    rampup_batch_size: str | None = option(
        None, '"start increment every": micro_num begins at start and grows by increment every so many steps.'
    )
    valid_every: int = option(0, "Steps between evaluations; 0: none.", unit="steps", ge=0)
    valid_micro_num: int | None = option(
        None,
        "Micro-batches between two progress marks of an evaluation.",
        ignored="evaluation goes over every row once",
    )
    valid_max_rows: int | None = option(None, "Evaluate on so many rows at most, per set.", unit="rows", ge=1)
    fixed_random_dataset_seqlen: bool = option(True, "Random documents all have length seq_len.")
    on_change: Literal["stop", "continue"] = option(
        "stop", "On resume with a training set that is not the checkpoint's: stop, or go on at the same number of rows."
    )

    @model_validator(mode="after")
    def _distinct(self) -> Data:
        names = [name_of(part) for part in self.mixture or []]
        if len(set(names)) < len(names):
            raise ValueError(f"data.mixture: two parts are called the same ({', '.join(names)}); give each a name")
        if self.mixture is not None and not self.mixture:
            raise ValueError("data.mixture is empty")
        return self

    @property
    def streams(self) -> int:
        """How many sources are tokenized on the way."""
        training = [part.kind for part in self.mixture] if self.mixture else [self.type]
        validation = [self.type] if self.valid_every and self.folders[1] else []
        return sum(kind in STREAMS for kind in training + validation)

    @property
    def folders(self) -> tuple[str | None, str | None]:
        """The training and validation folders that are read."""
        return (None, None) if self.type == "mocked" else (self.train_folder, self.valid_folder)

    gradient_accumulation: int | None = option(None, "InternEvo's other name of micro_num; must equal it.", ge=1)
    packed_length: int | None = option(None, "Tokens per micro-batch.", ignored="it is seq_len * micro_bsz")
    batch_size: int | None = option(None, "InternEvo's inner name of micro_num.", ignored="it is micro_num")
    empty_cache_and_diag_interval: int = option(50, "Steps between cache clean-ups.", ignored="memory needs no such help")
    diag_outlier_ratio: float = option(1.1, "Slow ranks are reported.", ignored="slow ranks are not diagnosed yet")
    num_worker: int = option(
        4, "Processes of each rank that tokenize a stream (no more than there are cores); 0: a thread does it.", ge=0
    )
    format: Literal["text", "alpaca", "chat"] = option(
        "text", "What a document of a stream is: a text, an Alpaca instruction, or a chat (the tokenizer's template)."
    )
    on_error: Literal["stop", "skip"] = option(
        "stop", "At data that cannot be read: stop, or leave it out, count it in the metrics and name it in the log."
    )
    use_shm: bool = option(False, "Index in shared memory.", ignored=LOADER)
    shm_path: str | None = option(None, "Folder of the shared index.", ignored=LOADER)
    bucket_size: int = option(0, "Loader buckets.", ignored=LOADER)
    content_name: str | None = option(
        None, "Column of a stream's text (None: content, then text) or chat (None: messages, then conversations)."
    )
    subset_name: str | None = option(None, "Folder of a streaming dataset that holds the wanted part.")
    is_multimodal: bool = option(False, "Images beside text.", later="multimodal data")
    image_folder: str | None = option(None, "Folder of images.", later="multimodal data")
    image_size: int | None = option(None, "Size of images.", later="multimodal data")
    patch_size: int | None = option(None, "Size of image patches.", later="multimodal data")
    unit_schedule_size: int | None = option(None, "ZeroPP's schedule unit.", later="ZeroPP schedules")


def name_of(part: MixturePart) -> str:
    """Under which a part's losses are reported."""
    return part.name or (PurePath(part.folder).name if part.folder else part.kind)
