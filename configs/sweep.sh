#!/bin/sh
# A sweep: every number of experts a sample with every balance weight, one run each. On the digits half a minute a run:
#   sh configs/sweep.sh
# Or with other options, which all runs share:
#   sh configs/sweep.sh --config configs/cifar100_cpu.yaml --data.root DATA
# Compare them by python evaluate.py --compare runs/sweep-*, or in ClearML, where the tasks are named sweep-*. A run that
# is there already is left alone, so that an interrupted sweep goes on where it stopped.
set -eu
cd "$(dirname "$0")/.."
[ "$#" -gt 0 ] || set -- --config configs/digits.yaml
for top_k in 1 2; do
  for balance in 0.0 0.01 0.1; do
    run="runs/sweep-k$top_k-balance$balance"
    [ -e "$run/evaluation/metrics.json" ] && continue
    ${PYTHON:-python} train.py "$@" --router.top_k "$top_k" --balance.switch "$balance" --run_dir "$run"
  done
done
