"""``nbdqcow-nbd`` beside qemu-nbd: messages, the life of a server, the client."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, find_tool, wait_until_listening
from tests.interop.commands import info, run
from tests.interop.img_versions import errors_as_7_2_says, is_newer
from tests.interop.nbd_beside_qemu import (
    image,
    ours,
    path,
    program,
    start,
    theirs,
    wait_gone,
)

__all__ = ["image", "ours", "path", "program", "start", "theirs"]

MAIN = "import sys; from nbdqcow.cli.nbd import main; sys.exit(main())"


# -- wrong command lines, word for word --------------------------------------------

SAME = [
    [],
    ["a", "b"],
    ["/none"],
    ["--bogus"],
    ["--bogus=1"],
    ["-Z"],
    ["-p"],
    ["--port"],
    ["--p=1"],
    ["--fork=1"],
    ["-k", "relative", "IMAGE"],
    ["-k", "/" + "x" * 120, "IMAGE"],
    ["-e", "-1", "IMAGE"],
    ["-e", "x", "IMAGE"],
    ["-e", "0x", "IMAGE"],
    ["-o", "x", "IMAGE"],
    ["-o", "", "IMAGE"],
    ["-L", "-o", "1"],
    ["-L", "-A"],
    ["-L", "-B", "b"],
    ["-B", "none", "IMAGE"],
    ["-o", "1T", "RAW"],
    ["--cache=x", "IMAGE"],
    ["--cache", "none", "--cache=none", "IMAGE"],
    ["-n", "--cache=none", "IMAGE"],
    ["--aio=x", "IMAGE"],
    ["--aio=native", "--aio=native", "IMAGE"],
    ["--discard=x", "IMAGE"],
    ["--discard=unmap", "--discard=unmap", "IMAGE"],
    ["--detect-zeroes=x", "IMAGE"],
    ["--detect-zeroes=unmap", "IMAGE"],
    ["-f", "nonsense", "IMAGE"],
    ["-f", "", "IMAGE"],
    ["-f", "qcow2", "RAW"],
    ["-x", "x" * 4097, "IMAGE"],
    ["-D", "x" * 4097, "IMAGE"],
    ["-L", "IMAGE"],
    ["-L", "-x", "x"],
    ["-L", "-D", "x"],
    ["-L", "--cache=none"],
    ["-L", "--fork"],
    ["-L", "-k", "/none/s"],
    ["-L", "-c", "/dev/nbd0"],
    ["-d", "/none"],
    ["-d"],
    ["-L", "-b", "127.0.0.1", "-p", "1"],
    ["--image-opts", "-f", "raw", "IMAGE"],
    ["-k", "/none/s", "IMAGE"],
    ["-p", "nonsense", "IMAGE"],
    ["--fork", "/none"],
    ["--fork", "-k", "/none/s", "IMAGE"],
    ["-k", "SOCKET", "--pid-file=/none/p", "IMAGE"],
    *(["-e", text, "-k", "SOCKET", "/none"] for text in ("010", " 1", "+1")),
    *(["-e", text, "IMAGE"] for text in ("08", "1 ", "1_0", "0o1", "9" * 20)),
    # A number to the C library of newer ones.
    *(["-e", text, "IMAGE"] for text in ("0b1",) if not is_newer()),
    *(["-o", text, "IMAGE"] for text in ("1_0", "0o7", "08", "1 ", "-1", "0x", "1k")),
    *(["-o", str(1 << bits), "IMAGE"] for bits in (63, 64)),
    ["-o", "1048577", "-f", "raw", "-k", "SOCKET", "RAW"],
    ["-o", str((1 << 63) - 1), "-f", "raw", "-k", "SOCKET", "RAW"],
    ["-o", "10485761", "-f", "qcow2", "-k", "SOCKET", "IMAGE"],
    ["-L", "-o", "-1"],
    ["-L", "-l", "s"],
    ["-L", "-b", "127.0.0.1", "-p", "nonsense"],
    ["--tls-hostname", "x"],
    ["--selinux-label", "x", "IMAGE"],
    ["--selinux-label", "x", "-L"],
    ["--selinux-label", "x", "-L", "-k", "/absent"],
    ["--selinux-label", "x", "--tls-hostname", "x", "IMAGE"],
    ["--selinux-label", "x", "-k", "SOCKET", "IMAGE"],
    *([f"--{letter}", "x"] for letter in "dpclotfbvs"),
    ["-l", "none", "-k", "SOCKET", "IMAGE"],
    ["-l", "snapshot.name=none", "-k", "SOCKET", "IMAGE"],
    ["-l", "snapshot.id=7,snapshot.name=none", "-k", "SOCKET", "IMAGE"],
    ["-l", "snapshot.none=1", "-k", "SOCKET", "IMAGE"],
    ["-l", "s", "-f", "raw", "-k", "SOCKET", "RAW"],
    ["-s", "-l", "s", "-k", "SOCKET", "IMAGE"],
    ["--aio=native", "-k", "SOCKET", "IMAGE"],
    ["--aio=native", "--cache=unsafe", "-k", "SOCKET", "IMAGE"],
    ["-f", "luks", "-k", "SOCKET", "IMAGE"],
    ["-k", "SOCKET", ""],
    ["-k", "SOCKET", "json:{}"],
    ["-k", "SOCKET", "nbd:unix:/none"],
    ["-k", "SOCKET", "nbd://127.0.0.1:1"],
    ["-b", "192.0.2.1", "-p", "10899", "IMAGE"],
    ["-b", "127.0.0.1", "-p", "-1", "IMAGE"],
    *(
        ["-k", "SOCKET", "--image-opts", text]
        for text in (
            "",
            "driver=qcow2",
            "driver=none,file.filename=/none",
            "driver=qcow2,file.filename=/none",
            "driver=qcow2,file.filename=/none,read-only=maybe",
        )
    ),
    *(
        ["-k", "SOCKET", "--object", text, "IMAGE"]
        for text in ("none", "secret", "secret,id=1,data=x", "secret,id=s")
    ),
    ["--object=secret,id=s,data=x", "--object=secret,id=s,data=x", "-k", "SOCKET",
     "IMAGE"],
    # Objects are made in their turn, and bitmaps looked for the last one first.
    ["--object", "secret,id=s,data", "a", "b"],
    ["-B", "one", "-B", "two", "-k", "SOCKET", "IMAGE"],
    ["-k", "SOCKET", "file:"],
    ["-k", "SOCKET", "nbd:"],
    ["-k", "SOCKET", 'json:{"driver":"qcow2","file.filename":"RAW"}'],
    ["-k", "SOCKET", 'json:{"driver":"qcow2","file.filename":"/none"}'],
    ["-k", "SOCKET", "file:a:none"],
    ["-k", "SOCKET", "--image-opts", "driver=luks,key-secret=s,file.filename=IMAGE"],
]  # fmt: skip


def test_what_options_of_the_image_refuse(ours, theirs, image, path):
    os.truncate(image, 1 << 20)
    file = f'"file": {{"driver": "file", "filename": "{image}"}}'
    for arguments in (
        ["--image-opts", f"driver=qcow2,read-only=on,file.filename={image}"],
        ['json:{"driver": "qcow2", "read-only": true, ' + file + "}"],
        ["--image-opts", f"driver=raw,offset=96M,file.filename={image}"],
        ["--image-opts", f"driver=raw,offset=512,size=96M,file.filename={image}"],
        ["--aio=native", "--image-opts", f"driver=qcow2,file.filename={image}"],
    ):
        answers = [run(p, "-k", path, *arguments, status=1) for p in (ours, theirs)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("arguments", SAME, ids=lambda a: " ".join(a)[:40] or "none")
def test_same_message_and_status(ours, theirs, image, path, tmp_path, arguments):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    names = {"IMAGE": str(image), "RAW": str(raw), "SOCKET": str(path)}

    def named(word):
        return re.sub("IMAGE|RAW|SOCKET", lambda found: names[found[0]], word)

    results = []
    for command in (ours, theirs):
        done = subprocess.run(
            [command, *(named(a) for a in arguments)],
            capture_output=True,
            text=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
        # Of argv[0] qemu-nbd shows all here, the last part there.
        err = done.stderr.replace(command, "qemu-nbd")
        results.append((done.returncode, done.stdout, err))
    status, out, err = results[1]
    assert results[0] == (status, out, errors_as_7_2_says(err))


def test_a_format_takes_the_place_of_that_in_a_name(start, image, path):
    """Of a disk that is raw no tables are believed, whatever its name says."""
    start("-r", "-f", "raw", f'json:{{"driver": "qcow2", "file.filename": "{image}"}}')
    assert info(f"nbd+unix:///?socket={path}")["export-size"] < 1 << 20


def test_a_bitmap_that_missed_writes(ours, theirs, image, path):
    run(find_tool("qemu-img"), "bitmap", "--add", image, "b0")
    run(find_tool("qemu-io"), "-c", "write 0 1k", "-c", "abort", image, status=-6)
    arguments = ("-r", "-B", "b0", "-k", path, image)
    answers = [run(program, *arguments, status=1) for program in (ours, theirs)]
    assert answers[0] == answers[1]
    assert "inconsistent" in answers[0][1]


@pytest.mark.parametrize("stream", [">/dev/full", "2>/dev/full"])
def test_nobody_reads_what_is_printed(ours, theirs, image, path, tmp_path, stream):
    """A server comes up, and what is done has succeeded, all the same."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    for command in (ours, theirs):
        shell = ["sh", "-c", f'exec "$@" {stream}', "sh", command]
        with subprocess.Popen([*shell, "-t", "-k", path, raw]) as process:
            try:
                wait_until_listening(path, process)
                assert info(f"nbd+unix:///?socket={path}")["export-size"] == 1 << 20
                listed = subprocess.run([*shell, "-L", "-k", path], timeout=60)
                assert listed.returncode == 0
            finally:
                process.terminate()
        assert process.returncode == 0


# -- the life of a server --------------------------------------------------------


def test_ends_after_the_last_client(start, image, path):
    process = start("-f", "qcow2", image)
    assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20
    assert process.wait(20) == 0
    assert not path.exists()


def test_persistent_until_sigterm(start, image, path):
    process = start("-t", "-f", "qcow2", image)
    for _ in range(3):
        info(f"nbd+unix:///?socket={path}")
    assert process.poll() is None
    process.terminate()
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


def test_one_client_more_than_shared_waits(start, image, path):
    start("-t", "-f", "qcow2", image)
    uri = f"nbd+unix:///?socket={path}"
    qemu_io = [find_tool("qemu-io"), "-f", "raw", uri]
    with subprocess.Popen(
        qemu_io, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        first.stdin.write("read 0 512\n")
        first.stdin.flush()
        while "512" not in first.stdout.readline():
            pass
        with subprocess.Popen(
            [*qemu_io, "-c", "write 0 512"], stdout=subprocess.DEVNULL
        ) as second:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(1)
            first.communicate("quit\n", timeout=20)
            assert second.wait(20) == 0


def test_probed_raw_is_warned_of(start, tmp_path, path):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    process = start(raw)
    info(f"nbd+unix:///?socket={path}")
    assert process.wait(20) == 0
    assert process.stderr.read() == (
        f"WARNING: Image format was not specified for '{raw}' and probing guessed "
        "raw.\n"
        "         Automatically detecting the format is dangerous for raw images, "
        "write operations on block 0 will be restricted.\n"
        "         Specify the 'raw' format explicitly to remove the restrictions.\n"
    )


def test_raw_that_is_not_guessed_is_not_warned_of(start, tmp_path, path):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    file = f'"file": {{"driver": "file", "filename": "{raw}"}}'
    for arguments in (
        [f'json:{{"driver": "raw", {file}}}'],
        ["-r", raw],
        ["-s", raw],
    ):
        process = start(*arguments)
        info(f"nbd+unix:///?socket={path}")
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_fork(program, image, path, tmp_path):
    pid_file = tmp_path / "pid"
    done = subprocess.run(
        [program, "--fork", "-t", f"--pid-file={pid_file}", "-k", path, image],
        capture_output=True,
        timeout=20,
    )
    # Had the server kept our pipes, this run would not have ended.
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    pid = int(pid_file.read_text())
    try:
        assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20
        assert os.getsid(pid) != os.getsid(0)
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_gone(path)


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "<&-", ">&-", "2>&-"])
@pytest.mark.parametrize("failing", [False, True])
def test_fork_with_streams_closed(ours, image, path, tmp_path, streams, failing):
    """Neither the pipe to the parent nor the image has the number of one."""
    pid_file = tmp_path / "pid"
    name = "/none" if failing else image
    command = f'"{ours}" --fork -t -v --pid-file={pid_file} -k {path} {name} {streams}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
    assert done.returncode == int(failing), done.stderr
    if failing:
        return
    pid = int(pid_file.read_text())
    try:
        for fd in range(3):
            assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
        assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_gone(path)


def test_verbose_is_no_word_of_clients_that_come_and_go(program, image, path):
    """QEMU's tests compare what it says, and have it say all that it can."""
    command = [program, "-v", "-f", "qcow2", "-k", str(path), str(image)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            wait_until_listening(path, process)
            assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20
        finally:
            process.terminate()
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")


def test_hangup_ends_in_order(start, image, path, tmp_path):
    pid_file = tmp_path / "pid"
    process = start("-t", "-f", "qcow2", f"--pid-file={pid_file}", image)
    uri = f"nbd+unix:///?socket={path}"
    run(find_tool("qemu-io"), "-f", "raw", uri, "-c", "write -P 7 0 64k")
    assert pid_file.stat().st_mode & 0o777 == 0o600
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 0
    assert not path.exists()
    run(find_tool("qemu-io"), image, "-c", "read -P 7 0 64k")


def test_nohup_is_obeyed(ours, image, path):
    with subprocess.Popen(["nohup", ours, "-t", "-k", str(path), str(image)],
                          stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        try:
            wait_until_listening(path, process)
            process.send_signal(signal.SIGHUP)
            assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20
        finally:
            process.terminate()
        assert process.wait(20) == 0


def test_image_in_use(start, program, image, path, tmp_path):
    start("-t", "-f", "qcow2", image)
    # QEMU's has the image a little later than the socket.
    info(f"nbd+unix:///?socket={path}")
    out, err = run(program, "-k", tmp_path / "t", image, status=1)
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == (
        f"qemu-nbd: Failed to blk_new_open '{image}': Failed to get \"write\" lock"
    )
    assert lines[1].startswith(f"Is another process using the image [{image}]?")


# -- the client -------------------------------------------------------------------


def listed(said):
    """Return what 7.2's client would have listed: it knows no extended headers."""
    if not is_newer():
        return said
    text = re.sub(r"(?m)^ *transaction size: .*\n", "", said[0])
    return re.sub(
        r"0x([0-9a-f]+) \((.*) block-status-payload \)",
        lambda found: f"{int(found[1], 16) & ~0x1000:#x} ({found[2]} )",
        text,
    ), said[1]


@pytest.mark.parametrize("options", [("-x", "n", "-D", "d"), ("-r",), ("-e", "0")])
def test_lists_what_qemu_nbd_lists(start, ours, theirs, image, path, options):
    start("-t", *options, "-f", "qcow2", image)
    assert run(ours, "-L", "-k", path) == listed(run(theirs, "-L", "-k", path))


def test_lists_nbdkit(ours, theirs, path, tmp_path):
    nbdkit = find_tool("nbdkit")
    with subprocess.Popen([nbdkit, "-f", "-U", path, "memory", "5M"]) as process:
        try:
            wait_until_listening(path, process)
            assert run(ours, "-L", "-k", path) == listed(run(theirs, "-L", "-k", path))
        finally:
            process.terminate()


def test_version_does_not_load_the_loop(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", MAIN, "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
    )
    assert done.stdout.startswith("nbdqcow 0.")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"asyncio", "click", "uvloop", "numpy", "socket", "logging"}
