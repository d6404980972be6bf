"""How llama.cpp has each family: its architecture, the names of its tensors, and what it computes in another way.

The facts are from llama.cpp's src/models/ARCH.cpp (what it loads and computes) and conversion/ (what its converter writes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ...errors import UsageError
from ..config import DecoderConfig, Experts, Latent
from ..layers import LATENT_EPS

KINDS = ("default", "dynamic", "linear", "yarn")
"""The kinds of rotary scaling that llama.cpp knows in every architecture. (Dynamic NTK has no effect on documents that are not
longer than the context length, and llama.cpp leaves it out.)"""


@dataclass(frozen=True)
class Form:
    """How llama.cpp has a family (src/models/ARCH.cpp)."""

    arch: str
    neighbours: bool = False
    """Whether it rotates pairs of neighbours, so that the rows of q and k of a model that does not have another order."""
    kinds: tuple[str, ...] = KINDS
    """The kinds of rotary scaling that it knows."""
    square: bool = False
    """Whether all heads together must have the size of the residual stream."""
    biases: tuple[str, ...] = ()
    """Biases that it knows: some of qkv, o, mlp."""
    normalize: bool | None = None
    """Whether it divides the weights of a token's experts by their sum; None: it has no experts, or either way."""
    pattern: int | None = 0
    """Every layer has a sliding window, except each N-th, for this N; 0: none has; None: all have the same, or none has."""
    no_rope: int = 0
    """Every N-th layer has no rotary embedding, for this N; 0: all have one."""
    large: int = 0
    """The number of layers of the model whose scores it divides by sqrt(hidden size / heads), not by sqrt(head size)."""
    tied: bool | None = None
    """Whether the head must be tied to the embedding (True), or must not be (False)."""
    names: dict[str, str] = field(default_factory=dict)
    """Names of tensors that differ from those in ``LAYER``. Parameters of one name are one tensor, one after the other."""


GATE_UP = {"mlp.gate": "ffn_up"}
QKV = {"attn.q": "attn_qkv", "attn.k": "attn_qkv", "attn.v": "attn_qkv"}
LLAMA = Form("llama", neighbours=True, kinds=(*KINDS, "llama3"), biases=("qkv", "o", "mlp"))
DEEPSEEK = Form("deepseek2", neighbours=True, names={"attn.q": "attn_q_b"})
FORMS = {
    "LLAMA2": LLAMA,
    "INTERNLM": LLAMA,
    "INTERNLM2": Form("internlm2", neighbours=True, square=True),
    "INTERNLM3": LLAMA,
    "BAICHUAN2": Form("baichuan", neighbours=True, square=True, tied=False),
    "MISTRAL": replace(LLAMA, biases=()),
    "SMOLLM3": Form("smollm3", neighbours=True, no_rope=4),
    "GRANITE": Form("granite", neighbours=True),
    "MIXTRALMOE": replace(LLAMA, biases=(), normalize=True),
    "QWEN2": Form("qwen2", square=True, biases=("qkv",)),
    "QWEN3": Form("qwen3"),
    "QWEN2MOE": Form("qwen2moe", square=True, biases=("qkv",), normalize=False),
    "QWEN3MOE": Form("qwen3moe", normalize=True),
    "GEMMA": Form("gemma", tied=True),
    "GEMMA2": Form("gemma2", pattern=2, large=46, tied=True),
    "GEMMA3": Form("gemma3", pattern=6, large=62),
    "PHI3": Form("phi3", kinds=(*KINDS, "longrope"), square=True, pattern=None, names={**QKV, **GATE_UP}),
    "GLM": Form("chatglm", neighbours=True, square=True, biases=("qkv",), names=GATE_UP),
    "GLM4": Form("glm4", neighbours=True, biases=("qkv",), names=GATE_UP),
    "DEEPSEEKV2": DEEPSEEK,
    "DEEPSEEKV3": DEEPSEEK,
}  # fmt: skip
LAYER = {
    "attn_norm": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm", "attn.q_a": "attn_q_a", "attn.q_a_norm": "attn_q_a_norm",
    "attn.kv_a": "attn_kv_a_mqa", "attn.kv_a_norm": "attn_kv_a_norm", "attn.kv": "attn_kv_b", "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down", "attn_out_norm": "post_attention_norm",
    "mlp_out_norm": "post_ffw_norm", "mlp.router": "ffn_gate_inp", "mlp.router.bias": "exp_probs_b",
    "mlp.experts.gate": "ffn_gate_exps", "mlp.experts.up": "ffn_up_exps", "mlp.experts.down": "ffn_down_exps",
    "mlp.shared.gate": "ffn_gate_shexp", "mlp.shared.up": "ffn_up_shexp", "mlp.shared.down": "ffn_down_shexp",
    "mlp.shared_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
ENDS = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}


def form_of(config: DecoderConfig) -> Form:
    """Returns how llama.cpp has a model.

    Raises:
        UsageError: if it does not. The message names the family, or what of the model it does not have.
    """
    form = FORMS.get(config.family)
    if form is None:
        raise UsageError(f"--to gguf does not support {config.family} (supported: {', '.join(FORMS)})")
    if wrong := list(_problems(config, form)):
        raise UsageError(f"a GGUF file cannot describe this {config.family} model: {'; '.join(wrong)}")
    return form


def _problems(config: DecoderConfig, form: Form) -> Iterator[str]:
    """Yields what of a model llama.cpp computes in another way, or not at all."""
    for name, given in (("qkv", config.qkv_bias), ("o", config.o_bias), ("mlp", config.mlp_bias)):
        if given and name not in form.biases:
            yield f"it has {name} biases"
    if form.arch in ("qwen2", "qwen2moe") and not config.qkv_bias:
        yield "it has no qkv biases"
    if form.square and config.num_heads * config.head_dim != config.hidden_size:
        yield f"its {config.num_heads} heads of {config.head_dim} do not have the hidden size {config.hidden_size} together"
    large = config.num_layers == form.large
    if config.query_scalar != (config.hidden_size // config.num_heads if large else config.head_dim):
        yield f"its scores are divided by sqrt({config.query_scalar})"
    if form.tied is not None and form.tied != config.tie_embeddings:
        yield f"its head is {'not ' if form.tied else ''}tied to the embedding"
    caps = config.attention_softcap, config.logit_softcap
    if (not all(caps)) if form.arch == "gemma2" else any(caps):
        yield f"its scores and logits have caps of {caps[0]} and {caps[1]}"
    yield from _wrong_windows(config, form)
    yield from _wrong_rope(config, form)
    moe = config.experts
    if config.latent is not None and moe is not None:
        yield from _wrong_latents(config, config.latent, moe)
    elif moe and (moe.normalize != form.normalize or moe.dense_layers or moe.balance_bias):
        yield "its experts choose in another way, or some layers have none (norm_topk_prob, mlp_only_layers, bias_update_speed)"


def _wrong_windows(config: DecoderConfig, form: Form) -> Iterator[str]:
    window, pattern = max(config.windows, default=0), form.pattern
    expected = tuple(
        window if pattern is None or (pattern and (layer + 1) % pattern) else 0 for layer in range(config.num_layers)
    )
    if window and config.windows != expected:
        yield f"its sliding windows {list(config.windows)} are not in the architecture's layers"
    if pattern and not window:
        yield "it has no sliding windows"


def _wrong_rope(config: DecoderConfig, form: Form) -> Iterator[str]:
    rope, inner = config.rope, config.window_rope
    if form.arch == "baichuan" and config.num_layers != (32 if rope else 40):
        kind = "the rotary embedding only in models of 32 layers" if rope else "ALiBi only in models of 40 layers"
        yield f"it has {config.num_layers} layers, and llama.cpp uses {kind}"
    if rope is None and form.arch != "baichuan":
        yield "it has ALiBi"
    without = list(range(form.no_rope - 1, config.num_layers, form.no_rope)) if form.no_rope else []
    if (mine := list(config.layers_without_rope)) != without:
        yield f"its layers {mine} have no rotary embedding, and in llama.cpp {without} have none"
    if rope is not None and rope.kind not in form.kinds:
        yield f"rotary scaling {rope.kind!r}"
    if rope is not None and rope.kind == "yarn":
        usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
        if other := [key for key, value in usual.items() if rope.options.get(key, value) != value]:
            yield f"YaRN with another {', '.join(other)}"
    if inner is not None and inner.kind != "default":
        yield f"rotary scaling {inner.kind!r} in layers with a window"


def _wrong_latents(config: DecoderConfig, latent: Latent, moe: Experts) -> Iterator[str]:
    if config.norm_eps != LATENT_EPS:
        yield f"the norms of its latents add {LATENT_EPS}, all others {config.norm_eps}, and llama.cpp has one number for all"
    if latent.query_rank and (config.num_layers in (26, 27) or (config.num_layers, config.vocab_size) == (48, 128256)):
        yield f"it has q_lora_rank and {config.num_layers} layers, by which llama.cpp takes it for a model without q_lora_rank"
    if moe.dense_layers != tuple(range(len(moe.dense_layers))):
        yield f"the layers without experts {list(moe.dense_layers)} are not the first ones"
    if not moe.shared_size or moe.shared_size % moe.size or moe.shared_gate:
        yield f"the size of its shared experts {moe.shared_size} is not a multiple of the experts' size {moe.size}"
    if moe.top_groups < moe.groups and moe.scoring == "softmax":
        yield "its tokens choose a group of experts by the largest score in it (topk_method 'group_limited_greedy')"


def name_of(name: str, form: Form, config: DecoderConfig) -> str:
    """Returns the name of the tensor in the file that has a parameter."""
    if name in ENDS:
        return ENDS[name]
    _, layer, *path, kind = name.split(".")
    names = LAYER if config.latent and not config.latent.query_rank else {**LAYER, **form.names}
    key = ".".join(path)
    return f"blk.{layer}.{names.get(f'{key}.{kind}') or names[key]}.{kind}"
