"""Compares a `train_gpt --dump-state FILE` with the PyTorch model.

    /usr/bin/python3 dev/reference/compare.py FILE... [--tolerance 1e-5] [--all]

Reads inputs, targets, parameters and configuration from the file, computes loss, logits and every
gradient in float64, and prints ‖a − b‖/‖b‖ of each, worst first. Exits 1 if one exceeds the
tolerance or is not finite, or if a tensor is missing, unknown or of another shape.

Scalar gradients (GPAS's gates, SkipInit's gammas) are compared as one vector: where the last gate
only scales the input of the final norm, its gradient is 0 but for the norm's eps, and a float
program finds only rounding errors.
"""

import argparse
import sys

import numpy as np
import tensor_file
from model import Config, forward_backward


def compare(path):
    """(title, [(error, name)…]), worst first; the error is infinite for what cannot be compared."""
    found, metadata = tensor_file.read(path)
    config, scheme = Config.from_hugging_face(metadata["config"])
    inputs, targets = found.pop("inputs"), found.pop("targets")
    own = ("loss", "logits")
    parameters = {n: v for n, v in found.items() if n not in own and not n.startswith("grad.")}
    results = {n: v for n, v in found.items() if n not in parameters}
    expected = forward_backward(config, scheme, parameters, inputs, targets)

    whole = np.linalg.norm([np.linalg.norm(v) for n, v in expected.items() if n.startswith("grad.")])

    rows, scalars = [], []
    for name in sorted(set(expected) | set(results)):
        if name not in expected or name not in results:
            rows.append((np.inf, f"{name} (only {'expected' if name in expected else 'found'})"))
            continue
        a, b = results[name].astype(np.float64), expected[name]
        if a.size != b.size or (a.shape != b.shape and name != "loss"):
            rows.append((np.inf, f"{name} is {a.shape}, expected {b.shape}"))
        elif a.size == 1 and name != "loss":
            scalars.append((a.ravel(), b.ravel()))
        else:
            rows.append((relative(a.ravel(), b.ravel(), whole), name))
    if scalars:
        a, b = (np.concatenate(side) for side in zip(*scalars))
        rows.append((relative(a, b, whole), f"the {len(scalars)} scalar gradients"))
    rows = [(error if np.isfinite(error) else np.inf, name) for error, name in rows]
    return f"{config.architecture}, {scheme.describe()}", sorted(rows, reverse=True)


def relative(a, b, whole=0):
    """‖a − b‖/‖b‖. Tensors that should be zero (q's and k's gradients if a token attends only to
    itself) are measured against the norm of all gradients, `whole`."""
    size = np.linalg.norm(b)
    return np.linalg.norm(a - b) / (size if size > 1e-12 * whole else whole)


def main():
    options = argparse.ArgumentParser(description="Compares a --dump-state file with PyTorch.")
    options.add_argument("files", nargs="+", metavar="FILE")
    options.add_argument("--tolerance", type=float, default=1e-5)
    options.add_argument("--all", action="store_true", help="print all tensors, not the worst 5")
    args = options.parse_args()
    failed = False
    for path in args.files:
        title, rows = compare(path)
        bad = sum(error > args.tolerance for error, _ in rows)
        failed |= bad > 0
        print(f"{path}: {title}: {len(rows)} tensors, {bad} above {args.tolerance:g}")
        for error, name in rows if args.all else rows[: max(5, bad)]:
            print(f"  {error:9.2e}  {name}{'' if error <= args.tolerance else '  <-- FAIL'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
