"""``python -m tests.fuzz [--seconds N] [--seed N] [TARGET...]``: fuzz for a while.

With atheris the search is led by coverage, without it the corpus is changed
blindly. Input that gets out an exception that it should not is kept in the
corpus, where the tests find it, and the exit status is 1.
"""

import argparse
import hashlib
import importlib.util
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.mutate import CORPUS, load, mutate

MEMORY = 3 << 30


def keep(target: str, data: bytes) -> Path:
    path = CORPUS / target / f"crash-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def fuzz(name: str, seconds: float, seed: int) -> int:
    """Run one target; return the number of inputs that failed."""
    from tests.fuzz.targets import TARGETS

    target, corpus, rnd = TARGETS[name], load(name), random.Random(seed)
    deadline = time.monotonic() + seconds
    nb_inputs, seen = 0, set()
    while time.monotonic() < deadline and len(seen) < 10:
        data = mutate(rnd.choice(corpus), corpus, rnd)
        nb_inputs += 1
        try:
            target(data)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            key = (type(error), where.filename, where.lineno)
            if key not in seen:
                seen.add(key)
                print(f"{name}: {keep(name, data)}", file=sys.stderr)
                traceback.print_exc()
    print(f"{name}: {nb_inputs} inputs, {len(seen)} failures, seed {seed}", flush=True)
    return len(seen)


def fuzz_by_coverage(name: str, seconds: float, seed: int) -> None:
    """Let atheris run a target; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["nbdqcow"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]

    def one(data: bytes) -> None:
        try:
            target(data)
        except Exception:
            print(f"{name}: {keep(name, data)}", file=sys.stderr)
            raise

    found = Path(os.environ.get("NBDQCOW_FUZZ_CORPUS", "var/fuzz")) / name
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={int(seconds)}", f"-seed={seed}", "-rss_limit_mb=3000"]
    options += [f"-max_len={1 << 14}", "-timeout=120", "-verbosity=0"]
    options += ["-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / name)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--blind", action="store_true", help="without atheris")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.only:
        names = arguments.targets or sorted(p.name for p in CORPUS.iterdir())
        command = [sys.executable, "-m", "tests.fuzz", "--only", *sys.argv[1:]]
        command += ["--seed", str(arguments.seed)]
        command = [word for word in command if word not in arguments.targets]
        # A process for each: a limit on memory, and one's end is not all's.
        return max([subprocess.call([*command, name]) for name in names])
    (name,) = arguments.targets
    if not arguments.blind and importlib.util.find_spec("atheris"):
        fuzz_by_coverage(name, arguments.seconds, arguments.seed)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    return 1 if fuzz(name, arguments.seconds, arguments.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
