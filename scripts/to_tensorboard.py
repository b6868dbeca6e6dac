#!/usr/bin/env python3
"""Writes runs as TensorBoard's event files: loss, learning rate, speed, the variance of each layer.

    scripts/to_tensorboard.py RUN... -o DIR
    tensorboard --logdir DIR

RUN is a directory that ./train_gpt -o wrote, finished or not. Each becomes DIR/NAME, which the same
command replaces. TensorBoard is needed only to view the files. An event file is a sequence of
records (length, its checksum, the bytes, their checksum); a record is a protocol buffer, here with
only the fields that a scalar needs (tensorflow/core/util/event.proto).
"""

import argparse
import datetime
import math
import os
import struct
import sys

from runs import Run, RunError, number

SCALARS = [  # field of log.jsonl, tag
    ("loss", "loss/train"),
    ("val_loss", "loss/validation"),
    ("val_bits_per_byte", "loss/validation_bits_per_byte"),
    ("lr", "optimizer/lr"),
    ("grad_norm", "optimizer/grad_norm"),
    ("tokens", "progress/tokens"),
    ("seconds", "progress/seconds"),
    ("tokens_per_s", "speed/tokens_per_s"),
    ("mfu", "speed/mfu"),
]
FILE = "events.out.tfevents.0.lns"  # TensorBoard looks for "tfevents" in the name


def crc_table():
    """CRC-32C (Castagnoli), reflected."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = crc_table()


def masked_crc(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(data):
    length = struct.pack("<Q", len(data))
    checksums = struct.pack("<I", masked_crc(length)), struct.pack("<I", masked_crc(data))
    return length + checksums[0] + data + checksums[1]


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def message(field, data):
    """A field that holds a message or a string."""
    return varint(field << 3 | 2) + varint(len(data)) + data


def event(wall_time, step, scalars):
    """Event {wall_time = 1, step = 2, summary = 5 {value = 1 {tag = 1, simple_value = 2}}}."""
    values = b"".join(
        message(1, message(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
        for tag, value in scalars
    )
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + varint(step) + message(5, values)


def float32(value):
    """The value, or infinity if it is too large for a float32."""
    return math.copysign(math.inf, value) if abs(value) > 3e38 else value


def scalars_of(line):
    """[(tag, value)] of one line of log.jsonl."""
    found = [(tag, number(line.get(key))) for key, tag in SCALARS if line.get(key) is not None]
    loss = number(line.get("val_loss"))
    if math.isfinite(loss):
        found.append(("loss/validation_perplexity", math.exp(min(loss, 88))))
    found += [
        (f"residual_variance/after_layer_{layer:02d}", number(value))
        for layer, value in enumerate(line.get("residual_variance") or [])
    ]
    found += numbers_in(line.get("tasks") or {}, "tasks")
    probe = line.get("probe")
    found += numbers_in(probe, "probe") if isinstance(probe, dict) else []
    return [(tag, float32(value)) for tag, value in found]


def numbers_in(values, tag):
    """The numbers of an object, or of a list with one per layer, named by their keys."""
    if isinstance(values, dict):
        return [item for key, value in values.items() for item in numbers_in(value, f"{tag}/{key}")]
    if isinstance(values, list):
        flat = [(i, v) for i, v in enumerate(values, 1) if math.isfinite(number(v))]
        return [(f"{tag}/{i:02d}", number(v)) for i, v in flat]
    return [(tag, number(values))] if math.isfinite(number(values)) else []


def start_time(run):
    """When the run started, in seconds since 1970; 0 if run.json does not say."""
    try:
        time = datetime.datetime.strptime(run.starts[0]["time"], "%Y-%m-%dT%H:%M:%SZ")
        return time.replace(tzinfo=datetime.timezone.utc).timestamp()
    except (IndexError, KeyError, TypeError, ValueError):
        return 0.0


def names_of(runs):
    """The names of the directories, with as much of the path as makes them unique."""
    paths = [os.path.abspath(run.path).strip("/").split("/") for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise RunError("the same run is given twice")


def write(run, directory):
    """Returns the number of events."""
    start = start_time(run)
    try:
        os.makedirs(directory, exist_ok=True)
        new = os.path.join(directory, FILE + ".new")
        if os.path.lexists(new):
            os.remove(new)
        with open(new, "xb") as file:  # do not follow a link
            file.write(record(b"\x09" + struct.pack("<d", start) + message(3, b"brain.Event:2")))
            for line in run.log:
                seconds = number(line.get("seconds"))
                time = start + (seconds if math.isfinite(seconds) else 0)
                file.write(record(event(time, max(0, int(line["step"])), scalars_of(line))))
        os.replace(new, os.path.join(directory, FILE))
    except OSError as error:
        raise RunError(f"cannot write {directory}: {error.strerror}") from None
    return len(run.log)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("-o", "--out", metavar="DIR", required=True)
    args = parser.parse_args()
    runs = [Run(path) for path in args.runs]
    for run in runs:
        if not run.log:
            raise RunError(f"{run.path}/log.jsonl holds no whole step yet: train the run first")
    for run, name in zip(runs, names_of(runs)):
        events = write(run, os.path.join(args.out, name))
        cut = "; its log's last line is cut short and left out" if run.cut else ""
        print(f"wrote {os.path.join(args.out, name)}: {events} steps{cut}")
    print(f"look at them with: tensorboard --logdir {args.out}")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"to_tensorboard.py: {error}")
