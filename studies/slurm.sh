#!/bin/bash
# A study on several nodes of a Slurm cluster: one Ray node per Slurm node, the driver on the first.
#
#   sbatch --nodes=4 --gpus-per-node=8 studies/slurm.sh my-study.yaml [options of `loratune run`]
#
# The study's folder (output.folder) and the environment with loratune[ray] must be seen by all nodes under the same path, as home
# and scratch folders are; the model and the data are then read where they lie. Without a shared disk, leave
# --executor.options.shared_folder away: everything reaches the nodes through Ray. The same command goes on after a time limit.
#SBATCH --job-name=loratune
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname -I | awk '{print $1}')
export RAY_ADDRESS="$address:${RAY_PORT:-6379}" RAY_USAGE_STATS_ENABLED=0
# Only this job's processes, which inherit the token, may speak to its Ray.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')

# --block: a node's Ray ends with its step, and with it the actors there.
srun --nodes=1 --ntasks=1 --overlap -w "$head" ray start --head --node-ip-address="$address" --port="${RAY_PORT:-6379}" --block &
tries=0
until ray status --address "$RAY_ADDRESS" >/dev/null 2>&1; do
    if ((++tries > 60)); then echo "Ray does not start on $head; see above. Is port ${RAY_PORT:-6379} free?" >&2; exit 1; fi
    sleep 2
done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
    srun --nodes="$others" --ntasks="$others" --overlap --exclude "$head" ray start --address "$RAY_ADDRESS" --block &
fi

loratune run "$@" --executor.name ray --executor.options.shared_folder true &
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM  # checkpoints are written; then the job ends, and may be requeued
wait "$driver" || wait "$driver"
