#!/usr/bin/env bash
# Measure updates on a GPU, and train MT10 and MT50 by the recipe:
#
#   benchmarks/gpu.sh OUTPUT_FOLDER [--part 1|2|3] [--minutes M] [--rehearse]
#
# Part 1 (six minutes): the tests that need a GPU, the rate of updates in every way to run them, the
# kernels of an update. Part 2: MT10 for M minutes (5), evaluated, with its curve and a packed
# checkpoint. Part 3: MT50 for M minutes (4). Without --part, all three.
# --rehearse runs the same code in small sizes on the CPU. $PYTHON is the interpreter (python).
set -u
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }

OUT="" PART="1 2 3" MINUTES="" REHEARSE="" END=0
while [ $# -gt 0 ]; do
    case "$1" in
        --part) PART="${2:-}"; shift ;;
        --minutes) MINUTES="${2:-}"; shift ;;
        --rehearse) REHEARSE=--rehearse ;;
        -*) usage ;;
        *) [ -z "$OUT" ] || usage; OUT="$1" ;;
    esac
    shift
done
[ -n "$OUT" ] || usage
case "$PART" in 1 | 2 | 3 | "1 2 3") ;; *) usage ;; esac
mkdir -p "$OUT" && OUT="$(cd "$OUT" && pwd)" || exit 1
cd "$(dirname "$0")/.." || exit 1
PYTHON="${PYTHON:-python}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# A step that exceeds its seconds, or those that its part has left, is ended; the others still run.
step() {
    local seconds=$(($1 < END - SECONDS ? $1 : END - SECONDS)) began=$SECONDS; shift
    echo "== $*"
    [ "$seconds" -gt 0 ] || { echo "== left out: no time left"; return; }
    timeout --signal=INT --kill-after=10 "$seconds" "$@"
    echo "== exit code $? after $((SECONDS - began)) s"
}

part_1() {
    END=$((SECONDS + 360))
    local rates=("$PYTHON" -m benchmarks.gpu rates "$OUT" $REHEARSE)
    local kernels=("$PYTHON" -m benchmarks.gpu kernels "$OUT" $REHEARSE --ways chunks)
    step 90 "$PYTHON" -m pytest -m cuda -q 2>&1 | tee "$OUT/cuda_tests.txt"
    step 80 "${rates[@]}" --ways captured chunks "chunks, bf16"
    step 30 "${kernels[@]}" --cases mt10
    step 30 "${kernels[@]}" --cases paper_mt10
    step 30 "${rates[@]}" --ways eager
    step 120 "${rates[@]}" --cases mt10 --ways compiled
    step 120 "${rates[@]}" --cases paper_mt10 --ways "compiled, bf16"
}

train() { # tasks, minutes
    local sizes=(fabric=cuda fabric.precision=tf32)
    [ -z "$REHEARSE" ] || sizes=(fabric=cpu run=smoke fabric.updates_per_graph=26)
    local runs="$OUT/$1_runs"
    END=$((SECONDS + $2 * 60 + 240))
    step "$(($2 * 60 + 60))" "$PYTHON" -m softmod.train env="$1" tracking=journal "${sizes[@]}" \
        run.max_minutes="$2" run.folder="$runs" 2>&1 | tee "$OUT/$1.txt"
    local run
    run="$(find "$runs" -maxdepth 3 -name journal.jsonl -printf '%h\n' | head -1)"
    [ -n "$run" ] || return
    cp "$run/journal.jsonl" "$OUT/$1_journal.jsonl"
    [ ! -e "$run/result.json" ] || cp "$run/result.json" "$OUT/$1_result.json"
    step 60 "$PYTHON" -m softmod.report "runs=[$run]" output="$OUT/$1_report"
    step 60 "$PYTHON" -m softmod.state pack "$run" "$OUT/$1_packed"
}

for part in $PART; do
    case "$part" in
        1) part_1 ;;
        2) train mt10 "${MINUTES:-5}" ;;
        3) train mt50 "${MINUTES:-4}" ;;
    esac
done
"$PYTHON" -m benchmarks.gpu table "$OUT"
