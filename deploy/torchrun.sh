#!/usr/bin/env bash
# Training on several machines without a scheduler. Run it on each of them with the same HEAD:
#
#   HEAD=node1:29500 NODES=4 deploy/torchrun.sh configs/7B_internlm2.py data.train_folder=/data/train
#
# NODES machines (default 1), GPUS processes on each (default: its GPUs), meeting at HEAD. The agents find each other there and
# agree on ranks; a machine that is lost ends the run on all, and the same command goes on from the last checkpoint.
#
# RESTARTS (default 0): how often all ranks may start again after one of them has failed, from the last checkpoint. When a machine is
# lost, the others wait 600 s (or PET_RDZV_CONF=join_timeout=SECONDS) for another one: run the same command there. Only the first
# machine, which is HEAD, may not be lost; then start the scripts again on all.
#
# SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to this script on any machine: all ranks finish their step, save and exit with 0, and so do
# the scripts. It takes as long as it takes. A signal to torchrun itself does the same, but torchrun kills the ranks of its machine
# after STOP seconds (default 600; torchrun's own default is 30), prints a traceback, and returns 1.
set -euo pipefail

config=${1:?usage: HEAD=HOST:PORT NODES=N deploy/torchrun.sh CONFIG [KEY=VALUE ...]}
shift
NODES=${NODES:-1}
[ "$NODES" = 1 ] || : "${HEAD:?is HOST:PORT of one of the machines}"
HEAD=${HEAD:-localhost:0} # alone, on any free port: two runs on a machine must not meet
GPUS=${GPUS:-$(command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | wc -l || echo 1)}

set -m # torchrun gets a process group of its own, so that a terminal sends Ctrl-C to this script alone
RESTARTS=${RESTARTS:-0}
# By default the agents keep one store for all starts and its address, so a machine that replaces another one would not find it.
[ "$RESTARTS" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun \
    --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB:-internevo}" --max-restarts "$RESTARTS" \
    --shutdown-timeout "${STOP:-600}" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$(dirname "$0")/../train.py" --config "$config" --launcher torch "$@" &
torchrun=$!

# The signal goes to the ranks, which are the child processes of torchrun; or to torchrun, if it has not started them yet.
stop() {
    # shellcheck disable=SC2046
    kill -TERM $(cat "/proc/$torchrun/task/$torchrun/children" || pgrep -P "$torchrun") || kill -TERM "$torchrun"
} 2>/dev/null
trap stop TERM USR1 HUP INT
exec 9> >(cat >/dev/null; stop) # this pipe is closed when the script ends, even if it is killed

code=0
wait "$torchrun" || code=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal has interrupted the wait
    code=0
    wait "$torchrun" || code=$?
done
exit "$code"
