#!/bin/sh
# A sweep: every balance weight with every number of experts a sample, one run each, on the digits (half a minute a run).
# Copy it, change the lists, and pass what all runs share:
#   sh configs/sweep.sh
#   sh configs/sweep.sh --config configs/cifar100_cpu.yaml --data.root DATA
# Then: python evaluate.py --compare runs/sweep-*, or select the runs sweep-* in ClearML and press Compare.
set -eu
cd "$(dirname "$0")/.."
[ "$#" -gt 0 ] || set -- --config configs/digits.yaml
for top_k in 1 2; do
  for balance in 0.0 0.01 0.1; do
    ${PYTHON:-python} train.py "$@" --router.top_k "$top_k" --balance.switch "$balance" \
      --run_dir "runs/sweep-k$top_k-balance$balance"
  done
done
