#!/usr/bin/env bash
# examples/retrofit.sh with a tiny model on the CPU, in two processes, started four times:
#
#   1. killed with SIGKILL in the middle of the retrofit stage, every process of it;
#   2. stopped (TERM) in the middle of the finetune stage: saves, code 75;
#   3. continues to the end;
#   4. finds everything done.
#
#     tests/support/run_retrofit.sh [FOLDER]     # default: a new folder in /tmp
#
# Wants the environment of `make setup` or PYTHON=...; a few minutes on two cores. Not part of the pytest run.
set -euo pipefail

repo=$(cd -P "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$repo/.venv/bin/python}
work=${1:-$(mktemp -d /tmp/dmc-retrofit.XXXXXX)}
mkdir -p "$work"
# shellcheck source=tests/support/small_job.sh
source "$repo/tests/support/small_job.sh"

export RUN_DIR=$work/run-dir PROCESSES_PER_NODE=2 SAVE_INTERVAL=5
export ZERO_OUT_STEPS=5 RETROFIT_STEPS=30 FINETUNE_STEPS=30
export CONVERT_FLAGS="--calibration-data $TRAIN_DATA" DMC_FLAGS="--dmc-merge-delay 4"
export REPORT_FLAGS="--seq-length 64 --max-windows 2 --max-tokens 8"
patience=${PATIENCE:-300}
# The plan's layout has the distributed optimizer, which resumes only with Transformer Engine or Apex.
export FLAGS_FILE=$work/flags
"$python" - "$model" "$FLAGS_FILE" <<'PYTHON' >>"$work/data.log" 2>&1 || fail "preparing failed"
import sys
from pathlib import Path
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.megatron_args import megatron_flags

flags = megatron_flags(from_hf_folder(sys.argv[1]))
flags += ["--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "4"]
Path(sys.argv[2]).write_text("\n".join(flags) + "\n")
PYTHON

start() { # NUMBER: in the background; sets `pid` and `log`
    log=$work/$1.log
    "$repo/examples/retrofit.sh" "$model" 2 >"$log" 2>&1 &
    pid=$!
}
tree() { # PID and all its descendants
    echo "$1"
    local child
    for child in $(pgrep -P "$1"); do
        tree "$child"
    done
}
has_saved() { (($(saved "$1") >= 5)); }
# two processes write the log: a line may be another one's neighbour, but it is whole
iterations() { grep -oE " iteration +[0-9]+/ +[0-9]+ \|" "$log" | awk '{ print $2 + 0 }'; }

start 1
wait_until "$patience" "retrofit saves" has_saved retrofit
mapfile -t processes < <(tree "$pid")
kill -KILL "${processes[@]}" 2>/dev/null || true
wait "$pid" 2>/dev/null || true
at=$(saved retrofit)
echo "1. killed ${#processes[@]} processes in retrofit, its newest checkpoint is of iteration $at of $RETROFIT_STEPS"
((at < RETROFIT_STEPS)) || fail "it was not killed in the middle"

start 2
wait_until "$patience" "finetune saves" has_saved finetune
kill -TERM "$pid"
code=0
wait "$pid" || code=$?
[[ $code == 75 ]] || fail "asked to stop, it ended with code $code"
grep -q "convert is done" "$log" || fail "it converted again"
grep -q "zero-out is done: iteration 5 of 5" "$log" || fail "it did zero-out again"
grep -q "retrofit from iteration $at of $RETROFIT_STEPS" "$log" || fail "retrofit did not resume"
grep -q " iteration *$((at + 1))/ *$RETROFIT_STEPS |" "$log" || fail "retrofit did not resume at $((at + 1))"
[[ $(saved retrofit) == "$RETROFIT_STEPS" ]] || fail "retrofit ended at $(saved retrofit)"
at=$(saved finetune)
((at < FINETUNE_STEPS)) || fail "it was not stopped in the middle"
echo "2. resumed retrofit; stopped in finetune, saved at iteration $at of $FINETUNE_STEPS, code 75"

start 3
wait "$pid" || fail "it failed"
[[ $(iterations | head -n 1) == $((at + 1)) ]] || fail "finetune did not resume at $((at + 1))"
[[ $(saved finetune) == "$FINETUNE_STEPS" ]] || fail "finetune ended at $(saved finetune)"
for file in hf/model.safetensors hf/config.json report/report.html report/report.json; do
    [[ -s $RUN_DIR/$file ]] || fail "$file is missing"
done
echo "3. resumed finetune at iteration $((at + 1)), to the end:"
tail -n 2 "$log"
"$python" - "$RUN_DIR/report/report.json" <<'PYTHON' || fail "the report is not of all three stages"
import json, sys

report = json.load(open(sys.argv[1]))
steps = {}
for point in report["curves"]:
    steps.setdefault(point["stage"], []).append(point["step"])
print("   steps in the report:", {stage: len(s) for stage, s in steps.items()})
assert {s: len(v) for s, v in steps.items()} == {"zero-out": 5, "retrofit": 30, "finetune": 30}
PYTHON

start 4
wait "$pid" || fail "it failed"
[[ -z $(iterations) ]] || fail "it trained again"
echo "4. everything is done"
echo "ok: four starts of one command, $SECONDS s; logs in $work"
