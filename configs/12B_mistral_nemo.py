"""Mistral-Nemo-Base-2407 (12B) in its published shape: no window, and heads that are smaller than hidden size / heads.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/12B_mistral_nemo.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "12B_mistral_nemo_train"
model_type = "MISTRAL"

model = dict(
    num_layers=40,
    hidden_size=5120,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=131072,
    rope_base=1000000,
    max_position_embeddings=128000,
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
