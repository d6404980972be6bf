"""Qwen2-57B-A14B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/57B_qwen2_MoE.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "57B_qwen2_MoE_train"
model_type = "QWEN2MOE"

model = dict(
    num_layers=28,
    hidden_size=3584,
    num_attention_heads=28,
    num_kv_attention_heads=4,
    intermediate_size=18944,
    vocab_size=151936,
    rope_base=1000000,
    max_position_embeddings=131072,
    layer_norm_epsilon=1e-6,
    num_experts=64,
    top_k=8,
    moe_intermediate_size=2560,
    num_shared_experts=8,
    moe_type='Dropless',
    dtype="torch.bfloat16",
    checkpoint=True,
    compile=True,
)

loss = dict(label_smoothing=0, moe_loss_coeff=0.001, moe_loss_kind="pooled")

# Weights, gradients and optimizer state over all ranks.
parallel = dict(zero1=dict(size=-1, fsdp=True))
