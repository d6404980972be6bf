"""References: InternLM, InternLM2 and Baichuan2, which transformers does not have, and attention by its definition.

They are written from the published descriptions, for tensors with their names on disk, and share no code with the package. They
use dense masks, full logits and fp32, and compute one token after the other where that is clearer.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps))


def rotate(x: Tensor, base: float) -> Tensor:
    """The rotary embedding of x [heads, length, size], half-split."""
    _, length, size = x.shape
    out = torch.empty_like(x)
    half = size // 2
    for i in range(half):
        angle = torch.arange(length) * base ** (-2 * i / size)
        a, b = x[:, :, i], x[:, :, i + half]
        out[:, :, i] = a * angle.cos() - b * angle.sin()
        out[:, :, i + half] = b * angle.cos() + a * angle.sin()
    return out


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes, as its authors' code computes them."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return power_of_two(closest) + slopes(2 * closest)[0::2][: heads - closest]


def attend(q: Tensor, k: Tensor, v: Tensor, alibi: bool) -> Tensor:
    """Attention of one document: q, k and v [heads, length, size] -> [length, heads * size]."""
    heads, length, size = q.shape
    group = heads // k.shape[0]
    out = []
    for h in range(heads):
        scores = q[h] @ k[h // group].T / math.sqrt(size)
        if alibi:
            scores = scores + slopes(heads)[h] * (torch.arange(length) - torch.arange(length)[:, None])
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        out.append(scores.softmax(-1) @ v[h // group])
    return torch.cat(out, dim=-1)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: list[int], window: int, slopes: Tensor | None, softcap: float = 0.0
) -> Tensor:
    """Attention by its definition, for one document after the other, with a score for each pair of tokens.

    Args:
        q: [1, T, H, N].
        k, v: [1, T, K, N].
        boundaries: where the documents begin and end.
        slopes: ALiBi's slopes [H].
        softcap: the cap of the scores; 0: none.
    """
    out = torch.zeros_like(q)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    for a, b in itertools.pairwise(boundaries):
        distance = torch.arange(b - a).unsqueeze(1) - torch.arange(b - a)
        scores = torch.einsum("qhn,khn->hqk", q[0, a:b], k[0, a:b]) / q.shape[3] ** 0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes.to(q.dtype).view(-1, 1, 1) * distance
        visible = (distance >= 0) & (distance < (window or b - a))
        out[0, a:b] = torch.einsum("hqk,khn->qhn", scores.masked_fill(~visible, -torch.inf).softmax(-1), v[0, a:b])
    return out


def linear(disk: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, disk[f"{name}.weight"], disk.get(f"{name}.bias"))


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def internlm(disk: dict[str, Tensor], config: dict[str, Any], tokens: Tensor) -> Tensor:
    """InternLM: returns the logits of one document."""
    x, n, eps = disk["model.embed_tokens.weight"][tokens], config["num_attention_heads"], config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = rms(x, disk[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (heads_of(linear(disk, f"{at}.self_attn.{p}_proj", y), n) for p in "qkv")
        base = config["rotary"]["base"]
        longest, size = config["max_position_embeddings"], q.shape[-1]
        if config["rotary"]["type"] == "dynamic" and len(tokens) > longest:
            base = base * (len(tokens) / longest) ** (size / (size - 2))
        x = x + linear(disk, f"{at}.self_attn.o_proj", attend(rotate(q, base), rotate(k, base), v, alibi=False))
        y = rms(x, disk[f"{at}.post_attention_layernorm.weight"], eps)
        y = F.silu(linear(disk, f"{at}.mlp.gate_proj", y)) * linear(disk, f"{at}.mlp.up_proj", y)
        x = x + linear(disk, f"{at}.mlp.down_proj", y)
    return rms(x, disk["model.norm.weight"], eps) @ disk["lm_head.weight"].T


def internlm2(disk: dict[str, Tensor], config: dict[str, Any], tokens: Tensor) -> Tensor:
    """InternLM2: returns the logits of one document. The rows of wqkv are, for each key/value head: queries, key, value."""
    x, groups, eps = disk["model.tok_embeddings.weight"][tokens], config["num_key_value_heads"], config["rms_norm_eps"]
    per_group = config["num_attention_heads"] // groups
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = rms(x, disk[f"{at}.attention_norm.weight"], eps)
        qkv = linear(disk, f"{at}.attention.wqkv", y).view(len(tokens), groups, per_group + 2, -1)
        q = torch.stack([qkv[:, g, j] for g in range(groups) for j in range(per_group)])
        k = torch.stack([qkv[:, g, per_group] for g in range(groups)])
        v = torch.stack([qkv[:, g, per_group + 1] for g in range(groups)])
        base = config["rope_theta"]
        x = x + linear(disk, f"{at}.attention.wo", attend(rotate(q, base), rotate(k, base), v, alibi=False))
        y = rms(x, disk[f"{at}.ffn_norm.weight"], eps)
        y = F.silu(linear(disk, f"{at}.feed_forward.w1", y)) * linear(disk, f"{at}.feed_forward.w3", y)
        x = x + linear(disk, f"{at}.feed_forward.w2", y)
    return rms(x, disk["model.norm.weight"], eps) @ disk["output.weight"].T


def baichuan2(disk: dict[str, Tensor], config: dict[str, Any], tokens: Tensor) -> Tensor:
    """Baichuan2: returns the logits of one document. The rows of W_pack are all queries, all keys, all values; each row of the
    head is divided by its norm."""
    x, n, eps = disk["model.embed_tokens.weight"][tokens], config["num_attention_heads"], config["rms_norm_eps"]
    alibi = "max_position_embeddings" not in config
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = rms(x, disk[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (heads_of(part, n) for part in linear(disk, f"{at}.self_attn.W_pack", y).chunk(3, dim=-1))
        if not alibi:
            q, k = rotate(q, 10000.0), rotate(k, 10000.0)
        x = x + linear(disk, f"{at}.self_attn.o_proj", attend(q, k, v, alibi))
        y = rms(x, disk[f"{at}.post_attention_layernorm.weight"], eps)
        y = F.silu(linear(disk, f"{at}.mlp.gate_proj", y)) * linear(disk, f"{at}.mlp.up_proj", y)
        x = x + linear(disk, f"{at}.mlp.down_proj", y)
    head = disk["lm_head.weight"]
    head = head / head.pow(2).sum(1, keepdim=True).sqrt()
    return rms(x, disk["model.norm.weight"], eps) @ head.T


REFERENCES = {"INTERNLM": internlm, "INTERNLM2": internlm2, "BAICHUAN2": baichuan2}


def random_folder(family: str, draw: Callable[[list[Any]], Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns a random ``config.json`` and random tensors of a family. ``draw(values)`` returns one of the values."""
    kv = draw([1, 2, 3]) if family == "INTERNLM2" else draw([2, 4, 6])
    heads = kv * draw([1, 2]) if family == "INTERNLM2" else kv
    size, layers, width, vocab = draw([4, 8]), draw([1, 2]), draw([17, 40]), draw([67, 128])
    hidden = heads * size
    config = {
        "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "vocab_size": vocab, "rms_norm_eps": draw([1e-3, 1e-6]), "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    bias = draw([True, False])
    shapes: dict[str, tuple[int, ...]] = {}
    if family == "INTERNLM":
        rotary = {"base": draw([100, 10000]), "type": draw(["dynamic", "origin"])}
        config |= {"model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": bias,
                   "max_position_embeddings": 8, "rotary": rotary}  # fmt: skip
    elif family == "INTERNLM2":
        config |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": bias,
                   "num_key_value_heads": kv, "max_position_embeddings": 64, "rope_theta": draw([100.0, 1e6])}  # fmt: skip
    else:
        longest = draw(["max_position_embeddings", "model_max_length"])
        config |= {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], longest: 64}
        if longest == "max_position_embeddings":
            config["model_max_length"] = 64
    for n in range(layers):
        at = f"model.layers.{n}"
        if family == "INTERNLM2":
            norms, mlp = (
                ("attention_norm", "ffn_norm"),
                {"w1": "feed_forward.w1", "w3": "feed_forward.w3", "w2": "feed_forward.w2"},
            )
            attention = {"attention.wqkv": ((heads + 2 * kv) * size, hidden), "attention.wo": (hidden, hidden)}
        else:
            norms = ("input_layernorm", "post_attention_layernorm")
            mlp = {"w1": "mlp.gate_proj", "w3": "mlp.up_proj", "w2": "mlp.down_proj"}
            packed = {"self_attn.W_pack": (3 * hidden, hidden)}
            apart = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkv"}
            attention = {**(packed if family == "BAICHUAN2" else apart), "self_attn.o_proj": (hidden, hidden)}
        shapes |= {f"{at}.{name}.weight": (hidden,) for name in norms}
        shapes |= {f"{at}.{name}.weight": shape for name, shape in attention.items()}
        if bias and family != "BAICHUAN2":
            shapes |= {f"{at}.{name}.bias": shape[:1] for name, shape in attention.items()}
        shapes |= {f"{at}.{mlp[p]}.weight": (hidden, width) if p == "w2" else (width, hidden) for p in mlp}
    embed, head = ("model.tok_embeddings", "output") if family == "INTERNLM2" else ("model.embed_tokens", "lm_head")
    shapes |= {f"{embed}.weight": (vocab, hidden), f"{head}.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape) * (0.2 if len(shape) == 1 else 0.1)
        tensors[name] = tensor + 1 if "norm" in name else tensor
    return config, tensors


def assert_close_to_scale(mine: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    """Compares tensors; the tolerance is relative to the largest element of the reference if that is greater than 1."""
    mine, reference = mine.detach(), reference.detach()
    error, scale = (mine - reference).abs().max(), max(1.0, float(reference.abs().max()))
    assert error <= tolerance * scale, f"differs by {error} at a scale of {scale}"
