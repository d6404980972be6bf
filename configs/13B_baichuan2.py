"""Baichuan2-13B in its published shape. Positions are linear biases (ALiBi).

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/13B_baichuan2.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "13B_baichuan2_train"
model_type = "BAICHUAN2"

model = dict(
    num_layers=40,
    hidden_size=5120,
    num_attention_heads=40,
    intermediate_size=13696,
    vocab_size=125696,
    max_position_embeddings=4096,
    layer_norm_epsilon=1e-6,
    use_alibi=True,
    dtype="torch.bfloat16",
    checkpoint=True,
    compile=True,
)
