#!/bin/bash
# Print the path of the Python to use: $PYTHON, or one from 3.11 up, the
# distribution's own before those on PATH, and one that can make a virtual environment
# before one that cannot. Exits 1, silently, if there is none.
#
# Debian and Ubuntu build Python with profile-guided and link-time optimisation. pyenv
# and who builds by hand mostly do not, and theirs takes a third longer for all we do.
set -euo pipefail

second_best=
for candidate in ${PYTHON:-/usr/bin/python3 python3 python3.11 python3.12 python3.13 python3.14}; do
    # type -a: an old python3 early on PATH must not hide a newer one behind it.
    for path in $(type -aP "$candidate" || true); do
        # A pyenv shim answers with the interpreter behind it, or fails.
        python=$("$path" -c 'import sys
if sys.version_info >= (3, 11): print(sys.executable)' 2>/dev/null) || continue
        [ -n "$python" ] || continue
        if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
            echo "$python"
            exit 0
        fi
        second_best=${second_best:-$python}
    done
done
[ -n "$second_best" ] && echo "$second_best"
