#!/bin/bash
# Make .venv hold the pinned packages and this project; quick if it does already.
#
#   tools/setup-venv.sh serve|test
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:?usage: tools/setup-venv.sh serve|test} in
serve) lock=requirements.lock ;;
test) lock=requirements-test.lock ;;
*)
    echo "setup: '$1': expected serve or test" >&2
    exit 1
    ;;
esac

# A virtual environment holds absolute paths: a moved tree needs a new one.
fingerprint() {
    { pwd && cat "$1" pyproject.toml; } | sha256sum
}
is_ready() {
    [ "$(cat "$1" 2>/dev/null)" = "$(fingerprint "$2")" ] &&
        .venv/bin/python -c '' 2>/dev/null
}

# Where the environment keeps Python from writing bytecode, each start of a command
# would compile all of its modules: that takes longer than many commands do.
compile_sources() {
    .venv/bin/python -m compileall -q nbdqcow
}

# What tests install holds all that serving needs.
if is_ready ".venv/ready-$1" "$lock" ||
    is_ready .venv/ready-test requirements-test.lock; then
    compile_sources
    exit 0
fi

tools/setup-system.sh serve
if ! [ -e .venv/created ] || [ "$(cat .venv/created)" != "$PWD" ] ||
    ! .venv/bin/python -c '' 2>/dev/null; then
    python=$(tools/find-python.sh)
    echo "setup: .venv with $("$python" -V) of $python"
    "$python" -m venv --clear .venv
    pwd >.venv/created
fi
echo "setup: installing $lock into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --require-hashes -r "$lock"
# As a path, not as an import hook that would cost each start 20 ms.
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
compile_sources
fingerprint "$lock" >".venv/ready-$1"
