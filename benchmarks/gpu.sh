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
[[ $MINUTES =~ ^([1-9][0-9]*)?$ ]] || usage
case "$PART" in 1 | 2 | 3 | "1 2 3") ;; *) usage ;; esac
mkdir -p "$OUT" && OUT="$(cd "$OUT" && pwd)" || exit 1
[ -z "$REHEARSE" ] || OUT="$OUT/rehearsal"
for part in $PART; do
    of="$OUT/$(case "$part" in 1) echo rates.jsonl ;; 2) echo mt10_runs ;; 3) echo mt50_runs ;; esac)"
    [ ! -e "$of" ] || { echo "$of exists already; choose another folder"; exit 2; }
done
mkdir -p "$OUT"
cd "$(dirname "$0")/.." || exit 1
PYTHON="${PYTHON:-python}"
# Products by cuBLAS in compiled updates: tuning Triton's for every shape would take minutes.
export TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS="${TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS:-ATEN}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# A step that exceeds its seconds, or those that its part has left, is ended; the others still run.
step() {
    local seconds=$(($1 < END - SECONDS ? $1 : END - SECONDS)) began=$SECONDS; shift
    echo "== $*"
    [ "$seconds" -gt 0 ] || { echo "== left out: no time left"; return; }
    timeout --signal=TERM --kill-after=10 "$seconds" "$@"
    local code=$?
    echo "== exit code $code after $((SECONDS - began)) s"
    [ "$code" = 0 ] || echo "exit code $code: $*" >> "$OUT/failed.txt"
}

part_1() {
    END=$((SECONDS + 360))
    local tests=("$PYTHON" -m pytest -m cuda -q)
    local rates=("$PYTHON" -m benchmarks.gpu rates "$OUT" $REHEARSE)
    local kernels=("$PYTHON" -m benchmarks.gpu kernels "$OUT" $REHEARSE --ways chunks)
    {
        step 60 "${tests[@]}" tests/test_counter.py tests/kernels tests/agent
        step 50 "${rates[@]}" --ways captured chunks --cases mt10 paper_mt10
        step 90 "${rates[@]}" --ways compiled --cases mt10
        step 25 "${kernels[@]}" --cases mt10
        step 50 "${tests[@]}" tests/capture/test_update_graph.py tests/command/test_cuda.py
        step 25 "${kernels[@]}" --cases paper_mt10
        step 60 "${rates[@]}" --ways captured chunks --cases mt50 paper_mt50
        step 30 "${rates[@]}" --ways eager "chunks, bf16"
        step 90 "${rates[@]}" --ways "compiled, bf16" --cases paper_mt10
        step 90 "${tests[@]}" -x tests/capture/test_compiled.py
    } 2>&1 | tee "$OUT/part_1.txt"
}

train() { # tasks, minutes
    local sizes=(fabric=cuda fabric.precision=tf32) runs="$OUT/$1_runs" run
    [ -z "$REHEARSE" ] || sizes=(fabric=cpu run=smoke fabric.updates_per_graph=26)
    END=$((SECONDS + $2 * 60 + 120))
    step "$(($2 * 60 + 60))" "$PYTHON" -m softmod.train env="$1" tracking=journal "${sizes[@]}" \
        run.max_minutes="$2" run.folder="$runs" 2>&1 | tee "$OUT/$1.txt"
    run="$(find "$runs" -maxdepth 3 -name journal.jsonl -printf '%h\n' | head -1)"
    [ -n "$run" ] || return
    step 40 "$PYTHON" -m softmod.report "runs=[$run]" output="$OUT/$1_report"
    step 40 "$PYTHON" -m softmod.state pack "$run" "$OUT/$1_packed"
    cp "$run/journal.jsonl" "$OUT/$1_journal.jsonl"
    # What travels, in one file: the report, the result, the state.
    tar czf "$OUT/$1.tar.gz" -C "$OUT" "$1_report" "$1_packed" "${run#"$OUT"/}/result.json"
}

for part in $PART; do
    case "$part" in
        1) part_1 ;;
        2) train mt10 "${MINUTES:-5}" ;;
        3) train mt50 "${MINUTES:-4}" ;;
    esac
done
"$PYTHON" -m benchmarks.gpu table "$OUT"
[ ! -e "$OUT/failed.txt" ] || { echo; echo "Failed:"; cat "$OUT/failed.txt"; exit 1; }
