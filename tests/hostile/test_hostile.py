"""Hostile images: told in one line what is wrong, or used; never in much memory.

Each is described, checked, read, written to and repaired in a process of its
own, with limits on its time and its memory.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, own_environment
from tests.hostile.images import BUILDERS
from tests.hostile.probe import ACTIONS, MEMORY


def probe(directory: Path, *mutant: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.probe", str(directory), *mutant],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**own_environment(), "OPENBLAS_NUM_THREADS": "1"},
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def wrong(results: list[dict]) -> list[str]:
    return [
        f"{r['image']}, {r['action']}: status {r['status']}, {r['cpu']} s, "
        f"{r['memory'] >> 20} MiB\n{r['text'][-1500:]}"
        for r in results
        if r["status"] or r["memory"] > MEMORY
    ]


@pytest.mark.timeout(600)
def test_hostile_images(tmp_path, figures):
    results = probe(tmp_path)
    assert len(results) == len(BUILDERS) * len(ACTIONS)
    failures = wrong(results)
    assert not failures, "\n".join(failures)
    worst = max(r["memory"] for r in results) >> 20
    slowest = max(r["cpu"] for r in results)
    figures(
        f"hostile images: {len(BUILDERS)}, {len(results)} processes; at most "
        f"{worst} MiB and {slowest} s"
    )


@pytest.mark.parametrize(
    ("mutant", "name"),
    [("unbounded_tables", "l1_of_32_gib"), ("unbounded_streams", "zip_bomb")],
)
def test_a_broken_driver_is_caught(mutant, name, tmp_path):
    assert wrong(probe(tmp_path, mutant, name))
