"""Llama-2-70B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/70B_llama2.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "70B_llama2_train"
model_type = "LLAMA2"

model = dict(
    num_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_kv_attention_heads=8,
    mlp_ratio=3.5,
    vocab_size=32000,
    rope_base=10000,
    max_position_embeddings=4096,
    layer_norm_epsilon=1e-5,
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=True,
    compile=True,
)

# Weights, gradients and optimizer state over all ranks.
parallel = dict(zero1=dict(size=-1, fsdp=True))
