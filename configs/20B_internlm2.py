"""InternLM2-20B in its published shape. Set the folders, then:

    torchrun --nproc-per-node 8 train.py --config configs/20B_internlm2.py --launcher torch
"""

JOB_NAME = "20B_internlm2_train"
model_type = "INTERNLM2_PUBLIC"
DO_ALERT = False

VOCAB_SIZE = 92544
SEQ_LEN = 4096
HIDDEN_SIZE = 6144
NUM_ATTENTION_HEAD = 48
NUM_KV_ATTENTION_HEAD = 8
MLP_RATIO = 8 / 3
NUM_LAYER = 48

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
    rope_base=1000000,
    max_position_embeddings=32768,
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
