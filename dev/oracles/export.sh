#!/bin/bash
# Models from transformers and for them, held against them (`make test-oracles`).
HF_HUB_OFFLINE=1 exec python3 dev/reference/check_export.py
