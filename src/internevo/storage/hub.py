"""Downloads models and datasets from the Hugging Face Hub into its cache, from which they are read like any folder.

What the hub's own library does holds here, too: ``HF_TOKEN`` is the token, ``HF_HOME`` the folder of the cache, ``HF_ENDPOINT``
another address, and with ``HF_HUB_OFFLINE=1`` only what is in the cache is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..config.hub import may_be_on_hub, split_revision
from ..errors import UsageError

Kind = Literal["model", "dataset"]
DESCRIPTION = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "chat_template.*", "additional_chat_templates/*", "*.tiktoken", "configuration_*.py", "modeling_*.py",
    "tokenization_*.py",
)  # fmt: skip
"""The files of a model without its weights."""
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
OLDER_WEIGHTS = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
"""Weights of models that have no others."""


def model_folder(name: str | Path, weights: bool = True) -> Path:
    """Returns the folder of a model: ``name`` itself, unless it is the name of a model on the hub, which is downloaded.

    Args:
        weights: also download the weights, and not only the config and the tokenizer.

    Raises:
        UsageError: if it cannot be downloaded. The message says what was tried, and what to do.
    """
    if not may_be_on_hub(str(name)):
        return Path(name)
    if not weights:
        return download(str(name), "model", DESCRIPTION)
    folder = download(str(name), "model", (*DESCRIPTION, *WEIGHTS))
    if not any(folder.glob(WEIGHTS[0])):
        folder = download(str(name), "model", (*DESCRIPTION, *OLDER_WEIGHTS))
    if not any(path for pattern in (WEIGHTS[0], OLDER_WEIGHTS[0]) for path in folder.glob(pattern)):
        where = "in the hub's cache, and it cannot be asked for them now" if _offline() else "on the hub"
        raise UsageError(f"the model {name} has no weights {where} (model*.safetensors or pytorch_model*.bin)")
    return folder


def download(name: str, kind: Kind, patterns: tuple[str, ...] | None = None) -> Path:
    """Downloads what is not in the cache yet, and returns the folder.

    Args:
        name: owner/name, or owner/name@revision: of a commit, a tag or a branch.
        patterns: which files; None: all.

    Raises:
        UsageError: if it cannot be downloaded.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            f"{name} is not a path here; if it is a {kind} on the Hugging Face Hub, install the library that downloads it: "
            "pip install huggingface_hub"
        ) from error
    repository, revision = split_revision(name)
    chosen = None if patterns is None else list(patterns)
    try:
        return Path(huggingface_hub.snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=chosen))
    except Exception as error:  # the library raises errors of several other libraries
        tried = f"{name} is not a path here, and the {kind} {name} cannot be had from {_address()}"
        raise UsageError(f"{tried}: {_why(error)}") from error


def _why(error: Exception) -> str:
    """Returns the reason for which something cannot be downloaded, and what to do."""
    from huggingface_hub import errors

    if _offline():
        return "HF_HUB_OFFLINE is set, and it is not in the cache. Unset it once, or copy the folder here and give its path"
    if isinstance(error, errors.GatedRepoError):
        return "its owner asks for consent: give it on its page there, and set HF_TOKEN to your token"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision (what comes after @): give a commit, a tag or a branch"
    if isinstance(error, errors.RepositoryNotFoundError):
        has_token = bool(os.environ.get("HF_TOKEN"))
        token = "your token (HF_TOKEN) may not read it" if has_token else "it is private, and HF_TOKEN is not set"
        return f"there is no such name, or {token}. Correct the name or path, or set HF_TOKEN to a token that may read it"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return f"it answers {status}: {str(error).splitlines()[0]}"
    if isinstance(error, errors.LocalEntryNotFoundError | OSError) or "connect" in str(error).lower():
        return (
            "it cannot be reached, and nothing of this name is in the cache. Check the network (HF_ENDPOINT, HTTPS_PROXY), or "
            "copy the folder here and give its path"
        )
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def _address() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE)
