"""What a run directory says of its run: log.jsonl, one object a step, and the checkpoints' JSON.

Used by table.py and picture.py. The last line of log.jsonl may be cut short, by a kill or because
the run is still writing it; everything before it must be whole.
"""

import glob
import json
import os


class RunError(Exception):
    """A sentence for the user."""


class Run:
    """path; log: list of objects; config: of the newest checkpoint, {} before the first."""

    def __init__(self, path):
        self.path = path.rstrip("/") or "/"
        self.log = read_log(os.path.join(path, "log.jsonl"))
        checkpoints = sorted(glob.glob(os.path.join(glob.escape(path), "step-*[0-9]")))
        newest = checkpoints[-1] if checkpoints else ""
        self.config = read_json(os.path.join(newest, "config.json")) if newest else {}
        state = read_json(os.path.join(newest, "trainer_state.json")) if newest else {}
        self.flags = state.get("flags", {})

    @property
    def scheme(self):
        """As -n has it; the directory's name where no checkpoint tells."""
        name = self.config.get("lns_cpp", {}).get("scheme")
        return name or os.path.basename(os.path.abspath(self.path))

    @property
    def preset(self):
        name = self.config.get("lns_cpp", {}).get("preset") or self.config.get("model_type", "")
        return name[4:] if name.startswith("lns-") else name  # so are models that need our code

    @property
    def layers(self):
        return self.config.get("num_hidden_layers") or self.config.get("n_layer")

    @property
    def tokens(self):
        return self.log[-1]["tokens"] if self.log else 0

    @property
    def validations(self):
        """[(tokens trained on, loss in nats a token)], in order."""
        return [(r["tokens"], r["val_loss"]) for r in self.log if r.get("val_loss") is not None]

    @property
    def variances(self):
        """Of the residual stream after the embedding and after each layer: L + 1 numbers that the
        last step's line holds; None if the run has not come to its end."""
        return self.log[-1].get("residual_variance") if self.log else None


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from None


def read_log(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror}. A run's directory, the -o of ./train_gpt, is "
            "expected"
        ) from None
    log = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "tokens" not in record:
                raise ValueError
        except ValueError:
            if number == len(lines):  # no newline behind it: cut short
                break
            raise RunError(f"{path}, line {number}: expected an object with \"tokens\"") from None
        log.append(record)
    return log
