#!/usr/bin/env bash
# Start a run on a cluster that xpk made; xpk writes the JobSet. RUN_DIR must be on a storage that xpk attached to the cluster.
# Usage: xpk.sh [options] CONFIG [KEY=VALUE ...]      what `jaxrl_llm train` takes; run.dir is RUN_DIR

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
need PROJECT ZONE NAME RUN_DIR CLUSTER IMAGE TYPE SLICES RESTARTS
((${#REST[@]})) || die "no config given, such as configs/gsm8k.yaml"

run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$TYPE" \
  --num-slices="$SLICES" --docker-image="$IMAGE" --max-restarts="$RESTARTS" --termination-grace-period-seconds=600 \
  --command="RUN_DIR=$(quoted "$RUN_DIR") $(show tpu_scripts/container.sh "${REST[@]}")"
