#!/usr/bin/env bash
# Everything to run the day a GPU is at hand, in order of worth, in 13 minutes.
#
#     bash benchmarks/gpu.sh
#
# From the repository's folder. Each stage writes OUT/STAGE.json when it is finished; the same command again runs what is
# missing, and training goes on from its checkpoint. A stage that fails or runs out of time leaves OUT/STAGE.log, and the
# next one begins.
#
#     OUT=build/gpu      where results go
#     DEVICE=cuda        or cuda:1, ...; cpu for a dry run
#     MINUTES=13         for all stages together
#     DATA=cifar10       a name or a path for the last stage; without the data it trains on random images, to be timed
#     PYTHON=python3     one with torch and CUDA; what else is missing is installed into OUT/venv
#     WHEELS=folder      install from there, without a network
#     TINY=1             the smallest settings: a dry run
set -u
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-build/gpu} DEVICE=${DEVICE:-cuda} MINUTES=${MINUTES:-13} DATA=${DATA:-cifar10} TINY=${TINY:-}
python=${PYTHON:-python3}
mkdir -p "$OUT"
export OUT DEVICE DATA TINY PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
began=$SECONDS

complete() { "$1" -c 'import accelerate, datasets, hypothesis, pytest, holdfast.cli, tests.helpers' 2>"$OUT/missing.log"; }

if ! complete "$python"; then
    echo "installing what is missing into $OUT/venv"
    from=${WHEELS:+--no-index --find-links "$WHEELS"}
    [ -x "$OUT/venv/bin/python" ] || "$python" -m venv --system-site-packages "$OUT/venv" || exit 2
    # Without constraints.txt: a torch that is there already has this machine's CUDA, and stays.
    # shellcheck disable=SC2086
    "$OUT/venv/bin/python" -m pip install --quiet $from --editable . pytest hypothesis || exit 2
    python=$OUT/venv/bin/python
    complete "$python" || { tail -n 1 "$OUT/missing.log"; exit 2; }
fi
rm -f "$OUT/missing.log"
"$python" -c "import torch; torch.zeros(1, device='$DEVICE')" 2>"$OUT/device.log" || {
    echo "the device $DEVICE cannot be used: $(tail -n 1 "$OUT/device.log")"
    exit 2
}
rm -f "$OUT/device.log"

stage() { # NAME, SECONDS at most, and the command
    local name=$1 left=$((MINUTES * 60 - SECONDS + began)) limit=$2
    shift 2
    [ -f "$OUT/$name.json" ] && { echo "$name: done before"; return; }
    [ "$limit" -gt "$left" ] && limit=$left
    [ "$limit" -lt 10 ] && { echo "$name: no time left; the same command goes on from here"; return; }
    echo "$name: at most $limit s"
    LIMIT=$limit timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    case $? in
        0) [ -f "$OUT/$name.json" ] && rm -f "$OUT/$name.log" ;;
        124 | 137) echo "$name: its $limit s are over; the same command goes on from here" ;;
        *) echo "$name: failed, see $OUT/$name.log" ;;
    esac
}

# The tests of the device, in float32 and bf16, with their bounds on how often the host waits.
stage tests 240 "$python" benchmarks/gpu.py tests
# The same network, the same images, on the CPU and on the device: sample by sample.
stage agreement 120 "$python" benchmarks/gpu.py agreement
# Training and attacks against the largest rate of a product of matrices, and how often the host waits.
stage throughput 150 "$python" benchmarks/gpu.py throughput
# The CIFAR-10 recipe, for as long as there is time.
stage cifar10 100000 "$python" benchmarks/gpu.py cifar10
"$python" benchmarks/gpu.py summary
