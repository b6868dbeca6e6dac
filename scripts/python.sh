# shellcheck shell=bash
# To be sourced: puts the Python environment that `make deps` made, if any, first in PATH.
for folder in "${BUILD:-build}" build; do
    [[ $folder == /* ]] || folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/$folder
    if [[ -x $folder/venv/bin/python3 ]]; then
        PATH=$folder/venv/bin:$PATH
        break
    fi
done
unset folder
