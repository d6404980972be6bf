"""Llama-3.2-1B in its published shape: a tied head, and rotary embeddings scaled by 32.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/1B_llama3_2.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "1B_llama3_2_train"
model_type = "LLAMA3"

model = dict(
    num_layers=16,
    hidden_size=2048,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    head_dim=64,
    intermediate_size=8192,
    vocab_size=128256,
    rope_base=500000,
    rope_scaling=dict(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    max_position_embeddings=131072,
    layer_norm_epsilon=1e-5,
    no_bias=True,
    tie_word_embeddings=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)

data = dict(data, seq_len=8192)
