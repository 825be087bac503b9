#!/usr/bin/env bash
# slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [options of tools/train.py]
# Environment: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, SRUN_ARGS (split at blanks), PYTHON.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [WORK_DIR] [options]" >&2
    exit 2
fi

arguments=("$3" --launcher slurm)
if [ $# -gt 3 ] && [[ $4 != -* ]]; then
    arguments+=(--work-dir "$4" "${@:5}")
else
    arguments+=("${@:4}")
fi
read -r -a srun_args <<< "${SRUN_ARGS:-}"

exec srun -p "$1" \
    --job-name="$2" \
    --gres=gpu:"${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    "${srun_args[@]}" \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "${arguments[@]}"
