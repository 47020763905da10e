#!/usr/bin/env bash
# Install this checkout (its last commit) on every host, in ~/jaxrl_llm, and mount NFS at MOUNT when both are set.
# Usage: install.sh [options]

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
pod

package=${TMPDIR:-/tmp}/$NAME.tar.gz
run git -C "$TOP" archive --format=tar.gz --output="$package" HEAD
for node in $(nodes); do
  tpu tpu-vm scp "$package" "$node:jaxrl_llm.tar.gz" --worker=all
done
run rm "$package"

if [[ -n ${NFS:-} ]]; then
  everywhere "sudo apt-get -qq install -y nfs-common && sudo mkdir -p $MOUNT && $(shared)"
fi

# The images have an older Python than the package needs; uv brings one.
everywhere "mkdir -p $REMOTE && tar -xzf jaxrl_llm.tar.gz -C $REMOTE && cd $REMOTE && \
python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.11 .venv && \
~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu]' && .venv/bin/jaxrl_llm list grpo > /dev/null"
