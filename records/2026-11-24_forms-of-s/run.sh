#!/usr/bin/env bash
# The runs of this record. From the repository's root: bash records/2026-11-24_forms-of-s/run.sh STAGE [OUT]
# STAGE: choose-* or confirm-*, as below. Every stage resumes where it was stopped.
set -euo pipefail
stage=$1 out=${2:-out/forms-of-s}
export OMP_NUM_THREADS=1
data=${MNIST:-mnist}

run() { holdfast compare --data "$data" --out "$out/$stage" --quiet "$@"; }
choose() { run --split val --seeds 3 --suite quick --limit 0 "$@"; }
confirm() { run --first-seed 10 --seeds 8 --suite standard --limit 500 "$@"; }
rows() { local IFS=,; echo "$*"; }

linf=(--limit-train 10000 --lr 2e-3 --epochs 8)
l2=(--threat l2:1.58 --limit-train 12000 --lr 5e-3 --epochs 10 --model lipmlp)

case $stage in
choose-l2)
  choose "${l2[@]}" --losses "$(rows sce@orthogonal:scale={1,1.5,2,3,10} \
    isce:s=lipschitz:{0.6,1,1.6}@orthogonal:scale={10,30})" ;;
choose-l2-low)
  choose "${l2[@]}" --losses "$(rows sce@orthogonal:scale={0.1,0.2,0.3,0.5,0.7})" ;;
choose-l2-annealing)
  choose "${l2[@]}" --losses "$(rows isce:s=2,gamma={5,0},temperature=0.75@orthogonal:scale={1,3,10,30,100})" ;;
choose-adversarial)
  at=adversarial:steps=5,ramp=0.3 tr=steps=5,ramp=0.3
  choose "${linf[@]}" --threat linf:0.2 --losses "$(rows sce+$at sce+$at,factor={1.1,1.2} sce+$at+fit:lr=5e-3 \
    isce:s={1,3,5}+$at \
    sce+trades:beta={1,6},$tr+fit:epochs=6 isce:s=3+trades:beta={1,6},$tr+fit:epochs=6 \
    sce+interval+fit:epochs=16 sce+interval:factor=1.1+fit:epochs=16 isce:s={1,3}+interval+fit:epochs=16 \
    isce:s=mix:{0.1,0.3}+$at+fit:epochs=5)" ;;
choose-adversarial-lr)
  at=adversarial:steps=5,ramp=0.3 tr=trades:beta=6,steps=5,ramp=0.3
  choose "${linf[@]}" --threat linf:0.2 --losses "$(rows {sce,isce:s=1,isce:s=3}+$at+fit:lr={5e-3,1e-2} \
    sce+$at,factor=1.1+fit:lr=5e-3 {sce,isce:s=3}+$tr+fit:epochs=6,lr=5e-3 {sce,isce:s=1}+interval+fit:epochs=16,lr=5e-3)" ;;
choose-adversarial-lr2)
  at=adversarial:steps=5,ramp=0.3 tr=trades:beta=6,steps=5,ramp=0.3
  choose "${linf[@]}" --threat linf:0.2 --losses "$(rows {sce,isce:s=3}+$at+fit:lr=2e-2 \
    {sce,isce:s=3}+$at,factor=1.1+fit:lr=1e-2 sce+$at,factor=1.2+fit:lr=1e-2 \
    sce:smoothing=0.1+$at+fit:lr=1e-2 sce+$at+fit:lr=1e-2,weight_decay=0.1 isce:s={5,10}+$at+fit:lr=1e-2 \
    {sce,isce:s=3}+$tr+fit:epochs=6,lr=1e-2 {sce,isce:s=1,isce:s=3}+interval+fit:epochs=16,lr=1e-2)" ;;
choose-last)
  at=adversarial:steps=5,ramp=0.3
  choose "${linf[@]}" --threat linf:0.2 --lr 1e-2 --losses "$(rows sce+$at,factor=1.3 isce:s={1,3}+$at,factor=1.2 \
    {sce,isce:s=3}+interval:factor=1.1+fit:epochs=16 sce+interval:factor=1.2+fit:epochs=16)" ;;
choose-0.3)
  at=adversarial:steps=5,ramp=0.3
  choose "${linf[@]}" --threat linf:0.3 --lr 1e-2 --losses "$(rows {sce,isce:s=1}+$at{,\,factor={1.1,1.2,1.3}} {sce,isce:s=1}+$at+fit:lr=5e-3 \
    {sce,isce:s=3}+interval{,:factor={1.1,1.2}}+fit:epochs=16)" ;;
choose-0.3-more)
  at=adversarial:steps=5,ramp=0.3
  choose "${linf[@]}" --threat linf:0.3 --lr 1e-2 --losses "$(rows {sce,isce:s=1}+$at,factor={1.4,1.5})" ;;
choose-gradient)
  choose "${linf[@]}" --threat linf:0.1 --epochs 16 --losses "$(rows isce:s=gradient:{1,1.5} isce:s=gradient:{0.5,1}+fit:lr=5e-3)" ;;
choose-standard)
  choose "${linf[@]}" --threat linf:0.1 --epochs 48 --losses "$(rows sce sce+fit:lr=5e-3 sce+fit:weight_decay=0.3 \
    sce:smoothing=0.1 isce:s={3,10} cosface:m={0.1,0.2,0.5},scale=15 \
    isce:s=gradient:{0.1,0.25,0.5}+fit:epochs=16 isce:s=gradient-stopped:1+fit:epochs=16)" ;;
confirm-0.3)
  at=adversarial:steps=5,ramp=0.3
  confirm "${linf[@]}" --threat linf:0.3 --lr 1e-2 --losses "$(rows {sce,isce:s=1}+$at,factor=1.3 sce+$at \
    {sce,isce:s=3}+interval:factor=1.1+fit:epochs=16)" ;;
confirm-0.2)
  at=adversarial:steps=5,ramp=0.3
  confirm "${linf[@]}" --threat linf:0.2 --lr 1e-2 --losses "$(rows sce+$at,factor=1.3 sce+$at isce:s=1+$at,factor=1.2 \
    sce+interval:factor=1.2+fit:epochs=16 isce:s=3+interval:factor=1.1+fit:epochs=16)" ;;
confirm-0.1)
  confirm "${linf[@]}" --threat linf:0.1 --losses "$(rows sce+adversarial:steps=5,ramp=0.3,factor=1.3+fit:lr=1e-2 \
    sce+fit:epochs=48,weight_decay=0.3 isce:s=gradient:1+fit:epochs=16)" ;;
confirm-l2)
  confirm "${l2[@]}" --losses "$(rows sce@orthogonal:scale={0.2,0.3,0.5,0.7,1} isce:s=lipschitz:{1,1.6}@orthogonal:scale=10)" ;;
*) echo "no such stage: $stage" >&2; exit 2 ;;
esac
