# shellcheck shell=bash
# Sourced: puts the project's own Python (`make deps`) first in PATH where it has been made, so that
# it does not matter which python3 comes first there.
for folder in "${BUILD:-build}" build; do
    [[ $folder == /* ]] || folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/$folder
    if [[ -x $folder/venv/bin/python3 ]]; then
        PATH=$folder/venv/bin:$PATH
        break
    fi
done
unset folder
