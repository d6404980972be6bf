"""The ``model`` section: the shape of the network, and how its weights start."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from .option import REQUIRED, Section, dtype_name, option

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
KERNELS = "the best kernel for the device is chosen in one place (internevo/ops)"
ROTARY = "rotary pairs are stored half-split, as on the Hugging Face side; checkpoints are turned when converted"


class MoeLayerKwargs(Section):
    """Options of the expert layer."""

    capacity_factor: float | None = option(
        None, "Tokens that an expert takes in training, over its even share; GShard's default is 1.0.", gt=0
    )
    eval_capacity_factor: float | None = option(None, "The same in evaluation and generation.", gt=0)
    min_capacity: int = option(4, "An expert takes at least so many.", unit="tokens", ge=0)
    drop_tokens: bool = option(True, "GShard with False drops nothing.")
    drop_policy: Literal["position", "probs"] = option(
        "position", "Who is left out of a full expert: the last in the batch, or the least likely."
    )
    noisy_gate_policy: Literal["Jitter", "RSample"] | None = option(None, "Noise in the router.", later="noisy routers")
    drop_and_pad: bool = option(False, "Pad every expert to its capacity.", ignored="experts take ragged groups of rows")
    use_rts: bool = option(True, "Drop at random.", ignored="drop_policy decides, so that results do not depend on chance")
    use_fused_gating: bool = option(True, "Fused router.", ignored=KERNELS)
    use_grouped_mlp: bool = option(True, "Grouped products.", ignored=KERNELS)
    enable_fused_permute: bool = option(False, "Fused permutation.", ignored=KERNELS)
    deterministic_mode: bool = option(False, "Deterministic kernels.", ignored="gathers replace atomic sums in any case")
    token_dispatch_policy: str = option("alltoall", "Exchange of tokens.", ignored="an all-to-all is used")


LINEARS = {
    "wqkv": ("q", "k", "v"), "wq": ("q",), "wk": ("k",), "wv": ("v",), "wo": ("o",),
    "w1": ("gate",), "w3": ("up",), "w2": ("down",),
    **{f"{name}_proj": (name,) for name in ("q", "k", "v", "o", "gate", "up", "down")},
}  # fmt: skip
"""Other names of a layer's linears: InternEvo's and Hugging Face's."""


class Lora(Section):
    """Low-rank adapters: only they are trained, and they are merged into the weights on export."""

    rank: int = option(8, "Rank of an adapter.", ge=1)
    alpha: float = option(16.0, "An adapter's output is scaled by alpha / rank.", gt=0)
    targets: tuple[str, ...] = option(
        ("q", "k", "v", "o"),
        "Linears that have one: q, k, v, o, gate, up, down (or InternEvo's and Hugging Face's names).",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> tuple[str, ...]:
        names = [value] if isinstance(value, str) else list(value)
        found = [name for given in names for name in LINEARS.get(given, (given,))]
        known = ("q", "k", "v", "o", "gate", "up", "down")
        wrong = [name for name in found if name not in known]
        if wrong or not found:
            raise ValueError(f"must be some of {', '.join(known)}, not {', '.join(map(repr, wrong)) or 'none'}")
        return tuple(name for name in known if name in found)


class Model(Section):
    """The network. Names and defaults are InternEvo's."""

    num_layers: int = option(REQUIRED, "Number of decoder layers.", ge=1)
    hidden_size: int = option(REQUIRED, "Width of the residual stream.", ge=1)
    vocab_size: int = option(REQUIRED, "Rows of the embedding; every token id is below it.", ge=1)
    num_attention_heads: int = option(REQUIRED, "Query heads.", ge=1)
    num_kv_attention_heads: int | None = option(None, "Key and value heads; by default as many as query heads.", ge=1)
    head_dim: int | None = option(None, "Width of a head; by default hidden_size / num_attention_heads.", ge=1)
    mlp_ratio: float = option(4.0, "Width of the MLP = int(hidden_size * mlp_ratio), rounded up to multiple_of.", gt=0)
    multiple_of: int = option(256, "The MLP's width is rounded up to a multiple of this.", ge=1)
    intermediate_size: int | None = option(None, "Width of the MLP, instead of mlp_ratio and multiple_of.", ge=1)
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] = option(
        "float16",
        'Type of the computation: "torch.float32", "torch.bfloat16", "torch.float16", or "torch.tf32" (fp32 weights, '
        "TF32 matrix products). Master weights and optimizer state are fp32 in every case.",
    )
    checkpoint: Annotated[float, Field(ge=0, le=1)] | Literal["attention"] = option(
        0.0,
        "Activation recomputation: True, False, or the share of layers (the first of them) recomputed; "
        '"attention": the attention of every layer, and nothing else.',
    )
    lora: Lora | None = option(None, "Train low-rank adapters beside the frozen weights.")
    compile: bool = option(False, "Compile each layer with torch.compile; layers of one shape share the code.")
    layer_norm_epsilon: float = option(1e-5, "Added to the mean square in the norms.", gt=0)
    norm_type: Literal["rmsnorm", "layernorm"] = option("rmsnorm", "Kind of norm.", later="LayerNorm")
    no_bias: bool | None = option(None, "No bias in attention. INTERNLM: False unless given; INTERNLM2, LLAMA2: True.")
    qkv_bias: bool | None = option(
        None, "Bias in the query, key and value projections; overrides no_bias there. QWEN2, QWEN2MOE: True."
    )
    o_bias: bool | None = option(None, "Bias in the attention's output projection; overrides no_bias there.")
    mlp_bias: bool = option(False, "Bias in the MLP (of the families that know it).")
    tie_word_embeddings: bool | None = option(None, "The head is the embedding's weight. GEMMA: True unless given.")
    rope_base: float = option(10000.0, "Base of the rotary embedding's wave lengths.", gt=0)
    rope_scaling: dict[str, Any] | None = option(
        None,
        'Rotary scaling in Hugging Face form, for example {"rope_type": "linear", "factor": 4.0}; '
        "kinds: linear, dynamic, llama3, yarn.",
    )
    use_dynamic_ntk_rope: bool = option(False, "Dynamic NTK scaling with rope_scaling_factor beyond max_position_embeddings.")
    rope_scaling_factor: float = option(1.0, "Factor of the rotary scaling.", gt=0)
    rope_type: Literal["normal", "native", "dynamic_ntk"] = option("normal", "QWEN2's name for the rotary kind.")
    max_position_embeddings: int = option(2048, "Length that the rotary embedding was made for.", unit="tokens", ge=1)
    use_sliding_window: bool = option(
        False, "Attention looks back a limited number of tokens (QWEN2, QWEN2MOE, QWEN3, QWEN3MOE, MIXTRALMOE)."
    )
    sliding_window: int | None = option(None, "Tokens that a token sees, itself included.", unit="tokens", ge=1)
    max_window_layers: int | None = option(None, "Layers below this one (counted from 0) use full attention.", ge=0)
    use_alibi: bool = option(False, "Attention with linear biases in place of rotary positions (BAICHUAN2, 13B).")
    norm_head: bool | None = option(None, "The head's rows have length 1. BAICHUAN2: True unless given.")
    add_unit_offset: bool | None = option(None, "The norm multiplies by 1 + weight. GEMMA: True.")
    use_swiglu: bool | None = option(None, "SwiGLU, or gated GELU (tanh form). GEMMA: False, all others True.")
    embed_grad_scale: float = option(1.0, "Scale of the embedding's and head's gradients.", gt=0)
    use_scaled_init: bool = option(
        True, "The std of the output projections is divided by sqrt(2 * layer), with layers counted from 1."
    )
    init_type: Literal["normal", "uniform"] = option("normal", "Distribution of the initial weights.")
    embedding_init_std: float = option(0.02, "Std of the embedding's initial weights.", ge=0)
    attn_wqkv_init_std: float = option(0.02, "Std of the initial query, key and value weights.", ge=0)
    attn_other_init_std: float = option(0.02, "Std of the initial attention output weights.", ge=0)
    ffn_uplayer_init_std: float = option(0.02, "Std of the initial gate and up weights of the MLP.", ge=0)
    ffn_other_init_std: float = option(0.02, "Std of the initial down weights of the MLP.", ge=0)
    out_head_init_std: float = option(0.02, "Std of the head's initial weights.", ge=0)

    # Features of later versions: they validate, and a run that needs one of them says so.
    num_chunks: int = option(1, "Virtual pipeline stages on each rank.", later="interleaved pipeline stages", ge=1)
    apply_post_layer_norm: bool = option(False, "Norm after the residual sum.", later="post-norm layers")
    use_logn_attn: bool = option(False, "Qwen 1's log-n attention.", later="log-n attention")
    scale_attn_weights: bool = option(False, "Qwen 1's scaled attention weights.", later="scaled attention weights")
    residual_in_fp32: bool = option(False, "The residual stream in fp32.", later="a residual stream in fp32")
    is_reward: bool = option(False, "A reward head in place of the language head.", later="reward models")
    drop_rate: float = option(0.0, "Dropout on the residual branches.", later="dropout", neutral=(0,))
    attn_drop_rate: float = option(0.0, "Dropout on attention weights.", later="attention dropout", neutral=(0,))
    num_experts: int = option(1, "Experts per layer (QWEN2MOE, QWEN3MOE, MIXTRALMOE).", ge=1)
    top_k: int = option(1, "Experts per token.", ge=1)
    moe_type: Literal["GShard", "Dropless", "MegaBlock", "MegaBlock-D", "MegaBlock-Dropless"] = option(
        "GShard",
        "GShard: an expert takes up to its capacity and the rest is dropped. Dropless: it takes all that choose it. "
        "The MegaBlock kinds are accepted as names of Dropless.",
    )
    moe_layer_kwargs: MoeLayerKwargs = option(MoeLayerKwargs(), "Options of the expert layer.")
    moe_intermediate_size: int | None = option(None, "Width of an expert; by default the MLP's width.", ge=1)
    num_shared_experts: int = option(0, "Width of the shared expert (QWEN2MOE), in widths of an expert.", ge=0)
    shared_expert_intermediate_size: int | None = option(None, "Width of the shared expert, given directly.", ge=1)
    norm_topk_prob: bool | None = option(None, "The chosen experts' weights add up to 1. By default True, in QWEN2MOE False.")
    decoder_sparse_step: int = option(1, "Every so many layers has experts (counted from 1).", ge=1)
    mlp_only_layers: tuple[int, ...] = option((), "Layers with a plain MLP (counted from 0).")

    # Known from InternEvo, without effect here.
    use_flash_attn: bool = option(True, "Use flash attention.", ignored=KERNELS)
    mlp_layer_fusion: bool = option(False, "One weight for gate and up.", ignored=KERNELS)
    enable_qkv_fusion: bool = option(True, "One weight for q, k, v.", ignored=KERNELS)
    qk_interleaved: bool = option(False, "Rotary pairs are neighbours.", ignored=ROTARY)
    embed_split_hidden: bool = option(
        False, "Cut the embedding along its width.", ignored="the embedding is cut along the vocabulary in every mode"
    )
    parallel_output: bool = option(True, "Logits stay cut.", ignored="full logits never exist on a rank")
    deepnorm: bool = option(False, "Unused in InternEvo.", ignored="InternEvo does not use it either")
    dropout_selective_checkpoint: bool = option(True, "Recompute dropout.", ignored="it belongs to dropout")
    device: str | None = option(None, "Device of the weights' making.", ignored="weights are made on the run's device")
    inject_info: dict[str, Any] | None = option(None, "Foreign models.", later="foreign models inside InternEvo's modules")

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        return dtype_name(value)

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        return float(value) if isinstance(value, bool | int) else value

    @property
    def mlp_width(self) -> int:
        """The MLP's width: ``intermediate_size``, or InternEvo's rounding of ``hidden_size * mlp_ratio``."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * self.mlp_ratio)
        return self.multiple_of * ((width + self.multiple_of - 1) // self.multiple_of)
