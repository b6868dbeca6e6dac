#!/bin/bash
# The Makefile separates variants, dev/deps.sh installs exactly what is missing, and
# dev/run_tests.sh counts correctly.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
unset MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES OPENMP ONEDNN MPI CUDA SANITIZE MARCH BUILD V CXX
here=$PWD

# A small program in its own tree.
mkdir -p "$dir/tree/dev" "$dir/tree/gpt/base"
cp Makefile "$dir/tree/"
cp dev/configure_check.in dev/run_tests.sh "$dir/tree/dev/"
cp gpt/base/build.h gpt/base/build.cpp "$dir/tree/gpt/base/"
cat >"$dir/tree/train_gpt.cpp" <<'END'
#include "gpt/base/build.h"
#include <cstdio>
#ifdef _OPENMP
const char* openmp = "with OpenMP";
#else
const char* openmp = "without OpenMP";
#endif
int main() { std::printf("%s\n%s\n", openmp, lns::build_info().flags.c_str()); }
END
cd "$dir/tree" || exit 1
out=$(make MARCH= 2>&1)
check "the first build says what it found" says "$out" "SentencePiece"
out=$(make MARCH= 2>&1)
check "a second build has nothing to do" silent_on "$out" CXX
check "the program says its flags" says "$(./train_gpt)" "-std=c++20"
check "OpenMP is used if found" says "$(./train_gpt)" "with OpenMP"
out=$(make MARCH= OPENMP=0 2>&1)
check "an option compiles everything again" says "$out" "CXX   gpt/base/build.cpp"
check "missing features are named" says "$out" "without OpenMP: one thread only"
check "an option takes effect" says "$(./train_gpt)" "without OpenMP"
out=$(make MARCH= 2>&1)
check "switching back compiles nothing" silent_on "$out" CXX
check "switching back takes effect" says "$(./train_gpt)" "with OpenMP"
touch -d '+1 minute' gpt/base/build.h
out=$(make MARCH= 2>&1)
check "a changed header compiles its users" says "$out" "CXX   train_gpt.cpp"
sed -i '/CLI11/d' dev/configure_check.in
out=$(make MARCH=x86-64 BUILD=other 2>&1)
check "a missing library is explained" says "$out" "missing: run make deps"
out=$(make CXX=no-such-compiler 2>&1)
check "a missing compiler is explained" says "$out" "no C++ compiler no-such-compiler"

# A machine with only apt, simulated by scripts; $dir/state has its installed packages.
mkdir "$dir/bin" "$dir/state"
for tool in bash cut sed awk grep id env cmp cp sort tail basename mkdir; do
    ln -s "$(command -v $tool)" "$dir/bin/$tool"
done
cat >"$dir/bin/apt-get" <<END
#!$(command -v bash)
echo "\$*" >>"$dir/apt.log"
for word in "\$@"; do
    [[ \$word == "\$UNAVAILABLE" ]] && exit 100
done
for word in "\$@"; do
    [[ \$word == -* || \$word == install || \$word == *Lock* ]] || : >"$dir/state/\$word"
done
END
cat >"$dir/bin/dpkg-query" <<END
#!$(command -v bash)
[[ -e "$dir/state/\${!#}" ]] && echo installed
END
printf '#!%s\necho "  Candidate: 1.0"\n' "$(command -v bash)" >"$dir/bin/apt-cache"
# shellcheck disable=SC2016
printf '#!%s\nexec "$@"\n' "$(command -v bash)" >"$dir/bin/sudo"
chmod +x "$dir"/bin/{apt-get,dpkg-query,apt-cache,sudo}
deps() { PATH=$dir/bin UNAVAILABLE=$1 bash "$here/dev/deps.sh" 2>&1; }

out=$(deps)
check "a bare machine gets everything" test $? -eq 0
check "installed packages are reported" says "$out" "for fast matmuls"
check "with one command" test "$(grep -c install "$dir/apt.log")" -eq 1
check "and no update" test "$(grep -c update "$dir/apt.log")" -eq 0
: >"$dir/apt.log"
check "the second time nothing is done" says "$(deps)" "all packages are installed"
check "the second time apt is not asked" test ! -s "$dir/apt.log"
rm "$dir/state/libdnnl-dev" "$dir/state/libcli11-dev"
out=$(deps libdnnl-dev)
check "without an optional package the rest is installed" test $? -eq 0
check "the feature lost is named" says "$out" "there will be no fast matmuls"
check "only missing packages are requested" silent_on "$(cat "$dir/apt.log")" "g++"
rm "$dir/state/libcli11-dev"
out=$(deps libcli11-dev)
check "without a required package it fails" test $? -eq 1
check "and says why" says "$out" "libcli11-dev could not be installed"

# Its Python: the module venv copies it, pip only logs its arguments.
cat >"$dir/bin/python3" <<END
#!$(command -v bash)
case \$* in
'-m pip '*)
    echo "\$*" >>"$dir/pip.log"
    [[ ! \$PIP_FAILS ]] || { echo "there is no network" && exit 1; }
    ;;
'-m venv '*) mkdir -p "\${!#}/bin" && cp "$dir/bin/python3" "\${!#}/bin/python3" ;;
esac
END
chmod +x "$dir/bin/python3"
out=$(PIP_FAILS=yes deps)
check "without a network the rest succeeds" test $? -eq 0
check "the failure is reported" says "$out" "there is no network"
check "and its consequence" says "$out" "warning: there will be no pictures"
out=$(deps)
check "the next time Python's packages are installed" says "$out" "installing requirements.txt into build/venv"
check "the pinned ones" says "$(tail -1 "$dir/pip.log")" "-r $here/dev/requirements.txt"
: >"$dir/pip.log"
check "but only once" silent_on "$(deps)" "installing requirements.txt"
check "and pip is not called again" test ! -s "$dir/pip.log"
check "BUILD moves them" says "$(BUILD=other deps)" "into other/venv"
rm "$dir/bin/apt-get"
printf '#!%s\n' "$(command -v bash)" >"$dir/bin/dnf" && chmod +x "$dir/bin/dnf"
out=$(deps)
check "elsewhere it only says what to install" test $? -eq 1
check "under that system's names" says "$out" "dnf install gcc-c++ cli11-devel"

# The summary of tests.
cd "$dir" || exit 1
test_that() { printf '#!/bin/bash\n%s\n' "$2" >"$1" && chmod +x "$1"; }
test_that numbers 'echo "3 passed, 2 failed"; exit 1'
test_that silent 'exit 0'
test_that crash 'echo "5 passed, 0 failed"; kill -SEGV $$'
test_that gtest 'echo "[  FAILED  ] A.b (0 ms)"; echo "[  PASSED  ] 7 tests."; exit 1'
test_that some 'echo "SKIPPED: ranks: there is no mpirun"; echo "2 passed, 0 failed, 1 skipped"'
test_that old 'echo "SKIPPED: a GPU: there is none"; echo "0 passed, 0 failed"'
test_that gtests 'for i in 1 2; do echo "a.cpp:3: Skipped"; echo "no curl here"; echo; done
echo "[  PASSED  ] 1 test."; echo "[  SKIPPED ] 2 tests."'
for jobs in 1 3; do
    out=$(JOBS=$jobs "$here/dev/run_tests.sh" numbers silent crash gtest some old gtests 2>&1)
    check "failures are a failure" test $? -eq 1
    check "all are counted" test "$(tail -1 <<<"$out")" = "19 passed, 4 failed, 4 skipped"
    check "why a script skips" says "$out" $'\nSKIPPED: some: ranks: there is no mpirun\n'
    check "why it skips all" says "$out" $'\nSKIPPED: old: a GPU: there is none\n'
    check "why GoogleTest skips" says "$out" $'\nSKIPPED: gtests: no curl here (2 tests)\n'
    check "each output is shown once" test "$(grep -cx "3 passed, 2 failed" <<<"$out")" = 1
done
out=$("$here/dev/run_tests.sh" silent)
check "success is a success" test $? -eq 0

summary
