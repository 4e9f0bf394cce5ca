"""``nbdqcow serve``, attached to by clients of others."""

import json
import shutil
import signal
import socket

import pytest

from tests.conftest import find_tool
from tests.interop.commands import info, listeners, run, serve

MiB = 1 << 20


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("place", ["unix", "v4", "v6"])
def test_read_and_write(served, images, short_path, tmp_path, image_format, place):
    image = images[image_format]
    if place == "unix":
        server = served(image, "--format", image_format, "--unix", short_path / "s")
        uri = f"nbd+unix:///?socket={short_path}/s"
    else:
        host = "127.0.0.1" if place == "v4" else "[::1]"
        server = served(image, "--format", image_format, "--listen", f"{host}:0")
        (address,) = listeners(server)
        uri = f"nbd://{address}"
    export = info(uri)
    assert export["export-size"] == 3 * MiB + 512
    assert not export["is_read_only"]
    assert export["can_multi_conn"]
    assert export["block_size_maximum"] == 32 * MiB
    copy = tmp_path / "copy"
    run(find_tool("nbdcopy"), uri, copy)
    assert copy.read_bytes() == images["raw"].read_bytes()
    run(
        find_tool("qemu-io"), "-f", "raw", uri,
        "-c", "write -P 7 65535 70000",
        "-c", "write -z 1M 64k",
        "-c", "flush",
        "-c", "read -P 7 65535 70000",
        "-c", "read -P 0 1M 64k",
    )  # fmt: skip
    run(find_tool("nbdcopy"), copy, uri)
    server.stop()
    run(find_tool("qemu-img"), "compare", "-f", image_format, "-F", "raw", image, copy)
    if image_format == "qcow2":
        run(find_tool("qemu-img"), "check", image)


def test_what_is_printed_attaches(served, images, short_path):
    server = served(images["qcow2"], "--unix", short_path / "s", "--listen", "[::1]:0")
    lines = server.stdout.read_text().splitlines()
    assert listeners(server)[1] == f"{short_path}/s"
    uris = [line.split()[0] for line in lines if line.startswith("    nbd")][:2]
    for uri in uris:
        assert info(uri)["export-size"] == 3 * MiB + 512
    (command,) = (line for line in lines if line.startswith("    nbdinfo "))
    run("sh", "-c", command)


def test_exports_by_name(served, images, short_path):
    odd = images["raw"].with_name("ä name")
    shutil.copy(images["raw"], odd)
    served(
        images["qcow2"], odd, f"third={images['raw']}",
        "--read-only", "--unix", short_path / "s",
    )  # fmt: skip
    where = f"?socket={short_path}/s"
    out, _ = run(find_tool("nbdinfo"), "--list", "--json", f"nbd+unix:///{where}")
    names = [export["export-name"] for export in json.loads(out)["exports"]]
    assert names == ["disk.qcow2", "ä name", "third"]
    for name in ("disk.qcow2", "%C3%A4%20name", "third"):
        export = info(f"nbd+unix:///{name}{where}")
        assert export["is_read_only"]
    run(find_tool("nbdinfo"), f"nbd+unix:///none{where}", status=1)
    run(find_tool("nbdinfo"), f"nbd+unix:///{where}", status=1)


def test_exports_named_with_slashes(served, images, short_path):
    server = served(
        "--export", "vm/disk=0", images["qcow2"], "--export", "/raw", images["raw"],
        "--read-only", "--unix", short_path / "s",
    )  # fmt: skip
    lines = server.stdout.read_text().splitlines()
    uris = [line.split()[0] for line in lines if line.startswith("    nbd+unix")]
    assert [info(uri)["export-name"] for uri in uris] == ["vm/disk=0", "/raw"]
    for uri in uris:
        run(find_tool("qemu-io"), "-r", "-f", "raw", uri, "-c", "read 0 64k")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_that_end_in_order(served, images, short_path, number):
    server = served(images["qcow2"], "--unix", short_path / "s")
    uri = f"nbd+unix:///?socket={short_path}/s"
    run(find_tool("qemu-io"), "-f", "raw", uri, "-c", "write -P 7 0 64k")
    server.process.send_signal(number)
    assert server.process.wait(20) == 0
    run(find_tool("qemu-io"), images["qcow2"], "-c", "read -P 7 0 64k")


def test_pid_file(served, images, tmp_path, short_path):
    pid_file = tmp_path / "pid"
    server = served(images["qcow2"], "--unix", short_path / "s", "--pid-file", pid_file)
    assert int(pid_file.read_text()) == server.process.pid
    server.stop()
    assert not pid_file.exists()
    assert not (short_path / "s").exists()


def test_default_address(served, images):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 10809))
        except OSError:
            pytest.skip("something listens on port 10809")
    assert listeners(served(images["qcow2"])) == ["127.0.0.1:10809"]


# -- what goes wrong is one line and exit status 1 -------------------------------


def test_missing_file(tmp_path):
    assert serve(tmp_path / "none") == (
        f"nbdqcow: Could not open '{tmp_path}/none': No such file or directory\n"
    )


def test_not_an_image(images):
    message = serve("--format", "qcow2", images["raw"])
    assert message.startswith(f"nbdqcow: Could not open '{images['raw']}': ")
    assert message.count("\n") == 1


def test_a_directory(tmp_path):
    message = serve(tmp_path)
    assert message.startswith(f"nbdqcow: Could not open '{tmp_path}': ")
    assert message.count("\n") == 1


def test_unknown_format(images):
    assert "Unknown driver 'vmdk'" in serve("--format", "vmdk", images["raw"])


def test_image_in_use(served, images, short_path):
    served(images["qcow2"], "--unix", short_path / "s")
    message = serve(images["qcow2"], "--unix", short_path / "t")
    assert "lock" in message
    assert message.count("\n") == 1
    assert not (short_path / "t").exists()


def test_one_image_twice(images):
    message = serve(f"a={images['qcow2']}", f"b={images['qcow2']}")
    assert "lock" in message


def test_port_in_use(images):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert serve(images["qcow2"], "--listen", f"127.0.0.1:{port}") == (
            f"nbdqcow: Failed to listen on 127.0.0.1:{port}: Address already in use\n"
        )


def test_socket_in_use(served, images, short_path):
    served(images["qcow2"], "--unix", short_path / "s")
    assert serve(images["raw"], "-f", "raw", "--unix", short_path / "s") == (
        f"nbdqcow: Failed to bind socket to {short_path}/s: Address already in use\n"
    )


def test_socket_path_too_long(images):
    path = "/" + "x" * 107
    assert serve(images["raw"], "-f", "raw", "--unix", path) == (
        f"nbdqcow: UNIX socket path '{path}' is too long\n"
        "Path must be less than 108 bytes\n"
    )


def test_unknown_host(images):
    message = serve(images["raw"], "-f", "raw", "--listen", "host.invalid:1")
    assert "address resolution failed for host.invalid:1: " in message


def test_pid_file_that_cannot_be_written(images, short_path):
    message = serve(
        images["raw"], "-f", "raw", "--unix", short_path / "s", "--pid-file", "/none/p"
    )
    assert message == (
        "nbdqcow: Could not create '/none/p': No such file or directory\n"
    )
    assert not (short_path / "s").exists()


def test_guessed_raw_is_warned_of(served, images, short_path):
    server = served(images["raw"], "--unix", short_path / "s")
    assert "probing guessed raw" in server.stderr.read_text()
