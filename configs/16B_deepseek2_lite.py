"""DeepSeek-V2-Lite in its published shape.

    torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/16B_deepseek2_lite.py --launcher torch
"""

from configs._base_.pretrain import *

JOB_NAME = "16B_deepseek2_lite_train"
model_type = "DEEPSEEKV2"

model = dict(
    num_layers=27,
    hidden_size=2048,
    num_attention_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=10944,
    vocab_size=102400,
    rope_base=10000,
    max_position_embeddings=4096,
    layer_norm_epsilon=1e-6,
    num_experts=64,
    top_k=6,
    num_shared_experts=2,
    moe_intermediate_size=1408,
    mlp_only_layers=[0],
    moe_type="Dropless",
    dtype="torch.bfloat16",
    checkpoint=True,
    compile=True,
)

loss = dict(label_smoothing=0, moe_loss_coeff=0.001)

# Weights, gradients and optimizer state over all ranks.
parallel = dict(zero1=dict(size=-1, fsdp=True))
