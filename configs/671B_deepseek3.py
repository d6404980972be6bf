"""DeepSeek-V3 in its published shape. Experts are over all ranks of a stage; a rank must have room for its part.

Its 8 stages need a multiple of 8 processes:

    srun python train.py --config configs/671B_deepseek3.py --launcher slurm
"""

from configs._base_.pretrain import *

JOB_NAME = "671B_deepseek3_train"
model_type = "DEEPSEEKV3"

model = dict(
    num_layers=61,
    hidden_size=7168,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    vocab_size=129280,
    rope_base=10000,
    max_position_embeddings=4096,
    layer_norm_epsilon=1e-6,
    num_experts=256,
    top_k=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_shared_experts=1,
    moe_intermediate_size=2048,
    mlp_only_layers=[0, 1, 2],
    moe_type="Dropless",
    moe_layer_kwargs=dict(bias_update_speed=0.001),
    dtype="torch.bfloat16",
    checkpoint=True,
    compile=True,
)

loss = dict(label_smoothing=0, moe_loss_coeff=0.0001)

data = dict(data, micro_num=32)
parallel = dict(pipeline=dict(size=8), expert=dict(size=-1), zero1=dict(size=-1))
