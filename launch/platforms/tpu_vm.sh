#!/usr/bin/env bash
# paged-dist-decode on all hosts of a TPU VM slice at once, over ssh.
set -euo pipefail

usage() {
    cat >&2 <<'END'
usage: tpu_vm.sh [--dry_run] NAME ZONE [-- FLAGS OF paged-dist-decode]

  NAME       the TPU VM
  ZONE       its zone
  --dry_run  print the gcloud command and do not run it; so does a DRY_RUN that is not empty in the environment

example: tpu_vm.sh my-slice us-east5-a -- --num_kv_heads=8 --model=8 --output=run.jsonl
END
    exit 2
}

dry_run=${DRY_RUN:-}
if [ "${1:-}" = --dry_run ]; then
    dry_run=1
    shift
fi
[ $# -ge 2 ] || usage
name=$1 zone=$2
shift 2
for word in "$name" "$zone"; do
    case $word in '' | -*) usage ;; esac
done
if [ $# -gt 0 ]; then
    [ "$1" = -- ] || usage
    shift
fi

# ssh hands a line to a shell over there: each flag is quoted for it, and only these two variables are expanded. A
# shell started so has neither of the folders in its PATH.
# shellcheck disable=SC2016
remote='PATH="$HOME/paged-dist/bin:$HOME/.local/bin:$PATH" '
remote+=$(printf '%q ' paged-dist-decode "$@")

command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=${remote% }")
if [ -n "$dry_run" ]; then
    line=$(printf '%q ' "${command[@]}")
    printf '%s\n' "${line% }"
    exit
fi
exec "${command[@]}"
