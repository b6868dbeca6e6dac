#!/bin/bash
# TensorBoard reads what scripts/to_tensorboard.py writes.
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 dev/test/make_run.py "$dir/run" lns --final 1.9
python3 scripts/to_tensorboard.py "$dir/run" -o "$dir/tb"
if python3 - "$dir/tb/run" <<'PYTHON'; then
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1], {"scalars": 0})
events.Reload()
assert len(events.Scalars("loss/train")) == 100
assert abs(events.Scalars("loss/validation")[-1].value - 1.9) < 1e-6
PYTHON
    echo "1 passed, 0 failed"
else
    echo "0 passed, 1 failed"
    exit 1
fi
