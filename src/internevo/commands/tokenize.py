"""``internevo tokenize``: checks the options, shows a progress bar, and prints a summary."""

from __future__ import annotations

from pathlib import Path

from ..config.data import TEMPLATE_DATE
from ..data.encoding.encode import OnError
from ..data.encoding.formats import FormatName
from ..data.encoding.tokenize import tokenize
from ..errors import UsageError
from ..wording import counted
from .progress import progress_bar


def run(
    inputs: list[Path],
    output: Path,
    *,
    tokenizer: Path | None,
    train_tokenizer: str | None,
    vocab_size: int | None,
    format: str | None,
    text_key: str | None,
    pattern: str | None,
    exclude: tuple[str, ...],
    dataset_type: str,
    valid_ratio: float,
    workers: int | None,
    overwrite: bool,
    on_error: OnError,
    template_date: str | None,
) -> None:
    """Tokenizes ``inputs`` into ``output``, and prints how many documents and tokens were written.

    Raises:
        UsageError: if the options do not go together.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise UsageError("give either --tokenizer PATH or --train-tokenizer bpe --vocab-size N")
    if train_tokenizer and vocab_size is None:
        raise UsageError("--train-tokenizer needs --vocab-size")
    document_format: FormatName = format if format in ("alpaca", "chat") else "text"  # type: ignore[assignment]
    kind = None if format in ("alpaca", "chat") else format
    with progress_bar("tokenizing") as (progress, status):
        result = tokenize(
            inputs, output, tokenizer=tokenizer, train_vocab_size=vocab_size if train_tokenizer else None, kind=kind,
            format=document_format, on_error=on_error, template_date=template_date or TEMPLATE_DATE,
            text_key=text_key, pattern=pattern, exclude=exclude, dataset_type=dataset_type, valid_ratio=valid_ratio,
            workers=workers, overwrite=overwrite, status=status, progress=progress,
        )  # fmt: skip
    documents, tokens = counted(result.documents, "document"), counted(result.tokens, "token")
    print(f"{output}: {documents}, {tokens}, vocabulary {result.vocab_size:,}")
    if valid_ratio:
        documents, tokens = counted(result.valid_documents, "document"), counted(result.valid_tokens, "token")
        print(f"for validation: {documents}, {tokens}")
    if result.skipped:
        print(f"left out: {counted(result.skipped, 'document')} that cannot be read (see the messages above)")
    if result.empty:
        print(f"left out: {counted(result.empty, 'empty document')}")
