#!/usr/bin/env python3
"""Turns the archives that data/get.sh evals downloads to DIR into DIR/TASK.jsonl, in the fields of
the data sets on Hugging Face. Each split is the one that lm-evaluation-harness scores.

    data/evals.py DIR
"""

import csv
import io
import json
import os
import sys
import tarfile
import zipfile

QUESTIONS = {
    "hellaswag": 10042, "piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270,
    "openbookqa": 500, "winogrande": 1267, "mmlu_test": 14042, "mmlu_dev": 285,
}  # fmt: skip


def lines_of(data):
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line.strip()]


def member(directory, archive, name):
    with zipfile.ZipFile(os.path.join(directory, archive)) as file:
        return file.read(name)


def with_choices(row, field):
    """AI2's form of a question, in Hugging Face's."""
    choices = row["question"]["choices"]
    return {
        "id": row["id"],
        field: row["question"]["stem"],
        "choices": {key: [choice[key] for choice in choices] for key in ("text", "label")},
        "answerKey": row["answerKey"],
    }


def hellaswag(directory):
    with open(os.path.join(directory, "hellaswag_val.jsonl"), "rb") as file:
        return lines_of(file.read())


def piqa(directory):
    archive, folder = "physicaliqa-train-dev.zip", "physicaliqa-train-dev/"
    rows = lines_of(member(directory, archive, folder + "dev.jsonl"))
    labels = member(directory, archive, folder + "dev-labels.lst").decode().split()
    if len(rows) != len(labels):
        raise ValueError(f"{archive} has {len(rows)} questions and {len(labels)} labels")
    return [{**row, "label": int(label)} for row, label in zip(rows, labels)]


def arc(directory, name):
    path = f"ARC-V1-Feb2018-2/ARC-{name}/ARC-{name}-Test.jsonl"
    rows = lines_of(member(directory, "ARC-V1-Feb2018.zip", path))
    return [with_choices(row, "question") for row in rows]


def boolq(directory):
    rows = lines_of(member(directory, "BoolQ.zip", "BoolQ/val.jsonl"))
    return [{**row, "label": int(row["label"])} for row in rows]


def openbookqa(directory):
    path = "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl"
    rows = lines_of(member(directory, "OpenBookQA-V1-Sep2018.zip", path))
    return [with_choices(row, "question_stem") for row in rows]


def winogrande(directory):
    return lines_of(member(directory, "winogrande_1.1.zip", "winogrande_1.1/dev.jsonl"))


def mmlu(directory, split):
    """CSV without a header: question, four choices, the answer's letter."""
    rows = []
    with tarfile.open(os.path.join(directory, "data.tar")) as archive:
        for name in sorted(archive.getnames()):
            if not name.startswith(f"data/{split}/") or not name.endswith(f"_{split}.csv"):
                continue
            text = io.TextIOWrapper(archive.extractfile(name), encoding="utf-8", newline="")
            subject = os.path.basename(name)[: -len(f"_{split}.csv")]
            for question, *choices, answer in csv.reader(text):
                rows.append({"question": question, "subject": subject, "choices": choices,
                             "answer": "ABCD".index(answer)})  # fmt: skip
    return rows


def main(directory):
    makers = {
        "hellaswag": hellaswag,
        "piqa": piqa,
        "arc_easy": lambda where: arc(where, "Easy"),
        "arc_challenge": lambda where: arc(where, "Challenge"),
        "boolq": boolq,
        "openbookqa": openbookqa,
        "winogrande": winogrande,
        "mmlu_test": lambda where: mmlu(where, "test"),
        "mmlu_dev": lambda where: mmlu(where, "dev"),
    }
    for task, make in makers.items():
        try:
            rows = make(directory)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
            sys.exit(f"evals.py: {task}: {error}")
        if len(rows) != QUESTIONS[task]:
            sys.exit(f"evals.py: {task} has {len(rows)} questions, expected {QUESTIONS[task]}: what "
                     f"was downloaded to {directory} is not the data set")  # fmt: skip
        path = os.path.join(directory, task + ".jsonl")
        with open(path + ".new", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(path + ".new", path)
        print(f"  {path}: {len(rows)} questions")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    main(sys.argv[1])
