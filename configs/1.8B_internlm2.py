"""InternLM2-1.8B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/1.8B_internlm2.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "1.8B_internlm2_train"
model_type = "INTERNLM2_PUBLIC"

model = dict(
    num_layers=24,
    hidden_size=2048,
    num_attention_heads=16,
    num_kv_attention_heads=8,
    mlp_ratio=4,
    vocab_size=92544,
    rope_base=1000000,
    max_position_embeddings=32768,
    layer_norm_epsilon=1e-5,
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
