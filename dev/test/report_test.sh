#!/bin/bash
# scripts/report.py, table.py and to_tensorboard.py on runs whose numbers are known.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
command -v python3 >/dev/null || skip_all "the scripts about runs are not tested: there is no python3 (make deps)"
fails_with() { # SENTENCE COMMAND...: exit status 1, the sentence, no traceback
    local sentence=$1 out status=0
    shift
    out=$("$@" 2>&1) || status=$?
    [[ $status == 1 ]] && says "$out" "$sentence" && silent_on "$out" Traceback && return
    echo "status $status: $out"
    return 1
}
make_run() { python3 dev/test/make_run.py "$dir/$1" "${@:2}"; }

make_run pre-1 pre --final 2.0 --probe
make_run pre-2 pre --final 2.1 --seed 2
make_run lns-1 lns --final 1.9 --probe
make_run lns-2 lns --final 1.95 --seed 2
make_run post post --end rise
make_run deepnorm deepnorm --end nan --stop 40
make_run mix mix --end cut --stop 60
make_run failed pre+gpas --end none --stop 30 && echo "train_gpt: step 31: the loss is not finite" >"$dir/failed/outcome"
runs=("$dir"/{pre-1,pre-2,lns-1,lns-2,post,deepnorm,mix,failed})

# The table in the terminal
out=$(python3 scripts/table.py "${runs[@]}")
check "table: the best comes first" says "$(sed -n 2p <<<"$out")" "lns-1    1.9000        6.69  1.9000       500  finished"
check "table: a loss that is not finite" says "$out" "diverged: not finite at step 40"
check "table: an end above the start" says "$out" "diverged: ended at 7.00, above its start"
check "table: a log that stops short" says "$out" "not finished: at step 59 of 100"
check "table: an outcome from compare.sh" says "$out" "diverged: not finite after step 30"
make_run stuck deepnorm-published --final 4
out=$(python3 scripts/table.py "$dir/pre-1" "$dir/stuck")
check "table: stuck far above the others" says "$out" "stuck at 4.00, 2.00 above the best run here"
out=$(python3 scripts/table.py "$dir/stuck")
check "table: not without other runs" says "$out" "500  finished"
make_run large deepnorm-published --final 4 --steps 50
out=$(python3 scripts/table.py "$dir/pre-1" "$dir/large")
check "table: nor with runs of another length" says "$out" "4.0000       500  finished"

# TensorBoard's files
out=$(python3 scripts/to_tensorboard.py "${runs[@]}" -o "$dir/tb")
check "tensorboard: it succeeds" test $? -eq 0
check "tensorboard: the truncated line is reported" says "$out" "mix: 59 steps; its log's last line is cut short"
check "tensorboard: the events match the log" python3 - "$dir" <<'PYTHON'
import json, struct, sys

sys.path.insert(0, "scripts")
import to_tensorboard

# https://www.rfc-editor.org/rfc/rfc3720, B.4: 32 bytes of zeros; unmasked
masked = to_tensorboard.masked_crc(bytes(32)) - 0xA282EAD8 & 0xFFFFFFFF
assert (masked << 15 | masked >> 17) & 0xFFFFFFFF == 0x8A9136AA, "CRC-32C"


def varint(data, at):
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


def fields(data):
    """[(number, value)] of a protocol buffer."""
    at, found = 0, []
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        elif key & 7 == 2:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            size = {1: 8, 5: 4}[key & 7]
            value, at = struct.unpack("<d" if size == 8 else "<f", data[at : at + size])[0], at + size
        found.append((key >> 3, value))
    return found


data = open(f"{sys.argv[1]}/tb/lns-1/{to_tensorboard.FILE}", "rb").read()
events, at = [], 0
while at < len(data):
    (length,) = struct.unpack("<Q", data[at : at + 8])
    body = data[at + 12 : at + 12 + length]
    assert struct.unpack("<I", data[at + 12 + length : at + 16 + length])[0] == to_tensorboard.masked_crc(body)
    events.append(dict(fields(body)))
    at += 16 + length
log = [json.loads(line) for line in open(f"{sys.argv[1]}/lns-1/log.jsonl")]
assert events[0][3] == b"brain.Event:2" and len(events) == 1 + len(log) == 101
for event, line in zip(events[1:], log):
    values = {}
    for _, value in fields(event[5]):
        scalar = dict(fields(value))
        values[scalar[1].decode()] = scalar[2]
    assert event[2] == line["step"] and event[1] == 1735689600 + line["seconds"]
    assert abs(values["loss/train"] - line["loss"]) < 1e-6
    assert ("residual_variance/after_layer_12" in values) == ("val_loss" in line)
PYTHON
check "tensorboard: a missing run" fails_with "is not there; a run's directory" \
    python3 scripts/to_tensorboard.py "$dir/none" -o "$dir/tb"

# The report
mkdir "$dir/lacks" && echo 'raise ImportError' >"$dir/lacks/matplotlib.py"
check "report: without Matplotlib it says what to install" fails_with "Matplotlib is needed to draw" \
    env PYTHONPATH="$dir/lacks" python3 scripts/report.py "$dir/pre-1"
check "report: and how" fails_with "\`make deps\`" env PYTHONPATH="$dir/lacks" scripts/report.py "$dir/pre-1"
check "picture: without Matplotlib" fails_with "picture.py: Matplotlib is needed to draw" \
    env PYTHONPATH="$dir/lacks" scripts/picture.py "$dir/pre-1" -o "$dir/p.svg"
if ! why=$(python3 scripts/figures.py 2>&1); then
    echo "SKIPPED: scripts/report.py is not tested: $(tail -1 <<<"$why")"
    echo "$passed passed, $failed failed, 1 skipped"
    exit $((failed > 0))
fi
# A python3 without Matplotlib that comes first in PATH, as a user's own often does
if [[ $(command -v python3) == */venv/bin/python3 ]]; then
    mkdir "$dir/first"
    printf '#!/bin/sh\nexec %s -S "$@"\n' "$(readlink -f "$(command -v python3)")" >"$dir/first/python3"
    chmod +x "$dir/first/python3"
    check "report: with any python3 first in PATH" env PATH="$dir/first:/usr/bin:/bin" \
        scripts/report.py "$dir/pre-1" -o "$dir/first.html"
fi
report() { python3 scripts/report.py "$@" -o "$dir/report.html" 2>&1; }
page() { # the page's text: a line a table row or paragraph, cells parted by |
    python3 - "$dir/report.html" <<'PYTHON'
import html.parser, sys


class Text(html.parser.HTMLParser):
    inside, out = 0, ""

    def handle_starttag(self, tag, _):
        self.inside += tag in ("svg", "style")

    def handle_endtag(self, tag):
        self.inside -= tag in ("svg", "style")
        self.out += {"td": "|", "th": "|", "tr": "\n", "p": "\n", "h3": "\n"}.get(tag, "")

    def handle_data(self, data):
        self.out += "" if self.inside else data


text = Text()
text.feed(open(sys.argv[1], encoding="utf-8").read())
print(text.out)
PYTHON
}

out=$(report "${runs[@]}" --png "$dir/png")
check "report: it succeeds" test $? -eq 0
text=$(page)
check "report: mean and deviation over seeds, tokens to reach Pre-LN's" \
    says "$text" "lns|6.86 ± 0.24|−11.8%, p = 0.13, within noise|1.9250 ± 0.0354|2|64k (0.64×)|100k|500||"
check "report: the reference" says "$text" "pre|7.78 ± 0.55|–|2.0500 ± 0.0707|2|100k (1.00×)|100k|500||"
check "report: a mark where the loss was not finite" says "$text" "0 of 1|not reached|40k|500|✗ diverged: not finite at step 40|"
check "report: a mark where it ended above its start" says "$text" "✗ diverged: ended at 7.00"
check "report: a run that stopped before a checkpoint" says "$text" "✗ diverged: not finite after step 30"
check "report: an unfinished run is not called diverged" says "$text" "500|not finished: at step 59 of 100|"
check "report: the best run" says "$text" "Lowest perplexity: lns, 6.86 ± 0.24. That is 11.8% below pre."
check "report: the truncated log is noted" says "$text" "mix: the last line of log.jsonl is cut short"
check "report: and on the terminal" says "$out" "mix: the last line of log.jsonl is cut short"
check "report: one tokenizer, no warning" silent_on "$text" "not comparable"
check "report: diagnostics in numbers" says "$text" "pre|27.1×|ℓ^1.30 (R² 0.850)|e^(0.300 ℓ) (R² 1.000)|"
# By their formulas: means over the deeper half, layers 7 … 12, of 0.4 f / (1 + f), f − 0.005, f.
check "report: the deep half" says "$text" "|0.0392|0.104|0.109|25%|0.0544|"
for what in "Variance by layer" "Power or exponential?" "Variance through training" "Gradient norms" \
    "Angular distance" "Removal of one layer" "Removal of a run of layers" "Jacobian of each layer" \
    "One layer" "Usefulness" "Permutation" "Training and validation loss" "Perplexity"; do
    check "report: a picture" says "$text" "$what"
done
check "report: every picture says what to look for" test \
    "$(grep -c '^<h3>' "$dir/report.html")" = "$(grep -c '^<p class=look>[A-Z]' "$dir/report.html")"
check "report: PNGs of all pictures" test "$(find "$dir/png" -name '*.png' -size +5k | wc -l)" = \
    "$(sed -nE 's/.* ([0-9]+) pictures.*/\1/p' <<<"$out")"
check "report: no external resources" test -z "$(grep -oE 'https?:|//[a-z]|@import|<(script|link|iframe)|src=|href="[^#d]|url\([^#]' "$dir/report.html")"
check "report: it is small" test "$(stat -c %s "$dir/report.html")" -lt 1000000
cp "$dir/report.html" "$dir/before.html"
report "${runs[@]}" >/dev/null
check "report: the same runs, the same bytes" cmp -s "$dir/report.html" "$dir/before.html"

# Sections without data are omitted.
report "$dir/lns-2" >/dev/null
text=$(page)
check "report: a run without probes" silent_on "$text" "Angular distance"
check "report: nothing to compare with" says "$text" "There is no finished run of pre"
make_run alone pre --no-log --probe
# A variant of pre is neither the reference nor a point on pre's line of learning rates.
for lr in 0.001 0.003; do for scheme in pre lns; do make_run "of-$scheme-$lr" $scheme --lr $lr --final 2; done; done
make_run of-pre-embed pre --final 1.5 --embed-std 0.632455532034
report "$dir"/of-{pre,lns}-0.00{1,3} "$dir/of-pre-embed" >/dev/null
text=$(page)
check "report: the reference is of the usual flags" says "$text" "is 39.3% below pre lr 0.001."
check "report: a variant is named by its unusual flags" says "$text" "pre embed-std 0.632 lr 0.001|4.48|"
check "report: no line averages a variant in" python3 - "$dir" <<'PYTHON'
import sys

sys.path.insert(0, "scripts")
import figures
from table import group_runs
from runs import Run

drawn = []
figures.draw_line = lambda axes, group, xs, ys, **_: drawn.append((group.scheme, xs, ys))
runs = ("of-pre-0.001", "of-pre-0.003", "of-lns-0.001", "of-lns-0.003", "of-pre-embed")
figures.prepare()
groups, _ = group_runs([Run(f"{sys.argv[1]}/{name}") for name in runs])
figures.learning_rate_panel(groups, "name")
assert sorted(scheme for scheme, _, _ in drawn) == ["lns", "pre"], drawn
assert all(abs(y - 7.389) < 0.01 for _, _, ys in drawn for y in ys), drawn
PYTHON

out=$(report "$dir/alone")
check "report: a probe alone" test $? -eq 0
check "report: has no table of losses" silent_on "$(page)" perplexity
# shellcheck disable=SC2016
make_run odd 'x<b>$y$' && report "$dir/odd" >/dev/null
# shellcheck disable=SC2016
check "report: a name is text" says "$(<"$dir/report.html")" 'x&lt;b&gt;$y$'
# shellcheck disable=SC2016
check "report: and nothing else" silent_on "$(<"$dir/report.html")" '<b>$y'
cp -r "$dir/pre-2" "$dir/copy"
check "report: the same seed twice counts once" says "$(report "$dir"/{pre-2,copy})" "copy is not counted"
check "report: as one" says "$(page)" "pre|8.17|2.1000|1|"

# Learning rates
for lr in 0.0003 0.003; do
    for scheme in pre lns post sandwich; do make_run "$scheme-$lr" $scheme --lr $lr --final "2${lr#0}"; done
done
report "$dir"/{pre,lns}-2 "$dir"/{pre,lns,post,sandwich}-0.* >/dev/null
text=$(page)
check "report: learning rates are told apart" says "$text" "pre lr 0.003|"
check "report: and drawn" says "$text" "Learning rates"
check "report: the best of each scheme" says "$(sed '/Every learning rate/,$d' <<<"$text")" "lns lr 0.001|7.03|"
check "report: only that" silent_on "$(sed '/Every learning rate/,$d' <<<"$text")" "lns lr 0.003|"

# Sweeps: the best learning rate of each scheme, paired by seed
check "sweep: the paired t-test has the tables' critical values" python3 - <<'PYTHON'
import sys

sys.path.insert(0, "scripts")
from table import t_test

for t, degrees, p in ((12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05),
                      (9.925, 2, 0.01), (2.042, 30, 0.05), (0, 2, 1)):  # fmt: skip
    assert abs(t_test(t, degrees) - p) < 1e-4 and t_test(t, degrees) == t_test(-t, degrees)
PYTHON
sweep() { # SCHEME RATE LOSS...: of seeds 1, 2, …
    local seed=0 loss
    for loss in "${@:3}"; do make_run "sweep/$1-$2-$((++seed))" "$1" --lr "$2" --seed $seed --final "$loss"; done
}
sweep pre 0.001 2.00 2.04 2.08
sweep pre 0.002 2.10 2.14 2.18
sweep pre 0.0005 2.20 2.24 2.28
sweep lns 0.001 2.00 2.05 2.06 # differences 0, 0.01, −0.02
sweep lns 0.002 2.40 2.40 2.40
sweep mix 0.001 2.30 2.30 2.30
sweep mix 0.002 1.90 1.95 1.98 # −0.1, −0.09, −0.1
sweep post 0.001 2.5 2.5 2.6
sweep post 0.002 1.5 # two of its three seeds are missing
text=$(python3 scripts/table.py "$dir"/sweep/*/ --paper table1 --scale 130m)
check "sweep: the best rate, mean and deviation" says "$(tr -s ' ' <<<"$text")" \
    "mix lr 0.002 6.99 ± 0.28 1.9433 ± 0.0404 3 of 3 −9.2%, p = 0.0012 26.07 (−2.5%)"
check "sweep: noise is called so" says "$text" "within noise: lns lr 0.001 (−0.3%, p = 0.74)"
check "sweep: what is not, too" says "$text" "better: mix lr 0.002 (−9.2%, p = 0.0012)"
check "sweep: and what is worse" says "$text" "worse: post lr 0.001 ("
check "sweep: what three seeds can show" says "$text" "3 seeds cannot show a p below 0.25"
check "sweep: a best rate at the edge" says "$text" "so that others may be better: lns lr 0.001, mix lr 0.002, post lr 0.001."
out=$(report "$dir"/sweep/*/ --paper table1 --pdf "$dir/pdf")
text=$(page)
check "sweep: the report has it" says "$text" "mix lr 0.002|6.99 ± 0.28|−9.2%, p = 0.0012|26.07 (−2.5%)|21.39 (−2.4%)|1363.21 (70×)|1414.78 (83×)|1.9433"
check "sweep: and says it" says "$text" "within noise: lns lr 0.001 (−0.3%, p = 0.74)"
check "sweep: through training" says "$text" "against pre lr 0.001|"
check "sweep: a PDF of every picture" test "$(find "$dir/pdf" -name '*.pdf' | wc -l)" = "$(sed -nE 's/.* ([0-9]+) pictures.*/\1/p' <<<"$out")"
check "sweep: colour by scheme, line by rate, seeds share both" python3 - "$dir" <<'PYTHON'
import glob, sys

sys.path.insert(0, "scripts")
import figures
from table import group_runs
from runs import Run

groups, _ = group_runs([Run(path) for path in glob.glob(f"{sys.argv[1]}/sweep/*")])
styles = {(g.scheme, g.lr): figures.line_style(g) for g in groups}
assert len(groups) == len(styles) == 9
for look, of in (("color", 0), ("linestyle", 1)):
    seen = {}
    for key, style in styles.items():
        assert seen.setdefault(key[of], style[look]) == style[look], look
    assert len(set(seen.values())) == len(seen), look
assert styles["pre", 0.001]["linestyle"] == "-"  # most schemes' best
PYTHON
rows_are_full() { # of six columns, a panel takes two or three
    python3 - "$dir/report.html" <<'PYTHON'
import re, sys

blocks = re.findall(r"<div class=panels>(.*?)</svg>\n</div>\n</div>", open(sys.argv[1]).read(), re.S)
widths = [[3 if half else 2 for half in re.findall(r"<div( class=half)?>", block)] for block in blocks]
for row in widths:
    used = 0
    for width in row:
        used = used % 6 + width
        assert used <= 6, widths
    assert used == 6, widths
assert widths
PYTHON
}
check "report: pictures fill their rows" rows_are_full
report "$dir"/{pre,lns}-1 --pdf "$dir/vectors" >/dev/null
check "report: also of diagnostics" rows_are_full
check "pdf: heat maps are vectors, too" test "$(cat "$dir"/vectors/{angular,jacobian-matrix}*.pdf | grep -ac '/Subtype /Image')" = 0
check "pdf: fonts are embedded" grep -aq /FontFile2 "$dir/vectors/variance.pdf"
check "pdf: no date" test "$(cat "$dir"/vectors/*.pdf | grep -ac CreationDate)" = 0

# Depth: each model has its own Pre-LN.
for scheme in pre lns; do for layers in 6 24; do for seed in 1 2; do
    final=$(awk "BEGIN { print 2 - $layers / 100 + $seed / 50 - ($layers == 24 && \"$scheme\" == \"lns\") * (0.2 + $seed / 1000) }")
    make_run "depth/$scheme-$layers-$seed" $scheme --layers $layers --seed $seed --final "$final"
done; done; done
report "$dir"/depth/*/ >/dev/null
text=$(page)
check "depth: a picture" grep -q 'aria-label="Final perplexity by depth"' "$dir/report.html"
check "depth: models are named by it" says "$text" "lns layers 24|"
check "depth: and compared with their like" says "$text" "Against pre layers 6, paired by 2 seeds: within noise: lns layers 6 (+0.0%, p = 1)."
check "depth: of 24 layers, too" says "$text" "Against pre layers 24, paired by 2 seeds: better: lns layers 24 (−18.2%, p = 0.0016)."
check "depth: whether it pays" says "$text" "lns|7.17 ± 0.10|4.90 ± 0.07 (−31.7%, p < 0.001)|"
check "paper: a table that it lacks" fails_with "has no table 'table9'; it has table1, table6" report "$dir/pre-1" --paper table9

# Tokenizers
make_run bytes lns --tokenizer bytes:257 --final 1.5
report "$dir"/{pre-2,lns-2,bytes} >/dev/null
text=$(page)
check "report: two tokenizers are a warning" says "$text" "their perplexities are not comparable"
check "report: no bytes, no other measure" says "$text" "The logs do not tell how many bytes a token is"
check "report: no gain over another tokenizer" says "$text" "Final perplexity: lns train bytes:257, 4.48."
make_run bits pre --bits
report "$dir"/{bits,bytes} >/dev/null
check "report: bits per byte where they are known" says "$(page)" "pre|7.39|2.0000|1.0000|1|"
check "report: of bytes too" says "$(page)" "lns|4.48|1.5000|2.1640|1|"

# Bad input
mkdir "$dir/empty" "$dir/broken" "$dir/start" "$dir/probe"
check "report: a missing run" fails_with "none is not there; a run's directory" report "$dir/pre-1" "$dir/none"
check "report: a file" fails_with "is a file; a run's directory" report "$dir/pre-1/log.jsonl"
check "report: an empty directory" fails_with "log.jsonl: No such file" report "$dir/empty"
: >"$dir/empty/log.jsonl"
check "report: an empty log" fails_with "holds no whole step yet" report "$dir/empty"
printf '{"step": 1, "lo' >"$dir/start/log.jsonl"
check "report: cut in its first line" fails_with "its only line is cut short" report "$dir/start"
printf '{"step": 1, "tokens": 8, "loss": "x"}\n{}\n' >"$dir/broken/log.jsonl"
check "report: not a log" fails_with "log.jsonl, line 1: expected an object of a step: \"loss\" is 'x'" report "$dir/broken"
printf '{"version": 2}' >"$dir/probe/probe.json"
check "report: a probe of another version" fails_with "has version 2; this program reads version 1" report "$dir/probe"
printf '{"version": 1, "layers": 3, "loss": 1, "removal": {"single": [1, 2]}}' >"$dir/probe/probe.json"
check "report: a probe of other sizes" fails_with '"removal.single" is not a list of 3 numbers' report "$dir/probe"
printf '{"version": 1, "layers": 3, "angular_distance": {"last_token": [[1, 2], [1]]}}' >"$dir/probe/probe.json"
check "report: and of other rows" fails_with '"angular_distance.last_token" has rows of 2, 1 numbers; 3, 2 are expected' report "$dir/probe"
check "report: an output that cannot be written" fails_with "cannot write $dir/no/r.html" \
    python3 scripts/report.py "$dir/pre-1" -o "$dir/no/r.html"

summary
