"""Qwen3-30B-A3B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/30B_qwen3_MoE.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "30B_qwen3_MoE_train"
model_type = "QWEN3MOE"

model = dict(
    num_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    num_kv_attention_heads=4,
    intermediate_size=6144,
    vocab_size=151936,
    rope_base=1000000,
    max_position_embeddings=40960,
    layer_norm_epsilon=1e-6,
    head_dim=128,
    num_experts=128,
    top_k=8,
    moe_intermediate_size=768,
    moe_type='Dropless',
    dtype="torch.bfloat16",
    checkpoint=True,
    compile=True,
)

loss = dict(label_smoothing=0, moe_loss_coeff=0.001, moe_loss_kind="pooled")

# Weights, gradients and optimizer state over all ranks.
parallel = dict(zero1=dict(size=-1, fsdp=True))
