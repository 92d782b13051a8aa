#!/usr/bin/env bash
# Everything that a GPU has to say, in nine minutes. In the root of the repository, with tests/gpu/whl:
#
#     BUDGET=540 bash tests/gpu/gpu_day.sh [STAGE ...]      all stages, or these
#
# First, all at once and untimed: kernels compiled on every core (warm.py), errors, equal bits, graphs
# (check.py), the tests marked gpu, and the small run: SFT killed and continued, RL, evaluation. Then, timed,
# one by one: the scan and its kernels next to mamba_ssm and fla (scan.py), decoding next to transformers
# (decoding.py), training steps (train.py), convolution, draw and AdamW (parts.py), our kernels with other
# tiles (tune.py), and what ncu counts in them, if it is installed.
#
# $OUT (runs/gpu) gets results.jsonl, a line at a time, ncu.csv, and at the end logs.tar.gz, a log per stage.
# A stage that fails or takes too long costs only itself; none starts after $BUDGET seconds (480). Without a
# GPU everything shrinks, so that the scripts can be tried. No setting of the card is touched.
#
# The peers' wheels belong in tests/gpu/whl, and need einops and transformers. They can be made without a GPU:
#     pip download --no-deps --dest tests/gpu/whl fla-core==0.6.0
#     MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip wheel --no-deps --no-build-isolation \
#         --no-binary mamba-ssm --wheel-dir tests/gpu/whl mamba-ssm==2.3.2.post1
set -u
WANTED=" ${*:-all} "
HERE=tests/gpu START=$(date +%s)
export OUT=${OUT:-runs/gpu} PY=${PY:-python3} W=$(mktemp -d) PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
mkdir -p "$OUT" && rm -f "$OUT"/results.jsonl "$OUT"/ncu.csv
trap 'cd "$OUT" && tar -czf logs.tar.gz *.log && rm -rf *.log "$W"' EXIT # few files are easier to carry off

if $PY -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  export SFT=240 MAKE="" RL="--steps 2" EVAL="--limit 24"
  LAYERS=16 TOKENS=32768
else # six steps teach nothing, so RL may find no answer right; inductor takes a minute
  export SFT=6 MAKE="--sft 200 --rl 16 --heldout 4" RL="--steps 1 --prompts 2 --group 2 --max-new-tokens 8"
  export EVAL="--limit 1 --samples 17 --max-new-tokens 8" TORCHDYNAMO_DISABLE=1
  LAYERS=2 TOKENS=256
fi

stage() { # name, seconds, command...
  local name=$1 limit=$2 begin=$(date +%s) rc
  local left=$((${BUDGET:-480} - 5 - begin + START))
  shift 2
  [[ $WANTED == *" $name "* || $WANTED == " all " ]] || return
  [ "$left" -lt "$limit" ] && limit=$left
  [ "$limit" -lt 15 ] && echo "== $name: no time left" && return
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  echo "== $name: rc $rc, $(($(date +%s) - begin)) s, at $(($(date +%s) - START)) s"
  tail -n 2 "$OUT/$name.log" | cut -c1-300
}

small() { # the whole method at small size; SFT is killed on the way and continued
  local middle=$((SFT / 2)) model=$W/rl/model log=$W/sft/log.jsonl
  local sft=(train_sft.py --data "$W/data/sft.jsonl" --out "$W/sft" --steps "$SFT" --batch 16
    --save-every $((SFT / 3)))
  set -e
  $PY data.py make --out "$W/data" $MAKE
  $PY "${sft[@]}" &
  until grep -qs "\"step\": $middle\b" "$log" || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
  kill -KILL $! && echo "killed after step $middle"
  $PY "${sft[@]}"
  $PY train_rl.py --init "$W/sft" --problems "$W/data/rl.jsonl" --out "$W/rl" $RL || [ "$SFT" -lt 100 ]
  [ -d "$model" ] || model=$W/sft/model
  $PY eval.py --model "$model" --problems "$W/data/heldout.jsonl" --out "$W/eval" $EVAL
}
export -f small

{
  git rev-parse HEAD
  $PY -c 'import numpy, torch, triton; print(numpy.__version__, torch.__version__, triton.__version__)'
  nvidia-smi && nvidia-smi -q -d CLOCK,POWER
  $PY -m pip install -q --no-index --no-deps --target "$W/site" $HERE/whl/*.whl
  PYTHONPATH=$PYTHONPATH:$W/site
} >"$OUT/environment.log" 2>&1

stage warm 110 $PY $HERE/warm.py 100 &
for share in 0 1 2 3 4 5; do stage compile 110 $PY $HERE/tune.py $share 6 & done
stage small 200 bash -c small &
stage tests 150 $PY -m pytest -q -p no:cacheprovider -m gpu --continue-on-collection-errors tests &
stage check 170 $PY $HERE/check.py
wait

# What matters most comes first.
stage scan 100 $PY $HERE/scan.py
stage decoding 130 $PY $HERE/decoding.py
stage train 70 $PY $HERE/train.py $LAYERS $TOKENS
stage parts 50 $PY $HERE/parts.py
stage tune 70 $PY $HERE/tune.py
stage train_packed 60 $PY $HERE/train.py $LAYERS $TOKENS packed
stage train_compiled 130 $PY $HERE/train.py $LAYERS $TOKENS compile
command -v ncu >/dev/null && stage ncu 50 ncu --clock-control none --csv --log-file "$OUT/ncu.csv" \
  --kernel-name 'regex:^_(cb|states|scan|dcb|dbc)_kernel$' --launch-count 9 --section SpeedOfLight \
  --section MemoryWorkloadAnalysis --section WarpStateStats --section SchedulerStats --section Occupancy \
  --section LaunchStats $PY $HERE/warm.py ours 32768 24 128 256

grep -E '"FAILED"|"kind": "(scan|part|decode|generate|train)"' "$OUT/results.jsonl" | cut -c1-200 | tail -n 45
echo "all: $(($(date +%s) - START)) s"
