"""What a decoder is, as one frozen value. Families make it from a config section or from a Hugging Face config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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
    rope: Rope = Rope()
    max_position_embeddings: int = 2048
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """The inverse of ``to_dict``."""
        return cls(**{**values, "rope": Rope(**values["rope"])})

    def parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        d, heads, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = d * (heads + 2 * kv) + heads * d + self.qkv_bias * (heads + 2 * kv) + self.o_bias * d
        mlp = 3 * d * self.intermediate_size + self.mlp_bias * (2 * self.intermediate_size + d)
        ends = self.vocab_size * d * (1 if self.tie_embeddings else 2) + d
        return self.num_layers * (attention + mlp + 2 * d) + ends

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs of one token in a row of ``seq_len``: 6 per matrix weight, and 6 * heads * seq_len per layer for
        causal attention (half of the full square; PaLM, https://arxiv.org/abs/2204.02311, appendix B)."""
        matrices = self.parameters() - (0 if self.tie_embeddings else self.vocab_size * self.hidden_size)
        return 6.0 * matrices + 6.0 * self.num_layers * self.num_heads * self.head_dim * seq_len
