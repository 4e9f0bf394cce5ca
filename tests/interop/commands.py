"""Programs run to their end, ours and others', and what they say."""

import json
import subprocess
import sys

from tests.conftest import find_tool, own_environment


def run(*command, status=0):
    """Run a program to its end and return what it printed on both."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=60,
        env=own_environment(),
    )
    assert done.returncode == status, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def serve(*arguments, status=1):
    """Run ``nbdqcow serve``, which is to fail; return its message."""
    out, err = run(sys.executable, "-m", "nbdqcow", "serve", *arguments, status=status)
    assert out == ""
    assert "Traceback" not in err
    return err


def info(uri):
    out, _ = run(find_tool("nbdinfo"), "--json", uri)
    (export,) = json.loads(out)["exports"]
    return export


def listeners(server):
    """Return the address of each ready line."""
    lines = server.stdout.read_text().splitlines()
    return [line.partition(": ready on ")[2] for line in lines if "ready on" in line]
