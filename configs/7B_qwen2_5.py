"""Qwen2.5-7B in its published shape: the architecture of Qwen2.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/7B_qwen2_5.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "7B_qwen2_5_train"
model_type = "QWEN2_5"

model = dict(
    num_layers=28,
    hidden_size=3584,
    num_attention_heads=28,
    num_kv_attention_heads=4,
    intermediate_size=18944,
    vocab_size=152064,
    rope_base=1000000,
    max_position_embeddings=131072,
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
