"""SmolLM3-3B in its published shape: every fourth layer has no rotary embedding.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/3B_smollm3.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "3B_smollm3_train"
model_type = "SMOLLM3"

model = dict(
    num_layers=36,
    hidden_size=2048,
    num_attention_heads=16,
    num_kv_attention_heads=4,
    intermediate_size=11008,
    vocab_size=128256,
    rope_base=5000000,
    no_rope_layer_interval=4,
    max_position_embeddings=65536,
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)
