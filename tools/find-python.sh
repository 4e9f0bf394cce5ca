#!/bin/bash
# Print the path of the Python to use: $PYTHON, or the first one from 3.11 up on PATH.
# Exits 1, silently, if there is none.
set -euo pipefail

for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
    # type -a: an old python3 early on PATH must not hide a newer one behind it.
    for path in $(type -aP "$candidate" || true); do
        # A pyenv shim answers with the interpreter behind it, or fails.
        if "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$path" -c 'import sys; print(sys.executable)'
            exit 0
        fi
    done
done
exit 1
