# shellcheck shell=bash
# What slurm/run_slurm.sh and run_retrofit.sh share: the demo's model and this project's own source as
# text, on the CPU. They set `repo`, `python` and `work` and source this file.

fail() {
    echo "${0##*/}: $*" >&2
    tail -n 20 "$work"/*.log "$work"/run-dir/*.log >&2 2>/dev/null || true
    exit 1
}

[[ -x $python ]] || fail "no Python at $python: run make setup, or set PYTHON"
models=("$repo"/examples/models/*/)
[[ ${#models[@]} == 1 ]] || fail "examples/models should hold one model"
model=${models[0]%/}
export PYTHONPATH=$repo OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" PYTHONWARNINGS=ignore
export DMC_REPO=$repo DMC_PYTHON=$python
export TRAIN_DATA=$work/data_text_document VALID_DATA=$work/data_text_document
export EVAL_INTERVAL=100000 EVAL_ITERS=1
unset CONTAINER_IMAGE

make_data() {
    "$python" - "$repo" "$work/text.jsonl" <<'PYTHON' && "$python" "$repo/tools/preprocess_data.py" \
        --input "$work/text.jsonl" --output-prefix "$work/data" --append-eod \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$model/tokenizer.model"
import json, sys
from pathlib import Path

with open(sys.argv[2], "w") as out:
    for file in sorted(Path(sys.argv[1], "megatron_dmc").rglob("*.py")):
        out.write(json.dumps({"text": file.read_text()}) + "\n")
PYTHON
}
make_data >"$work/data.log" 2>&1 || fail "making the data failed"

wait_until() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        ((SECONDS < end)) || fail "timed out waiting until $what"
        sleep 0.3
    done
}

saved() { cat "$RUN_DIR/$1/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; } # STAGE
