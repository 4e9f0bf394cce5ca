"""Command lines of qemu-nbd: a table of made ones, `LINES`, and random ones that
`NbdLines` makes.

As in `img_lines`: words come from pools that hold what scripts give and what
nobody should. ``{dir}`` is the directory that a line runs in, ``{held}`` one with
images that another program has opened, and with servers that `-L` may ask,
``{port}`` a port that nobody has. Redirections of the shell are words, too.
"""

import random
from collections.abc import Iterator
from typing import Final

from tests.interop import img_lines

PROGRAM: Final = "qemu-nbd"
REDIRECTIONS: Final = (
    *(">&-", "2>&-", "<&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"),
    ">/dev/full 2>/dev/full",
)
_SOCKET: Final = "-k {dir}/s"
_JSON: Final = 'json:{"driver":"qcow2","file.filename":"base.qcow2"}'
_X509: Final = "--object tls-creds-x509,id=t,endpoint=server,dir={dir}/tls"
_CLIENT: Final = "--object tls-creds-x509,id=t,endpoint=client,dir={dir}/tls"

# Words are separated by spaces; a space in a word is "~".
LINES: Final = (
    # The life of a server.
    f"{_SOCKET} base.qcow2",
    f"-t {_SOCKET} -f qcow2 base.qcow2",
    "-t -p {port} -b 127.0.0.1 base.qcow2",
    "-t -p {port} -b localhost --fork --pid-file={dir}/pid base.qcow2",
    f"--fork {_SOCKET} --pid-file {{dir}}/pid top.qcow2",
    f"--fork -t {_SOCKET} --pid-file pid top.qcow2",
    f"-t {_SOCKET} --pid-file pid base.qcow2",
    f"--fork -t {_SOCKET} --pid-file {{dir}}/absent/pid base.qcow2",
    f"-t {_SOCKET} --pid-file {{dir}}/absent/pid base.qcow2",
    f"-t {_SOCKET} --pid-file= base.qcow2",
    f"-t {_SOCKET} --pid-file=sub base.qcow2",
    f"-t -e 3 {_SOCKET} base.qcow2",
    f"-t -e 0 -r {_SOCKET} base.qcow2",
    "-t --sh=2 --soc {dir}/s --per base.qcow2",
    f"-t --fork --ver {_SOCKET} base.qcow2",
    # Where it listens.
    f"-p {{port}} {_SOCKET} -t base.qcow2",
    f"-b localhost {_SOCKET} -t base.qcow2",
    "-k {dir}/other -k {dir}/s base.qcow2 -t",
    "-k s base.qcow2",
    "-k {dir}/absent/s base.qcow2",
    "-k {dir}/sub base.qcow2",
    "-k {dir}/used base.qcow2 -t",
    "-k {held}/s base.qcow2 --pid-file=/dev/null absent",
    "-p 0x50 base.qcow2",
    "-p nothing base.qcow2",
    "-b 1.2.3.4.5 -p {port} base.qcow2",
    "-b '' -p {port} base.qcow2 -t",
    "-b ::1 -p {port} base.qcow2 -t",
    "-b 127.0.0.1 -p {taken} base.qcow2",
    # Which image.
    f"{_SOCKET}",
    f"{_SOCKET} base.qcow2 top.qcow2",
    f"{_SOCKET} -- base.qcow2 -t",
    f"{_SOCKET} -t -- base.qcow2",
    f"{_SOCKET} -t base.qcow2 --",
    f"{_SOCKET} absent",
    f"{_SOCKET} absent/x",
    f"{_SOCKET} base.raw/x",
    f"{_SOCKET} sub",
    f"{_SOCKET} fifo",
    f"{_SOCKET} -r -f raw sub",
    f"{_SOCKET} {{held}}/locked.qcow2",
    f"{_SOCKET} -r {{held}}/locked.qcow2",
    f"{_SOCKET} -s {{held}}/locked.qcow2 -t",
    f"{_SOCKET} -r -t -f raw {{held}}/locked.qcow2",
    f"{_SOCKET} {{held}}/served.qcow2",
    # Two things are wrong.
    f"{_SOCKET} -f foo {{held}}/locked.qcow2",
    f"{_SOCKET} -f foo absent",
    f"{_SOCKET} -f foo sub",
    f"{_SOCKET} -f foo -B none base.qcow2",
    f"{_SOCKET} -f foo -l none base.qcow2",
    f"{_SOCKET} -o 2M -P 1 base.qcow2",
    f"{_SOCKET} --aio=foo --bar base.qcow2",
    f"{_SOCKET} -e foo base.qcow2 -k",
    f"{_SOCKET} -V -P 1 base.qcow2",
    f"{_SOCKET} --cache=foo --discard=foo absent",
    f"{_SOCKET} -x {'x' * 4097} -P 1 base.qcow2",
    f"{_SOCKET} -t -r {{held}}/served.qcow2",
    f"{_SOCKET} \udcff.raw -f raw -t",
    f"{_SOCKET} \udcff.absent",
    f"{_SOCKET} -t \udcff.raw",
    f"{_SOCKET} \u00e9~\t.qcow2",
    f"{_SOCKET} {'x' * 300}",
    f"{_SOCKET} {'x/' * 2200}",
    f"{_SOCKET} {'l' * 250} -t -f raw",
    f"{_SOCKET} none -t",
    f"{_SOCKET} -f raw none -t",
    f"{_SOCKET} -f qcow2 none",
    f"{_SOCKET} link -t",
    f"{_SOCKET} dangling",
    f"{_SOCKET} orphan.qcow2",
    f"{_SOCKET} -t wrong.qcow2",
    f"{_SOCKET} -t file:base.qcow2",
    f"{_SOCKET} -t nbd+unix:///listed?socket={{held}}/s",
    f"{_SOCKET} nbd+unix:///absent?socket={{held}}/s",
    f"{_SOCKET} nbd:unix:{{held}}/s:exportname=listed -t -r",
    f"{_SOCKET} nbd:",
    f"{_SOCKET} nbd://",
    f"{_SOCKET} foo:bar",
    f"{_SOCKET} http://localhost/x",
    f"{_SOCKET} encrypted.qcow2",
    f"{_SOCKET} luks.img -f luks",
    f"{_SOCKET} -t --object secret,id=s,data=one --image-opts"
    " driver=qcow2,encrypt.key-secret=s,file.filename=encrypted.qcow2",
    f"{_SOCKET} --object secret,id=s,data=two --image-opts"
    " driver=qcow2,encrypt.key-secret=s,file.filename=encrypted.qcow2",
    f"{_SOCKET} -t --object secret,id=s,data=one --image-opts"
    " driver=luks,key-secret=s,file.filename=luks.img",
    f"{_SOCKET} --image-opts driver=luks,key-secret=s,file.filename=luks.img",
    # How much of it.
    f"-t {_SOCKET} -r -s base.qcow2",
    f"-t {_SOCKET} -s base.qcow2",
    f"-t {_SOCKET} -s -f raw holes.raw",
    f"-t {_SOCKET} -l one snap.qcow2",
    f"-t {_SOCKET} -l 2 snap.qcow2",
    f"-t {_SOCKET} -l three snap.qcow2",
    f"-t {_SOCKET} -l '' snap.qcow2",
    f"-t {_SOCKET} -l snapshot.id=1,snapshot.name=two snap.qcow2",
    f"-t {_SOCKET} -l snapshot.id=1,snapshot.id=2 snap.qcow2",
    f"-t {_SOCKET} -l snapshot. snap.qcow2",
    f"-t {_SOCKET} -l one -l two snap.qcow2",
    f"-t {_SOCKET} -l one base.raw -f raw",
    f"-t {_SOCKET} -l one old.qcow",
    f"-t {_SOCKET} -l one -r --sn snap.qcow2",
    f"-t {_SOCKET} -o 1M base.qcow2",
    f"-t {_SOCKET} -o 0x10000 base.qcow2",
    f"-t {_SOCKET} -o 4194304 base.qcow2",
    f"-t {_SOCKET} -o 4194305 base.qcow2",
    f"-t {_SOCKET} -o 65536 -f raw base.raw",
    f"-t {_SOCKET} -o 512 -o 1024 -f raw base.raw",
    f"-t {_SOCKET} --off=65536 -s base.qcow2",
    f"-t {_SOCKET} -A top.qcow2",
    f"-t {_SOCKET} -A -A -B b0 bitmaps.qcow2",
    f"-t {_SOCKET} -B b0 -B b1 -r bitmaps.qcow2",
    f"-t {_SOCKET} -B '' bitmaps.qcow2",
    f"-t {_SOCKET} -B {'x' * 1100} bitmaps.qcow2",
    f"-t {_SOCKET} -B b0 broken.qcow2 -r",
    f"-t {_SOCKET} -B b0 broken.qcow2",
    f"-t {_SOCKET} -B b0 base.raw -f raw",
    f"-t {_SOCKET} -B \u00e9 bitmaps.qcow2",
    # What it is called.
    f"-t {_SOCKET} -x a~b -D what base.qcow2",
    f"-t {_SOCKET} -x '' -D '' base.qcow2",
    f"-t {_SOCKET} -x \u00e9 -D \u00e9 base.qcow2",
    f"-t {_SOCKET} -x one -x two -D one -D two base.qcow2",
    f"-t {_SOCKET} -x {'x' * 4096} base.qcow2",
    f"-t {_SOCKET} -x {'x' * 4097} base.qcow2",
    f"-t {_SOCKET} -D {'x' * 4097} base.qcow2",
    # How it is opened.
    *(f"-t {_SOCKET} --cache={m} base.qcow2" for m in img_lines.CACHES),
    *(f"-t {_SOCKET} --aio={m} base.qcow2" for m in ("threads", "io_uring", "x", "")),
    f"-t {_SOCKET} --aio=native base.qcow2",
    f"-t {_SOCKET} --aio=native -n base.qcow2",
    *(f"-t {_SOCKET} --discard={m} base.qcow2" for m in ("ignore", "off", "on", "x")),
    *(f"-t {_SOCKET} --detect-zeroes={m} base.qcow2" for m in ("on", "off", "x", "")),
    f"-t {_SOCKET} --detect-zeroes=unmap --discard=unmap base.qcow2",
    f"-t {_SOCKET} --discard=unmap --detect-zeroes=unmap base.qcow2",
    f"-t {_SOCKET} --detect-zeroes=on --detect-zeroes=off base.qcow2",
    f"-t {_SOCKET} --discard unmap --discard ignore base.qcow2",
    f"-t {_SOCKET} --aio threads --aio threads base.qcow2",
    f"-t {_SOCKET} -n -n base.qcow2",
    f"-t {_SOCKET} -f qcow2 -f raw base.qcow2",
    f"-t {_SOCKET} -f raw base.qcow2",
    f"-t {_SOCKET} -f qcow2 base.raw",
    f"-t {_SOCKET} -f foo base.qcow2",
    f"-t {_SOCKET} -f '' base.qcow2",
    f"-t {_SOCKET} --image-opts driver=qcow2,file.filename=base.qcow2",
    f"-t {_SOCKET} --image-opts driver=raw,offset=512,size=1k,file.filename=base.raw",
    f"-t {_SOCKET} --image-opts -o 512 driver=raw,file.filename=base.raw",
    f"-t {_SOCKET} --image-opts -f raw driver=raw,file.filename=base.raw",
    f"-t {_SOCKET} --image-opts --cache=none driver=qcow2,file.filename=base.qcow2",
    *(
        f"-t {_SOCKET} --image-opts driver=compress{rest}"
        for rest in (
            "",
            ",file=base.qcow2",
            ",filename=base.qcow2",
            ",file.filename=base.qcow2",
            ",file.driver=raw,file.file.filename=base.raw",
            ",file.driver=foo,file.file.filename=base.qcow2",
            ",file.driver=qcow2,file.file.filename=absent",
            ",file.driver=qcow2,file.file.filename=base.qcow2",
            ",foo=1,file.driver=qcow2,file.file.filename=base.qcow2",
            ",read-only=maybe,file.driver=qcow2,file.file.filename=base.qcow2",
        )
    ),
    f"-t {_SOCKET} --image-opts base.qcow2",
    f"-t {_SOCKET} --image-opts ''",
    f"-t {_SOCKET} -f raw {_JSON}",
    f"-t {_SOCKET} {_JSON}",
    # Options.
    "",
    "--help=1",
    "-qq",
    "--bogus base.qcow2",
    f"--fork=yes {_SOCKET} base.qcow2",
    f"--s {_SOCKET} base.qcow2",
    f"--tls {_SOCKET} base.qcow2",
    "-e1 -tk{dir}/s base.qcow2",
    f"-rte5 {_SOCKET} base.qcow2",
    f"-te {_SOCKET} base.qcow2",
    *(f"-t -e {n} {_SOCKET} base.qcow2" for n in ("2147483647", "2147483648", "1k")),
    f"-v -t {_SOCKET} base.qcow2 --bogus",
    f"-t {_SOCKET} base.qcow2 -",
    f"-t {_SOCKET} -",
    # Objects.
    *(
        f"-t {_SOCKET} --object {text.replace(' ', '~')} base.qcow2"
        for text in img_lines.OBJECTS
        if "help" not in text and text
    ),
    f"-t {_SOCKET} --object tls-creds-x509,id=t base.qcow2",
    f"-t {_SOCKET} --object tls-creds-x509,id=t,dir=absent,endpoint=server base.qcow2",
    f"-t {_SOCKET} --object tls-creds-x509,id=t,dir=sub,endpoint=server base.qcow2",
    f"-t {_SOCKET} --object tls-creds-x509,id=t,dir=tls,endpoint=x base.qcow2",
    f"-t {_SOCKET} --object tls-creds-x509,id=t,dir=tls,verify-peer=x base.qcow2",
    f"-t {_SOCKET} --object tls-creds-x509,id=t,dir=tls,priority= base.qcow2",
    f"-t {_SOCKET} --object tls-creds-x509,id=t,dir=tls,foo=1 base.qcow2",
    f"-t {_SOCKET} --object authz-list,id=a base.qcow2",
    f"-t {_SOCKET} --object authz-list,id=a,policy=x base.qcow2",
    f"-t {_SOCKET} --object authz-list,id=a,policy=deny,rules.0.match=x base.qcow2",
    f"-t {_SOCKET} --object authz-list,id=a,rules.0.match=*,rules.0.policy=x"
    " base.qcow2",
    f"-t {_SOCKET} --object authz-list,id=a,rules.1.match=* base.qcow2",
    f"-t {_SOCKET} --object authz-list,id=a,rules=x base.qcow2",
    f"-t {_SOCKET} --object authz-simple,id=a base.qcow2",
    f"-t {_SOCKET} --object authz-simple,id=a,identity=x base.qcow2",
    f"-t {_SOCKET} --object secret,id=s,data base.qcow2",
    f"-t {_SOCKET} --object secret,id=s,data=b,format=base64 base.qcow2",
    f"-t {_SOCKET} --object {{'qom-type':'secret','id':'s','data':'x'}} base.qcow2",
    f"-t {_SOCKET} --object {{\"qom-type\":\"secret\" base.qcow2",
    # TLS.
    f"-t {_SOCKET} {_X509} --tls-creds t base.qcow2",
    f"-t -b 127.0.0.1 -p {{port}} {_X509} --tls-creds t base.qcow2",
    f"-t {_SOCKET} {_X509} --tls-creds u base.qcow2",
    f"-t {_SOCKET} {_CLIENT} --tls-creds t base.qcow2",
    f"-t {_SOCKET} --object secret,id=t,data=x --tls-creds t base.qcow2",
    f"-t {_SOCKET} --tls-creds t {_X509} base.qcow2",
    f"-t {_SOCKET} {_X509} --tls-creds t --tls-authz a base.qcow2",
    f"-t {_SOCKET} {_X509} --object authz-simple,id=a,identity=x --tls-creds t"
    " --tls-authz a base.qcow2",
    f"-t {_SOCKET} {_X509} --object"
    " authz-simple,id=a,identity=O=Example,,CN=client --tls-creds t"
    " --tls-authz a base.qcow2",
    f"-t {_SOCKET} {_X509} --object authz-list,id=a,policy=allow --tls-creds t"
    " --tls-authz a base.qcow2",
    f"-t {_SOCKET} {_X509} --tls-creds t --tls-hostname x base.qcow2",
    f"-t {_SOCKET} {_X509} --tls-creds t --tls-authz t base.qcow2",
    f"-t {_SOCKET} --tls-authz a base.qcow2",
    f"-t {_SOCKET} --tls-creds= base.qcow2",
    # The client.
    "-L -k {held}/s",
    "--lis --sock={held}/s",
    "-L -k {held}/absent",
    "-L -k {dir}/text",
    "-L -k s",
    "-L -b 127.0.0.1 -p {port}",
    "-L -b absent.invalid -p {port}",
    "-L -b 127.0.0.1 -p nothing",
    "-L -k {held}/s base.qcow2",
    "-L -k {held}/s -t",
    "-L -k {held}/s -v -e 4 -r -s",
    "-L -k {held}/s -d",
    "-L -k {held}/s --pid-file={dir}/pid",
    "-L -k {held}/s --detect-zeroes=on",
    "-L -k {held}/s --image-opts",
    f"-L -k {{held}}/s {_CLIENT} --tls-creds t",
    f"-L -k {{held}}/tls {_CLIENT} --tls-creds t --tls-hostname localhost",
    f"-L -k {{held}}/tls {_CLIENT} --tls-creds t --tls-hostname other",
    f"-L -k {{held}}/tls {_CLIENT} --tls-creds t",
    f"-L -k {{held}}/tls {_X509} --tls-creds t",
    "-L -k {held}/tls",
    "-L -k {held}/s --tls-hostname localhost",
    "-L -k {held}/s --tls-creds t",
    # The kernel's device, which is none here.
    "-d {dir}/absent",
    "-d",
    f"-c {{dir}}/absent {_SOCKET} base.qcow2",
    f"-c {{dir}}/text {_SOCKET} base.qcow2",
    f"-c {{dir}}/absent {_SOCKET} {_X509} --tls-creds t base.qcow2",
    # Standard streams.
    *(f"-t {_SOCKET} base.qcow2 {r}" for r in REDIRECTIONS),
    *(f"--fork -t {_SOCKET} base.qcow2 {r}" for r in REDIRECTIONS),
    *(f"{_SOCKET} absent {r}" for r in REDIRECTIONS),
    *(f"-L -k {{held}}/s {r}" for r in REDIRECTIONS),
    *(f"-t {_SOCKET} holes.raw {r}" for r in REDIRECTIONS if "2>&-" not in r),
    *(f"--bogus {r}" for r in REDIRECTIONS),
)  # fmt: skip


def words_of(line: str) -> list[str]:
    """Return the words of a line of the table."""
    words = line.split(" ") if line else []
    return [PROGRAM, *("" if w == "''" else w.replace("~", " ") for w in words)]


_IMAGES: Final = (*img_lines.QCOW2, *img_lines.OTHERS)
_ODD_IMAGES: Final = (
    *img_lines.ODD,
    *("{held}/locked.qcow2", "{held}/served.qcow2", "fifo", "\udcff.raw", "l" * 250),
    *("nbd+unix:///listed?socket={held}/s", "nbd+unix:///absent?socket={held}/s"),
    *("\udcff.absent", "x" * 300),
)
# QEMU's messages go into the image that has the place of its standard error.
_REDIRECTIONS: Final = tuple(r for r in REDIRECTIONS if "2>&-" not in r)
_TEXTS: Final = ("name", "", "a b", "\u00e9", "x" * 4096, "x" * 4097, "\udcff", "a/b")
# Options with a value, and where that comes from; "" is none.
_OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "e": img_lines.NUMBERS,
    "t": (),
    "x": _TEXTS,
    "D": _TEXTS,
    "o": (*img_lines.NUMBERS, "65536", "512", "1048576", "4194304", "4194305"),
    "A": (),
    "B": img_lines.BITMAPS,
    "r": (),
    "s": (),
    "l": img_lines.SNAPSHOTS,
    "n": (),
    "cache": img_lines.CACHES,
    "aio": ("threads", "native", "io_uring", "foo", ""),
    "discard": ("ignore", "unmap", "on", "off", "foo", ""),
    "detect-zeroes": ("on", "off", "unmap", "foo", ""),
    "f": img_lines.FORMATS,
    "image-opts": (),
    "object": (
        *(o for o in img_lines.OBJECTS if "help" not in o),
        "tls-creds-x509,id=t,endpoint=server,dir={dir}/tls",
        "tls-creds-x509,id=t,endpoint=client,dir={dir}/tls",
        "authz-simple,id=a,identity=x",
        "authz-list,id=a,policy=allow",
    ),
    "tls-creds": ("t", "s", "absent", ""),
    "tls-authz": ("a", "absent"),
    "tls-hostname": ("localhost",),
    "fork": (),
    "pid-file": ("{dir}/pid", "pid", "absent/pid", "sub", ""),
    "L": (),
    "k": ("{dir}/s", "s", "{dir}/absent/s", "{dir}/sub", ""),
    "b": ("127.0.0.1", "localhost", "", "absent.invalid"),
    "p": ("{port}", "0x1", "nothing"),
    "d": (),
}  # fmt: skip
_LONG: Final = {
    "e": "shared", "t": "persistent", "x": "export-name", "D": "description",
    "o": "offset", "A": "allocation-depth", "B": "bitmap", "r": "read-only",
    "s": "snapshot", "l": "load-snapshot", "n": "nocache", "f": "format",
    "L": "list", "k": "socket", "b": "bind", "p": "port", "d": "disconnect",
}  # fmt: skip
_ASKED: Final = "{held}/s"
_RARE: Final = frozenset(("L", "k", "b", "p", "d", "tls-hostname", "tls-authz"))


class NbdLines:
    """Random command lines. ``oddness`` is the share of odd words."""

    def __init__(self, seed: int, oddness: float = 0.15) -> None:
        self._random = random.Random(seed)
        self._oddness = oddness

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            line = self.line()
            if is_harmless(line):
                yield line

    def line(self) -> list[str]:
        """Return one line."""
        choose = self._random
        names = [name for name in _OPTIONS if name not in _RARE or self._odd()]
        options = choose.sample(names, choose.choice((0, 1, 1, 2, 2, 3, 4)))
        if options and self._odd():
            options.append(choose.choice(options))
        if choose.random() < 0.6:
            options.append("t")
        groups = [self._option(name) for name in options]
        if not self._odd():
            groups.append(["-k", _ASKED if "L" in options else "{dir}/s"])
        elif self._odd():
            groups.append(["-p", "{port}"])
        if "tls-creds" in options and not self._odd():
            groups.insert(0, words_of(_X509)[1:])
        if self._odd() == ("L" in options):
            groups.append([self._operand("image-opts" in options)])
        if self._odd() and self._odd():
            extra = ("--", "-", "--foo", "-Z", "-T", "base.qcow2", "-f", "--x=1")
            groups.append([choose.choice(extra)])
        choose.shuffle(groups)
        if choose.random() < 0.05:
            groups.append([choose.choice(_REDIRECTIONS)])
        return [PROGRAM, *(word for group in groups for word in group)]

    def _odd(self) -> bool:
        return self._random.random() < self._oddness

    def _operand(self, image_opts: bool) -> str:
        choose = self._random
        name = choose.choice(_ODD_IMAGES if self._odd() else _IMAGES)
        if image_opts and not self._odd():
            patterns = img_lines.IMAGE_OPTS[: None if self._odd() else 2]
            pattern = choose.choice([p for p in patterns if "null-co" not in p])
            return pattern.replace("{}", name)
        if self._odd():
            # What null-co's reads give is what was in memory.
            names = [n for n in img_lines.JSON_NAMES if "null-co" not in n]
            return choose.choice(names).replace("{}", name)
        return name

    def _option(self, name: str) -> list[str]:
        choose = self._random
        values = _OPTIONS[name]
        if name in ("e", "f", "B", "l") and not self._odd():
            values = values[:3]
        long = _LONG.get(name, name)
        if len(name) == 1 and choose.random() < 0.7:
            if not values:
                return [f"-{name}"]
            value = choose.choice(values)
            return [f"-{name}{value}"] if self._odd() else [f"-{name}", value]
        if self._odd():
            long = long[: choose.randrange(1, len(long) + 1)]
        if not values:
            return [f"--{long}"]
        value = choose.choice(values)
        return [f"--{long}={value}"] if choose.random() < 0.6 else [f"--{long}", value]


def is_harmless(line: list[str]) -> bool:
    """Whether a line listens nowhere but where it may: a server that is told no
    place has a port that others may have, too, and QEMU's deletes the socket that
    another one has."""
    if _ASKED in line:
        return "-L" in line or "--list" in line
    return any("{dir}/s" in word or "{port}" in word for word in line[1:])
