"""Llama-2-7B in its published shape. Set the folders, then:

    torchrun --nproc-per-node 8 train.py --config configs/7B_llama2.py --launcher torch
"""

JOB_NAME = "7B_llama2_train"
model_type = "LLAMA2"
DO_ALERT = False

VOCAB_SIZE = 32000
SEQ_LEN = 4096
HIDDEN_SIZE = 4096
NUM_ATTENTION_HEAD = 32
NUM_KV_ATTENTION_HEAD = 32
MLP_RATIO = 8 / 3
NUM_LAYER = 32

TRAIN_FOLDER = "data/train"
VALID_FOLDER = "data/valid"
TOTAL_STEPS = 50000
CHECKPOINT_EVERY = 1000

model = dict(
    num_layers=NUM_LAYER,
    hidden_size=HIDDEN_SIZE,
    num_attention_heads=NUM_ATTENTION_HEAD,
    num_kv_attention_heads=NUM_KV_ATTENTION_HEAD,
    mlp_ratio=MLP_RATIO,
    vocab_size=VOCAB_SIZE,
    rope_base=10000,
    max_position_embeddings=4096,
    layer_norm_epsilon=1e-5,
    no_bias=True,
    dtype="torch.bfloat16",
    checkpoint=False,
    compile=True,
)

data = dict(
    seq_len=SEQ_LEN,
    micro_bsz=1,
    micro_num=4,
    total_steps=TOTAL_STEPS,
    pack_sample_into_one=False,
    min_length=50,
    train_folder=TRAIN_FOLDER,
    valid_folder=VALID_FOLDER,
    valid_every=1000,
)

adam = dict(lr=3e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.1)
lr_scheduler = dict(total_steps=TOTAL_STEPS, init_steps=0, warmup_ratio=0.01, eta_min=3e-5)
hybrid_zero_optimizer = dict(clip_grad_norm=1.0)
loss = dict(label_smoothing=0)

# ZeRO-1.5 in groups of 8: optimizer state is shared inside a node and replicated over nodes.
parallel = dict(zero1=dict(size=8))

ckpt = dict(
    save_ckpt_folder=f"runs/{JOB_NAME}",
    checkpoint_every=CHECKPOINT_EVERY,
    oss_snapshot_freq=CHECKPOINT_EVERY // 4,
    keep_last=3,
)
