"""InternLM2.5-7B in its published shape: the architecture of InternLM2, with dynamic NTK scaling beyond 32768 tokens.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/7B_internlm2_5.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "7B_internlm2_5_train"
model_type = "INTERNLM2_5"

model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=8,
    mlp_ratio=3.5,
    vocab_size=92544,
    rope_base=1000000,
    rope_scaling=dict(rope_type="dynamic", factor=2.0),
    max_position_embeddings=32768,
    layer_norm_epsilon=1e-5,
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
