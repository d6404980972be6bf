"""Fine-tunes the demo's model to follow instructions: adapters (LoRA) beside its frozen weights.

Behind `make demo`:
    internevo tokenize configs/demo_instructions.json --format alpaca --tokenizer demo/data --output demo/instructions --valid-ratio 0.1
    internevo train configs/demo_lora.py --nproc 2
    internevo generate demo/lora --format alpaca --prompt "Import the module socket." --temperature 0
"""

from internlm.utils.utils import read_base

with read_base():
    from configs.demo import *

JOB_NAME = "demo_lora"

model.update(lora=dict(rank=16, alpha=32, targets=("wqkv", "wo", "w1", "w3", "w2")))

data.update(
    train_folder="demo/instructions/train",
    valid_folder="demo/instructions/valid",
    total_steps=100,
    valid_every=50,
)

adam.update(lr=5e-3, weight_decay=0.0)
lr_scheduler.update(eta_min=5e-4)

ckpt.update(
    save_ckpt_folder="demo/lora",
    load_ckpt_info=dict(path="demo/run", content=("model",), ckpt_type="internevo"),
)

monitor = {name: value for name, value in monitor.items() if not name.startswith("sample_")}
