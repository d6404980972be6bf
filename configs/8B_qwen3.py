"""Qwen3-8B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/8B_qwen3.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "8B_qwen3_train"
model_type = "QWEN3"

model = dict(
    num_layers=36,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    intermediate_size=12288,
    vocab_size=151936,
    rope_base=1000000,
    max_position_embeddings=40960,
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
