#!/usr/bin/env bash
# Ask the run to save and end, as Ctrl-C does. The pod stays.
# Usage: stop.sh [options]

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
pod

everywhere "kill -TERM \$(cat $REMOTE/train.pid) || true"
