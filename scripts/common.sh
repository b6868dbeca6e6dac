# shellcheck shell=bash
# To be sourced: what compare.sh and reproduce.sh share.
# shellcheck source=scripts/python.sh
. "$(dirname "${BASH_SOURCE[0]}")/python.sh"

run_name() { # SCHEME SUFFIX: of a run's directory
    local name=${1//:/-}
    echo "${name//\*/-star}$2"
}

# TABLE REPORT RUN...: prints the table of the runs and, unless the names are empty, writes it and the
# report. Without Python or Matplotlib it says what is missing.
paper_flags=()  # for both
report_flags=() # for the report alone
write_report() {
    local name=${0##*/} table=$1 report=$2 text lack
    shift 2
    if ! command -v python3 >/dev/null; then
        echo "$name: the runs are done. There is no table of them, because there is no python3:" \
            "\`make deps\`; then the same command writes it" >&2
        return
    fi
    text=$(python3 scripts/table.py "$@" ${paper_flags[@]+"${paper_flags[@]}"})
    echo "$text"
    [[ $report ]] || return 0
    echo "$text" >"$table"
    if ! lack=$(python3 scripts/figures.py 2>&1); then
        echo "$name: the runs are done, and their table is $table. There is no report:" \
            "$(tail -1 <<<"${lack#figures.py: }"). Then the same command writes it" >&2
        return
    fi
    python3 scripts/report.py "$@" -o "$report" ${paper_flags[@]+"${paper_flags[@]}"} \
        ${report_flags[@]+"${report_flags[@]}"}
}
