"""``--object``: what there is to know about them, and secrets in secrets."""

import base64
import re

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdqcow.cli.nbd_options import parse_arguments
from nbdqcow.cli.objects import Objects, Properties
from nbdqcow.cli.program import Answered, run_program
from nbdqcow.errors import UsageError

KEY = bytes(range(32))
IV = bytes(range(100, 116))
SECRET_OPTIONS = """\
secret options:
  data=<string>
  file=<string>
  format=<QCryptoSecretFormat>
  iv=<string>
  keyid=<string>
"""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("secret,help", SECRET_OPTIONS),
        ("secret,?", SECRET_OPTIONS),
        ("qom-type=secret,help", SECRET_OPTIONS),
        ("secret,id=a,data=b,help", SECRET_OPTIONS),
        ("help", "List of user creatable objects:\n  authz-list\n"),
        ("?", "List of user creatable objects:\n"),
        ("unknown,help", "List of user creatable objects:\n"),
        ("tls-creds-x509,help", "tls-creds-x509 options:\n  dir=<string>\n"),
    ],
)
def test_help(text, answer, capsys):
    with pytest.raises(Answered):
        Objects([text])
    assert capsys.readouterr().out.startswith(answer)


@pytest.mark.parametrize("text", ["secret,id=a,data=help", "secret,id=help,data=a"])
def test_a_value_asks_for_nothing(text):
    Objects([text])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("on", "yes", "true", "y")),
        *((text, False) for text in ("off", "no", "false", "n")),
    ],
)
def test_truth_values(text, value):
    properties = Properties({"verify-peer": text})
    assert properties.take_boolean("verify-peer", not value) is value


@pytest.mark.parametrize("text", ["", "ON", "1"])
def test_no_truth_value(text):
    with pytest.raises(UsageError, match="'verify-peer' expects 'on' or 'off'"):
        Properties({"verify-peer": text}).take_boolean("verify-peer", True)


def test_a_question_needs_no_image(capsys):
    assert run_program(lambda: bool(parse_arguments(["--object", "secret,help"]))) == 0
    assert capsys.readouterr().out == SECRET_OPTIONS


def test_unknown_properties_are_named_before_others_are_missed():
    with pytest.raises(UsageError, match="Parameter 'nosuch' is unexpected"):
        Objects(["tls-creds-x509,id=a,nosuch=dir"])


def encrypted(text: bytes) -> bytes:
    padding = 16 - len(text) % 16
    encryptor = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    return encryptor.update(text + bytes([padding]) * padding) + encryptor.finalize()


def with_key(data: bytes, *more: str) -> Objects:
    key = base64.b64encode(KEY).decode()
    shown = base64.b64encode(data).decode()
    return Objects(
        [
            f"secret,id=key,format=base64,data={key}",
            ",".join((f"secret,id=s,format=base64,data={shown}", *more)),
        ]
    )


VECTOR = f"iv={base64.b64encode(IV).decode()}"


@pytest.mark.parametrize("text", ["", "one", "a passphrase of 32 characters..."])
def test_a_secret_that_another_one_decrypts(text):
    objects = with_key(encrypted(text.encode()), "keyid=key", VECTOR)
    assert objects.secret("s") == text


def test_it_may_be_in_a_file(tmp_path):
    (tmp_path / "raw").write_bytes(encrypted(b"one"))
    key = base64.b64encode(KEY).decode()
    objects = Objects(
        [
            f"secret,id=key,format=base64,data={key}",
            f"secret,id=s,file={tmp_path}/raw,keyid=key,{VECTOR}",
        ]
    )
    assert objects.secret("s") == "one"


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        (encrypted(b"a"), ("keyid=no", VECTOR), "No secret with id 'no'"),
        (encrypted(b"a"), ("keyid=key",), "IV is required to decrypt secret"),
        (encrypted(b"a"), ("keyid=key", "iv=!"), "Base64 data contains invalid"),
        (encrypted(b"a"), ("keyid=key", "iv=eA=="), "IV should be 16 .* not 1$"),
        (b"a", ("keyid=key", VECTOR), "Length 1 must be a multiple of block size 16"),
        (bytes(16), ("keyid=key", VECTOR), "Incorrect number of padding bytes"),
    ],
)
def test_secrets_that_can_not_be_decrypted(data, more, message):
    with pytest.raises(UsageError, match=message):
        with_key(data, *more)


def test_a_key_of_another_length():
    key, data = "secret,id=key,data=short", "secret,id=s,data=x,keyid=key"
    with pytest.raises(UsageError, match="Key should be 32 bytes in length"):
        Objects([key, f"{data},{VECTOR}"])


@pytest.mark.parametrize(
    ("text", "secret"),
    [("b25l", "one"), ("b2\n5l", "one"), ("b25lMQ", "one"), ("b25", ""), ("=====", "")],
)
def test_base64_as_qemu_reads_it(text, secret):
    """What is no whole group of four digits is dropped."""
    objects = Objects([f"secret,id=s,format=base64,data={text}"])
    assert objects.secret("s").strip("\0") == secret


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # A secret is not called "on".
        ("secret,id=s,data", "Expected '=' after parameter 'data'"),
        ("secret,id=s,data=x,foo.bar=1", "Parameter 'foo' is unexpected"),
        ("secret,id=s,data.x=1", "Parameters 'data.*' are unexpected"),
        ("secret,id=s,data.x=1,data=x", "Parameters 'data.*' used inconsistently"),
        ('{"qom-type": "secret"', "JSON parse error, premature EOI"),
        ("{}x", "Expecting at most one JSON value"),
        ("{x}", "JSON parse error, expecting property name"),
        ("authz-list,id=a,rules.0.policy=deny", "Parameter 'rules.0.match' is missing"),
        ("authz-list,id=a,rules.1.match=x", "Parameter 'rules.0' missing"),
        ("authz-list,id=a,rules=x", "type for 'rules', expected: array"),
        ("authz-list,id=a,rules.x=1", "type for 'rules', expected: array"),
        ("authz-list,id=a,rules.0=x", "type for 'rules.0', expected: object"),
    ],
)
def test_wrong_properties_in_the_words_of_qemu(text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Objects([text])


def test_json_with_single_quotes():
    text = "{'qom-type': 'secret', 'id': 's', 'data': 'one'}"
    assert Objects([text]).secret("s") == "one"


def test_without_pre_shared_keys_their_object_is_unknown(monkeypatch):
    monkeypatch.delattr("ssl.HAS_PSK", raising=False)
    # nbdkit's tests and libnbd's look for the words.
    with pytest.raises(UsageError, match="invalid object type: tls-creds-psk"):
        Objects(["tls-creds-psk,id=tls0"])
