"""TLS with the clients and the server of others, on certificates made here."""

import contextlib
import json
import socket as socket_module
import ssl
import subprocess
import sys
import time

import pytest

from tests.certificates import Authority
from tests.conftest import REPOSITORY, find_free_port, find_tool
from tests.interop.commands import run, serve

MiB = 1 << 20
ALICE = "O=Example,CN=alice"


class Pki:
    """Directories: a server's, and those of clients with and without names."""

    def __init__(self, directory):
        self.authority = Authority()
        self.directory = directory
        self.server = self.authority.write_server(directory / "server")
        self.nobody = self.authority.write_client(directory / "nobody")
        self.certificates = {}

    def client(self, name):
        path = self.directory / name
        if name not in self.certificates:
            self.certificates[name] = self.authority.client(name)
            self.authority.write_client(path, self.certificates[name])
        return path


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path)


@pytest.fixture
def socket(short_path):
    return short_path / "s"


@pytest.fixture
def image(images):
    return images["qcow2"]


def uri(socket, directory, export=""):
    return f"nbds+unix:///{export}?socket={socket}&tls-certificates={directory}"


def qemu_options(socket, directory, export=""):
    """What QEMU's programs call the same."""
    return [
        "--object",
        f"tls-creds-x509,id=tls0,endpoint=client,dir={directory}",
        "--image-opts",
        f"driver=nbd,server.type=unix,server.path={socket},export={export},"
        "tls-creds=tls0,tls-hostname=localhost",
    ]


def size(uri):
    """What nbdinfo says of an export; None if it can't have it."""
    done = subprocess.run(
        [find_tool("nbdinfo"), "--size", uri],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return int(done.stdout) if done.returncode == 0 else None


def exports(uri):
    out, _ = run(find_tool("nbdinfo"), "--list", "--json", uri)
    return [export["export-name"] for export in json.loads(out).get("exports", [])]


def listening(path):
    """Return what says whether somebody accepts clients on a unix socket."""

    def check():
        with contextlib.closing(socket_module.socket(socket_module.AF_UNIX)) as probe:
            return probe.connect_ex(str(path)) == 0

    return check


def logs(server, text):
    """Whether the server says that, now or soon: it may hear of its client's
    end after we do."""
    deadline = time.monotonic() + 20
    while text not in server.stderr.read_text():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def nbdqcow_nbd(*arguments):
    program = "import sys; from nbdqcow.cli.nbd import main; sys.exit(main())"
    return [sys.executable, "-c", program, *map(str, arguments)]


def nbdqcow_img():
    program = "import sys; from nbdqcow.cli.img import main; sys.exit(main())"
    return [sys.executable, "-c", program]


def certtool(directory, *arguments, template=""):
    (directory / "template").write_text(template)
    command = [find_tool("certtool"), "--template", "template", *arguments]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


# -- clients -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rsa", "rsa-pss", "ecdsa", "ed25519"])
def test_keys_of_certtool(served, image, socket, tmp_path, kind):
    certtool(tmp_path, "--generate-privkey", "--outfile", "ca-key.pem")
    certtool(
        tmp_path, "--generate-self-signed", "--load-privkey", "ca-key.pem",
        "--outfile", "ca-cert.pem", template="cn=ca\nca\ncert_signing_key\n",
    )  # fmt: skip
    certtool(
        tmp_path, "--generate-privkey", "--key-type", kind,
        "--outfile", "server-key.pem",
    )  # fmt: skip
    certtool(
        tmp_path, "--generate-certificate", "--load-privkey", "server-key.pem",
        "--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem",
        "--outfile", "server-cert.pem",
        template="cn=localhost\ndns_name=localhost\ntls_www_server\nsigning_key\n",
    )  # fmt: skip
    served(image, "--unix", socket, "--tls-certificates", tmp_path)
    assert size(uri(socket, tmp_path)) == 3 * MiB + 512


@pytest.mark.parametrize("client", ["ours", "theirs"])
def test_an_image_with_tls_creds(start, pki, image, socket, tmp_path, client):
    start(*credentials(pki), "-f", "qcow2", image)
    command = nbdqcow_img() if client == "ours" else [find_tool("qemu-img")]
    options = qemu_options(socket, pki.client("alice"))
    for words in ("info", "map"):
        out, _ = run(*command, words, *options)
        assert out
    copy = tmp_path / "copy"
    run(*command, "convert", "-O", "raw", *options, copy)
    assert copy.read_bytes() == (tmp_path / "disk.raw").read_bytes()

    def refused(old, new, says):
        changed = [word.replace(old, new) for word in options]
        for words in ("info", "map"):
            _, err = run(*command, words, *changed, status=1)
            assert says in err.splitlines()[-1], (words, err)

    refused("tls-hostname=localhost", "tls-hostname=elsewhere", "elsewhere")
    without = "No hostname for certificate validation"
    refused(",tls-hostname=localhost", "", without)
    refused("tls-creds=tls0", "tls-creds=tls1", "No TLS credentials with id 'tls1'")
    refused("endpoint=client", "endpoint=server", "Unable to access")
    stranger = Authority("stranger")
    directory = stranger.write_client(pki.directory / "x", stranger.client("alice"))
    # What QEMU's says depends on whether it is still writing when it is refused.
    says = "certificate" if client == "ours" else ""
    refused(str(pki.client("alice")), str(directory), says)


def test_an_image_of_nbdqcow_nbd_with_tls_creds(served, pki, image, socket, tmp_path):
    served(image, "--unix", socket, "--tls-certificates", pki.server)
    *options, text = qemu_options(socket, pki.client("alice"))
    other = tmp_path / "other"
    front = served(
        "-t", "-k", other, *options, text,
        command=nbdqcow_nbd(), is_ready=listening(other),
    )  # fmt: skip
    assert size(f"nbd+unix:///?socket={other}") == 3 * MiB + 512
    # While its image's server is there, or it would wait for it.
    front.stop()


def test_libnbd(served, pki, image, socket, tmp_path):
    served(image, "--unix", socket, "--tls-certificates", pki.server)
    where = uri(socket, pki.nobody)
    out, _ = run(find_tool("nbdinfo"), where)
    assert "with TLS" in out
    raw, copy = tmp_path / "disk.raw", tmp_path / "copy"
    run(find_tool("nbdcopy"), where, copy)
    assert copy.read_bytes() == raw.read_bytes()
    changed = bytes(reversed(raw.read_bytes()))
    copy.write_bytes(changed)
    run(find_tool("nbdcopy"), copy, where)
    run(find_tool("nbdcopy"), where, raw)
    assert raw.read_bytes() == changed


def test_qemu(served, pki, image, socket, tmp_path):
    served(image, "--unix", socket, "--tls-certificates", pki.server)
    options = qemu_options(socket, pki.nobody)
    qemu_img, qemu_io = find_tool("qemu-img"), find_tool("qemu-io")
    out, _ = run(qemu_img, "info", "--output=json", *options)
    assert json.loads(out)["virtual-size"] == 3 * MiB + 512
    commands = ["write -P 0x5a 1M 300k", "write -z 2M 64k", "flush"]
    commands += ["read -P 0x5a 1M 300k", "read -P 0 2M 64k"]
    words = [word for command in commands for word in ("-c", command)]
    out, _ = run(qemu_io, *options, *words)
    assert "failed" not in out
    copy = tmp_path / "copy"
    run(qemu_img, "convert", *options, "-O", "raw", copy)
    content = bytearray((tmp_path / "disk.raw").read_bytes())
    content[MiB : MiB + 300 * 1024] = b"\x5a" * 300 * 1024
    content[2 * MiB : 2 * MiB + 65536] = bytes(65536)
    assert copy.read_bytes() == content


def test_tcp_and_the_name_of_the_server(served, pki, image):
    port = find_free_port()
    served(image, "--listen", f"127.0.0.1:{port}", "--tls-certificates", pki.server)
    for host, found in (("localhost", 3 * MiB + 512), ("127.0.0.1", None)):
        # The certificate is for localhost, by name.
        where = f"nbds://{host}:{port}/?tls-certificates={pki.nobody}"
        assert size(where) == found
    nbd_client = find_tool("nbd-client")
    command = ["-l", "localhost", str(port), "-x", "-H", "localhost"]
    command += ["-A", pki.nobody / "ca-cert.pem"]
    out, err = run(nbd_client, *command)
    assert "Negotiation: .." in out + err


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_one_version_of_tls(served, pki, image, socket, version):
    other = {"1.2": "1.3", "1.3": "1.2"}[version]
    credentials = f"tls-creds-x509,id=t,endpoint=server,dir={pki.server}"
    credentials += f",verify-peer=off,priority=NORMAL:-VERS-TLS{other}"
    served(
        "-t", "-k", socket, "--object", credentials, "--tls-creds", "t", image,
        command=nbdqcow_nbd(), is_ready=listening(socket),
    )  # fmt: skip
    assert size(uri(socket, pki.nobody)) == 3 * MiB + 512


# -- who is let in -----------------------------------------------------------------


def test_client_certificates(served, pki, image, socket):
    server = served(
        image, "--unix", socket, "--tls-certificates", pki.server, "-v",
        "--tls-allow-dn", ALICE,
    )  # fmt: skip
    assert size(uri(socket, pki.client("alice"))) == 3 * MiB + 512
    assert size(uri(socket, pki.client("bob"))) is None
    assert size(uri(socket, pki.nobody)) is None
    assert exports(uri(socket, pki.client("bob"))) == []
    assert logs(server, "'O=Example,CN=bob' is not allowed")
    assert logs(server, "peer did not return a certificate")


def test_client_certificates_for_one_export(served, pki, image, socket, tmp_path):
    raw = tmp_path / "disk.raw"
    served(
        f"all={image}", f"some={raw}", "-r", "--unix", socket,
        "--tls-certificates", pki.server, "--tls", "on",
        "--tls-verify-peer", "optional", "--tls-export-allow-dn", "some", ALICE,
    )  # fmt: skip
    whole = 3 * MiB + 512
    for name, found in (("alice", whole), ("bob", None)):
        assert size(uri(socket, pki.client(name), "some")) == found
        assert size(uri(socket, pki.client(name), "all")) == whole
    assert size(uri(socket, pki.nobody, "some")) is None
    assert size(f"nbd+unix:///some?socket={socket}") is None
    assert size(f"nbd+unix:///all?socket={socket}") == whole
    assert exports(uri(socket, pki.client("alice"))) == ["all", "some"]
    assert exports(uri(socket, pki.client("bob"))) == ["all"]


def test_exports_that_need_tls_are_hidden(served, pki, image, socket, tmp_path):
    served(
        f"open={image}", f"secret={tmp_path / 'disk.raw'}", "-r", "--unix", socket,
        "--tls-certificates", pki.server, "--tls", "on", "--tls-only", "secret",
    )  # fmt: skip
    assert exports(f"nbd+unix:///?socket={socket}") == ["open"]
    assert exports(uri(socket, pki.nobody)) == ["open", "secret"]
    assert size(f"nbd+unix:///secret?socket={socket}") is None
    assert size(uri(socket, pki.nobody, "secret")) == 3 * MiB + 512


def test_tls_is_required(served, pki, image, socket):
    served(image, "--unix", socket, "--tls-certificates", pki.server)
    plain = f"nbd+unix:///?socket={socket}"
    assert size(plain) is None
    done = subprocess.run(
        [find_tool("qemu-img"), "info", plain], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "TLS" in done.stderr


def test_certificates_that_were_revoked(served, pki, image, socket):
    alice, bob = pki.client("alice"), pki.client("bob")
    pki.authority.revoke(pki.server, pki.certificates["bob"])
    server = served(
        image, "--unix", socket, "--tls-certificates", pki.server,
        "--tls-verify-peer", "on",
    )  # fmt: skip
    assert size(uri(socket, alice)) == 3 * MiB + 512
    assert size(uri(socket, bob)) is None
    assert logs(server, "certificate revoked")
    # A new list counts from the next client on.
    pki.authority.revoke(pki.server, *pki.certificates.values())
    assert size(uri(socket, alice)) is None


def test_new_certificates_without_a_restart(served, pki, image, tmp_path):
    # libnbd does not check the server's certificate on a unix socket.
    port = find_free_port()
    server = served(
        image, "--listen", f"127.0.0.1:{port}", "--tls-certificates", pki.server
    )

    def size_for(directory):
        return size(f"nbds://localhost:{port}/?tls-certificates={directory}")

    assert size_for(pki.nobody) == 3 * MiB + 512
    (pki.server / "server-cert.pem").write_text("broken")
    assert size_for(pki.nobody) == 3 * MiB + 512
    assert logs(server, "stay as they were")
    other = Authority("other")
    other.write_server(pki.server)
    assert size_for(pki.nobody) is None
    assert size_for(other.write_client(tmp_path / "other")) == 3 * MiB + 512


# -- the options of qemu-nbd, beside it --------------------------------------------


@pytest.fixture(params=["ours", "theirs"])
def start(request, served, socket):
    """Starts our nbdqcow-nbd or qemu-nbd with the same arguments."""

    def begin(*arguments):
        ours = request.param == "ours"
        command = nbdqcow_nbd() if ours else [find_tool("qemu-nbd")]
        return served(
            "-t", "-e", "0", "-k", socket, *arguments,
            command=command, is_ready=listening(socket),
        )  # fmt: skip

    return begin


def credentials(pki, verify="on"):
    directory = f"dir={pki.server},verify-peer={verify}"
    return [
        "--object", f"tls-creds-x509,id=tls0,endpoint=server,{directory}",
        "--tls-creds", "tls0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rules",
    [
        "authz-simple,id=a,identity=O=Example,,CN=alice",
        "authz-list,id=a,policy=deny,rules.0.match=O=Example,,CN=alice,"
        "rules.0.policy=allow",
        "authz-list,id=a,policy=allow,rules.0.match=*CN=b?b,rules.0.policy=deny,"
        "rules.0.format=glob",
        json.dumps(
            {
                "qom-type": "authz-list",
                "id": "a",
                "rules": [{"match": "*=alice", "policy": "allow", "format": "glob"}],
            }
        ),
    ],
    ids=["simple", "list", "glob", "json"],
)
def test_authorization(start, pki, image, socket, rules):
    start(
        *credentials(pki), "--object", rules, "--tls-authz", "a", "-f", "qcow2", image
    )
    assert size(uri(socket, pki.client("alice"))) == 3 * MiB + 512
    assert size(uri(socket, pki.client("bob"))) is None
    assert size(uri(socket, pki.nobody)) is None


def test_authorization_in_a_file(served, pki, image, socket, tmp_path):
    # qemu-nbd 7.2 does not have these rules.
    path = tmp_path / "rules"
    path.write_text("{}")
    served(
        "-t", "-e", "0", "-k", socket, *credentials(pki), "--object",
        f"authz-listfile,id=a,filename={path}", "--tls-authz", "a", image,
        command=nbdqcow_nbd(), is_ready=listening(socket),
    )  # fmt: skip
    assert size(uri(socket, pki.client("alice"))) is None
    path.write_text(json.dumps({"rules": [{"match": ALICE, "policy": "allow"}]}))
    assert size(uri(socket, pki.client("alice"))) == 3 * MiB + 512
    assert size(uri(socket, pki.client("bob"))) is None


def test_password_of_the_key(start, pki, image, socket):
    pki.authority.write_server(pki.server, password="pass word")
    start(
        "--object", "secret,id=s,data=pass word",
        "--object",
        f"tls-creds-x509,id=t,endpoint=server,dir={pki.server},passwordid=s,"
        "verify-peer=off",
        "--tls-creds", "t", "-f", "qcow2", image,
    )  # fmt: skip
    assert size(uri(socket, pki.nobody)) == 3 * MiB + 512


@pytest.mark.parametrize("client", ["ours", "theirs"])
def test_list(start, pki, image, socket, client):
    start(*credentials(pki), "-x", "one", "-D", "text", "-f", "qcow2", image)
    command = nbdqcow_nbd() if client == "ours" else [find_tool("qemu-nbd")]

    def listing(directory, hostname=None, *, status=0, more=""):
        return run(
            *command, "-L", "-k", socket, "--object",
            f"tls-creds-x509,id=t,endpoint=client,dir={directory}{more}",
            "--tls-creds", "t", *(["--tls-hostname", hostname] if hostname else []),
            status=status,
        )  # fmt: skip

    out, _ = listing(pki.client("alice"), "localhost")
    assert " export: 'one'\n  description: text\n" in out
    _, err = listing(pki.client("alice"), "elsewhere", status=1)
    assert "elsewhere" in err
    stranger = Authority("stranger")
    directory = stranger.write_client(pki.directory / "x", stranger.client("alice"))
    listing(directory, "localhost", status=1)
    # A socket has no name: any server that the authority knows could be it.
    _, err = listing(pki.client("alice"), status=1)
    assert "No hostname for certificate validation" in err
    out, _ = listing(pki.client("alice"), more=",verify-peer=no")
    assert " export: 'one'\n" in out
    assert run(*command, "-L", "-k", socket, status=1)[0] == ""


SAME = [
    ["--object", "tls-creds-x509,id=t,dir=/none,endpoint=server", "--tls-creds", "t"],
    ["--tls-creds", "t"],
    ["--tls-authz", "a"],
    ["--tls-hostname", "h"],
    ["--object", "bogus,id=x"],
    ["--object", "tls-creds-x509,dir=/none"],
    ["--object", "tls-creds-x509,id=t,endpoint=server"],
    ["--object", "tls-creds-x509,id=t,dir=SERVER,endpoint=server,verify-peer=x"],
    ["--object", "tls-creds-x509,id=t,dir=SERVER,endpoint=x"],
    ["--object", "tls-creds-x509,id=t,dir=SERVER,endpoint=server,bogus=1"],
    ["--object", "authz-simple,id=a"],
    ["--object", "authz-list,id=a,policy=x"],
    ["--object", "authz-list,id=a", "--tls-creds", "a"],
    ["--object", "authz-list,id=a", "--tls-authz", "a"],
    ["--object", "secret,id=s"],
    ["--object", "secret,id=s,data=x", "--tls-creds", "s"],
    ["--object="],
    ["--object"],
    ["--tls-creds", "a", "--tls-creds", "b"],
    [
        "--object", "tls-creds-x509,id=t,dir=SERVER,endpoint=server",
        "--tls-creds", "t", "--tls-hostname", "x",
    ],
    [
        "--object", "tls-creds-x509,id=t,dir=CLIENT,endpoint=client",
        "--tls-creds", "t",
    ],
]  # fmt: skip
SAME += [
    ["-L", "--tls-creds", "t"],
    ["-L", "--tls-authz", "t"],
    [
        "-L", "--object", "tls-creds-x509,id=t,dir=SERVER,endpoint=server",
        "--tls-creds", "t",
    ],
]  # fmt: skip


@pytest.mark.parametrize("arguments", SAME, ids=lambda a: " ".join(a)[:60])
def test_same_message_and_status(pki, image, arguments):
    names = {"SERVER": pki.server, "CLIENT": pki.nobody}
    words = []
    for word in arguments:
        for name, directory in names.items():
            word = word.replace(name, str(directory))
        words.append(word)
    if "-L" not in words and arguments != ["--object"]:
        words.append(str(image))
    results = []
    for command in (nbdqcow_nbd(), [find_tool("qemu-nbd")]):
        done = subprocess.run(
            [*command, *words],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=REPOSITORY,
        )
        err = done.stderr.replace(find_tool("qemu-nbd"), "qemu-nbd")
        err = err.replace("nbdqcow:", "qemu-nbd:").replace("`nbdqcow ", "`qemu-nbd ")
        results.append((done.returncode, done.stdout, err))
    assert results[0] == results[1]


# -- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tls", "require"], "--tls=require needs --tls-certificates or --tls-psk"),
        (["--tls-certificates", "/none"], "/none/server-cert.pem: No such file"),
        (["--tls-certificates", "DIR", "--tls-only", "x"], "no export named 'x'"),
        (["--tls-only", "x"], "need TLS"),
        (["--tls-allow-dn", "x"], "need TLS"),
        (["--tls-certificates", "DIR", "--tls-psk", "x"], "exclude each other"),
        (["--tls-psk", "x", "--tls-allow-dn", "x"], "need --tls-certificates"),
        (
            ["--tls-certificates", "DIR", "--tls-verify-peer=off", "--tls-allow-dn=x"],
            "excludes",
        ),
    ],
)
def test_refused_by_serve(pki, image, socket, arguments, message):
    words = [word.replace("DIR", str(pki.server)) for word in arguments]
    err = serve(image, "--unix", socket, *words)
    assert message in err
    assert err.count("\n") == 1
    assert not socket.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--object", "tls-creds-anon,id=t,endpoint=server"], "nobody knows who"),
        (["--object", "authz-pam,id=t,service=x"], "use authz-list"),
        (["--object", "authz-simple,id=a,identity=x", "--object=secret,id=a,data=x"],
         "duplicate property 'a'"),
        (["--object", "{"], "JSON parse error, premature EOI"),
        (
            ["--object", "tls-creds-x509,id=t,dir=DIR,endpoint=server,priority=X"],
            "priority 'X'",
        ),
        (
            ["--object", "tls-creds-x509,id=t,dir=DIR,endpoint=server,verify-peer=off",
             "--tls-creds=t", "--object=authz-list,id=a", "--tls-authz=a"],
            "verify-peer=on",
        ),
        (
            ["--object", "authz-list,id=a,rules.1.match=x,rules.1.policy=allow"],
            "Parameter 'rules.0' missing",
        ),
    ],
)  # fmt: skip
def test_refused_by_nbdqcow_nbd(pki, image, arguments, message):
    words = [word.replace("DIR", str(pki.server)) for word in arguments]
    out, err = run(*nbdqcow_nbd(*words, image), status=1)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


# -- pre-shared keys ---------------------------------------------------------------


def test_pre_shared_keys(served, image, socket, tmp_path):
    (tmp_path / "keys.psk").write_text("alice:" + "1a" * 32 + "\nbob:" + "2b" * 32)
    (tmp_path / "wrong").write_text("alice:" + "3c" * 32 + "\n")
    arguments = image, "--unix", socket, "--tls-psk", tmp_path / "keys.psk"
    if not getattr(ssl, "HAS_PSK", False):
        assert "TLS-PSK needs Python 3.13" in serve(*arguments)
        return
    served(*arguments)
    whole = 3 * MiB + 512

    def where(user, file):
        return f"nbds+unix://{user}@/?socket={socket}&tls-psk-file={tmp_path / file}"

    assert size(where("alice", "keys.psk")) == whole
    assert size(where("bob", "keys.psk")) == whole
    assert size(where("alice", "wrong")) is None
    keys = f"tls-creds-psk,id=t,endpoint=client,username=bob,dir={tmp_path}"
    listing = ["-L", "-k", socket, "--object", keys, "--tls-creds", "t"]
    for command in (nbdqcow_nbd(), [find_tool("qemu-nbd")]):
        out, _ = run(*command, *listing)
        assert "exports available: 1" in out
