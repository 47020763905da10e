#!/usr/bin/env bash
# What a container runs: `jaxrl_llm train` with run.dir=RUN_DIR, on all hosts together. Stopped by SIGTERM it saves and ends
# with 0, which a scheduler would take for the end of the run: the code is 75 then, so that it restarts the run.
# Usage: RUN_DIR=/path container.sh CONFIG [KEY=VALUE ...]      needs checkpoint.export, by which the end is known
set -u

if [[ ${1:-} == --help ]]; then
  sed -n '2,/^set/s/^# //p' "$0"
  exit 0
fi

# A shell takes no signal while it waits for a program in the foreground.
jaxrl_llm train "$@" run.dir="$RUN_DIR" distributed.coordinator=auto &
trap 'kill -TERM $!' TERM INT
wait $!
code=$?
while kill -0 $! 2> /dev/null; do # a signal ended the waiting, not the program
  wait $!
  code=$?
done

if [[ $code == 0 && ! -f $RUN_DIR/export/config.json ]]; then
  echo "container.sh: stopped before the end of the run; code 75 asks for a restart" >&2
  exit 75
fi
exit "$code"
