"""What the ready configs have in common. Set the folders here, or on the command line:

    internevo train configs/7B_llama2.py data.train_folder=corpus/train data.valid_folder=corpus/valid
"""

CHECKPOINT_EVERY = 1000

data = dict(
    train_folder="data/train",
    valid_folder="data/valid",
    valid_every=1000,
    seq_len=4096,
    micro_bsz=1,
    micro_num=4,
    total_steps=50000,
    pack_sample_into_one=False,
    min_length=50,
)

adam = dict(lr=3e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.1)
lr_scheduler = dict(init_steps=0, warmup_ratio=0.01, eta_min=3e-5)
hybrid_zero_optimizer = dict(clip_grad_norm=1.0)
loss = dict(label_smoothing=0)

# ZeRO-1.5 over all ranks, however many there are. Hundreds of GPUs are faster with a smaller size, of which each group has a
# replica: 8 shards the optimizer state within a node of 8 GPUs. `internevo plan` finds the best.
parallel = dict(zero1=dict(size=-1))

# The run folder is runs/JOB_NAME.
ckpt = dict(
    checkpoint_every=CHECKPOINT_EVERY,
    oss_snapshot_freq=CHECKPOINT_EVERY // 4,
    keep_last=3,
)
