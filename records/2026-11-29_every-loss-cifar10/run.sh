#!/usr/bin/env bash
# The runs of this record. From the repository's root: bash records/2026-11-29_every-loss-cifar10/run.sh STAGE [OUT]
# STAGE: standard, at8 or at2; or confirm-standard, confirm-at8, confirm-at2 with the rows as ROWS=sce,isce_c (fresh
# seeds 10 to 17). SEEDS=1 runs seed 0 alone. Every stage resumes where it was stopped.
set -euo pipefail
stage=$1 out=${2:-out/every-loss-cifar10}
export OMP_NUM_THREADS=1

rows=sce,isce_c,isce:s=3,isce:s=10,isce:s=100,isce_b:tau=10,sce:temperature=10,sce:smoothing=0.1,isce_c:clip=false
rows+=,isce_c:mask=true,isce_c:m=0,center,lgm,mmc,cosface:m=0.2,scale=15,contrastive,triplet
seeds=(--seeds "${SEEDS:-3}")
[[ $stage == confirm-* ]] && rows=$ROWS seeds=(--first-seed 10 --seeds 8)
case ${stage#confirm-} in
standard) what=(--threat linf:0.25/255,linf:1/255,linf:2/255,linf:8/255) ;;
at8) what=(--threat linf:8/255 --objective adversarial:steps=2,ramp=0.3) ;;
at2) what=(--threat linf:2/255 --objective adversarial:steps=2,ramp=0.3) ;;
*) echo "no such stage: $stage" >&2; exit 2 ;;
esac
holdfast compare --data "${CIFAR10:-cifar10}" --out "$out/$stage" --losses "$rows" "${seeds[@]}" "${what[@]}" \
  --model fastconvnet --suite per-attack --limit 250 --epochs 12 --batch-size 256 --optimizer adam --lr 5e-3 \
  --weight-decay 0.05 --augment crop:4+flip --fit schedule=onecycle,ema=0.99,precision=bf16
