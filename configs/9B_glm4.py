"""GLM-4-9B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/9B_glm4.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "9B_glm4_train"
model_type = "GLM"

model = dict(
    num_layers=40,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=2,
    head_dim=128,
    intermediate_size=13696,
    vocab_size=151552,
    rope_base=10000,
    max_position_embeddings=8192,
    layer_norm_epsilon=1.5625e-7,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
