"""The shape of a decoder, as one value. A family makes it from a config's ``model`` section or from a Hugging Face config."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class Rope:
    """The base and the scaling of the rotary embedding, with the names of Hugging Face's ``rope_parameters``."""

    base: float = 10000.0
    kind: str = "default"
    """The kind of scaling: default (none), linear, dynamic, llama3, yarn or longrope."""
    factor: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    """Other numbers that the kind needs: low_freq_factor, beta_fast, attention_factor, ...; short_factor is a list of them."""
    share: float = 1.0
    """The share of a head that rotates, from its beginning; the rest has no position."""
    interleaved: bool = False
    """Whether neighbours form the pairs that rotate, and not elements that are half of the rotated size apart."""

    def size(self, head_dim: int) -> int:
        """Returns how many elements of a head rotate."""
        return int(head_dim * self.share)

    @property
    def latent_scale(self) -> float:
        """With latent attention: the factor of scores with which YaRN's ``mscale_all_dim`` makes up for the factor."""
        weight = self.options.get("mscale_all_dim")
        return (0.1 * weight * math.log(self.factor) + 1.0) ** 2 if self.kind == "yarn" and weight else 1.0

    @property
    def needs_length(self) -> bool:
        """Whether the angles depend on the decoder's ``max_position_embeddings``."""
        has_length = "original_max_position_embeddings" in self.options
        without_factor = self.kind == "longrope" and self.factor == 1.0 and "attention_factor" not in self.options
        return self.kind == "dynamic" or (self.kind in ("llama3", "yarn") and not has_length) or without_factor


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP (https://arxiv.org/abs/2006.16668)."""

    count: int
    """Number of experts in a layer."""
    top_k: int
    """Number of experts that each token chooses."""
    size: int
    """Width of an expert."""
    normalize: bool = True
    """Whether the weights of a token's experts are divided by their sum. Otherwise they are the router's probabilities."""
    shared_size: int = 0
    """Width of the shared expert, which sees every token; 0: there is none."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers that have an MLP in place of experts."""
    capacity_factor: float = 0.0
    """Capacity in training: the maximum number of tokens that an expert takes, divided by the number if all experts took the
    same. 0: no maximum (dropless)."""
    eval_capacity_factor: float = 0.0
    """The same in evaluation and generation."""
    min_capacity: int = 4
    """Smallest capacity, in tokens."""
    drop_policy: str = "position"
    """The tokens that a full expert drops: the last in the batch ("position"), or those with the smallest probability
    ("probs")."""
    balance_bias: bool = False
    """Whether each router has a bias per expert, which is added to the probabilities for the choice only
    (https://arxiv.org/abs/2408.15664)."""
    scoring: str = "softmax"
    """How the router makes scores of its logits: softmax, or sigmoid."""
    groups: int = 1
    """A token chooses among the experts of ``top_groups`` of this many groups: those with the largest score. The score of a
    group is the largest of its experts (softmax; https://arxiv.org/abs/2405.04434, section 2.2.2), or the sum of the two
    largest, with the balance bias (sigmoid; https://arxiv.org/abs/2412.19437, section 2.1.2)."""
    top_groups: int = 1
    scale: float = 1.0
    """The weights of a token's experts are multiplied by this."""
    shared_gate: bool = True
    """Whether the output of the shared expert is multiplied by a sigmoid gate."""

    def dropless(self) -> Experts:
        """Returns the same experts without a capacity."""
        return replace(self, capacity_factor=0.0, eval_capacity_factor=0.0, min_capacity=4, drop_policy="position")

    def without_bias(self) -> Experts:
        """Returns the same experts without a balance bias."""
        return replace(self, balance_bias=False)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (https://arxiv.org/abs/2405.04434, section 2.1): keys and values of all heads are computed
    from a small vector, the latent. The first ``plain_dim`` elements of a head's queries and keys have no position; the other
    ``rotary_dim`` rotate, and those of the keys are the same in all heads."""

    rank: int
    """Size of the latent of keys and values."""
    query_rank: int
    """Size of the latent of queries; 0: queries are computed from the residual stream."""
    plain_dim: int
    rotary_dim: int
    value_dim: int
    """Size of a head's values, at most that of its keys."""


class Projection(NamedTuple):
    """A linear of attention."""

    outputs: int
    inputs: int
    heads: int | None
    """The dimension of its weight [outputs, inputs] along which the heads are; None: neither."""


@dataclass(frozen=True)
class Lora:
    """LoRA adapters of linears in every layer (``models.lora``)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """The linears that have an adapter: some of q, k, v, o, gate, up, down."""


@dataclass(frozen=True)
class Stage:
    """The part of a decoder that one pipeline rank builds. Without a pipeline it is the whole decoder."""

    layers: range
    """The numbers of its layers."""
    embeds: bool = True
    """Whether it begins with the embedding."""
    heads: bool = True
    """Whether it ends with the norm and the head."""

    def has(self, parameter: str) -> bool:
        """Returns whether it has a parameter, by its name in the whole decoder. (A tied head is the embedding's weight.)"""
        part, _, rest = parameter.partition(".")
        if part == "layers":
            return int(rest.partition(".")[0]) in self.layers
        return self.embeds if part == "embed" else self.heads


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, and the options in which families differ."""

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
    """The rotary embedding. None: attention with linear biases (ALiBi)."""
    window_rope: Rope | None = None
    """The rotary embedding of layers with a window, where it is another one."""
    layers_without_rope: tuple[int, ...] = ()
    """Numbers of the layers whose queries and keys do not rotate: their attention knows no positions but what is before a token
    (NoPE, https://arxiv.org/abs/2305.19466)."""
    max_position_embeddings: int = 2048
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    activation: str = "silu"
    """The activation of the MLP's gate: silu or gelu_tanh."""
    norm_unit_offset: bool = False
    """Norms multiply by 1 + weight in place of weight."""
    qk_norm: bool = False
    """Each head's queries and keys go through a norm before the rotary embedding."""
    out_norms: bool = False
    """The outputs of attention and of the MLP go through a norm before they are added to the residual stream."""
    scale_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    embedding_multiplier: float = 1.0
    """Embeddings are multiplied by this, too."""
    residual_multiplier: float = 1.0
    """The outputs of attention and of the MLP are multiplied by this before they are added to the residual stream."""
    query_scale: float = 1.0
    """Queries are multiplied by this, besides 1 / sqrt(head_dim)."""
    attention_multiplier: float | None = None
    """Scores of attention are multiplied by this, and not by ``query_scale`` / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    """c > 0: scores s of attention become c * tanh(s / c). 0: they stay as they are."""
    logit_softcap: float = 0.0
    """The same for the logits of the head."""
    logits_scaling: float = 1.0
    """Logits are divided by this."""
    norm_head: bool = False
    """Each row of the head's weight is divided by its L2 norm."""
    windows: tuple[int, ...] = ()
    """For each layer, the number of tokens that a token attends to, including itself; 0: all. Empty: all, in every layer."""
    experts: Experts | None = None
    lora: Lora | None = None
    latent: Latent | None = None
    """Latent attention. Then ``head_dim`` is the size of queries and keys, and there are as many key/value heads as heads."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the shape as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """Returns the shape from ``to_dict``'s values, also if they have been written as JSON and read again."""
        rope, window_rope, experts = values["rope"], values.get("window_rope"), values.get("experts")
        if experts:
            experts = Experts(**{**experts, "dense_layers": tuple(experts["dense_layers"])})
        lora = values.get("lora")
        lora = lora and Lora(**{**lora, "targets": tuple(lora["targets"])})
        windows, latent = tuple(values.get("windows", ())), values.get("latent")
        without_rope = tuple(values.get("layers_without_rope", ()))
        return cls(
            **{
                **values,
                "rope": rope and Rope(**rope),
                "window_rope": window_rope and Rope(**window_rope),
                "experts": experts,
                "windows": windows,
                "layers_without_rope": without_rope,
                "lora": lora,
                "latent": latent and Latent(**latent),
            }
        )

    @property
    def score_multiplier(self) -> float:
        """By what the scores of attention are multiplied."""
        given = self.attention_multiplier
        return self.query_scale / math.sqrt(self.head_dim) if given is None else given

    @property
    def query_scalar(self) -> int:
        """The number n in scores q k / sqrt(n)."""
        return round(self.head_dim / self.query_scale**2)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def sparse_layers(self) -> int:
        """The number of layers with experts."""
        return sum(self.is_sparse(layer) for layer in range(self.num_layers))

    def window(self, layer: int) -> int:
        """Returns the number of tokens that a token attends to in a layer, including itself; 0: all."""
        return self.windows[layer] if self.windows else 0

    def rotary(self, layer: int) -> Literal["none", "usual", "window"]:
        """Returns which rotary embedding a layer has: none, ``rope``, or ``window_rope``."""
        if self.rope is None or layer in self.layers_without_rope:
            return "none"
        return "window" if self.window_rope is not None and self.window(layer) > 0 else "usual"

    def kind(self, layer: int) -> tuple[bool, int, str]:
        """Returns what layers that cost the same have in common: whether they have experts, their window, and ``rotary``."""
        return self.is_sparse(layer), self.window(layer), self.rotary(layer)

    @property
    def rotary_dim(self) -> int:
        """The size of what the rotary embedding gets of a head. (It may be for a share of that only.)"""
        return self.latent.rotary_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """The size of a head's values."""
        return self.latent.value_dim if self.latent else self.head_dim

    def projections(self) -> dict[str, Projection]:
        """Returns the linears of attention, by their names in it."""
        d, heads, kv, latent = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.latent
        if latent is None:
            keys = Projection(kv, d, 0)
            return {"q": Projection(heads, d, 0), "k": keys, "v": keys, "o": Projection(d, heads, 1)}
        return {
            **({"q_a": Projection(latent.query_rank, d, None)} if latent.query_rank else {}),
            "q": Projection(heads, latent.query_rank or d, 0),
            "kv_a": Projection(latent.rank + latent.rotary_dim, d, None),
            "kv": Projection(self.num_heads * (latent.plain_dim + latent.value_dim), latent.rank, 0),
            "o": Projection(d, self.num_heads * latent.value_dim, 1),
        }

    @property
    def attention_inputs(self) -> int:
        """The number of elements per token from which heads are computed: those of the residual stream, or of the latents."""
        latent = self.latent
        if latent is None:
            return self.hidden_size
        return (latent.query_rank or self.hidden_size) + latent.rank + latent.rotary_dim

    def parameters(self, active: bool = False) -> int:
        """Returns the number of parameters. A tied head is not counted again.

        Args:
            active: count only the parameters that one token uses, which is less than all in a model with experts.
        """
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2) + self.hidden_size
        return ends + sum(self.layer_parameters(layer, active) for layer in range(self.num_layers))

    def summary(self) -> str:
        """Returns the family and the number of parameters, for messages."""
        total, active = self.parameters(), self.parameters(active=True)
        used = f", {active:,} of them for each token" if active != total else ""
        return f"{self.family}, {total:,} parameters{used}"

    def layer_parameters(self, layer: int, active: bool = False) -> int:
        """Returns the number of parameters of a layer, without adapters.

        Args:
            active: as for ``parameters``.
        """
        d, linears = self.hidden_size, self.projections()
        biased = [name for name in linears if name != "o" and (self.latent is None or linears[name].heads is None)]
        total = sum(linear.outputs * linear.inputs for linear in linears.values()) + self.o_bias * d + 2 * d
        total += self.qkv_bias * sum(linears[name].outputs for name in biased)
        total += self.latent.rank + self.latent.query_rank if self.latent else 0  # their norms
        total += 2 * self.head_dim * self.qk_norm + 2 * d * self.out_norms
        if self.experts is None or not self.is_sparse(layer):
            return total + 3 * d * self.intermediate_size + self.mlp_bias * (2 * self.intermediate_size + d)
        e = self.experts
        total += 3 * d * e.size * (e.top_k if active else e.count) + d * e.count
        return total + (3 * d * e.shared_size + d * e.shared_gate if e.shared_size else 0)

    def attended(self, layer: int, seq_len: int) -> float:
        """Returns how many tokens a token attends to in a layer, on average over a row of ``seq_len`` tokens."""
        width = min(self.window(layer) or seq_len, seq_len)
        return width - width * width / (2 * seq_len)

    def flops_per_token(self, seq_len: int) -> float:
        """Returns the FLOPs of training on one token in a row of ``seq_len`` tokens.

        They are 6 for each weight that the token is multiplied by, and in each layer 6 * heads * (size of keys + size of
        values) for each token that it attends to, on average (PaLM, https://arxiv.org/abs/2204.02311, appendix B). With
        adapters the other weights have no gradients; then they are 4 for each weight.
        """
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        attended = sum(self.attended(layer, seq_len) for layer in range(self.num_layers))
        sizes = self.head_dim + self.value_dim
        per_weight = 6.0 if self.lora is None else 4.0
        return per_weight * (self.parameters(active=True) - embedding) + 6.0 * self.num_heads * sizes * attended
