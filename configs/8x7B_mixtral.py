"""Mixtral-8x7B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/8x7B_mixtral.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "8x7B_mixtral_train"
model_type = "MIXTRALMOE"

model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    mlp_ratio=3.5,
    vocab_size=32000,
    rope_base=1000000,
    max_position_embeddings=32768,
    layer_norm_epsilon=1e-5,
    num_experts=8,
    top_k=2,
    moe_type='Dropless',
    dtype="torch.bfloat16",
    checkpoint=True,
    compile=True,
)

loss = dict(label_smoothing=0, moe_loss_coeff=0.02, moe_loss_kind="pooled")

# Weights, gradients and optimizer state over all ranks.
parallel = dict(zero1=dict(size=-1, fsdp=True))
