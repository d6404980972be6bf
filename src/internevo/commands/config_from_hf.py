"""``internevo config --from-hf``: writes a config that trains a Hugging Face model, for people to change."""

from __future__ import annotations

import json
from pathlib import Path

from ..config.write import readable
from ..models.config import DecoderConfig
from ..train import recipe
from ..train.config import HfModel
from ..wording import counted


def from_hf(name: str) -> str:
    """Returns the text of a Python config that starts from the Hugging Face model ``name``, a folder or a name on the hub.

    Raises:
        UsageError: if it is not a model that can be read.
    """
    found = HfModel.find({"model": {"from_hf": name}}, "--from-hf")
    found.shape()
    decoder, place = found.decoder, str(found.folder.resolve()) if found.folder == Path(name).expanduser() else name
    lr = recipe.learning_rate(decoder.parameters(), adapters=False)
    values = {
        "JOB_NAME": Path(name).name,
        "model": {"from_hf": place, "dtype": f"torch.{found.dtype or 'bfloat16'}"},
        "data": {
            "train_folder": None, "seq_len": recipe.row_length(2048, 0, decoder.max_position_embeddings), "micro_bsz": 1,
            "micro_num": 8, "total_steps": 1000,
        },
        "adam": {"lr": lr, "weight_decay": 0.01},
        "lr_scheduler": {"warmup_ratio": 0.03, "eta_min": lr / 10},
        "hybrid_zero_optimizer": {"clip_grad_norm": 1.0},
        "ckpt": {"checkpoint_every": 200, "keep_last": 2},
    }  # fmt: skip
    tokenize = f"internevo tokenize INPUT... --tokenizer {json.dumps(place)} --output FOLDER"
    comments = {
        "model.from_hf": "the shape, the tokenizer and the weights",
        "data.train_folder": f"None: random data; or the FOLDER of: {tokenize}",
        "data.seq_len": "tokens of a row",
        "data.micro_num": "micro-batches per step on each rank",
    }
    return readable(values, comments, f"Written by internevo config --from-hf {name}\n{describe(decoder)}")


def describe(decoder: DecoderConfig) -> str:
    """Describes the shape of a model in a line."""
    heads = f"{counted(decoder.num_heads, 'head')} ({decoder.num_kv_heads} for keys and values)"
    moe = decoder.experts
    mlp = f"{counted(moe.count, 'expert')} of width {moe.size}" if moe else f"MLPs of width {decoder.intermediate_size}"
    rope = f"rotary base {decoder.rope.base:g}" if decoder.rope else "ALiBi"
    scaling = f" ({decoder.rope.kind})" if decoder.rope and decoder.rope.kind != "default" else ""
    tied = ", tied embedding" if decoder.tie_embeddings else ""
    return (
        f"{decoder.summary()}: {counted(decoder.num_layers, 'layer')} of width {decoder.hidden_size}, "
        f"{heads}, {mlp}, vocabulary {decoder.vocab_size}, {rope}{scaling}, epsilon {decoder.norm_eps:g}{tied}"
    )
