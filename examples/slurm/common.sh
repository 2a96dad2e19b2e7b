# shellcheck shell=bash
# What the sbatch files share: they source this file and call `run_stage`; on every node `srun` runs
# it again as `bash common.sh node ...`.
#
# A stage ends in one of three ways:
#   its last iteration is reached        exit 0, and the stage that depends on it starts;
#   it was told to stop, and saved       the job goes back to the queue and resumes from there;
#   anything else                        exit with training's code, and dependent stages are cancelled.
#
# How a stop travels: Slurm (time limit, preemption, `scontrol requeue`) sends USR1 or TERM to this
# batch script, which sends USR1 to srun, which passes it to the shell on every node, which sends
# TERM to the training processes: Megatron then saves and exits (--exit-signal-handler). torchrun
# itself ignores both signals; it would give its processes half a minute and then kill them.

latest_iteration() { # FOLDER -> the newest checkpoint's iteration, 0 for none
    local file=$1/latest_checkpointed_iteration.txt
    if [[ -s $file ]]; then
        tr -cd '0-9' <"$file"
    else
        echo 0
    fi
}

say() { echo "$(date '+%F %T') job ${SLURM_JOB_ID:-} (restart ${SLURM_RESTART_COUNT:-0}): $*"; }

# --- on every node ---------------------------------------------------------------------------------

run_node() { # arguments of torchrun
    local torchrun_pid status=0
    (
        trap '' USR1 TERM # kept through exec; Megatron sets its own handler in the processes
        exec "${DMC_PYTHON:-python3}" -m torch.distributed.run "$@"
    ) &
    torchrun_pid=$!
    trap 'pkill -TERM -P "$torchrun_pid"' USR1 TERM
    wait_for "$torchrun_pid" || status=$?
    return "$status"
}

wait_for() { # PID -> its exit code, however many signals arrive meanwhile
    local status again
    while true; do
        status=0
        wait "$1" || status=$?
        if ! kill -0 "$1" 2>/dev/null; then
            break
        fi
    done
    if ((status > 128)); then # perhaps a trap's doing, while the process ended
        again=0
        wait "$1" 2>/dev/null || again=$?
        if ((again != 127)); then
            status=$again
        fi
    fi
    return "$status"
}

# --- in the batch script ---------------------------------------------------------------------------

# Reads: MODEL, LAYOUT, SCHEDULE (arrays of flags) and STEPS (of this stage), beside the environment.
run_stage() {
    local stage=${DMC_STAGE:?zero-out, retrofit or finetune; submit.sh sets it}
    local run_dir=${RUN_DIR:?folder for the checkpoints of the stages, on a file system of all nodes}
    local repo=${DMC_REPO:?folder of the megatron-dmc checkout, on a file system of all nodes}
    local previous save=$run_dir/$stage
    case $stage in
        zero-out) previous=${BASE_CHECKPOINT:?Megatron checkpoint: megatron-dmc convert --to megatron HF_FOLDER OUT} ;;
        retrofit) previous=$run_dir/zero-out ;;
        finetune) previous=$run_dir/retrofit ;;
        *)
            say "DMC_STAGE=$stage: choose zero-out, retrofit or finetune" >&2
            return 2
            ;;
    esac

    local before
    before=$(latest_iteration "$save")
    if ((before >= STEPS)); then
        say "$stage is done: iteration $before of $STEPS"
        return 0
    fi
    say "$stage from iteration $before of $STEPS on ${SLURM_JOB_NODELIST:-this machine}"

    local head_node
    head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    local launcher=(
        --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${PROCESSES_PER_NODE:-8}"
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
        --rdzv-endpoint "${RDZV_HOST:-$head_node}:${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
        --max-restarts 0 --signals-to-handle "SIGINT,SIGHUP,SIGQUIT" # TERM is the processes' own
    )
    local training=(
        "${MODEL[@]}" "${LAYOUT[@]}" "${SCHEDULE[@]}" --train-iters "$STEPS"
        --dmc-stage "$stage" --dmc-target-cr "${TARGET_CR:-4}"
        --pretrained-checkpoint "$previous" --load "$save" --save "$save"
        --save-interval "${SAVE_INTERVAL:-250}" --ckpt-format torch_dist --exit-signal-handler
        --train-data-path "${TRAIN_DATA:?prefix of a .bin/.idx pair: tools/preprocess_data.py}"
        --valid-data-path "${VALID_DATA:?prefix of a .bin/.idx pair of held-out text}"
        --test-data-path "$VALID_DATA" --data-cache-path "$run_dir/data-cache"
        --tokenizer-type SentencePieceTokenizer
        --tokenizer-model "${TOKENIZER_MODEL:?the tokenizer.model file of the base model}"
        --log-interval 1 --eval-interval "${EVAL_INTERVAL:-250}" --eval-iters "${EVAL_ITERS:-8}"
        --tensorboard-dir "$save/tensorboard"
    )
    local container=()
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then # pyxis and enroot; without it: bare metal
        container=(
            --container-image "$CONTAINER_IMAGE" --container-workdir "$repo"
            --container-mounts "$repo,$run_dir,${CONTAINER_MOUNTS:?folders of the base checkpoint, data and tokenizer, separated by commas}"
        )
    fi
    mkdir -p "$save"
    export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

    local asked_to_stop=0 status=0 srun_pid
    srun --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=1 "${container[@]}" \
        bash "$repo/examples/slurm/common.sh" node \
        "${launcher[@]}" "$repo/pretrain_dmc.py" "${training[@]}" &
    srun_pid=$!
    trap 'asked_to_stop=1; say "told to stop: saving"; kill -USR1 "$srun_pid" 2>/dev/null' USR1 TERM
    wait_for "$srun_pid" || status=$?
    trap - USR1 TERM

    local after
    after=$(latest_iteration "$save")
    if ((after >= STEPS && status == 0)); then
        say "$stage is done: iteration $after"
        return 0
    fi
    if ((asked_to_stop)) && ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-100})); then
        say "$stage stopped at iteration $after of $STEPS (code $status): back to the queue"
        if scontrol requeue "$SLURM_JOB_ID"; then
            sleep 300 # it ends this script
        fi
        return 1 # Slurm has put the job back itself and ignores the code; or it may not be requeued
    fi
    say "$stage failed at iteration $after of $STEPS with code $status" >&2
    return $((status ? status : 1))
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    if [[ ${1:-} != node ]]; then
        echo "common.sh is for the sbatch files beside it; start with submit.sh" >&2
        exit 2
    fi
    set -uo pipefail
    shift
    run_node "$@"
fi
