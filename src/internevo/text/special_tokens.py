"""Reads the special tokens of a tokenizer's folder, in all the files in which transformers looks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..storage.jsonfile import read_object

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""The files of a tokenizer's folder that name its special tokens."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The keys of special tokens, in the order in which transformers adds those that the vocabulary does not have."""
END_OF_TEXT = "<|endoftext|>"
MODEL_KEYS = ("model_type", "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id")
"""What a model's ``config.json`` says about its tokenizer: the special tokens, if the tokenizer's files do not name them."""
CLASS_TOKENS: dict[str, tuple[str | None, str]] = {
    "gpt2": (END_OF_TEXT, END_OF_TEXT), "gptneox": (END_OF_TEXT, END_OF_TEXT), "codegen": (END_OF_TEXT, END_OF_TEXT),
    "llama": ("<s>", "</s>"), "codellama": ("<s>", "</s>"), "mistral": ("<s>", "</s>"), "mixtral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<eos>"), "gemma2": ("<bos>", "<eos>"), "gemma3": ("<bos>", "<eos>"), "gemma3text": ("<bos>", "<eos>"),
    "qwen2": (None, END_OF_TEXT), "qwen2moe": (None, END_OF_TEXT), "qwen3": (None, END_OF_TEXT),
    "qwen3moe": (None, END_OF_TEXT), "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
}  # fmt: skip
"""The tokens that begin and end a document, by the tokenizer's class in transformers (or by the model's type), for folders that
do not name them: GPT-2's is one."""


def token_text(token: Any) -> str | None:
    """Returns the text of a token, which is given as text or as an object with the field "content"; None if it is neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings of a tokenizer's folder: ``tokenizer_config.json``, and the tokens of ``special_tokens_map.json``.

    As in transformers, the latter take precedence, unless the former has ``added_tokens_decoder``; then they only add what it
    does not name. A token that is null is named: there is none.
    """
    config, tokens = (read_optional(folder / name) for name in SETTINGS[:2])
    return {**tokens, **config} if "added_tokens_decoder" in config else {**config, **tokens}


def read_optional(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one if the file does not exist."""
    return read_object(path) if path.is_file() else {}


def class_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str | None]:
    """Returns the "bos_token" and "eos_token" of the folder's class of tokenizers, if the class is known."""
    model = read_optional(folder / "config.json")
    name = settings.get("tokenizer_class") or model.get("tokenizer_class") or model.get("model_type")
    kind = str(name).lower().replace("_", "").removesuffix("fast").removesuffix("tokenizer")
    return dict(zip(NAMED, CLASS_TOKENS.get(kind, ()), strict=False))


def model_eos_ids(folder: Path) -> list[int]:
    """Returns the ids that end a text, by the model's ``generation_config.json`` or else its ``config.json``."""
    for name in ("generation_config.json", "config.json"):
        found: Any = read_optional(folder / name).get("eos_token_id")
        if is_ids(found):
            return found if isinstance(found, list) else [found]
    return []


def is_ids(value: Any) -> bool:
    """Whether a value of a model's config is an id, or a list of ids."""
    numbers = value if isinstance(value, list) else [value]
    return bool(numbers) and all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def added_tokens(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yields (id, fields) of each token that the settings add to the vocabulary, in the order in which transformers adds them.

    The fields are those of ``tokenizers.AddedToken``: content, special, lstrip, rstrip, ... The id is None if it is not given.

    Raises:
        UsageError: if an entry is not a token.
    """
    try:
        decoder = {int(number): dict(entry) for number, entry in (settings.get("added_tokens_decoder") or {}).items()}
        if "added_tokens_decoder" not in settings:
            decoder = {int(n): {"content": str(text)} for text, n in read_optional(folder / "added_tokens.json").items()}
        names = [settings.get(key) for key in NAMED]
        names += [value for key, value in settings.items() if key.endswith("_token") and key not in NAMED and token_text(value)]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = settings.get(key) or []
            names += more.values() if isinstance(more, dict) else more
        special = {text: name for name in names if (text := token_text(name))}
        for number, entry in sorted(decoder.items()):
            yield number, {**_flags(entry), "special": bool(entry.get("special")) or entry["content"] in special}
        known = {entry["content"] for entry in decoder.values()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the added tokens in {folder} ({', '.join(SETTINGS)}) cannot be read: {error}") from error
    for text, name in special.items():
        if text not in known:
            yield None, {**(_flags(name) if isinstance(name, dict) else {}), "content": text, "special": True}


def _flags(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a token that ``tokenizers.AddedToken`` has."""
    return {key: entry[key] for key in ("content", "single_word", "lstrip", "rstrip", "normalized") if key in entry}
