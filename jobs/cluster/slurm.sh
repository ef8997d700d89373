#!/usr/bin/env bash
# A job on whole nodes of a Slurm cluster, with a shared disk that holds fluxcli's environment, the input and the output.
#
#   sbatch --nodes 4 jobs/cluster/slurm.sh prompts.jsonl /shared/out --batch-size 16
#
# What follows the directory goes to `fluxcli batch`. The same command again goes on where the last one was stopped,
# by the time limit too: five minutes before it the job commits what it has begun.
#SBATCH --job-name=fluxcli
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail

if (( $# < 2 )); then
  echo "usage: sbatch $0 INPUT DIRECTORY [options of fluxcli batch]" >&2
  exit 2
fi
input=$1 directory=$2
shift 2
source "${FLUXCLI_VENV:-$HOME/fluxcli/.venv}/bin/activate"

port=$((20000 + SLURM_JOB_ID % 10000))
head=$(hostname)
address=$(hostname --ip-address | awk '{print $1}'):$port
# Nobody else on the network is to run code on these nodes.
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

trap 'kill $(jobs -p) 2>/dev/null' EXIT
start=(ray start --block --disable-usage-stats --num-gpus="$SLURM_GPUS_ON_NODE")
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  "${start[@]}" --head --node-ip-address="${address%:*}" --port="$port" --include-dashboard=false &
if (( SLURM_JOB_NUM_NODES > 1 )); then
  srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    bash -c 'sleep 10; exec "$@"' start "${start[@]}" --address="$address" &
fi

# A job takes the GPUs that are there when it starts: so wait for all nodes, ten minutes at most.
python - "$address" "$SLURM_JOB_NUM_NODES" <<'PY'
import sys, time, ray
address, nodes = sys.argv[1], int(sys.argv[2])
end = time.monotonic() + 600
while True:
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        break
    except ConnectionError:
        if time.monotonic() > end:
            sys.exit(f"no Ray answers at {address}")
        time.sleep(5)
while (there := sum(node["Alive"] for node in ray.nodes())) < nodes:
    if time.monotonic() > end:
        sys.exit(f"{there} of {nodes} nodes joined")
    time.sleep(2)
PY

fluxcli batch "$input" -o "$directory" --ray "$address" "$@" &
job=$!
trap 'kill -TERM $job' TERM
status=0
wait "$job" || status=$?
if kill -0 "$job" 2>/dev/null; then  # the signal ended the wait, and the job is committing
  status=0
  wait "$job" || status=$?
fi
exit "$status"
