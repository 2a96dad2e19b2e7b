#!/usr/bin/env bash
# A small Slurm cluster on this machine, and on it the three stages of examples/slurm with a tiny model
# on the CPU, interrupted twice:
#
#   zero-out   `scontrol requeue`, as an operator or a preemption does it;
#   retrofit   USR1 to the batch script, as `--signal=B:USR1@...` does it before the time limit.
#
# Checked: each interrupted stage saved where it was stopped and resumed from there, every stage reached
# its last iteration, and all three jobs ended with code 0.
#
#     tests/slurm/run_slurm.sh [FOLDER]     # default: a new folder in /tmp
#
# Wants Debian or Ubuntu, root for apt-get (unless Slurm is installed), and the environment of
# `make setup` or PYTHON=...; two CPU cores, a few minutes. Not part of the pytest run.
set -euo pipefail

repo=$(cd -P "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$repo/.venv/bin/python}
work=${1:-$(mktemp -d /tmp/dmc-slurm.XXXXXX)}
mkdir -p "$work"
steps=60
patience=${PATIENCE:-300}

# shellcheck source=tests/support/small_job.sh
source "$repo/tests/support/small_job.sh"

# --- Slurm -----------------------------------------------------------------------------------------

export PATH=$PATH:/usr/sbin
if ! type -P slurmctld slurmd munged >/dev/null; then
    echo "installing Slurm"
    apt-get update -q >"$work/apt.log" 2>&1 || fail "apt-get update failed"
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
        slurm-wlm munge procps >>"$work/apt.log" 2>&1 || fail "apt-get install slurm-wlm munge failed"
fi

daemons=()
clean_up() {
    [[ ${#daemons[@]} == 0 ]] || kill "${daemons[@]}" 2>/dev/null || true
}
trap clean_up EXIT

export SLURM_CONF=$work/slurm.conf
mkdir -p "$work/state" "$work/run"
chmod 755 "$work"
head -c 128 /dev/urandom >"$work/munge.key"
chmod 600 "$work/munge.key"
user=$(id -un)
port=$((21000 + RANDOM % 8000))
cat >"$SLURM_CONF" <<CONF
ClusterName=dmc
SlurmctldHost=localhost
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=5
SlurmctldPort=$port
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool.%n
SlurmctldPidFile=$work/run/slurmctld.pid
SlurmdPidFile=$work/run/slurmd.%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
KillWait=90
ReturnToService=2
SchedulerParameters=sched_interval=5,bf_interval=5
NodeName=node1 NodeHostname=localhost Port=$((port + 1)) CPUs=1
NodeName=node2 NodeHostname=localhost Port=$((port + 2)) CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
CONF

munged --foreground --force --key-file "$work/munge.key" --socket "$work/munge.socket" \
    --pid-file "$work/run/munged.pid" --log-file "$work/munged.log" \
    --seed-file "$work/munged.seed" >"$work/munged.out" 2>&1 &
daemons+=($!)
for _ in {1..50}; do
    [[ ! -S $work/munge.socket ]] || break
    sleep 0.1
done
slurmctld -D >"$work/slurmctld.out" 2>&1 &
daemons+=($!)
for node in node1 node2; do
    mkdir -p "$work/spool.$node"
    slurmd -D -N "$node" >"$work/slurmd.$node.out" 2>&1 &
    daemons+=($!)
done
for _ in {1..60}; do
    [[ $(sinfo -h -t idle -o %D 2>/dev/null) != 2 ]] || break
    sleep 0.5
done
sinfo
[[ $(sinfo -h -t idle -o %D) == 2 ]] || fail "the two nodes did not come up"

# --- model -----------------------------------------------------------------------------------------

"$python" -m megatron_dmc.cli.main convert --to megatron --force "$model" "$work/base" \
    >"$work/prepare.log" 2>&1 || fail "conversion failed"
"$python" - "$model" "$work/flags" >>"$work/prepare.log" 2>&1 <<'PYTHON' || fail "preparing failed"
import sys
from pathlib import Path
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.megatron_args import megatron_flags

flags = megatron_flags(from_hf_folder(sys.argv[1]))
# No --use-distributed-optimizer: without Transformer Engine or Apex it cannot resume.
flags += ["--seq-length", "64"]
flags += ["--micro-batch-size", "1", "--global-batch-size", "4"]
Path(sys.argv[2]).write_text("\n".join(flags) + "\n")
PYTHON

# --- the stages ------------------------------------------------------------------------------------

export RUN_DIR=$work/run-dir BASE_CHECKPOINT=$work/base FLAGS_FILE=$work/flags
export TOKENIZER_MODEL=$model/tokenizer.model
export RDZV_HOST=localhost PROCESSES_PER_NODE=1 SAVE_INTERVAL=100000
export ZERO_OUT_STEPS=$steps RETROFIT_STEPS=$steps FINETUNE_STEPS=5 TARGET_CR=2
mkdir -p "$RUN_DIR"
submitted=$("$repo/examples/slurm/submit.sh" "$repo/examples/slurm/llama2-7b.sbatch" \
    --nodes 2 --gpus-per-node 0 --time 20)
echo "$submitted"
job_of() { awk -v stage="$1" '$1 == stage { print $2 }' <<<"$submitted"; }
log_of() { echo "$RUN_DIR/$1.$(job_of "$1").log"; }
job_field() { scontrol show job "$(job_of "$1")" | grep -o "\b$2=[^ ]*" | head -n 1 | cut -d= -f2; }
reached() { # STAGE -> steps in its log
    local count
    count=$(grep -c " iteration .*/ .*$steps |" "$(log_of "$1")" 2>/dev/null) || true
    echo "${count:-0}"
}

has_trained() { (($(reached "$1") >= 5)); }
has_saved() { (($(saved "$1") > 0)); }
is_over() { is_ended "$(job_field "$1" JobState)"; }
is_ended() { [[ $1 =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }

declare -A stopped_at
interrupt() { # STAGE COMMAND...
    local stage=$1
    shift
    wait_until "$patience" "$stage trains" has_trained "$stage"
    "$@"
    wait_until "$patience" "$stage saves" has_saved "$stage"
    stopped_at[$stage]=$(saved "$stage")
    echo "$stage: interrupted, saved at iteration ${stopped_at[$stage]} of $steps"
}
interrupt zero-out scontrol requeue "$(job_of zero-out)"
interrupt retrofit scancel --batch --signal=USR1 "$(job_of retrofit)"
wait_until "$patience" "finetune is over" is_over finetune

for stage in zero-out retrofit finetune; do
    last=$steps restarts=1
    [[ $stage == finetune ]] && last=5 restarts=0
    log=$(log_of "$stage")
    state="$(job_field "$stage" JobState) $(job_field "$stage" ExitCode) $(job_field "$stage" Restarts)"
    [[ $state == "COMPLETED 0:0 $restarts" ]] || fail "$stage: state, code, restarts are $state"
    [[ $(saved "$stage") == "$last" ]] || fail "$stage: ended at $(saved "$stage") of $last"
    if ((restarts == 1)); then
        at=${stopped_at[$stage]}
        ((at < last)) || fail "$stage was not interrupted in the middle"
        grep -q "successfully loaded checkpoint from $RUN_DIR/$stage .* at iteration $at" "$log" ||
            fail "$stage did not resume from iteration $at"
        grep -q " iteration *$((at + 1))/" "$log" || fail "$stage did not go on at $((at + 1))"
        [[ $(reached "$stage") == "$steps" ]] || fail "$stage did a step twice, or not at all"
        ! grep -q SignalException "$log" || fail "$stage: torchrun acted on the signal"
    fi
    echo "$stage: $state, iteration $last of $last"
done

# --- retrofit.sh in one job ------------------------------------------------------------------------

export RUN_DIR=$work/run-dir/one-job ZERO_OUT_STEPS=2 RETROFIT_STEPS=2 FINETUNE_STEPS=2
export REPORT_FLAGS="--seq-length 64 --max-windows 2 --max-tokens 8"
id=$(sbatch --parsable --nodes 2 --time 20 --output "$work/run-dir/one-job.log" \
    "$repo/examples/retrofit.sh" "$model" 2)
one_job() { scontrol show job "$id" | grep -o "\b$1=[^ ]*" | head -n 1 | cut -d= -f2; }
one_job_is_over() { is_ended "$(one_job JobState)"; }
wait_until "$patience" "retrofit.sh is over" one_job_is_over
[[ "$(one_job JobState) $(one_job ExitCode)" == "COMPLETED 0:0" ]] || fail "retrofit.sh failed"
[[ $(saved finetune) == 2 && -s $RUN_DIR/report/report.html ]] || fail "retrofit.sh left no report"
echo "retrofit.sh in one job: $(one_job JobState) $(one_job ExitCode), all steps"

echo "ok: three stages, two interruptions, $SECONDS s; logs in $work"
