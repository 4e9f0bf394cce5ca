"""What the tools say of a server that refuses an option, beside QEMU's."""

import contextlib
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from tests.certificates import Authority
from tests.interop.img_programs import run_ours, run_theirs

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-nbd") is None, reason="qemu-nbd is not installed"
)

NBD = """
import sys
from nbdqcow.cli.nbd import main
sys.argv[0] = "qemu-nbd"
sys.exit(main())
"""


@contextlib.contextmanager
def refusing(path, option, error, text):
    """Serve clients at ``path``, but for one option, while the block runs."""

    def serve(client):
        with client, client.makefile("rb") as stream:
            client.sendall(codec.greeting(nbd.FLAG_FIXED_NEWSTYLE))
            stream.read(codec.CLIENT_FLAGS.size)
            while head := stream.read(codec.OPTION.size):
                _, asked, length = codec.OPTION.unpack(head)
                stream.read(length)
                known = asked != nbd.OPT_EXTENDED_HEADERS
                reply = nbd.REP_ACK if known else nbd.REP_ERR_UNSUP
                if asked == option:
                    client.sendall(codec.option_reply(asked, error, text))
                else:
                    client.sendall(codec.option_reply(asked, reply))

    def accept():
        with contextlib.suppress(OSError):  # Closed.
            while True:
                client, _ = listener.accept()
                with contextlib.suppress(OSError):  # It has left.
                    serve(client)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(30)


@pytest.mark.parametrize("text", [b"", b"some text"])
@pytest.mark.parametrize(
    "error",
    [
        nbd.REP_ERR_POLICY,
        nbd.REP_ERR_INVALID,
        nbd.REP_ERR_PLATFORM,
        nbd.REP_ERR_TLS_REQD,
        nbd.REP_ERR_UNKNOWN,
        nbd.REP_ERR_SHUTDOWN,
        nbd.REP_ERR_BLOCK_SIZE_REQD,
    ],
)
def test_an_export_is_refused(tmp_path, error, text):
    with refusing(tmp_path / "s", nbd.OPT_GO, error, text):
        line = f"info nbd+unix:///disk?socket={tmp_path}/s"
        assert run_ours(line, tmp_path) == run_theirs(line, tmp_path)


@pytest.mark.parametrize(
    "error", [nbd.REP_ERR_POLICY, nbd.REP_ERR_TLS_REQD, nbd.REP_ERR_INVALID]
)
def test_a_list_is_refused(tmp_path, error):
    with refusing(tmp_path / "s", nbd.OPT_LIST, error, b"some text"):
        results = [
            subprocess.run(
                [*command, "-L", "-k", tmp_path / "s"],
                capture_output=True,
                timeout=60,
                check=False,
            )
            for command in (["qemu-nbd"], [sys.executable, "-c", NBD])
        ]
    theirs, ours = ((one.returncode, one.stdout, one.stderr) for one in results)
    assert ours == theirs


@pytest.mark.parametrize("text", [b"", b"TLS not configured"])
@pytest.mark.parametrize("error", [nbd.REP_ERR_POLICY, nbd.REP_ERR_UNSUP])
def test_tls_is_refused(tmp_path, error, text):
    Authority().write_client(tmp_path / "tls")
    line = (
        "info --object tls-creds-x509,id=t,dir=tls,endpoint=client,verify-peer=no "
        f"--image-opts driver=nbd,path={tmp_path}/s,tls-creds=t"
    )
    with refusing(tmp_path / "s", nbd.OPT_STARTTLS, error, text):
        assert run_ours(line, tmp_path) == run_theirs(line, tmp_path)
