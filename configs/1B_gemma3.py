"""Gemma-3-1B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/1B_gemma3.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "1B_gemma3_train"
model_type = "GEMMA3"

model = dict(
    num_layers=26,
    hidden_size=1152,
    num_attention_heads=4,
    num_kv_attention_heads=1,
    head_dim=256,
    intermediate_size=6912,
    vocab_size=262144,
    rope_base=1000000,
    max_position_embeddings=32768,
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
