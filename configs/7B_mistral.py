"""Mistral-7B-v0.1 in its published shape: a sliding window in every layer.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/7B_mistral.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "7B_mistral_train"
model_type = "MISTRAL"

model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    intermediate_size=14336,
    vocab_size=32000,
    rope_base=10000,
    max_position_embeddings=32768,
    layer_norm_epsilon=1e-5,
    use_sliding_window=True,
    sliding_window=4096,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
