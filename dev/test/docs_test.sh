#!/bin/bash
# The documentation: the files, links and flags that it names exist, gpt/README.md describes each file,
# and versions agree.
# shellcheck source=dev/test/lib/checks.sh
. "$(dirname "$0")/lib/checks.sh"
flags=$(
    for command in '' eval probe export; do ./train_gpt $command --help; done
    cat data/*.cpp data/get.sh scripts/*.{sh,py} dev/reference/*.py
)
for document in *.md {data,docs,gpt,scripts,dev/*}/*.md; do
    folder=$(dirname "$document")
    # [text](target)
    while read -r target; do
        check "$document: link to $target" test -e "$folder/$target"
    done < <(grep -oE '\]\([^)#]+' "$document" | cut -c3- | grep -v '^https\?:' | sort -u)
    # Paths, and patterns such as gemm*.cpp
    while read -r path; do
        check "$document: $path" compgen -G "$path" >/dev/null
    done < <(grep -oE '\b(gpt|dev|scripts|docs)/[A-Za-z0-9_*./-]*[A-Za-z0-9_*/]' "$document" | sort -u)
    # Long flags, except other programs'
    while read -r flag; do
        check "$document: $flag" grep -qF -- "$flag" <<<"$flags"
    done < <(grep -oE '(^|[ `(])--[a-z][a-z-]+' "$document" | tr -d ' `(' | grep -vxE -- '--(args|gtest|mca)' | sort -u)
done
version=$(sed -n 's/^## //p; T; q' CHANGELOG.md)
check "CITATION.cff: version" grep -qx "version: $version" CITATION.cff
check "--version" grep -qF " $version" <<<"$(./train_gpt --version)"
for file in gpt/*/*; do
    name=${file##*/}
    check "gpt/README.md: $file" grep -qE "^\| \`(${name%.*}|$name)\` \|" gpt/README.md
done
summary
