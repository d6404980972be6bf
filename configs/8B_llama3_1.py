"""Llama-3.1-8B in its published shape: Llama 3 with scaled rotary embeddings, for 131072 tokens.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/8B_llama3_1.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "8B_llama3_1_train"
model_type = "LLAMA3"

model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    mlp_ratio=3.5,
    vocab_size=128256,
    rope_base=500000,
    rope_scaling=dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    max_position_embeddings=131072,
    layer_norm_epsilon=1e-5,
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)

data = dict(data, seq_len=8192)
