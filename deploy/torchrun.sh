#!/usr/bin/env bash
# Training on several machines without a scheduler. Run it on each of them with the same HEAD:
#
#   HEAD=node1:29500 NODES=4 deploy/torchrun.sh configs/7B_internlm2.py data.train_folder=/data/train
#
# NODES machines (default 1), GPUS processes on each (default: its GPUs), meeting at HEAD. The agents find each other there and
# agree on ranks; a machine that is lost ends the run on all, and the same command goes on from the last checkpoint.
set -euo pipefail

config=${1:?usage: HEAD=HOST:PORT NODES=N deploy/torchrun.sh CONFIG [KEY=VALUE ...]}
shift
GPUS=${GPUS:-$(command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | wc -l || echo 1)}

exec torchrun \
    --nnodes "${NODES:-1}" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:29500}" --rdzv-id "${JOB:-internevo}" \
    "$(dirname "$0")/../train.py" --config "$config" --launcher torch "$@"
