"""InternLM-7B in its published shape, by Intern Sequence Parallel, on a multiple of 4 processes.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/7B_isp_sft.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "7B_isp_sft"
model_type = "INTERNLM"

model = dict(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    mlp_ratio=8 / 3,
    vocab_size=103168,
    rope_base=10000,
    max_position_embeddings=2048,
    layer_norm_epsilon=1e-6,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)

data = dict(data, seq_len=2048)

# Intern Sequence Parallel: the sequence over 2 ranks, each weight over 4, optimizer state over what is left of the world.
parallel = dict(
    zero1=dict(size=-1),
    tensor=dict(size=2, mode="isp"),
    weight=dict(size=4, overlap=True),
)
