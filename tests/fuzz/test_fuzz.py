"""The parsers on input that is almost right: a bounded part of `make fuzz`.

Only documented exceptions leave a parser. All of the corpus is run, every crash
that was ever found among it, and then changes of it.
"""

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from nbdqcow.crypto import luks
from nbdqcow.formats.qcow1 import header as qcow1_header
from nbdqcow.formats.qcow2 import header as qcow2_header
from nbdqcow.nbd import client_transmission, requests
from tests.conftest import SEED
from tests.fuzz.mutate import CORPUS, load, mutate
from tests.fuzz.targets import TARGETS

NB_INPUTS = int(os.environ.get("NBDQCOW_FUZZ_INPUTS", "1500"))
SLOW = {"qcow2_image": 10, "qcow1_image": 5}


def test_every_target_has_a_corpus():
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name):
    for data in load(name):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_changes_of_the_corpus(name, seed, figures):
    corpus, rnd = load(name), random.Random(seed)
    nb_inputs = NB_INPUTS // SLOW.get(name, 1)
    for number in range(nb_inputs):
        data = mutate(rnd.choice(corpus), corpus, rnd)
        try:
            TARGETS[name](data)
        except Exception as error:
            raise AssertionError(f"input {number}, seed {seed}: {data!r}") from error
    figures(f"fuzz, {name}: {nb_inputs} inputs, seed {seed}")


@pytest.mark.parametrize("name", ["uris", "image_options", "luks_header", "streams"])
def test_any_bytes(name):
    @hypothesis_seed(SEED)
    @settings(max_examples=150, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=700))
    def run(data):
        TARGETS[name](data)

    run()


# -- mutants -----------------------------------------------------------------------


def believes_lengths(monkeypatch):
    """A header's extensions may be longer than the cluster."""
    sound = qcow2_header.Header._parse_extensions

    def parse(self, data):
        for extension in sound(self, data):
            assert len(extension.data) <= 64
            yield extension

    monkeypatch.setattr(qcow2_header.Header, "_parse_extensions", parse)


def believes_cookies(monkeypatch):
    """A reply is always to one of our requests."""
    monkeypatch.setattr(
        client_transmission.ClientTransmission,
        "_find",
        lambda self, cookie: self.calls[cookie],
    )


def takes_any_payload(monkeypatch):
    """A request's payload may be of any length."""
    reader = requests.RequestReader
    monkeypatch.setattr(reader, "_wanted_payload", lambda self, command: 1 << 64)
    monkeypatch.setattr(
        reader, "_payload_length", lambda self, command, flags, length: length
    )


def believes_table_sizes(monkeypatch):
    """An L1 table of version 1 may take any memory."""
    monkeypatch.setattr(qcow1_header, "MAX_L1_BYTES", 1 << 40)


def takes_luks2(monkeypatch):
    """A header of LUKS 2 is read as if it were one of LUKS 1."""
    sound = luks.LuksHeader.parse.__func__

    def parse(cls, data):
        changed = bytearray(data)
        changed[6:8] = b"\0\1" if changed[6:8] == b"\0\2" else changed[6:8]
        return sound(cls, bytes(changed))

    monkeypatch.setattr(luks.LuksHeader, "parse", classmethod(parse))


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (believes_table_sizes, "qcow1_header"),
        (takes_luks2, "luks_header"),
        (believes_lengths, "qcow2_header"),
        (believes_cookies, "client_transmission"),
        (takes_any_payload, "request_reader"),
    ],
)
def test_a_broken_parser_is_caught(mutant, name, monkeypatch, seed):
    mutant(monkeypatch)
    corpus, rnd = load(name), random.Random(seed)
    with pytest.raises((AssertionError, LookupError, MemoryError, OverflowError)):
        for _ in range(20_000):
            TARGETS[name](mutate(rnd.choice(corpus), corpus, rnd))
