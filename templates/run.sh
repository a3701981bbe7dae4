#!/usr/bin/env bash
# One experiment in this clone of the project: templates/run.sh <name> [<setting>=<value> ...]
# Data goes to the DVC remote, and the experiment to the git remote `origin`. Started again, it goes on where it was ended.
set -euo pipefail
name=$1
changes=()
for setting in "${@:2}"; do changes+=(--set-param "$setting"); done

git config user.name > /dev/null || git config user.name "docsmith"
git config user.email > /dev/null || git config user.email "docsmith@localhost"
dvc pull --allow-missing
if ! dvc exp list --name-only | grep --quiet --fixed-strings --line-regexp "$name"; then
  dvc exp run --name "$name" "${changes[@]}"
fi
dvc push
dvc exp push origin "$name"
