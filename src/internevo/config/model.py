"""The ``model`` section: the shape of the network and its initial weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator

from .experts import MoeLayerKwargs
from .option import KERNELS, MAX_EXPERTS, MAX_SIZE, REQUIRED, PathText, Section, dtype_name, listed, option

ROTARY = "rotary pairs are always half-split, as in Hugging Face's models; weights are reordered when they are converted"
LINEARS = {
    "wqkv": ("q", "k", "v"), "wq": ("q",), "wk": ("k",), "wv": ("v",), "wo": ("o",),
    "w1": ("gate",), "w3": ("up",), "w2": ("down",),
    **{f"{name}_proj": (name,) for name in ("q", "k", "v", "o", "gate", "up", "down")},
}  # fmt: skip
"""InternEvo's and Hugging Face's names of a layer's linears -> the names used here."""


class Lora(Section):
    """Low-rank adapters (LoRA). Only the adapters are trained. An export merges them into the weights."""

    rank: int = option(8, "Rank of the adapters.", ge=1, le=65_536)
    alpha: float = option(16.0, "The output of an adapter is multiplied by alpha / rank.", gt=0)
    targets: tuple[str, ...] = option(
        ("q", "k", "v", "o"),
        "Linear layers that get an adapter: some of q, k, v, o, gate, up, down. InternEvo's and Hugging Face's names work too.",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> tuple[str, ...]:
        names = listed(value)
        found = [name for given in names for name in (LINEARS.get(given, (given,)) if isinstance(given, str) else (given,))]
        known = ("q", "k", "v", "o", "gate", "up", "down")
        wrong = [name for name in found if name not in known]
        if wrong or not found:
            raise ValueError(f"must be some of {', '.join(known)}, not {', '.join(map(repr, wrong)) or 'none'}")
        return tuple(name for name in known if name in found)


class Model(Section):
    """The shape of the network, its precision and its initial weights. Names and defaults are InternEvo's."""

    from_hf: PathText | None = option(
        None,
        "A Hugging Face model: its folder, or its name on the Hugging Face Hub (owner/name). model_type, all keys of model "
        "that describe its shape, model.dtype and data.tokenizer_path are taken from there, unless they are set; and a new run "
        "starts from its weights, unless ckpt.load_ckpt_info names others. A key that contradicts the weights is an error.",
    )
    pretrained: bool = option(
        True,
        "Start from the weights of from_hf. False: take only the shape, and start with new initial weights.",
        needs="model.from_hf",
    )
    num_layers: int = option(REQUIRED, "Number of decoder layers.", ge=1, le=10_000)
    hidden_size: int = option(REQUIRED, "Width of the residual stream.", ge=1, le=MAX_SIZE)
    vocab_size: int = option(REQUIRED, "Size of the vocabulary. Every token id must be less than it.", ge=1, le=MAX_SIZE)
    num_attention_heads: int = option(REQUIRED, "Number of query heads.", ge=1, le=MAX_SIZE)
    num_kv_attention_heads: int | None = option(None, "Number of key/value heads. None: the same as num_attention_heads.", ge=1)
    head_dim: int | None = option(None, "Width of a head. None: hidden_size / num_attention_heads.", ge=1, le=MAX_SIZE)
    q_lora_rank: int | None = option(
        None,
        "Size of the latent from which queries are computed (DEEPSEEKV2, DEEPSEEKV3). None: from the residual stream.",
        ge=1,
        le=MAX_SIZE,
    )
    kv_lora_rank: int | None = option(
        None, "Size of the latent from which keys and values are computed (DEEPSEEKV2, DEEPSEEKV3).", ge=1, le=MAX_SIZE
    )
    qk_nope_head_dim: int | None = option(
        None, "Width of a head's queries and keys that have no position (DEEPSEEKV2, DEEPSEEKV3).", ge=1, le=MAX_SIZE
    )
    qk_rope_head_dim: int | None = option(
        None, "Width of a head's queries and keys that rotate (DEEPSEEKV2, DEEPSEEKV3).", ge=2, le=MAX_SIZE
    )
    v_head_dim: int | None = option(None, "Width of a head's values (DEEPSEEKV2, DEEPSEEKV3).", ge=1, le=MAX_SIZE)
    mlp_ratio: float = option(
        4.0,
        "The width of the MLP is int(hidden_size * mlp_ratio), rounded up to a multiple of multiple_of.",
        gt=0,
        le=MAX_SIZE,
        unless="model.intermediate_size",
    )
    multiple_of: int = option(
        256, "The width of the MLP is rounded up to a multiple of this.", ge=1, le=MAX_SIZE, unless="model.intermediate_size"
    )
    intermediate_size: int | None = option(
        None, "Width of the MLP. If it is set, mlp_ratio and multiple_of are not used.", ge=1, le=MAX_SIZE
    )
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] = option(
        "float16",
        'Dtype of the computation: "torch.float32", "torch.bfloat16", "torch.float16", or "torch.tf32" (fp32 weights and '
        "TF32 matrix products). Master weights and optimizer state are always fp32.",
    )
    checkpoint: StrictBool | Annotated[float, Field(ge=0, le=1)] | Literal["attention"] = option(
        0.0,
        "Recomputation of activations in the backward pass. True: all layers. False: none. A number from 0 to 1: this share of "
        'the layers, beginning with the first. "attention": only the attention, in every layer.',
    )
    lora: Lora | None = option(None, "Train low-rank adapters (LoRA) and keep all other weights as they are.")
    compile: bool = option(False, "Compile each layer with torch.compile. Layers of the same shape share the compiled code.")
    layer_norm_epsilon: float = option(1e-5, "Number that is added to the mean square in each norm.", ge=1e-37)
    norm_type: Literal["rmsnorm", "layernorm"] = option("rmsnorm", "Kind of norm.", not_available="LayerNorm")
    no_bias: bool | None = option(
        None, "Attention has no biases. None: the family's own choice (False for INTERNLM, True for INTERNLM2 and LLAMA2)."
    )
    qkv_bias: bool | None = option(
        None, "The query, key and value projections have biases. None: as no_bias says; True for QWEN2, QWEN2MOE, GLM and GLM4."
    )
    o_bias: bool | None = option(
        None, "The output projection of attention has a bias. None: as no_bias says; False for QWEN2, QWEN2MOE, GLM and GLM4."
    )
    mlp_bias: bool = option(False, "The MLP has biases, in families that support them.")
    tie_word_embeddings: bool | None = option(
        None, "The head uses the embedding's weight. None: False, but True for GEMMA, GEMMA2, GEMMA3 and SMOLLM3."
    )
    rope_base: float = option(10000.0, "Base of the rotary embedding.", gt=0)
    rope_scaling: dict[str, Any] | None = option(
        None,
        'Scaling of the rotary embedding, written as in Hugging Face, for example {"rope_type": "linear", "factor": 4.0}. '
        "Kinds, and their keys besides rope_type: linear (factor); dynamic (factor); llama3 (factor, low_freq_factor, "
        "high_freq_factor, original_max_position_embeddings); yarn (factor, original_max_position_embeddings, "
        "attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate); longrope (short_factor, long_factor, "
        "original_max_position_embeddings, factor, attention_factor). Each kind, also default, may have partial_rotary_factor, "
        "the share of a head that rotates (PHI3, GLM, GLM4).",
    )
    use_dynamic_ntk_rope: bool = option(
        False,
        "Scale the rotary embedding of documents that are longer than max_position_embeddings, by rope_scaling_factor (dynamic "
        "NTK).",
    )
    rope_scaling_factor: float = option(1.0, "Factor of use_dynamic_ntk_rope.", ge=1)
    rope_type: Literal["normal", "native", "dynamic_ntk"] = option(
        "normal", "QWEN2's name for the kind of rotary embedding. dynamic_ntk: the same as use_dynamic_ntk_rope."
    )
    max_position_embeddings: int = option(
        2048,
        "Document length for which the rotary embedding is made; rope_scaling refers to it.",
        unit="tokens",
        ge=1,
        le=MAX_SIZE,
    )
    embedding_multiplier: float = option(1.0, "Embeddings are multiplied by this (GRANITE).", gt=0)
    attention_multiplier: float | None = option(
        None, "The scores of attention are multiplied by this (GRANITE). None: 1 / sqrt(size of a head).", gt=0
    )
    residual_multiplier: float = option(
        1.0,
        "What attention and the MLP add to the residual stream is multiplied by this (GRANITE).",
        gt=0,
    )
    logits_scaling: float = option(1.0, "Logits are divided by this (GRANITE).", gt=0)
    query_pre_attn_scalar: int | None = option(
        None,
        "n in the scores of attention, q k / sqrt(n) (GEMMA2, GEMMA3). None: the size of a head.",
        ge=1,
        le=MAX_SIZE,
    )
    attn_logit_softcapping: float | None = option(
        None, "c: scores s of attention become c * tanh(s / c) (GEMMA2). 0: they stay as they are. None: 50 for GEMMA2.", ge=0
    )
    final_logit_softcapping: float | None = option(
        None, "c: logits z become c * tanh(z / c) (GEMMA2). 0: they stay as they are. None: 30 for GEMMA2.", ge=0
    )
    use_sliding_window: bool = option(
        False,
        "Tokens attend only to the last sliding_window tokens (QWEN2, QWEN2MOE, QWEN3, QWEN3MOE, MIXTRALMOE, "
        "MISTRAL, PHI3); GEMMA2: every second layer does (left out: 4096); GEMMA3: five layers of six do (left out: 512); "
        "SMOLLM3: layers without a rotary embedding do.",
    )
    sliding_window: int | None = option(
        None,
        "Number of tokens that a token attends to, including itself.",
        unit="tokens",
        ge=1,
        le=MAX_SIZE,
        needs="model.use_sliding_window",
    )
    layer_windows: tuple[Annotated[int, Field(ge=0, le=MAX_SIZE)], ...] | None = option(
        None,
        "For each layer, the number of tokens that a token attends to; 0: all. It replaces use_sliding_window, in families "
        "that support it.",
    )
    max_window_layers: int | None = option(
        None,
        "Number of layers, beginning with the first, that use full attention in spite of use_sliding_window.",
        ge=0,
        needs="model.use_sliding_window",
    )
    no_rope_layers: tuple[Annotated[int, Field(ge=0, le=1)], ...] | None = option(
        None,
        "For each layer, 1: queries and keys rotate; 0: it has no rotary embedding (SMOLLM3), as in Hugging Face's config. It "
        "replaces no_rope_layer_interval.",
    )
    no_rope_layer_interval: int | None = option(
        None, "N: every N-th layer has no rotary embedding (SMOLLM3; 4 in SmolLM3-3B). None: all have one.", ge=1, le=MAX_SIZE
    )
    use_alibi: bool = option(
        False, "Use attention with linear biases (ALiBi) in place of the rotary embedding (BAICHUAN2, 13B)."
    )
    norm_head: bool | None = option(
        None, "Each row of the head's weight is divided by its L2 norm. None: False, but True for BAICHUAN2."
    )
    add_unit_offset: bool | None = option(
        None, "Norms multiply by 1 + weight in place of weight. None: False, but True for GEMMA, GEMMA2 and GEMMA3."
    )
    use_swiglu: bool | None = option(
        None,
        "The MLP's activation is SwiGLU; False: GELU (tanh approximation), gated. None: True, but False for GEMMA, GEMMA2 and "
        "GEMMA3.",
    )
    embed_grad_scale: float = option(1.0, "Number by which the gradients of the embedding and the head are multiplied.", gt=0)
    use_scaled_init: bool = option(
        True,
        "The standard deviation of the initial attention output and MLP down weights is divided by sqrt(2 * number of the "
        "layer, from 1).",
    )
    init_type: Literal["normal", "uniform"] = option("normal", "Distribution of the initial weights.")
    embedding_init_std: float = option(0.02, "Standard deviation of the initial weights of the embedding.", ge=0)
    attn_wqkv_init_std: float = option(0.02, "Standard deviation of the initial query, key and value weights.", ge=0)
    attn_other_init_std: float = option(0.02, "Standard deviation of the initial attention output weights.", ge=0)
    ffn_uplayer_init_std: float = option(0.02, "Standard deviation of the initial gate and up weights of the MLP.", ge=0)
    ffn_other_init_std: float = option(0.02, "Standard deviation of the initial down weights of the MLP.", ge=0)
    out_head_init_std: float = option(0.02, "Standard deviation of the initial weights of the head.", ge=0)

    # Options of features that do not exist yet, and options of experts.
    num_chunks: int = option(
        1,
        "Number of stages on each pipeline rank. 1F1B: any number; more than 1 are interleaved. ZBH1: 1, ZBV: 2.",
        ge=1,
    )
    apply_post_layer_norm: bool = option(
        False, "Apply the norm after the residual connection.", not_available="post-norm layers"
    )
    use_logn_attn: bool = option(False, "Use the log-n attention of Qwen 1.", not_available="log-n attention")
    scale_attn_weights: bool = option(
        False, "Use the scaled attention weights of Qwen 1.", not_available="scaled attention weights"
    )
    residual_in_fp32: bool = option(False, "Keep the residual stream in fp32.", not_available="a residual stream in fp32")
    is_reward: bool = option(False, "Use a reward head in place of the language model's head.", not_available="reward models")
    drop_rate: float = option(0.0, "Dropout rate after attention and MLP.", not_available="dropout", supported=(0,), ge=0, le=1)
    attn_drop_rate: float = option(
        0.0, "Dropout rate of the attention weights.", not_available="attention dropout", supported=(0,), ge=0, le=1
    )
    num_experts: int = option(
        1, "Number of experts in a layer (QWEN2MOE, QWEN3MOE, MIXTRALMOE, DEEPSEEKV2, DEEPSEEKV3).", ge=1, le=MAX_EXPERTS
    )
    top_k: int = option(1, "Number of experts that each token is sent to.", ge=1, needs="model.num_experts")
    moe_type: Literal["GShard", "Dropless", "MegaBlock", "MegaBlock-D", "MegaBlock-Dropless"] = option(
        "GShard",
        "How many tokens an expert takes. GShard: up to its capacity; the others are dropped. Dropless: all tokens that choose "
        "it. MegaBlock, MegaBlock-D and MegaBlock-Dropless: the same as Dropless.",
        needs="model.num_experts",
    )
    moe_layer_kwargs: MoeLayerKwargs = option(MoeLayerKwargs(), "Options of a layer with experts.")
    moe_intermediate_size: int | None = option(
        None, "Width of an expert. None: the width of the MLP.", ge=1, le=MAX_SIZE, needs="model.num_experts"
    )
    num_shared_experts: int = option(
        0,
        "Width of the shared expert, which sees every token (QWEN2MOE, DEEPSEEKV2, DEEPSEEKV3), divided by the width of an "
        "expert.",
        ge=0,
        le=MAX_SIZE,
        needs="model.num_experts",
    )
    shared_expert_intermediate_size: int | None = option(
        None,
        "Width of the shared expert. If it is set, num_shared_experts is not used.",
        ge=1,
        le=MAX_SIZE,
        needs="model.num_experts",
    )
    norm_topk_prob: bool | None = option(
        None,
        "The weights of a token's experts are divided by their sum. None: True, but False for QWEN2MOE and DEEPSEEKV2.",
        needs="model.num_experts",
    )
    n_group: int = option(
        1,
        "Number of groups of experts, of which each token chooses topk_group (DEEPSEEKV2, DEEPSEEKV3).",
        ge=1,
        le=MAX_EXPERTS,
        needs="model.num_experts",
    )
    topk_group: int = option(
        1,
        "Number of groups in which a token chooses experts (DEEPSEEKV2, DEEPSEEKV3).",
        ge=1,
        le=MAX_EXPERTS,
        needs="model.num_experts",
    )
    routed_scaling_factor: float = option(
        1.0,
        "The weights of a token's experts are multiplied by this (DEEPSEEKV2, DEEPSEEKV3).",
        gt=0,
        needs="model.num_experts",
    )
    decoder_sparse_step: int = option(1, "N: only every N-th layer has experts.", ge=1, needs="model.num_experts")
    mlp_only_layers: tuple[Annotated[int, Field(ge=0)], ...] = option(
        (), "Numbers of the layers, from 0, that have an MLP in place of experts.", needs="model.num_experts"
    )

    flash_attention: int = option(
        2,
        "Generation of flash attention on NVIDIA GPUs. 2: PyTorch's own. 3 (Hopper) and 4 (Hopper, Blackwell): from packages "
        "to install.",
        ge=2,
        le=4,
    )

    # Options of InternEvo that have no effect here.
    use_flash_attn: bool = option(True, "Use flash attention.", ignored=KERNELS)
    mlp_layer_fusion: bool = option(False, "Use one weight for gate and up.", ignored=KERNELS)
    enable_qkv_fusion: bool = option(True, "Use one weight for q, k and v.", ignored=KERNELS)
    qk_interleaved: bool = option(False, "The two elements of a rotary pair are next to each other.", ignored=ROTARY)
    embed_split_hidden: bool = option(
        False, "Shard the embedding along its width.", ignored="the embedding is sharded along the vocabulary in every mode"
    )
    parallel_output: bool = option(True, "Keep the logits sharded.", ignored="full logits never exist on a rank")
    deepnorm: bool = option(False, "Use DeepNorm.", ignored="InternEvo does not use it either")
    dropout_selective_checkpoint: bool = option(True, "Recompute dropout.", ignored="there is no dropout")
    device: str | None = option(None, "Device on which weights are created.", ignored="it is the device of the run")
    inject_info: dict[str, Any] | None = option(
        None, "Model of another code base.", not_available="models of other code bases inside InternEvo's modules"
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        return dtype_name(value)

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        return float(value) if isinstance(value, bool) else value

    @property
    def mlp_width(self) -> int:
        """The width of the MLP: ``intermediate_size``, or ``hidden_size * mlp_ratio`` rounded up as InternEvo does it."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * self.mlp_ratio)
        return self.multiple_of * ((width + self.multiple_of - 1) // self.multiple_of)


def attention_widths(model: Model) -> Iterator[tuple[int, str]]:
    """Yields the widths of the linears of attention, and what each is."""
    heads, kv = model.num_attention_heads, model.num_kv_attention_heads or model.num_attention_heads
    if model.kv_lora_rank is None:
        head_dim = model.head_dim or model.hidden_size // heads
        yield heads * head_dim, "the width of all query heads (model.num_attention_heads * size of a head)"
        yield kv * head_dim, "the width of all key/value heads (model.num_kv_attention_heads * size of a head)"
        return
    plain, rotary = model.qk_nope_head_dim or 0, model.qk_rope_head_dim or 0
    yield model.q_lora_rank or 0, "model.q_lora_rank"
    yield model.kv_lora_rank + rotary, "model.kv_lora_rank + model.qk_rope_head_dim"
    yield heads * (plain + rotary), "model.num_attention_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)"
    yield heads * (plain + (model.v_head_dim or 0)), "model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)"
