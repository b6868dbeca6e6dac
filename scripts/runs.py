"""Reads run directories: log.jsonl, one object per step; run.json, the flags; the checkpoints' JSON;
probe.json, the results of `train_gpt probe`.

The last line of log.jsonl may be incomplete, after a kill or while the run is writing it; all other
lines must be complete.
"""

import glob
import json
import math
import os

RISE = 0.5  # a run that ends this many nats above its best validation loss has diverged
STUCK = 1.5  # and so has one that ends this far above the best run on the same data
DATA = ("--train", "--val", "--tokenizer", "--val-tokens", "--seq-len")
SIZE = ("--model", "--layers", "--width", "--steps")


class RunError(Exception):
    """A sentence for the user."""


class Run:
    """path; log: a list of objects; cut: whether the last line of the log was incomplete; config: of
    the newest checkpoint, or {}; flags: from run.json; tokenizer: kind, vocab_size and fingerprint
    from the newest checkpoint, or {}; probe: a Probe or None."""

    def __init__(self, path):
        self.path = path.rstrip("/") or "/"
        if not os.path.isdir(self.path):
            found = "a file" if os.path.exists(self.path) else "not there"
            raise RunError(
                f"{path} is {found}; a run's directory, the -o of ./train_gpt, is expected"
            )
        probe_file = os.path.join(self.path, "probe.json")
        log_file = os.path.join(self.path, "log.jsonl")
        has_probe = os.path.exists(probe_file)
        self.log, self.cut = [], False
        if os.path.exists(log_file) or not has_probe:
            self.log, self.cut = read_log(log_file)
        checkpoints = glob.glob(os.path.join(glob.escape(self.path), "step-*[0-9]"))
        newest = max(checkpoints, key=lambda name: (len(name), name), default="")
        config = read_json(os.path.join(newest, "config.json")) if newest else {}
        self.config = {**scalars(config), "lns_cpp": section(config, "lns_cpp")} if config else {}
        state = read_json(os.path.join(newest, "trainer_state.json")) if newest else {}
        self.tokenizer = section(state, "tokenizer")
        record_file = os.path.join(self.path, "run.json")
        record = read_json(record_file) if os.path.exists(record_file) else {}
        flags = section(record, "options") or section(state, "flags")
        self.flags = {name: flag_text(value) for name, value in flags.items()}
        starts = record.get("starts")
        starts = starts if isinstance(starts, list) else []
        self.starts = [start for start in starts if isinstance(start, dict)]
        self.probe = Probe(read_json(probe_file), probe_file) if has_probe else self._last_probe()
        self.best_beside = math.nan  # the best last validation loss of judge_together's runs

    def _last_probe(self):
        """The last diagnostics that were logged during training."""
        for record in reversed(self.log):
            values = record.get("probe")
            if isinstance(values, dict):
                variance = probed_variance(record) or record.get("residual_variance")
                layers = len(variance) - 1 if variance else self.layers
                where = f"{self.path}/log.jsonl, step {record['step']:g}: probe"
                if layers:
                    return Probe({"step": record["step"], **values}, where, layers)
        return None

    @property
    def name(self):
        return os.path.basename(os.path.abspath(self.path))

    @property
    def scheme(self):
        """The value of -n, or the name of the directory if it is unknown."""
        name = section(self.config, "lns_cpp").get("scheme") or self.flags.get("--norm")
        if not name and self.probe:
            name = self.probe.scheme
        return str(name or self.name)

    @property
    def preset(self):
        name = section(self.config, "lns_cpp").get("preset") or self.config.get("model_type")
        name = str(name or self.flags.get("--model") or "")
        return name[4:] if name.startswith("lns-") else name  # the prefix of non-stock models

    @property
    def layers(self):
        """From the newest checkpoint, or from the log."""
        told = self.config.get("num_hidden_layers") or self.config.get("n_layer")
        history = () if told else self.variance_history
        return len(history[-1][1]) - 1 if history else told

    @property
    def width(self):
        return self.config.get("hidden_size") or self.config.get("n_embd")

    @property
    def seed(self):
        return self.flags.get("--seed")

    @property
    def tokens(self):
        return self.log[-1]["tokens"] if self.log else 0

    @property
    def planned_tokens(self):
        """Of the whole run; None if its steps are unknown."""
        steps = number(self.flags.get("--steps"))
        if not self.log or not self.log[-1]["step"] or not steps > 0:
            return None
        return self.tokens * steps / self.log[-1]["step"]

    @property
    def tokens_per_s(self):
        """Averaged over the whole run; None if the log lacks the time."""
        seconds = number(self.log[-1].get("seconds")) if self.log else math.nan
        return self.tokens / seconds if seconds > 0 else None

    @property
    def losses(self):
        """[(training tokens, training loss)], in order; NaN for non-finite losses."""
        return [(r["tokens"], number(r["loss"])) for r in self.log if "loss" in r]

    @property
    def validations(self):
        """[(training tokens, validation loss in nats per token)], in order; finite losses only."""
        found = [(r["tokens"], number(r.get("val_loss"))) for r in self.log]
        return [(tokens, loss) for tokens, loss in found if math.isfinite(loss)]

    @property
    def accuracies(self):
        """{task: [(training tokens, its accuracy, its standard error, chance)]} of --val-tasks."""
        found = {}
        for record in self.log:
            for task, values in objects(record.get("tasks")).items():
                values = [number(values.get(key)) for key in ("acc", "acc_stderr", "chance")]
                if math.isfinite(values[0]):
                    found.setdefault(task, []).append((record["tokens"], *values))
        return found

    @property
    def variance_history(self):
        """[(training tokens, variance of the residual stream after the embedding and each layer)]."""
        found = []
        for record in self.log:
            values = record.get("residual_variance")
            if values is None:
                values = probed_variance(record)
            if values and len(values) > 1:
                found.append((record["tokens"], [number(value) for value in values]))
        return [item for item in found if len(item[1]) == len(found[-1][1])]

    @property
    def variances(self):
        """Variance of the residual stream after the embedding and each layer: the L + 1 numbers in
        the last line of the log; None if the run has not finished."""
        return self.log[-1].get("residual_variance") if self.log else None

    def outcome(self):
        """(word, sentence); the word is "finished", "diverged" or "short"."""
        path, text = os.path.join(self.path, "outcome"), ""
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        step = self.log[-1]["step"] if self.log else 0
        if "not finite" in text:  # left by scripts/compare.sh
            return "diverged", f"diverged: not finite after step {step:g}"
        for record in self.log:
            values = [number(record["loss"])] if "loss" in record else []
            if record.get("val_loss") is not None:
                values.append(number(record["val_loss"]))
            if not all(map(math.isfinite, values)):
                return "diverged", f"diverged: not finite at step {record['step']:g}"
        train = [loss for _, loss in self.losses]
        validations = [loss for _, loss in self.validations]
        last = train[-10:]
        end = validations[-1] if validations else sum(last) / len(last) if last else 0
        if train and end > train[0] and len(train) > 1:
            return "diverged", f"diverged: ended at {end:.2f}, above its start at {train[0]:.2f}"
        if validations and end > min(validations) + RISE:
            return "diverged", f"diverged: {end - min(validations):.2f} above its best"
        steps = number(self.flags.get("--steps"))
        if step < steps:
            return "short", f"not finished: at step {step:g} of {steps:g}"
        if self.variances is None:
            return "short", f"not finished: at step {step:g}"
        if validations and end > self.best_beside + STUCK:
            above = end - self.best_beside
            return "diverged", f"stuck at {end:.2f}, {above:.2f} above the best run here"
        return "finished", "finished"


class Probe:
    """A probe.json, or the `probe` of a line of log.jsonl. It has only the requested diagnostics:
    absent lists are None. Non-finite numbers are NaN."""

    def __init__(self, values, where, layers=None):
        self.values, self.where = values, where
        version = values.get("version", 1)
        if version != 1:
            raise RunError(f"{where} has version {version}; this program reads version 1")
        layers = values.get("layers", layers)
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise RunError(f'{where}: "layers" is {layers!r}; the number of layers is expected')
        self.layers = layers

    @property
    def scheme(self):
        return str(self.values.get("scheme") or "")

    @property
    def removal_tasks(self):
        return list(objects(self.values.get("task_removal")))

    def number(self, *keys):
        """The number under these keys, or NaN."""
        return number(self._at(keys))

    def series(self, *keys):
        """The list under these keys: one number per layer (residual: one more)."""
        values = self._at(keys)
        if values is None:
            return None
        expected = {"residual": self.layers + 1, "permutation": self.layers - 1}
        wanted = expected.get(keys[-1], self.layers)
        if not is_list_of_numbers(values) or len(values) != wanted:
            raise RunError(f'{self.where}: "{".".join(keys)}" is not a list of {wanted} numbers')
        values = [number(value) for value in values]
        return values if any(map(math.isfinite, values)) else None

    def rows(self, *keys, triangle=True):
        """The list of lists under these keys. In a triangle row n − 1 has L − n + 1 numbers."""
        rows = self._at(keys)
        if rows is None:
            return None
        if not isinstance(rows, list) or not rows or not all(map(is_list_of_numbers, rows)):
            raise RunError(f'{self.where}: "{".".join(keys)}" is not a list of lists of numbers')
        if triangle:
            wanted = [self.layers - n for n in range(len(rows))]
        else:
            wanted = [len(rows)] * len(rows)
        if [len(row) for row in rows] != wanted:
            raise RunError(
                f'{self.where}: "{".".join(keys)}" has rows of '
                f"{', '.join(str(len(row)) for row in rows[:8])}{', …' if len(rows) > 8 else ''} "
                f"numbers; {', '.join(map(str, wanted[:8]))}{', …' if len(wanted) > 8 else ''} are "
                "expected"
            )
        rows = [[number(value) for value in row] for row in rows]
        return rows if any(math.isfinite(value) for row in rows for value in row) else None

    def _at(self, keys):
        value = self.values
        for depth, key in enumerate(keys):
            if value is None:
                return None
            if not isinstance(value, dict):
                raise RunError(f'{self.where}: "{".".join(keys[:depth])}" is not an object')
            value = value.get(key)
        return value


def judge_together(runs):
    """Sets best_beside of each run: the loss of the best run of the same size on the same data. A run
    that only learned token frequencies looks finished by itself."""
    last = {}
    for run in runs:
        if run.flags and run.validations:
            key = tuple(run.flags.get(name) for name in DATA + SIZE)
            last.setdefault(key, []).append((run.validations[-1][1], run))
    for same in last.values():
        best = min(loss for loss, _ in same)
        for _, run in same:
            run.best_beside = best


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_list_of_numbers(values):
    return isinstance(values, list) and all(v is None or is_number(v) for v in values)


def number(value):
    """The number that a value or a flag's text denotes; NaN for everything else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def flag_text(value):
    """A flag's value as text, so that records with typed values and older ones, with the text that was
    given, compare as equal: 0.001 and "1e-3", True and "true"."""
    if isinstance(value, list):
        return " ".join(map(flag_text, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if math.isnan(number(value)) else f"{number(value):.12g}"


def scalars(values):
    """The strings and numbers of an object."""
    return {k: v for k, v in values.items() if isinstance(v, (str, int, float))}


def objects(values):
    """The objects of an object; {} if it is none."""
    return (
        {k: v for k, v in values.items() if isinstance(v, dict)} if isinstance(values, dict) else {}
    )


def section(values, key):
    """The strings and numbers of values[key], if that is an object; else {}."""
    found = values.get(key) if isinstance(values, dict) else None
    return scalars(found) if isinstance(found, dict) else {}


def probed_variance(record):
    """The residual stream's variance in the `probe` of a line of log.jsonl, or None."""
    values = record
    for key in ("probe", "variance", "residual"):
        values = values.get(key) if isinstance(values, dict) else None
    return values if is_list_of_numbers(values) else None


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} is not a JSON object")
    return values


def read_record(line):
    """One line of log.jsonl. Raises ValueError if it is invalid."""
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    for key in ("step", "tokens"):
        if not is_number(record.get(key)) or not math.isfinite(number(record[key])):
            raise ValueError(f'it has no number "{key}"')
    for key in ("loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "seconds"):
        if record.get(key) is not None and not is_number(record[key]):
            raise ValueError(f'"{key}" is {record[key]!r}, not a number')
    variance = record.get("residual_variance")
    if variance is not None and not (is_list_of_numbers(variance) and variance):
        raise ValueError('"residual_variance" is not a list of numbers')
    return record


def read_log(path):
    """The objects of a log.jsonl, and whether its last line was incomplete."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror}. A run's directory, the -o of ./train_gpt, is "
            "expected"
        ) from None
    log = []
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = read_record(line)
        except ValueError as error:
            if row == len(lines):  # no newline follows: incomplete
                return log, True
            raise RunError(f"{path}, line {row}: expected an object of a step: {error}") from None
        log.append(record)
    return log, False
