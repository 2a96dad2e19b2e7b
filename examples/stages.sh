# shellcheck shell=bash
# One stage of a retrofit, on this machine or in a Slurm job: retrofit.sh and the sbatch files source
# this file and call `run_stage`; in a job `srun` runs it again on every node as `bash stages.sh node ...`.
#
# A stage ends in one of three ways:
#   its last iteration is reached      code 0, and the next stage starts;
#   a signal stopped it after saving     a Slurm job goes back to the queue and resumes from there;
#                                      without Slurm code 75: start the same command again;
#   anything else                      training's code; dependent Slurm jobs are cancelled.
#
# How a stop travels: Slurm (time limit, preemption, `scontrol requeue`) sends USR1 or TERM to the
# batch script (without Slurm: a user's TERM or Ctrl-C), which sends USR1 to srun, which passes it to
# the shell on every node, which sends TERM to the training processes: Megatron then saves and exits
# (--exit-signal-handler). torchrun itself ignores both signals; it would give its processes half a
# minute and then kill them.

latest_iteration() { # FOLDER -> the newest checkpoint's iteration, 0 for none
    local file=$1/latest_checkpointed_iteration.txt
    if [[ -s $file ]]; then
        tr -cd '0-9' <"$file"
    else
        echo 0
    fi
}

say() { echo "$(date '+%F %T')${SLURM_JOB_ID:+ job $SLURM_JOB_ID (restart ${SLURM_RESTART_COUNT:-0})}: $*"; }

stage_steps() { # STAGE TARGET_CR -> its optimizer steps; the paper's, unless the environment says other
    case $1 in
        zero-out) echo "${ZERO_OUT_STEPS:-250}" ;;
        retrofit) echo "${RETROFIT_STEPS:-$(awk -v cr="$2" 'BEGIN { printf "%d", 3000 * (cr - 1) }')}" ;;
        finetune) echo "${FINETUNE_STEPS:-2000}" ;;
        *)
            say "stage '$1': choose zero-out, retrofit or finetune" >&2
            return 2
            ;;
    esac
}

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

# --- in the script that sources this file ----------------------------------------------------------

# Reads: MODEL and LAYOUT (arrays of Megatron's flags), and the environment.
run_stage() { # STAGE
    local stage=$1 target_cr=${TARGET_CR:-4} steps seed
    steps=$(stage_steps "$stage" "$target_cr") || return
    if [[ -n ${FLAGS_FILE:-} ]]; then # another model or layout, one word a line
        mapfile -t MODEL <"$FLAGS_FILE"
        LAYOUT=()
    fi
    local run_dir=${RUN_DIR:?folder for the checkpoints of the stages, on a file system of all nodes}
    local repo=${DMC_REPO:?folder of the megatron-dmc checkout, on a file system of all nodes}
    local previous save=$run_dir/$stage
    case $stage in
        zero-out)
            previous=${BASE_CHECKPOINT:?Megatron checkpoint: megatron-dmc convert --to megatron HF_FOLDER OUT}
            seed=1234
            ;;
        retrofit) previous=$run_dir/zero-out seed=1235 ;; # another order of the data
        finetune) previous=$run_dir/retrofit seed=1236 ;;
    esac

    local before
    before=$(latest_iteration "$save")
    if ((before >= steps)); then
        say "$stage is done: iteration $before of $steps"
        return 0
    fi
    say "$stage from iteration $before of $steps on ${SLURM_JOB_NODELIST:-this machine}"

    local launcher=(
        --nproc-per-node "${PROCESSES_PER_NODE:-8}" --rdzv-backend c10d
        --max-restarts 0 --signals-to-handle "SIGHUP,SIGQUIT" # TERM is the processes' own
    )
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        local head_node
        head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        launcher+=(
            --nnodes "$SLURM_JOB_NUM_NODES" --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
            --rdzv-endpoint "${RDZV_HOST:-$head_node}:${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
        )
    else
        launcher+=(--nnodes 1 --rdzv-id "$$" --rdzv-endpoint localhost:0)
    fi
    local training=(
        "${MODEL[@]}" "${LAYOUT[@]}" --train-iters "$steps" --seed "$seed"
        --lr "${LR:-3e-5}" --lr-decay-style constant --adam-beta1 0.9 --adam-beta2 0.95
        --weight-decay 0.1 --clip-grad 1.0
        --dmc-stage "$stage" --dmc-target-cr "$target_cr"
        --pretrained-checkpoint "$previous" --load "$save" --save "$save"
        --save-interval "${SAVE_INTERVAL:-250}" --ckpt-format torch_dist --exit-signal-handler
        --train-data-path "${TRAIN_DATA:?prefix of a .bin/.idx pair: tools/preprocess_data.py}"
        --valid-data-path "${VALID_DATA:?prefix of a .bin/.idx pair of held-out text}"
        --test-data-path "$VALID_DATA" --data-cache-path "$run_dir/data-cache"
        --tokenizer-type "${TOKENIZER_TYPE:-SentencePieceTokenizer}"
        --tokenizer-model "${TOKENIZER_MODEL:?the tokenizer.model file of the base model}"
        --log-interval 1 --eval-interval "${EVAL_INTERVAL:-250}" --eval-iters "${EVAL_ITERS:-8}"
        --tensorboard-dir "$save/tensorboard" --log-throughput --log-timers-to-tensorboard
    )
    if [[ -f ${BASE_CHECKPOINT:-}/megatron_flags.txt ]] &&
        [[ $(<"$BASE_CHECKPOINT/megatron_flags.txt") =~ --dmc-borrowed-rope-pair\ ([0-9]+) ]]; then
        training+=(--dmc-borrowed-rope-pair "${BASH_REMATCH[1]}") # chosen by convert --calibration-data
    fi
    local dmc_flags
    read -ra dmc_flags <<<"${DMC_FLAGS:-}"
    training+=("${dmc_flags[@]}")
    local container=()
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then # pyxis and enroot; without it: bare metal
        container=(
            --container-image "$CONTAINER_IMAGE" --container-workdir "$repo"
            --container-mounts "$repo,$run_dir,${CONTAINER_MOUNTS:?folders of the base checkpoint, data and tokenizer, separated by commas}"
        )
    fi
    mkdir -p "$save"
    export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}

    local asked_to_stop=0 status=0 run_pid
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        srun --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=1 "${container[@]}" \
            bash "$repo/examples/stages.sh" node \
            "${launcher[@]}" "$repo/pretrain_dmc.py" "${training[@]}" &
    else
        bash "$repo/examples/stages.sh" node \
            "${launcher[@]}" "$repo/pretrain_dmc.py" "${training[@]}" &
    fi
    run_pid=$!
    trap 'asked_to_stop=1; say "asked to stop: saving"; kill -USR1 "$run_pid" 2>/dev/null' USR1 TERM INT
    wait_for "$run_pid" || status=$?
    trap - TERM INT
    trap : USR1 # between stages; not '', which the next stage's processes would inherit

    local after
    after=$(latest_iteration "$save")
    if ((after >= steps && status == 0)); then
        say "$stage is done: iteration $after"
        return 0
    fi
    if ((asked_to_stop)) && [[ -z ${SLURM_JOB_ID:-} ]]; then
        say "$stage stopped at iteration $after of $steps: start the same command again to go on"
        return 75
    fi
    if ((asked_to_stop)) && ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-100})); then
        say "$stage stopped at iteration $after of $steps (code $status): back to the queue"
        if scontrol requeue "$SLURM_JOB_ID"; then
            sleep 300 # it ends this script
        fi
        return 1 # Slurm has put the job back itself and ignores the code; or it may not be requeued
    fi
    say "$stage failed at iteration $after of $steps with code $status" >&2
    return $((status ? status : 1))
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    if [[ ${1:-} != node ]]; then
        echo "stages.sh is sourced by others; start with retrofit.sh or slurm/submit.sh" >&2
        exit 2
    fi
    set -uo pipefail
    shift
    run_node "$@"
fi
