"""``nbdqcow-nbd`` beside qemu-nbd: the same command, the same outcome."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY, find_tool, wait_until_listening
from tests.interop.test_cli_serve import info, run

MAIN = "import sys; from nbdqcow.cli.nbd import main; sys.exit(main())"


def nbdsh(script, path):
    """Return ``result`` of a script with a libnbd handle ``h`` for a socket."""
    python = "/usr/bin/python3"
    probe = [python, "-c", "import nbd"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no module nbd (python3-libnbd)")
    program = "import json, sys, nbd\nh = nbd.NBD()\n" + script
    text, _ = run(python, "-c", program + "print(json.dumps(result))", path)
    return json.loads(text)


@pytest.fixture
def ours(tmp_path):
    """A program called qemu-nbd that is ours."""
    path = tmp_path / "bin" / "qemu-nbd"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from nbdqcow.cli.nbd import main\nsys.exit(main())\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def theirs():
    return find_tool("qemu-nbd")


@pytest.fixture(params=["ours", "theirs"])
def program(request):
    """Either of the two: what is asserted of ours must hold of qemu-nbd."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    run(find_tool("qemu-img"), "create", "-q", "-f", "qcow2", path, "10M")
    return path


@pytest.fixture
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("s") / "s"


@pytest.fixture
def start(program, path):
    """``start(*arguments)`` starts the program on the unix socket ``path``."""
    processes = []

    def begin(*arguments):
        process = subprocess.Popen(
            [program, "-k", str(path), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        wait_until_listening(path, process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        process.stderr.close()


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
    *(["-e", text, "IMAGE"] for text in ("08", "1 ", "1_0", "0b1", "0o1", "9" * 20)),
    *(["-o", text, "IMAGE"] for text in ("1_0", "0o7", "08", "1 ", "-1", "0x", "1k")),
    *(["-o", str(1 << bits), "IMAGE"] for bits in (63, 64)),
    ["-o", "1048577", "-f", "raw", "-k", "SOCKET", "RAW"],
    ["-o", str((1 << 63) - 1), "-f", "raw", "-k", "SOCKET", "RAW"],
    ["-o", "10485761", "-f", "qcow2", "-k", "SOCKET", "IMAGE"],
    ["-L", "-o", "-1"],
    ["-L", "-l", "s"],
    ["-L", "-b", "127.0.0.1", "-p", "nonsense"],
    ["--tls-hostname", "x"],
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
    for program in (ours, theirs):
        done = subprocess.run(
            [program, *(named(a) for a in arguments)],
            capture_output=True,
            text=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
        # Of argv[0] qemu-nbd shows all here, the last part there.
        err = done.stderr.replace(program, "qemu-nbd")
        results.append((done.returncode, done.stdout, err))
    assert results[0] == results[1]


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
    for program in (ours, theirs):
        shell = ["sh", "-c", f'exec "$@" {stream}', "sh", program]
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


@pytest.mark.parametrize(
    ("options", "multi_conn", "read_only"),
    [
        ((), False, False),
        (("-r",), False, True),
        (("-e", "2"), True, False),
        (("-e", "0", "-r"), True, True),
    ],
)
def test_multi_conn(start, image, path, options, multi_conn, read_only):
    start("-t", *options, "-f", "qcow2", "-x", "a name", "-D", "what it is", image)
    export = info(f"nbd+unix:///a%20name?socket={path}")
    assert export["can_multi_conn"] is multi_conn
    assert export["is_read_only"] is read_only
    assert export["description"] == "what it is"


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


def test_discard_is_ignored_unless_asked_for(start, image, path):
    qemu_img = find_tool("qemu-img")
    run(find_tool("qemu-io"), "-c", "write 0 1M", image)
    start("-f", "qcow2", image).stderr.fileno()
    run(find_tool("qemu-io"), "-f", "raw", f"nbd+unix:///?socket={path}",
        "-c", "discard 0 1M")  # fmt: skip
    wait_gone(path)
    assert '"data": true' in run(qemu_img, "map", "--output=json", image)[0]
    start("-f", "qcow2", "--discard=unmap", image)
    run(find_tool("qemu-io"), "-f", "raw", f"nbd+unix:///?socket={path}",
        "-c", "discard 0 1M")  # fmt: skip
    wait_gone(path)
    assert '"data": true' not in run(qemu_img, "map", "--output=json", image)[0]


def wait_gone(path):
    deadline = time.monotonic() + 20
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # The image is closed a little after its socket is.
    time.sleep(0.3)


def test_image_opts(start, image, path):
    start("--image-opts", f"driver=qcow2,file.driver=file,file.filename={image}")
    assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20


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
            wait_for(path)
            process.send_signal(signal.SIGHUP)
            assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20
        finally:
            process.terminate()
        assert process.wait(20) == 0


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_image_in_use(start, program, image, path, tmp_path):
    start("-t", "-f", "qcow2", image)
    out, err = run(program, "-k", tmp_path / "t", image, status=1)
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == (
        f"qemu-nbd: Failed to blk_new_open '{image}': Failed to get \"write\" lock"
    )
    assert lines[1].startswith(f"Is another process using the image [{image}]?")


def test_an_offset_into_a_raw_image(start, tmp_path, path):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"a" * 4096 + b"b" * 8192)
    start("-o", "0x1000", "-f", "raw", raw)
    uri = f"nbd+unix:///?socket={path}"
    run(find_tool("qemu-io"), "-f", "raw", uri, "-c", "read -P 0x62 0 8k",
        "-c", "write -P 0x63 0 512")  # fmt: skip
    wait_gone(path)
    assert raw.read_bytes() == b"a" * 4096 + b"c" * 512 + b"b" * 7680


def test_contexts_are_offered_on_demand(start, image, path):
    start("-t", "-e", "0", "-f", "qcow2", image)
    uri = f"nbd+unix:///?socket={path}"
    assert info(uri)["contexts"] == ["base:allocation"]


def test_allocation_depth(start, image, path):
    start("-t", "-A", "-f", "qcow2", image)
    contexts = info(f"nbd+unix:///?socket={path}")["contexts"]
    assert contexts == ["base:allocation", "qemu:allocation-depth"]


def test_a_named_export_has_no_other_name(start, image, path):
    start("-t", "-x", "disk", "-f", "qcow2", image)
    assert info(f"nbd+unix:///disk?socket={path}")["export-size"] == 10 << 20
    run(find_tool("nbdinfo"), f"nbd+unix:///?socket={path}", status=1)


def test_a_bitmap_that_is_not_there(program, image, path):
    _, err = run(program, "-B", "b0", "-f", "qcow2", "-k", path, image, status=1)
    assert err == "qemu-nbd: Bitmap 'b0' is not found\n"


def test_an_offset_into_a_qcow2_image(start, image, path):
    """The window is one of the guest's disk, not of the file."""
    qemu_io = find_tool("qemu-io")
    run(qemu_io, "-c", "write -P 1 0 2M", "-c", "write -z 4M 1M", image)
    process = start("-t", "-o", "1049088", "-f", "qcow2", "--discard=unmap", image)
    uri = f"nbd+unix:///?socket={path}"
    assert info(uri)["export-size"] == (10 << 20) - 1049088
    run(qemu_io, "-f", "raw", uri, "-c", "read -P 1 0 1048064",
        "-c", "read -P 0 1048064 1M", "-c", "write -P 2 512 8M",
        "-c", "write -P 3 1000 3000", "-c", "write -z 64k 128k",
        "-c", "discard 256k 128k")  # fmt: skip
    extents = json.loads(run(find_tool("nbdinfo"), "--map", "--json", uri)[0])
    assert {extent["type"] for extent in extents} == {0, 3}
    process.terminate()
    assert process.wait(20) == 0
    run(qemu_io, image, "-c", "read -P 1 0 1049600", "-c", "read -P 2 1049600 488",
        "-c", "read -P 3 1050088 3000", "-c", "read -P 0 1114624 128k")  # fmt: skip
    run(find_tool("qemu-img"), "check", "-q", image)


def test_an_offset_past_the_end(ours, image, path):
    _, err = run(ours, "-o", "11M", "-f", "qcow2", "-k", path, image, status=1)
    assert err == "qemu-nbd: Invalid offset '11M'\n"
    _, err = run(ours, "-o", "99999999", "-f", "qcow2", "-k", path, image, status=1)
    assert err == (
        "qemu-nbd: Offset (99999999) cannot be greater than size of the containing"
        " file (10485760)\n"
    )


# -- the client -------------------------------------------------------------------


@pytest.mark.parametrize("options", [("-x", "n", "-D", "d"), ("-r",), ("-e", "0")])
def test_lists_what_qemu_nbd_lists(start, ours, theirs, image, path, options):
    start("-t", *options, "-f", "qcow2", image)
    assert run(ours, "-L", "-k", path) == run(theirs, "-L", "-k", path)


def test_lists_nbdkit(ours, theirs, path, tmp_path):
    nbdkit = find_tool("nbdkit")
    with subprocess.Popen([nbdkit, "-f", "-U", path, "memory", "5M"]) as process:
        try:
            wait_until_listening(path, process)
            assert run(ours, "-L", "-k", path) == run(theirs, "-L", "-k", path)
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


def test_load_snapshot(image, start, path):
    uri = f"nbd+unix:///?socket={path}"
    qemu_io = (find_tool("qemu-io"), "-f", "qcow2", "-c")
    run(*qemu_io, "write -P 1 0 1M", image)
    run(find_tool("qemu-img"), "snapshot", "-c", "first", image)
    run(*qemu_io, "write -P 2 0 1M", image)
    run(find_tool("qemu-img"), "snapshot", "-c", "2nd", image)
    run(*qemu_io, "write -P 3 0 1M", image)
    for option, pattern in (
        ("first", 1), ("1", 1), ("snapshot.name=2nd", 2),
        ("snapshot.id=1,snapshot.name=first", 1),
    ):  # fmt: skip
        process = start("-r", "-l", option, image)
        run(
            find_tool("qemu-io"),
            "-r",
            "-f",
            "raw",
            "-c",
            f"read -P {pattern} 0 1M",
            uri,
        )
        assert process.wait(20) == 0


def test_bitmaps_of_the_chain(image, start, path, tmp_path):
    """Each -B adds one; that of a backing file has its name, too."""
    qemu_img, top = find_tool("qemu-img"), tmp_path / "top"
    run(qemu_img, "bitmap", "--add", "--disable", image, "low")
    run(qemu_img, "create", "-f", "qcow2", "-b", image, "-F", "qcow2", top)
    for name in ("a", "b", "c"):
        run(qemu_img, "bitmap", "--add", "--disable", top, name)
    start("-t", "-r", "-B", "a", "-B", "low", "-B", "b", "-f", "qcow2", top)
    uri = f"nbd+unix:///?socket={path}"
    contexts = info(uri)["contexts"]
    assert sorted(contexts[1:]) == [f"qemu:dirty-bitmap:{n}" for n in ("a", "b", "low")]
    text, _ = run(find_tool("nbdinfo"), "--map=qemu:dirty-bitmap:low", uri)
    assert text.split()[:3] == ["0", str(10 << 20), "0"]


def test_bitmap(image, start, path):
    run(find_tool("qemu-img"), "bitmap", "--add", image, "b0")
    qemu_io = (find_tool("qemu-io"), "-c")
    run(*qemu_io, "write 1M 64k", image)
    run(find_tool("qemu-img"), "bitmap", "--disable", image, "b0")
    # Given twice it is still one, which clients that add up would count twice.
    start("-t", "-r", "-B", "b0", "-B", "b0", image)
    uri = f"nbd+unix:///?socket={path}"
    text, _ = run(find_tool("nbdinfo"), "--map=qemu:dirty-bitmap:b0", uri)
    assert [line.split()[:3] for line in text.splitlines()] == [
        ["0", "1048576", "0"],
        ["1048576", "65536", "1"],
        ["1114112", "9371648", "0"],
    ]
    # What QEMU's client takes as a map is the bitmap: dirty is no data.
    options = f"driver=nbd,server.type=unix,server.path={path}"
    options += ",x-dirty-bitmap=qemu:dirty-bitmap:b0"
    text, _ = run(
        find_tool("qemu-img"), "map", "--output=json", "--image-opts", options
    )
    extents = [(e["start"], e["length"], e["data"]) for e in json.loads(text)]
    assert extents == [
        (0, 1 << 20, True),
        (1 << 20, 64 << 10, False),
        ((1 << 20) + (64 << 10), 9371648, True),
    ]


@pytest.mark.parametrize(
    ("options", "asks", "told"),
    [
        # A guessed raw image: whole sectors for who asks, anything for others.
        ((), True, [512, 512]),
        ((), False, [0, 1]),
        (("-f", "raw"), True, [1, 1]),
        (("-f", "raw"), False, [1, 1]),
    ],
    ids=str,
)
def test_block_sizes(start, path, tmp_path, options, asks, told):
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(1 << 20)
    start(*options, raw)
    found = nbdsh(
        "h.set_opt_mode(True)\n"
        f"h.set_request_block_size({asks})\n"
        "h.connect_unix(sys.argv[1])\n"
        "def ask(call):\n"
        "    try:\n"
        "        call()\n"
        "        return h.get_block_size(nbd.SIZE_MINIMUM)\n"
        "    except nbd.Error:\n"
        "        return 0\n"
        "result = [ask(h.opt_info), ask(h.opt_go)]\n"
        "h.shutdown()\n",
        path,
    )
    assert found == told


def test_a_sector_of_zeroes_is_a_hole_of_a_read(start, path, tmp_path):
    image = tmp_path / "small.qcow2"
    create = ("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "3k")
    run(find_tool("qemu-img"), *create)
    commands = ("-c", "write -P 1 0 3k", "-c", "write -zu 2k 512")
    run(find_tool("qemu-io"), "-d", "unmap", "-f", "qcow2", *commands, image)
    start("-f", "qcow2", image)
    found = nbdsh(
        "h.connect_unix(sys.argv[1])\n"
        "result = []\n"
        "def chunk(data, offset, status, error):\n"
        "    result.append([offset, len(data), status])\n"
        "data = h.pread_structured(1024, 2048, chunk)\n"
        "assert data == bytes(512) + b'\\1' * 512\n"
        "h.pread_structured(1024, 2048, chunk, nbd.CMD_FLAG_DF)\n"
        "h.shutdown()\n",
        path,
    )
    data, hole = 1, 2
    assert found == [[2048, 512, hole], [2560, 512, data], [2048, 1024, data]]
