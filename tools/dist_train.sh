#!/usr/bin/env bash
# dist_train.sh CONFIG GPUS [options of tools/train.py]; on a machine without a GPU, GPUS CPU processes.
# Environment: NNODES, NODE_RANK, MASTER_ADDR, PORT (another one for each job on a machine), PYTHON.
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG GPUS [options], with GPUS a positive number" >&2
    exit 2
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
