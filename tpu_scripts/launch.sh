#!/usr/bin/env bash
# Start a run on every host, detached; each host logs to ~/jaxrl_llm/train.log. A host where one is running starts none.
# Usage: launch.sh [options] CONFIG [KEY=VALUE ...]      what `jaxrl_llm train` takes; run.dir is RUN_DIR

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
pod
((${#REST[@]})) || die "no config given, such as configs/gsm8k.yaml"

train=$(show .venv/bin/jaxrl_llm train "${REST[@]}" run.dir="$RUN_DIR" distributed.coordinator=auto)
everywhere "$(shared) && cd $REMOTE && if kill -0 \$(cat train.pid 2> /dev/null) 2> /dev/null; then echo running already; else \
nohup setsid $train >> train.log 2>&1 < /dev/null & echo \$! > train.pid; fi"
