#!/bin/bash
# Models from transformers and for them, where a python has it: PYTHON names one.
python=${PYTHON:-python3}
if ! "$python" -c 'import torch, transformers, safetensors
exit(int(transformers.__version__.split(".")[0]) < 5)' 2>/dev/null; then
    echo "$python has no torch, transformers 5 and safetensors: import and export are not held against them"
    echo "(PYTHON=… names another python)"
    echo "0 passed, 0 failed"
    exit 0
fi
HF_HUB_OFFLINE=1 "$python" dev/reference/check_export.py
