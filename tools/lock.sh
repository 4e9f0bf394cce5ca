#!/bin/bash
# Write requirements.lock (runtime) and requirements-test.lock (runtime and tests)
# from pyproject.toml. Needs pip-compile of pip-tools 7.3 or later, under the oldest
# Python that we support.
set -euo pipefail
cd "$(dirname "$0")/.."

compile() {
    local lock=$1
    shift
    pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe \
        --build-deps-for=editable --no-emit-index-url --no-emit-find-links \
        --no-emit-trusted-host --no-header "$@" --output-file "$lock" pyproject.toml
    # pip-compile's own header names indexes and paths of the machine it ran on.
    sed -i "1i # Pinned with hashes for CPython 3.11 to 3.14; made by tools/lock.sh, not by hand." "$lock"
}

compile requirements.lock
compile requirements-test.lock --extra test --constraint requirements.lock
