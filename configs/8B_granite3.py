"""Granite-3.1-8B-base in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/8B_granite3.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "8B_granite3_train"
model_type = "GRANITE"

model = dict(
    num_layers=40,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    intermediate_size=12800,
    vocab_size=49152,
    rope_base=10000000,
    max_position_embeddings=131072,
    layer_norm_epsilon=1e-5,
    embedding_multiplier=12.0,
    attention_multiplier=0.0078125,
    residual_multiplier=0.22,
    logits_scaling=16.0,
    tie_word_embeddings=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
