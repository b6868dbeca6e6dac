#!/bin/bash
# dev/venv.sh DIR REQUIREMENTS [PIP FLAG...]: makes a Python environment in DIR with the packages in
# REQUIREMENTS, unless it exists already, using the first suitable python3 in PATH, /usr/bin's first.
# Exits 1 with a message if there is none.
set -u
dir=$1 requirements=$2
shift 2
unset PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV

# Written last, so that an interrupted installation is repeated.
installed=$dir/installed.txt
if cmp -s "$requirements" "$installed" && "$dir/bin/python3" -c '' 2>/dev/null; then exit 0; fi

usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))'
mapfile -t pythons < <(type -aP python3 | awk '{ print ($0 != "/usr/bin/python3"), $0 }' | sort -s -k1,1 | cut -d' ' -f2- | awk '!seen[$0]++')
reason='no python3 is 3.10 or newer and has the module venv (on Debian and Ubuntu: apt install python3-venv)'
for python in ${pythons[@]+"${pythons[@]}"}; do
    "$python" -c "$usable" 2>/dev/null || continue
    echo "installing $(basename "$requirements") into $dir ($python) ..."
    if output=$("$python" -m venv --clear "$dir" 2>&1) &&
        output=$("$dir/bin/python3" -m pip install -q --disable-pip-version-check \
            --only-binary :all: "$@" -r "$requirements" 2>&1); then
        cp "$requirements" "$installed"
        exit
    fi
    # pip's last line only says that there is no such package, also where it reached no server.
    network=$(grep -oE -m1 "connection broken by .*" <<<"$output" | cut -c1-300)
    reason="$python: $(grep . <<<"$output" | tail -1)${network:+ ($network)}"
done
echo "$dir could not be made: $reason" >&2
exit 1
