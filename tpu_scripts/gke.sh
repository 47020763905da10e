#!/usr/bin/env bash
# Start a run on a GKE cluster with TPU node pools and JobSet: jobset.yaml, filled in, to `kubectl apply`.
# Usage: gke.sh [options] CONFIG [KEY=VALUE ...]      what `jaxrl_llm train` takes; run.dir is RUN_DIR

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
need NAME RUN_DIR IMAGE ACCELERATOR TOPOLOGY SLICES HOSTS CHIPS CLAIM MOUNT RESTARTS
((${#REST[@]})) || die "no config given, such as configs/gsm8k.yaml"

ARGS= # as a JSON list, which YAML reads
for word in "${REST[@]}"; do
  word=${word//\\/\\\\}
  ARGS+="${ARGS:+, }\"${word//\"/\\\"}\""
done
ARGS="[$ARGS]"

manifest=$(< "$HERE/jobset.yaml")
for name in NAME RUN_DIR IMAGE ACCELERATOR TOPOLOGY SLICES HOSTS CHIPS CLAIM MOUNT RESTARTS ARGS; do
  manifest=${manifest//"\${$name}"/"${!name}"}
done

if [[ $DRY_RUN == true ]]; then
  run kubectl apply -f - # with on its standard input:
  echo "$manifest"
else
  run kubectl apply -f - <<< "$manifest"
fi
