"""Gemma-7B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/7B_gemma.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "7B_gemma_train"
model_type = "GEMMA"

model = dict(
    num_layers=28,
    hidden_size=3072,
    num_attention_heads=16,
    intermediate_size=24576,
    vocab_size=256000,
    rope_base=10000,
    max_position_embeddings=8192,
    layer_norm_epsilon=1e-6,
    head_dim=256,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
