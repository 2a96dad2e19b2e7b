#!/usr/bin/env bash
# From a Hugging Face checkpoint to an evaluated DMC checkpoint, in one command:
#
#     TRAIN_DATA=data/train_text_document VALID_DATA=data/valid_text_document \
#         examples/retrofit.sh path/to/Llama-2-7b-hf 4
#
# on this machine's GPUs, or (the options of sbatch as the cluster wants them) on the nodes of a Slurm job:
#
#     DMC_REPO=$PWD RUN_DIR=/shared/runs/7b-cr4 TRAIN_DATA=... VALID_DATA=... \
#         sbatch --nodes 2 --gpus-per-node 8 examples/retrofit.sh /shared/Llama-2-7b-hf 4
#
# Steps: convert, zero-out, retrofit, finetune, evaluate. Finished steps are skipped: after a kill, a
# crash or Ctrl-C the same command resumes where it stopped, training from its newest checkpoint. In a
# Slurm job the signal before the time limit saves and puts the job back into the queue.
#
# Writes to RUN_DIR (default: runs/MODEL-cr4 in this folder): base/, zero-out/, retrofit/, finetune/ (Megatron
# torch_dist), hf/ (Hugging Face) and report/. Data: .bin/.idx prefixes from tools/preprocess_data.py.
# Optional: FLAGS_FILE (Megatron's flags of model and layout, one word a line; default: what `megatron-dmc
# plan` ranks first for this machine, kept in RUN_DIR/flags), PROCESSES_PER_NODE (default: the GPUs),
# GPU_MEMORY (for the plan; default: 80 % of the GPU's), SEQ_LENGTH (4096), GLOBAL_BATCH_SIZE (1024), LR (3e-5),
# ZERO_OUT_STEPS (250), RETROFIT_STEPS (3000 for each unit of CR above 1), FINETUNE_STEPS (2000), SAVE_INTERVAL
# (250), HELDOUT_DATA (VALID_DATA), CONVERT_FLAGS (of `megatron-dmc convert`, such as "--calibration-data
# $TRAIN_DATA"), DMC_FLAGS (--dmc-* of all stages, such as "--dmc-merge-delay 16"), REPORT_FLAGS (of `megatron-dmc
# report`; "skip" for a model that does not fit one GPU), DMC_PYTHON.
# With tasks that srun starts in a container, CONTAINER_IMAGE and CONTAINER_MOUNTS as in slurm/README.md.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# != 2)); then
    echo "usage: examples/retrofit.sh HUGGING_FACE_FOLDER TARGET_CR" >&2
    exit 2
fi
model=$1
export TARGET_CR=$2
if [[ -n ${SLURM_JOB_ID:-} ]]; then # Slurm runs a copy of this file
    : "${DMC_REPO:?folder of the megatron-dmc checkout, on a file system of all nodes}"
else
    DMC_REPO=${DMC_REPO:-$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
fi
export DMC_REPO PYTHONPATH=$DMC_REPO${PYTHONPATH:+:$PYTHONPATH}
trap : USR1 # Slurm's notice during convert and evaluate: they finish; training saves, see stages.sh
# shellcheck source=examples/stages.sh
source "$DMC_REPO/examples/stages.sh"
if [[ -z ${DMC_PYTHON:-} && -x $DMC_REPO/.venv/bin/python ]]; then
    DMC_PYTHON=$DMC_REPO/.venv/bin/python
fi
export DMC_PYTHON=${DMC_PYTHON:-python3}
RUN_DIR=${RUN_DIR:-runs/$(basename "$model")-cr$TARGET_CR}
: "${TRAIN_DATA:?prefix of a .bin/.idx pair: tools/preprocess_data.py}"
: "${VALID_DATA:?prefix of a .bin/.idx pair of held-out text}"
mkdir -p "$RUN_DIR"
RUN_DIR=$(cd -P "$RUN_DIR" && pwd)

dmc() { "$DMC_PYTHON" -m megatron_dmc.cli.main "$@"; }

if [[ -z ${PROCESSES_PER_NODE:-} ]]; then
    PROCESSES_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
    ((PROCESSES_PER_NODE > 0)) || PROCESSES_PER_NODE=1
fi

# --- convert ---------------------------------------------------------------------------------------

BASE_CHECKPOINT=$RUN_DIR/base
if [[ -s $BASE_CHECKPOINT/latest_checkpointed_iteration.txt ]]; then
    say "convert is done"
else
    say "convert $model"
    # shellcheck disable=SC2086
    dmc convert --to megatron --force ${CONVERT_FLAGS:-} "$model" "$BASE_CHECKPOINT"
fi
if [[ -f $BASE_CHECKPOINT/tokenizer/tokenizer.model ]]; then
    TOKENIZER_TYPE=SentencePieceTokenizer TOKENIZER_MODEL=$BASE_CHECKPOINT/tokenizer/tokenizer.model
else
    TOKENIZER_TYPE=HuggingFaceTokenizer TOKENIZER_MODEL=$BASE_CHECKPOINT/tokenizer
fi

if [[ -z ${FLAGS_FILE:-} ]]; then
    FLAGS_FILE=$RUN_DIR/flags
    if [[ ! -s $FLAGS_FILE ]]; then
        if [[ -z ${GPU_MEMORY:-} ]]; then
            GPU_MEMORY=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null |
                awk 'NR == 1 { printf "%dGB", 0.8 * $1 * 1048576 / 1e9 }') || true
        fi
        say "plan for ${SLURM_JOB_NUM_NODES:-1} x $PROCESSES_PER_NODE processes"
        dmc plan --model "$model" --json --gpus $((PROCESSES_PER_NODE * ${SLURM_JOB_NUM_NODES:-1})) \
            --gpus-per-node "$PROCESSES_PER_NODE" --gpu-memory "${GPU_MEMORY:-64GB}" \
            --seq-length "${SEQ_LENGTH:-4096}" --global-batch-size "${GLOBAL_BATCH_SIZE:-1024}" \
            --dmc-target-cr "$TARGET_CR" >"$RUN_DIR/plan.json"
        "$DMC_PYTHON" -c 'import json, sys
plan = json.load(open(sys.argv[1]))
print(*plan["model"]["flags"], *plan["best"]["flags"], sep="\n")' "$RUN_DIR/plan.json" >"$FLAGS_FILE.part"
        mv "$FLAGS_FILE.part" "$FLAGS_FILE"
    fi
fi

# --- train -----------------------------------------------------------------------------------------

for stage in zero-out retrofit finetune; do
    run_stage "$stage" || exit
done

# --- evaluate --------------------------------------------------------------------------------------

if [[ ! -f $RUN_DIR/hf/config.json ]]; then
    say "convert to Hugging Face's format"
    dmc convert --to hf --force "$RUN_DIR/finetune" "$RUN_DIR/hf"
fi
if [[ ${REPORT_FLAGS:-} == skip || -f $RUN_DIR/report/report.html ]]; then
    say "evaluate is done, or skipped"
else
    say "evaluate"
    # shellcheck disable=SC2086 # several flags
    dmc report --base "$BASE_CHECKPOINT" --model "$RUN_DIR/finetune" --data "${HELDOUT_DATA:-$VALID_DATA}" \
        --stage zero-out="$RUN_DIR/zero-out/tensorboard" --stage retrofit="$RUN_DIR/retrofit/tensorboard" \
        --stage finetune="$RUN_DIR/finetune/tensorboard" --output "$RUN_DIR/report" ${REPORT_FLAGS:-}
fi
say "done: $RUN_DIR/hf, $RUN_DIR/report"
