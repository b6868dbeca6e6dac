#!/bin/bash
# Benchmarks from a user's side: eval --tasks, --val-tasks, probe --removal-tasks, export
# --drop-layers, and the data that data/evals.py writes.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
[[ -x train_gpt ]] || skip_all "benchmarks are not tested: there is no ./train_gpt"
data=dev/test/fixtures/tasks
all=hellaswag,piqa,arc_easy,arc_challenge,boolq,openbookqa,winogrande,mmlu
program() { CUDA_VISIBLE_DEVICES='' ./train_gpt "$@" --device cpu --threads 1; }
fails_with() { # SENTENCE FLAGS...: exit status 1 and one sentence
    local said status=0
    said=$(program "${@:2}" 2>&1 >/dev/null) || status=$?
    [[ $status == 1 && $(wc -l <<<"$said") == 1 ]] && says "$said" "$1" && return
    echo "status $status: $said"
    return 1
}

# A tiny model that trains with validations on two benchmarks
out=$(program -n lns -x 20 -o "$dir/run" --layers 3 --width 32 --heads 2 --kv-heads 1 --positions 512 -t 64 \
    -b 8 -v 10 --val-tokens 512 -s 0 -g 0 --val-tasks arc_easy,mmlu --val-task-limit 4 --task-data $data)
check "training: it succeeds" test $? -eq 0
check "training: accuracies are printed" says "$out" "step 20  accuracy  arc_easy "
if command -v python3 >/dev/null; then
    check "training: the log has them" python3 - "$dir/run/log.jsonl" <<'PYTHON'
import json, sys

log = [json.loads(line) for line in open(sys.argv[1])]
assert [line["step"] for line in log if "tasks" in line] == [10, 20]
tasks = log[-1]["tasks"]
assert set(tasks) == {"arc_easy", "mmlu", "mmlu_stem", "mmlu_social_sciences", "mmlu_humanities"}, tasks
assert tasks["mmlu"]["questions"] == 4 and tasks["arc_easy"]["questions"] == 2
assert tasks["mmlu"]["chance"] == 0.25 and 0 <= tasks["arc_easy"]["acc_norm"] <= 1
PYTHON
fi
program -n lns -x 20 -o "$dir/plain" --layers 3 --width 32 --heads 2 --kv-heads 1 --positions 512 -t 64 \
    -b 8 -v 10 --val-tokens 512 -s 0 -g 0 >/dev/null
check "training: not a bit of it changes" cmp "$dir"/{run,plain}/step-000020/optimizer.safetensors

# eval
out=$(program eval "$dir/run" --tasks $all --task-data $data -o "$dir/results.json" --log-samples "$dir/samples.jsonl")
check "eval: it succeeds" test $? -eq 0
check "eval: a table of 80 columns" test "$(wc -L <<<"$(grep -v '^note' <<<"$out")")" -le 80
check "eval: tasks, categories, subjects" grep -qE '^   - anatomy +2  0.2500 ' <<<"$out"
check "eval: mmlu once" test "$(grep -c '^mmlu ' <<<"$out")" = 1
check "eval: what the data lacks" says "$out" "no questions of 53 of mmlu's 57 subjects"
program eval "$dir/run" --tasks $all --task-data $data --json >"$dir/again.json" 2>/dev/null
if command -v python3 >/dev/null; then
    check "eval: lm-evaluation-harness's layout, and the same numbers" python3 - "$dir" <<'PYTHON'
import json, sys

one, two = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("results", "again"))
assert one["results"] == two["results"] and len(one["results"]) == 7 + 1 + 3 + 4
assert set(one["results"]["piqa"]) == {
    "alias", "name", "sample_len", "acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"}
assert one["group_subtasks"]["mmlu"] == ["mmlu_stem", "mmlu_social_sciences", "mmlu_humanities"]
assert one["n-samples"]["hellaswag"] == {"original": 3, "effective": 3}
assert one["configs"]["boolq"]["output_type"] == "multiple_choice" and one["versions"]["boolq"] == 2
samples = [json.loads(line) for line in open(f"{sys.argv[1]}/samples.jsonl")]
assert len(samples) == 3 + 6 * 2 + 8
for task in ("boolq", "mmlu_anatomy"):
    right = [s["acc"] for s in samples if s["task"] == task]
    assert abs(one["results"][task]["acc,none"] - sum(right) / len(right)) < 1e-12
assert all(len(s["resps"]) == len(s["arguments"]) and max(s["resps"]) < 0 for s in samples)
PYTHON
fi
if [[ -x train_gpt_sim ]]; then
    program eval "$dir/run" --tasks $all --task-data $data --fewshot 0 --dtype float32 --log-samples "$dir/cpu.jsonl" >/dev/null
    ./train_gpt_sim eval "$dir/run" --tasks $all --task-data $data --device cuda --dtype float32 \
        --log-samples "$dir/gpu.jsonl" >/dev/null
    check "eval: a simulated GPU gives the same scores" python3 - "$dir" <<'PYTHON'
import json, sys

cpu, gpu = ([json.loads(line)["resps"] for line in open(f"{sys.argv[1]}/{name}.jsonl")] for name in ("cpu", "gpu"))
assert len(cpu) == len(gpu) == 23
assert max(abs(x - y) for a, b in zip(cpu, gpu) for x, y in zip(a, b)) < 1e-4
PYTHON
else
    skip "eval --tasks on a simulated GPU: there is no ./train_gpt_sim"
fi
check "eval: an unknown task" fails_with "Did you mean 'hellaswag'?" eval "$dir/run" --tasks helaswag
check "eval: no data" fails_with "arc_easy.jsonl.xz. data/get.sh evals fetches it" eval "$dir/run" --tasks arc_easy --task-data "$dir"
check "eval: too few examples" fails_with "only 3 examples" eval "$dir/run" --tasks mmlu --task-data $data --fewshot 5
check "eval: flags of the loss" fails_with "--val belongs to the validation loss" eval "$dir/run" --tasks piqa -j x
printf '%s\n' '{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}' '{"goal": "g", "label": 0}' >"$dir/piqa.jsonl"
check "eval: a missing field, by line" fails_with "piqa.jsonl, line 2: the field 'sol1' is missing" eval "$dir/run" --tasks piqa --task-data "$dir"

# A layer less: measured, and exported
out=$(program probe "$dir/run" --probes removal --removal-tasks arc_easy,mmlu --task-data $data -o "$dir/probe.json" -b 2 --probe-tokens 256)
check "probe: it succeeds" test $? -eq 0
check "probe: accuracy beside the loss" grep -qE '^layer +removed +mmlu +\+- +arc_easy +\+-' <<<"$out"
out=$(./train_gpt export "$dir/run" "$dir/pruned" --drop-layers 2)
check "export: it says what is left" says "$out" "2 of 3 layers, without 2"
program eval "$dir/pruned" --tasks arc_easy,mmlu --task-data $data --json >"$dir/pruned.json" 2>/dev/null
program probe "$dir/pruned" --probes removal --removal-tasks arc_easy --task-data $data -o "$dir/alone.json" >out
check "probe: a model of no run, on benchmarks alone" out_says "only benchmarks are measured"
rm -f out
if command -v python3 >/dev/null; then
    check "the change without a layer is that of the exported model" python3 - "$dir" <<'PYTHON'
import json, sys

probe, pruned, alone = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("probe", "pruned", "alone"))
for task in ("arc_easy", "mmlu", "mmlu_stem", "mmlu_anatomy"):
    whole = probe["task_removal"][task]
    assert len(whole["change"]) == 3
    expected = whole["accuracy"] + whole["change"][1]
    assert abs(pruned["results"][task]["acc,none"] - expected) < 1e-12, task
assert alone["loss"] is None and len(alone["task_removal"]["arc_easy"]["change"]) == 2
PYTHON
fi
out=$(./train_gpt export "$dir/run" "$dir/x" --drop-layers 4 2>&1)
check "export: a layer that does not exist" says "$out" "layer 4 cannot be dropped: the model has layers 1 to 3"
check "probe: without removal" fails_with "which --probes leaves out" probe "$dir/run" --probes variance --removal-tasks piqa

# The data sets' archives
if command -v python3 >/dev/null; then
    mkdir "$dir/evals"
    check "evals.py: archives become JSON lines" python3 - "$dir/evals" <<'PYTHON'
import io, json, os, sys, tarfile, zipfile

sys.path.insert(0, "data")
import evals

where = sys.argv[1]


def zipped(name, files):
    with zipfile.ZipFile(os.path.join(where, name), "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


fixture = lambda name: open(f"dev/test/fixtures/tasks/{name}.jsonl", encoding="utf-8").read()
choices = [{"text": "a hen", "label": "A"}, {"text": "a cow\u2028or two", "label": "B"}]
question = json.dumps({"id": "1", "question": {"stem": "q", "choices": choices}, "answerKey": "B"}, ensure_ascii=False)
open(os.path.join(where, "hellaswag_val.jsonl"), "w").write(fixture("hellaswag"))
pairs = [{k: v for k, v in json.loads(line).items() if k != "label"} for line in fixture("piqa").splitlines()]
zipped("physicaliqa-train-dev.zip", {
    "physicaliqa-train-dev/dev.jsonl": "\n".join(map(json.dumps, pairs)), "physicaliqa-train-dev/dev-labels.lst": "0\n1\n"})
zipped("ARC-V1-Feb2018.zip", {f"ARC-V1-Feb2018-2/ARC-{n}/ARC-{n}-Test.jsonl": question for n in ("Easy", "Challenge")})
zipped("BoolQ.zip", {"BoolQ/val.jsonl": json.dumps({"passage": "p", "question": "q", "label": True, "idx": 0})})
zipped("OpenBookQA-V1-Sep2018.zip", {"OpenBookQA-V1-Sep2018/Data/Main/test.jsonl": question})
zipped("winogrande_1.1.zip", {"winogrande_1.1/dev.jsonl": fixture("winogrande")})
with tarfile.open(os.path.join(where, "data.tar"), "w") as archive:
    for split in ("test", "dev"):
        text = b'"two\nlines, ""quoted""",1,2,3,4,D\n'
        info = tarfile.TarInfo(f"data/{split}/anatomy_{split}.csv")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
try:
    evals.main(where)
    raise AssertionError("10,042 questions were expected")
except SystemExit as error:
    assert "hellaswag has 3 questions, expected 10042" in str(error), error
evals.QUESTIONS = {name: 1 for name in evals.QUESTIONS} | {"hellaswag": 3, "piqa": 2, "winogrande": 2}
evals.main(where)
row = json.loads(open(os.path.join(where, "mmlu_test.jsonl")).read())
assert row == {"question": 'two\nlines, "quoted"', "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 3}
PYTHON
    program eval "$dir/run" --tasks $all --task-data "$dir/evals" >out 2>&1
    check "evals.py: eval reads them" out_says "boolq"
    rm -f out
fi

summary
