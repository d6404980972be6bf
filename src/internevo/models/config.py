"""What a decoder is, as one frozen value. Families make it from a config section or from a Hugging Face config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base and scaling (names as in Hugging Face's ``rope_parameters``)."""

    base: float = 10000.0
    kind: str = "default"
    """default, linear, dynamic, llama3 or yarn."""
    factor: float = 1.0
    options: dict[str, float] = field(default_factory=dict)
    """The kind's other numbers: low_freq_factor, beta_fast, attention_factor, ..."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP (https://arxiv.org/abs/2006.16668)."""

    count: int
    top_k: int
    size: int
    """Width of an expert."""
    normalize: bool = True
    """The chosen experts' weights add up to 1; otherwise they are their probabilities among all."""
    shared_size: int = 0
    """Width of the expert that sees every token, behind a sigmoid gate; 0: none."""
    dense_layers: tuple[int, ...] = ()
    """Layers with a plain MLP."""
    capacity_factor: float = 0.0
    """Tokens that an expert takes, over its even share; 0: all that choose it (dropless)."""
    eval_capacity_factor: float = 0.0
    min_capacity: int = 4
    drop_policy: str = "position"
    """Who is left out of a full expert: the last in the batch ("position") or the least likely ("probs")."""

    def dropless(self) -> Experts:
        """The same experts, which take all that choose them."""
        return replace(self, capacity_factor=0.0, eval_capacity_factor=0.0, min_capacity=4, drop_policy="position")


@dataclass(frozen=True)
class Lora:
    """Adapters beside the linears of every layer (``models.lora``)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of linears: q, k, v, o, gate, up, down."""


@dataclass(frozen=True)
class Stage:
    """The part of a decoder that one rank builds; without a pipeline, all of it."""

    layers: range
    """Numbers of its layers."""
    embeds: bool = True
    """It begins with the embedding."""
    heads: bool = True
    """It ends with the norm and the head."""


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and the few choices that families differ in."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope: Rope | None = Rope()
    """None: attention with linear biases (ALiBi)."""
    max_position_embeddings: int = 2048
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    activation: str = "silu"
    """Of the MLP's gate: silu or gelu_tanh."""
    norm_unit_offset: bool = False
    """Norms multiply by 1 + weight."""
    qk_norm: bool = False
    """Queries and keys are normed, head by head, before they are turned."""
    scale_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    norm_head: bool = False
    """The head's rows have length 1."""
    windows: tuple[int, ...] = ()
    """Tokens that each layer looks back, itself included; 0: all. Empty: all in every layer."""
    experts: Experts | None = None
    lora: Lora | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """The inverse of ``to_dict``, also when it has been through JSON."""
        rope, experts = values["rope"], values.get("experts")
        if experts:
            experts = Experts(**{**experts, "dense_layers": tuple(experts["dense_layers"])})
        lora = values.get("lora")
        lora = lora and Lora(**{**lora, "targets": tuple(lora["targets"])})
        windows = tuple(values.get("windows", ()))
        return cls(**{**values, "rope": rope and Rope(**rope), "experts": experts, "windows": windows, "lora": lora})

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def window(self, layer: int) -> int:
        """How far a layer looks back; 0: to the beginning."""
        return self.windows[layer] if self.windows else 0

    def parameters(self, active: bool = False) -> int:
        """Number of parameters; a tied head counts once. ``active``: of those that one token meets."""
        d, heads, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = d * (heads + 2 * kv) + heads * d + self.qkv_bias * (heads + 2 * kv) + self.o_bias * d
        attention += 2 * self.head_dim * self.qk_norm
        mlp = 3 * d * self.intermediate_size + self.mlp_bias * (2 * self.intermediate_size + d)
        total = self.vocab_size * d * (1 if self.tie_embeddings else 2) + d
        for layer in range(self.num_layers):
            total += attention + 2 * d
            if self.experts is not None and self.is_sparse(layer):
                e = self.experts
                total += 3 * d * e.size * (e.top_k if active else e.count) + d * e.count
                total += (3 * d * e.shared_size + d) if e.shared_size else 0
            else:
                total += mlp
        return total

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs of one token in a row of ``seq_len``: 6 per matrix weight that it meets, and 12 * heads * head size
        per layer for each token that it looks back to, on average (PaLM, https://arxiv.org/abs/2204.02311, appendix B).
        Beside adapters the weights get no gradients: 4 per weight."""
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        seen = 0.0
        for layer in range(self.num_layers):
            width = min(self.window(layer) or seq_len, seq_len)
            seen += width - width * width / (2 * seq_len)
        per_weight = 6.0 if self.lora is None else 4.0
        return per_weight * (self.parameters(active=True) - embedding) + 12.0 * self.num_heads * self.head_dim * seen
