"""Phi-3-mini (4k) in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/4B_phi3.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "4B_phi3_train"
model_type = "PHI3"

model = dict(
    num_layers=32,
    hidden_size=3072,
    num_attention_heads=32,
    num_kv_attention_heads=32,
    intermediate_size=8192,
    vocab_size=32064,
    rope_base=10000,
    max_position_embeddings=4096,
    layer_norm_epsilon=1e-5,
    use_sliding_window=True,
    sliding_window=2047,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
