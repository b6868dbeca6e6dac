#!/bin/bash
# Import and export, compared with transformers (`make test-oracles`).
HF_HUB_OFFLINE=1 exec python3 dev/reference/check_export.py
