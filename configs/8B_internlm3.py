"""InternLM3-8B in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/8B_internlm3.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "8B_internlm3_train"
model_type = "INTERNLM3"

model = dict(
    num_layers=48,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_attention_heads=2,
    mlp_ratio=2.5,
    vocab_size=128512,
    rope_base=50000000,
    max_position_embeddings=32768,
    layer_norm_epsilon=1e-5,
    rope_scaling={'rope_type': 'dynamic', 'factor': 6.0},
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
