"""Gemma-2-2B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/2B_gemma2.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "2B_gemma2_train"
model_type = "GEMMA2"

model = dict(
    num_layers=26,
    hidden_size=2304,
    num_attention_heads=8,
    num_kv_attention_heads=4,
    head_dim=256,
    intermediate_size=9216,
    vocab_size=256000,
    rope_base=10000,
    max_position_embeddings=8192,
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
