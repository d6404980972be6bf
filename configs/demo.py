"""The demo: a small Llama-shaped model that learns to write Python from the standard library's source.

`make demo` prepares the data (demo/data) and runs everything; later: internevo train configs/demo.py --nproc 2
"""

JOB_NAME = "demo"
model_type = "LLAMA2"

VOCAB_SIZE = 4096
SEQ_LEN = 256
DATA = "demo/data"

model = dict(
    num_layers=5,
    hidden_size=256,
    num_attention_heads=4,
    num_kv_attention_heads=2,
    mlp_ratio=8 / 3,
    multiple_of=64,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=2048,
    dtype="torch.bfloat16",
)

data = dict(
    train_folder=f"{DATA}/train",
    valid_folder=f"{DATA}/valid",
    tokenizer_path=DATA,
    seq_len=SEQ_LEN,
    micro_bsz=8,
    # Rows per step over all processes: one process or two train the same batches.
    global_batch_size=16,
    total_steps=400,
    valid_every=100,
    valid_max_rows=256,
)

adam = dict(lr=3e-3, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.1)
lr_scheduler = dict(warmup_ratio=0.05, eta_min=3e-4)
hybrid_zero_optimizer = dict(clip_grad_norm=1.0)

parallel = dict(zero1=dict(size=-1))

ckpt = dict(
    save_ckpt_folder="demo/run",
    checkpoint_every=100,
    keep_last=2,
)

monitor = dict(
    log_every=10,
    sample_prompts=("def", "import", "class"),  # no space at the end: it is the beginning of the next token
    sample_every=100,
    sample_tokens=96,
)
