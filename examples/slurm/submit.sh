#!/usr/bin/env bash
# Submit the three stages of a retrofit, each after the one before it:
#
#     examples/slurm/submit.sh examples/slurm/llama2-70b.sbatch [options of sbatch]
#
# The environment that the sbatch file asks for is passed on. Prints the three job ids.
set -euo pipefail

job=${1:?name one of the .sbatch files}
shift
: "${RUN_DIR:?folder for checkpoints and logs, on a file system of all nodes}"
mkdir -p "$RUN_DIR"

dependency=()
for stage in zero-out retrofit finetune; do
    id=$(sbatch --parsable "${dependency[@]}" --job-name "dmc-$stage" \
        --output "$RUN_DIR/$stage.%j.log" --export "ALL,DMC_STAGE=$stage" "$@" "$job")
    id=${id%%;*} # --parsable may add the cluster's name
    echo "$stage $id"
    dependency=(--dependency "afterok:$id" --kill-on-invalid-dep=yes)
done
