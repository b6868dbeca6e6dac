#!/bin/bash
# `make deps`: installs missing packages of the build and the tests with apt, or lists them where
# there is no apt. A second run does nothing. Drawing libraries go into the project's own Python
# environment (dev/venv.sh).
set -u

# how to find it | need | purpose | Debian, Ubuntu | Fedora | Arch | Homebrew
table='
command g++                      |required|the C++ compiler                  |g++                 |gcc-c++             |gcc          |gcc
header  CLI/CLI.hpp              |required|the command line                  |libcli11-dev        |cli11-devel         |cli11        |cli11
header  nlohmann/json.hpp        |required|configurations and checkpoints    |nlohmann-json3-dev  |json-devel          |nlohmann-json|nlohmann-json
header  xxhash.h                 |required|checksums                         |libxxhash-dev       |xxhash-devel        |xxhash       |xxhash
header  dnnl.hpp                 |optional|fast matmuls (oneDNN)             |libdnnl-dev         |onednn-devel        |onednn       |onednn
header  pcre2.h                  |optional|tokenizer.json and GPT-2 tokenizer|libpcre2-dev        |pcre2-devel         |pcre2        |pcre2
header  utf8proc.h               |optional|Unicode forms in tokenizer.json   |libutf8proc-dev     |utf8proc-devel      |libutf8proc  |utf8proc
header  sentencepiece_processor.h|optional|SentencePiece tokenizers          |libsentencepiece-dev|sentencepiece-devel |sentencepiece|sentencepiece
header  editline/readline.h      |optional|editing lines in train_gpt chat  |libedit-dev         |libedit-devel       |libedit      |libedit
command mpicc                    |optional|training with several processes   |libopenmpi-dev      |openmpi-devel       |openmpi      |open-mpi
command mpirun                   |optional|training with several processes   |openmpi-bin         |openmpi             |openmpi      |open-mpi
header  gtest/gtest.h            |optional|make test                         |libgtest-dev        |gtest-devel         |gtest        |googletest
header  boost/context/fiber.hpp  |optional|fast threads of the simulated GPU |libboost-context-dev|boost-devel         |boost        |boost
command clang-format             |optional|make format                       |clang-format        |clang-tools-extra   |clang        |clang-format
command clang-tidy               |optional|make tidy                         |clang-tidy          |clang-tools-extra   |clang        |llvm
command git                      |optional|the commit in run records         |git                 |git                 |git          |git
command pkg-config               |optional|libraries outside /usr            |pkg-config          |pkgconf-pkg-config  |pkgconf      |pkgconf
command curl                     |optional|data/get.sh                       |curl                |curl                |curl         |curl
command jq                       |optional|data/get.sh c4                    |jq                  |jq                  |jq           |jq
command shellcheck               |optional|.ci/run                           |shellcheck          |ShellCheck          |shellcheck   |shellcheck
command clang++                  |optional|make fuzz and CXX=clang++         |clang               |clang               |clang        |llvm
runtime libclang_rt.fuzzer       |optional|make fuzz                         |libclang-rt-dev     |compiler-rt         |compiler-rt  |llvm
clang   omp.h                    |optional|threads under CXX=clang++         |libomp-dev          |libomp-devel        |openmp       |libomp
command python3                  |optional|scripts about runs                |python3             |python3             |python       |python
python  ensurepip                |optional|pictures of runs                  |python3-venv        |python3             |python       |python'
# Debian's curl only recommends the certificates it needs.
debian_extra='
file    /etc/ssl/certs/ca-certificates.crt|optional|data/get.sh            |ca-certificates'

if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
    system=apt column=4 table+=$debian_extra
elif command -v dnf >/dev/null; then
    system='sudo dnf install' column=5
elif command -v pacman >/dev/null; then
    system='sudo pacman -S' column=6
elif command -v brew >/dev/null; then
    system='brew install' column=7
else
    system='' column=4
fi

field() { cut -d'|' -f"$2" <<<"$1" | sed 's/ *$//'; }

present() { # line of the table
    local kind name compiler
    read -r kind name <<<"$(field "$1" 1)"
    case $kind in
    command) command -v "$name" >/dev/null && return ;;
    file) [[ -e $name ]] && return ;;
    python) python3 -c "import $name" 2>/dev/null && return ;;
    runtime) compgen -G "$(clang++ -print-runtime-dir 2>/dev/null)/$name*" >/dev/null && return ;;
    header | clang)
        [[ $kind == clang ]] && compiler=clang++ || compiler=${CXX:-g++}
        printf '#if !__has_include(<%s>)\n#error\n#endif\n' "$name" |
            "$compiler" -E -x c++ - >/dev/null 2>&1 && return
        ;;
    esac
    [[ $system == apt ]] &&
        dpkg-query -W -f '${db:Status-Status}' "$(field "$1" 4)" 2>/dev/null | grep -qx installed
}

required=() optional=() required_missing=''
declare -A purpose
while IFS= read -r line; do
    [[ -z $line ]] && continue
    present "$line" && continue
    package=$(field "$line" $column)
    purpose[$package]=$(field "$line" 3)
    if [[ $(field "$line" 2) == required ]]; then
        required+=("$package") required_missing=yes
    else
        optional+=("$package")
    fi
done <<<"$table"

# Makes the Python environment and exits.
finish() { # STATUS
    local status=$1
    if ((status == 0)) && ! "${0%/*}/venv.sh" "${BUILD:-build}/venv" "${0%/*}/requirements.txt"; then
        echo "deps: warning: there will be no pictures of runs; \`make deps\` tries again." >&2
    fi
    exit "$status"
}

if ((${#required[@]} + ${#optional[@]} == 0)); then
    echo "deps: all packages are installed."
    finish 0
fi
mapfile -t missing < <(printf '%s\n' "${required[@]}" "${optional[@]}" | awk 'NF && !seen[$0]++')

if [[ $system != apt ]]; then
    echo "deps: please install${system:+ with}${system:+ \`$system ${missing[*]}\`}:"
    for package in "${missing[@]}"; do echo "    $package  for ${purpose[$package]}"; done
    [[ -n $system ]] || echo "(these are Debian's names for the packages)"
    [[ -z $required_missing ]] || finish 1
    finish 0
fi

echo "deps: installing with apt-get:"
for package in "${missing[@]}"; do
    printf '    %-20s for %s\n' "$package" "${purpose[$package]}"
done

root=()
if [[ $(id -u) != 0 ]]; then
    if ! command -v sudo >/dev/null; then
        echo "deps: installing needs root, and there is no sudo; as root, run:" \
            "apt-get install --no-install-recommends ${missing[*]}" >&2
        [[ -z $required_missing ]] || finish 1
        finish 0
    fi
    root=(sudo)
fi

apt() { "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@"; }
install() { apt install -y --no-install-recommends "$@"; }
updated=''
update() { # once
    [[ -z $updated ]] && updated=yes && apt update
}
known() { [[ $(LC_ALL=C apt-cache policy "$1" 2>/dev/null) == *Candidate:\ [0-9]* ]]; }

# Package lists may be absent (in a fresh container) or outdated.
for package in "${missing[@]}"; do known "$package" || update; done
available=()
for package in "${missing[@]}"; do known "$package" && available+=("$package"); done
if ((${#available[@]} > 0)) && ! install "${available[@]}"; then
    update
    if ! install "${available[@]}"; then # one by one, as far as possible
        for package in "${available[@]}"; do install "$package"; done
    fi
fi

status=0
for package in "${missing[@]}"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed && continue
    if [[ " ${required[*]} " == *" $package "* ]]; then
        echo "deps: $package could not be installed; the build needs it for" \
            "${purpose[$package]}." >&2
        status=1
    else
        echo "deps: warning: $package could not be installed; there will be no" \
            "${purpose[$package]}." >&2
    fi
done
finish $status
