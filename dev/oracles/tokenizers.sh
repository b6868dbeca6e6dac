#!/bin/bash
# Tokenizers, compared with PyPI's tokenizers (`make test-oracles`). TOKENS: the program
# dev/oracles/tokens.
exec python3 dev/oracles/compare_tokenizers.py --strings "${STRINGS:-2000}" "$@"
