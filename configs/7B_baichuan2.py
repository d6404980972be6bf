"""Baichuan2-7B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/7B_baichuan2.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "7B_baichuan2_train"
model_type = "BAICHUAN2"

model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    mlp_ratio=8 / 3,
    vocab_size=125696,
    rope_base=10000,
    max_position_embeddings=4096,
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
