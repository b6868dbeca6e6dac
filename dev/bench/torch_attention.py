#!/usr/bin/env python3
"""Times causal attention on a GPU, forward and backward, with each backend of PyTorch's
scaled_dot_product_attention, for `make bench DEVICE=cuda`. Prints one JSON object,
{length: {backend: {"forward": seconds, "backward": seconds}}}."""

import argparse
import json

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


def median_seconds(run, runs):
    """After two warmup runs, which select kernels and allocate memory."""
    times = []
    for _ in range(runs + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times[2:])[len(times[2:]) // 2]


def measure(backend, B, T, heads, size, runs):
    qkv = [torch.randn(B, heads, T, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
           for _ in range(3)]
    gradient = torch.randn_like(qkv[0])
    with sdpa_kernel(backend):
        with torch.no_grad():
            forward = median_seconds(lambda: scaled_dot_product_attention(*qkv, is_causal=True), runs)
        out = scaled_dot_product_attention(*qkv, is_causal=True)
        backward = median_seconds(lambda: torch.autograd.grad(out, qkv, gradient, retain_graph=True), runs)
    return {"forward": forward, "backward": backward}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="batch x length")
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=20)
    o = parser.parse_args()
    result = {}
    for T in map(int, o.lengths.split(",")):
        result[T] = {}
        for name, backend in BACKENDS.items():
            try:
                result[T][name] = measure(backend, o.tokens // T, T, o.heads, o.head_size, o.runs)
            except RuntimeError as error:  # this GPU or size is not supported
                result[T][name] = {"error": str(error).splitlines()[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
