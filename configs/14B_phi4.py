"""Phi-4 in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/14B_phi4.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "14B_phi4_train"
model_type = "PHI3"

model = dict(
    num_layers=40,
    hidden_size=5120,
    num_attention_heads=40,
    num_kv_attention_heads=10,
    intermediate_size=17920,
    vocab_size=100352,
    rope_base=250000,
    max_position_embeddings=16384,
    layer_norm_epsilon=1e-5,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
