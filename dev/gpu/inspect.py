#!/usr/bin/env python3
"""Shows what kernels compiled to: registers, spills, tensor-core instructions.

    make train_gpt && dev/gpu/inspect.py [build/cuda-*/train_gpt.cu.o] [--arch sm_90a] [--all]

Needs cuobjdump (from the CUDA toolkit or a Python environment with Triton; CUOBJDUMP names it).
Exits 1 if a bf16 kernel spills registers, or if bf16 attention has no tensor-core instructions.
Pure float32 kernels, which serve as a reference, are shown with --all only.
"""

import argparse
import collections
import glob
import os
import re
import shutil
import subprocess
import sys


def find_cuobjdump():
    places = [os.environ.get("CUOBJDUMP"), shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    for path in sys.path + glob.glob(sys.prefix + "/lib/python3*/site-packages"):
        places.append(os.path.join(path, "triton/backends/nvidia/bin/cuobjdump"))
    for place in places:
        if place and os.path.exists(place):
            return place
    sys.exit("inspect.py: cuobjdump was not found: install the CUDA toolkit, or name it in CUOBJDUMP")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("object", nargs="?")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--all", action="store_true", help="every variant of every kernel")
    args = parser.parse_args()
    built = sorted(glob.glob("build/cuda-*/train_gpt.cu.o"), key=os.path.getmtime)
    if not args.object and not built:
        sys.exit("inspect.py: no build/cuda-*/train_gpt.cu.o was found: run make train_gpt with nvcc")
    target = args.object or built[-1]
    tool = find_cuobjdump()
    sass = subprocess.run([tool, "-sass", "-arch", args.arch, target], capture_output=True, text=True)
    usage = subprocess.run([tool, "--dump-resource-usage", "-arch", args.arch, target],
                           capture_output=True, text=True)
    if sass.returncode:
        sys.exit(f"inspect.py: cuobjdump cannot read {target}: {sass.stderr.strip()}")

    counts = collections.defaultdict(collections.Counter)
    name = None
    for line in sass.stdout.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            name = m.group(1)
        elif name and (m := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line)):
            counts[name][m.group(1)] += 1
    registers = {}
    for m in re.finditer(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)", usage.stdout):
        registers[m.group(1)] = (int(m.group(2)), int(m.group(3)))

    names = subprocess.run(["c++filt"], input="\n".join(counts), capture_output=True, text=True)
    readable = dict(zip(counts, names.stdout.splitlines()))
    print(f"{target}, {args.arch}\n")
    print(f"{'kernel':72} {'registers':>9} {'spills':>7} {'HMMA':>5} {'HGMMA':>6} {'copies':>6}")
    bad = 0
    for mangled, count in sorted(counts.items(), key=lambda item: readable[item[0]]):
        kernel = re.sub(r"lns::cuda::|\(anonymous namespace\)::|^void |__nv_", "", readable[mangled])
        kernel = re.sub(r"\(.*", "", kernel).replace("bfloat16", "bf16")
        spills = count["LDL"] + count["STL"]
        tensor = count["HMMA"] + count["HGMMA"]
        missing = "attention" in kernel and "bf16" in kernel and "dot" not in kernel and tensor == 0
        hot = "float" not in kernel or "bf16" in kernel  # pure float32 is a reference
        bad += hot and (spills > 0 or missing)
        if args.all or spills or (hot and "random" not in kernel):
            print(f"{kernel:72} {registers.get(mangled, (0, 0))[0]:>9} {spills:>7} {count['HMMA']:>5} "
                  f"{count['HGMMA']:>6} {count['LDGSTS'] + count['UTMALDG']:>6}"
                  f"{'  no tensor-core instructions' if missing else ''}")
    print(f"\n{len(counts)} kernels; {bad} bf16 kernels with spills or without tensor-core instructions")
    sys.exit(1 if bad or not counts else 0)


main()
