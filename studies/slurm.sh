#!/bin/bash
# A study on several nodes of a Slurm cluster: one Ray node per Slurm node, the driver on the first.
#
#   sbatch --nodes=4 --gpus-per-node=8 studies/slurm.sh my-study.yaml [options of `loratune run`]
#
# The study's folder (output.folder) and the environment with loratune[ray] must be seen by all nodes under the same path, as home
# and scratch folders are; the model and the data are then read where they lie. Without a shared disk, leave
# --executor.options.shared_folder away: everything reaches the nodes through Ray. Two minutes before the time limit checkpoints are
# written, and the job goes back to the queue, to go on from there; a preempted one is put back by Slurm.
#SBATCH --job-name=loratune
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
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

# A study is planned for the devices that are there when it begins.
joined='import os, ray; ray.init(logging_level="ERROR"); raise SystemExit(sum(n["Alive"] for n in ray.nodes()) < int(os.environ["SLURM_JOB_NUM_NODES"]))'
tries=0
until python -c "$joined"; do
    if ((++tries > 60)); then echo "Not all $SLURM_JOB_NUM_NODES nodes joined Ray; the study begins with those that did." >&2; break; fi
    sleep 2
done

loratune run "$@" --executor.name ray --executor.options.shared_folder true &
driver=$! again=
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM  # cancelled or preempted: checkpoints are written, then the job ends
trap 'again=yes; kill -TERM "$driver" 2>/dev/null || true' USR1  # the time limit
code=0
wait "$driver" || wait "$driver" || code=$?
if [[ $again && $code -eq 130 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
