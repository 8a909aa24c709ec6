#!/bin/sh
# A sweep: one run for each combination of top-k and balance weight. On the digits a run takes half a minute:
#   sh configs/sweep.sh
# Or with other options, which apply to all runs:
#   sh configs/sweep.sh --config configs/cifar100_cpu.yaml --data.root DATA
# Compare them with python evaluate.py --compare runs/sweep-*, or in ClearML, where the tasks are named sweep-*. Finished
# runs are skipped, so an interrupted sweep continues where it stopped.
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
