"""Random small models of every family that transformers has: transformers' model and ours, with the same weights."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import transformers as tf
from hypothesis import strategies as st
from torch import Tensor

from internevo.models.decoder import Decoder, parameter_shapes
from internevo.models.families.registry import decoder_from_hf
from internevo.models.huggingface.folder import naming

SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
]  # fmt: skip


@st.composite
def common(draw: st.DrawFn, head_dims: Sequence[int] = (4, 8, 16)) -> dict[str, Any]:
    kv = draw(st.sampled_from([1, 2, 3]))
    return dict(
        num_attention_heads=kv * draw(st.sampled_from([1, 2, 4])),
        num_key_value_heads=kv,
        head_dim=draw(st.sampled_from(head_dims)),
        hidden_size=draw(st.sampled_from([24, 48, 72])),
        intermediate_size=draw(st.sampled_from([17, 48])),
        vocab_size=draw(st.sampled_from([67, 128, 131])),
        num_hidden_layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-3, 1e-6])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        max_position_embeddings=16,
        rope_scaling=draw(st.sampled_from(SCALINGS).map(copy)),  # transformers changes what it is given
    )


@st.composite
def sparse(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.sampled_from([2, 4, 7]))
    return dict(count=count, top_k=draw(st.integers(1, min(count, 3))), size=draw(st.sampled_from([12, 20])))


@st.composite
def llama(draw: st.DrawFn) -> Any:
    return tf.LlamaConfig(**draw(common()), attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))


@st.composite
def internlm3(draw: st.DrawFn) -> Any:
    bias = draw(st.booleans())
    shape = draw(common())
    shape["hidden_size"] = shape["num_attention_heads"] * 8  # transformers insists on a multiple
    shape |= {"qkv_bias": bias, "bias": bias}
    # The embedding of a padding token would have no gradient.
    return tf.models.internlm3.configuration_internlm3.InternLM3Config(**shape, pad_token_id=None)


def no_head_dim(shape: dict[str, Any]) -> dict[str, Any]:
    """Changes a shape for families whose head size is hidden_size / num_attention_heads."""
    shape["hidden_size"] = shape["num_attention_heads"] * shape.pop("head_dim")
    return shape


@st.composite
def windows(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    return dict(use_sliding_window=draw(st.booleans()), sliding_window=5, max_window_layers=draw(st.integers(0, layers)))


@st.composite
def qwen2(draw: st.DrawFn) -> Any:
    shape = no_head_dim(draw(common()))
    return tf.Qwen2Config(**shape, **draw(windows(shape["num_hidden_layers"])))


@st.composite
def gemma(draw: st.DrawFn) -> Any:
    return tf.GemmaConfig(**draw(common()))


@st.composite
def qwen3(draw: st.DrawFn) -> Any:
    shape = draw(common())
    return tf.Qwen3Config(**shape, **draw(windows(shape["num_hidden_layers"])), attention_bias=draw(st.booleans()))


@st.composite
def mistral(draw: st.DrawFn) -> Any:
    return tf.MistralConfig(**draw(common()), sliding_window=draw(st.sampled_from([None, 5])))


@st.composite
def smollm3(draw: st.DrawFn) -> Any:
    shape = draw(common())
    layers = shape["num_hidden_layers"]
    rotate = st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
    kinds = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)
    used = draw(st.booleans())
    return tf.SmolLM3Config(
        **shape, no_rope_layers=draw(st.none() | rotate), no_rope_layer_interval=draw(st.integers(1, 4)),
        use_sliding_window=used, sliding_window=5, layer_types=draw(st.none() | kinds) if used else None,
        attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()), pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@st.composite
def granite(draw: st.DrawFn) -> Any:
    numbers = {"embedding_multiplier": 7.0, "attention_multiplier": 0.4, "residual_multiplier": 0.3, "logits_scaling": 3.0}
    drawn: dict[str, Any] = {name: draw(st.sampled_from([1.0, value])) for name, value in numbers.items()}
    return tf.GraniteConfig(**draw(common()), **drawn, attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))


@st.composite
def mixtral(draw: st.DrawFn) -> Any:
    moe = draw(sparse())
    return tf.MixtralConfig(
        **draw(common()), num_local_experts=moe["count"], num_experts_per_tok=moe["top_k"],
        sliding_window=draw(st.sampled_from([None, 5])),
    )  # fmt: skip


@st.composite
def qwen2moe(draw: st.DrawFn) -> Any:
    moe, shape = draw(sparse()), no_head_dim(draw(common()))
    return tf.Qwen2MoeConfig(
        **shape, **draw(windows(shape["num_hidden_layers"])), num_experts=moe["count"], num_experts_per_tok=moe["top_k"],
        moe_intermediate_size=moe["size"], shared_expert_intermediate_size=28, norm_topk_prob=draw(st.booleans()),
        decoder_sparse_step=draw(st.sampled_from([1, 2])), mlp_only_layers=draw(st.sampled_from([[], [0]])),
        qkv_bias=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def qwen3moe(draw: st.DrawFn) -> Any:
    moe = draw(sparse())
    return tf.Qwen3MoeConfig(
        **draw(common()), num_experts=moe["count"], num_experts_per_tok=moe["top_k"], moe_intermediate_size=moe["size"],
        norm_topk_prob=draw(st.booleans()), decoder_sparse_step=draw(st.sampled_from([1, 2])), mlp_only_layers=[],
        use_sliding_window=draw(st.booleans()), sliding_window=5, attention_bias=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def phi3(draw: st.DrawFn) -> Any:
    shape, share = draw(common((8, 16))), draw(st.sampled_from([1.0, 0.5]))
    shape["rope_scaling"] = None
    if draw(st.booleans()):
        pairs = int(shape["head_dim"] * share) // 2
        short, long = (draw(st.lists(st.floats(1.0, 8.0), min_size=pairs, max_size=pairs)) for _ in range(2))
        shape["rope_scaling"] = {"type": "longrope", "short_factor": short, "long_factor": long}
    shape["hidden_size"] = shape["num_attention_heads"] * shape["head_dim"]  # with which transformers counts the factors
    shape["partial_rotary_factor"] = share
    window = draw(st.sampled_from([None, 5]))
    return tf.Phi3Config(
        **shape, original_max_position_embeddings=8, sliding_window=window, pad_token_id=None, eos_token_id=None
    )  # fmt: skip


@st.composite
def glm(draw: st.DrawFn, kind: Any) -> Any:
    shape = draw(common((8, 16)))
    shape |= {"attention_bias": draw(st.booleans()), "partial_rotary_factor": draw(st.sampled_from([0.5, 1.0]))}
    return kind(**shape, pad_token_id=None, eos_token_id=2)


@st.composite
def gemma3(draw: st.DrawFn) -> Any:
    shape = draw(common())
    shape["hidden_size"] = shape["num_attention_heads"] * 8  # transformers insists on a multiple
    scaling = shape.pop("rope_scaling")
    if scaling is not None and scaling["rope_type"] != "linear":
        scaling = None
    layers, kinds = shape["num_hidden_layers"], st.sampled_from(["full_attention", "sliding_attention"])
    shape |= {"rope_scaling": scaling, "rope_local_base_freq": 50.0}
    return tf.Gemma3TextConfig(
        **shape, query_pre_attn_scalar=draw(st.sampled_from([8, 12])),
        sliding_window=5, layer_types=draw(st.lists(kinds, min_size=layers, max_size=layers)), pad_token_id=None,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip


@st.composite
def gemma2(draw: st.DrawFn) -> Any:
    shape = draw(common())
    shape["hidden_size"] = shape["num_attention_heads"] * 8  # transformers insists on a multiple
    layers, kinds = shape["num_hidden_layers"], st.sampled_from(["full_attention", "sliding_attention"])
    caps = st.sampled_from([None, 0.5, 30.0])
    return tf.Gemma2Config(
        **shape, query_pre_attn_scalar=draw(st.sampled_from([8, 12])), attn_logit_softcapping=draw(caps),
        final_logit_softcapping=draw(caps), sliding_window=5,
        layer_types=draw(st.none() | st.lists(kinds, min_size=layers, max_size=layers)), pad_token_id=None, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip


@st.composite
def deepseek(draw: st.DrawFn, version: int) -> Any:
    shape, layers = draw(common()), draw(st.integers(1, 3))
    heads = shape["num_attention_heads"] = draw(st.sampled_from([1, 2, 4]))
    mscale = {**(SCALINGS[4] or {}), "mscale": 0.7, "mscale_all_dim": 1.3}
    scaling = draw(st.sampled_from([None, *SCALINGS[3:], mscale]).map(copy))
    groups, per_group = draw(st.sampled_from([(1, 4), (2, 3), (4, 2)]))
    chosen = draw(st.integers(1, groups))
    shape |= {
        "num_key_value_heads": heads, "hidden_size": heads * 24, "rope_scaling": scaling, "num_hidden_layers": layers,
        "q_lora_rank": draw(st.sampled_from([None, 12])), "kv_lora_rank": 10, "qk_nope_head_dim": draw(st.sampled_from([4, 6])),
        "qk_rope_head_dim": draw(st.sampled_from([4, 6])), "v_head_dim": draw(st.sampled_from([5, 8])),
        "n_routed_experts": groups * per_group, "n_shared_experts": draw(st.integers(1, 2)), "moe_intermediate_size": 12,
        "num_experts_per_tok": draw(st.integers(1, min(3, chosen * per_group))), "n_group": groups, "topk_group": chosen,
        "first_k_dense_replace": draw(st.integers(0, layers)), "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "attention_bias": draw(st.booleans()), "pad_token_id": None,
    }  # fmt: skip
    del shape["head_dim"]
    if version == 2:
        method = "group_limited_greedy" if groups > 1 else "greedy"
        return tf.DeepseekV2Config(**shape, topk_method=method)
    return tf.DeepseekV3Config(
        **shape, rope_interleave=draw(st.booleans()), norm_topk_prob=draw(st.booleans()), num_mtp_layers=0
    )  # fmt: skip


CONFIGS = {
    "LLAMA2": llama(), "INTERNLM3": internlm3(), "QWEN2": qwen2(), "GEMMA": gemma(), "QWEN3": qwen3(),
    "MIXTRALMOE": mixtral(), "QWEN2MOE": qwen2moe(), "QWEN3MOE": qwen3moe(), "PHI3": phi3(), "GLM": glm(tf.GlmConfig),
    "GLM4": glm(tf.Glm4Config), "GEMMA2": gemma2(), "GEMMA3": gemma3(),
    "DEEPSEEKV2": deepseek(2), "DEEPSEEKV3": deepseek(3), "MISTRAL": mistral(),
    "SMOLLM3": smollm3(), "GRANITE": granite(),
}  # fmt: skip


def pair(config: Any, seed: int) -> tuple[Any, Decoder]:
    """Returns transformers' model and ours with the same random weights. No weight is 1 or 0, so that a lost one is noticed."""
    torch.manual_seed(seed)
    config._attn_implementation = config._experts_implementation = "eager"
    theirs = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            vector = parameter.dim() == 1
            parameter.copy_(torch.randn_like(parameter) * (0.2 if vector else 0.08))
            if vector and not name.endswith("bias"):
                parameter.add_(1.0)
            if "gate.weight" in name or "router" in name:
                parameter.mul_(8)  # so that rounding does not change which experts are chosen
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return theirs, ours_of(theirs)


def disk_tensors(theirs: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Returns transformers' weights or their gradients by their names on disk, where experts are not fused as in memory. With
    the weights come the balance biases of routers."""
    biases = {} if gradients else dict(theirs.named_buffers())
    found = {name: bias for name, bias in biases.items() if name.endswith("e_score_correction_bias")}
    for name, parameter in theirs.named_parameters():
        tensor = parameter.grad if gradients else parameter.detach()
        if ".experts." not in name:
            found[name] = tensor
            continue
        base, mixtral = name.rsplit(".", 1)[0], theirs.config.model_type == "mixtral"
        base = base.replace(".mlp.", ".block_sparse_moe.") if mixtral else base
        for expert, one in enumerate(tensor):
            if name.endswith("gate_up_proj"):
                gate, up = one.chunk(2)
                found[f"{base}.{expert}.{'w1' if mixtral else 'gate_proj'}.weight"] = gate
                found[f"{base}.{expert}.{'w3' if mixtral else 'up_proj'}.weight"] = up
            else:
                found[f"{base}.{expert}.{'w2' if mixtral else 'down_proj'}.weight"] = one
    if theirs.config.model_type == "mixtral":
        found = {k.replace(".mlp.gate.", ".block_sparse_moe.gate."): v for k, v in found.items()}
    return found


def ours_of(theirs: Any) -> Decoder:
    """Returns our model with the weights of transformers' model."""
    values = theirs.config.to_dict()
    values["architectures"] = [type(theirs).__name__]
    config = decoder_from_hf(values, "test")
    model = Decoder(config)
    load_disk_tensors(model, disk_tensors(theirs))
    return model


@torch.no_grad()
def load_disk_tensors(model: Decoder, disk: dict[str, Tensor]) -> None:
    """Copies tensors, given by their names on disk, into a model."""
    mappings = naming(model.config).by_parameter
    for name, parameter in model.stored().items():
        if name not in mappings:
            continue
        rows = parameter.flatten(0, -2) if parameter.dim() > 1 else parameter
        for m in mappings[name]:
            rows[m.row : m.row + m.count] = disk[m.disk][m.disk_row : m.disk_row + m.count]


def to_disk(model: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts tensors by parameter name to tensors by name on disk."""
    names = naming(model.config)
    found = {disk: torch.empty(shape) for disk, shape in names.shapes.items() if not disk.endswith("e_score_correction_bias")}
    for name in parameter_shapes(model.config):
        tensor = tensors[name]
        rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor
        for m in names.by_parameter[name]:
            found[m.disk][m.disk_row : m.disk_row + m.count] = rows[m.row : m.row + m.count]
    return found
