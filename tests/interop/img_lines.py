"""Random command lines of the image tool: `CommandLines` makes them, `shrink` makes
one shorter.

Words come from pools that hold what scripts give and what nobody should. A line
is a list of words, the command first. Nothing of it reaches outside of the
directory that it runs in, and sizes are such that no line fills a disk.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

QCOW2: Final = (
    *("base.qcow2", "overlay.qcow2", "top.qcow2", "same.qcow2", "snap.qcow2"),
    *("bitmaps.qcow2", "v2.qcow2", "full.qcow2", "empty.qcow2", "compressed.qcow2"),
    *("sub/overlay.qcow2", "external.qcow2", "extended.qcow2", "unclosed.qcow2"),
)
OTHERS: Final = ("x.raw", "holes.raw", "base.raw", "text", "old.qcow", "none")
ODD: Final = (
    *("absent", "orphan.qcow2", "wrong.qcow2", "sub", "", "link", "dangling"),
    *("absent/x", "file:base.qcow2", "./base.qcow2", "foo:bar", "sub/"),
    *("-", "\u00e9 \t.qcow2", "file:", "luks.img", "encrypted.qcow2", "broken.qcow2"),
    *("json:", "json:{}", "nbd+unix:///?socket=none.sock", "base.raw/x", "a,b.raw"),
    *("http://localhost/x", "rbd:x/y", "vvfat:sub", "fat:sub", "ssh://x/y"),
)
NEW: Final = (
    "out",
    "out",
    "out",
    "new.img",
    "sub/out",
    "absent/out",
    "file:out",
    "o,ut",
)
FORMATS: Final = (
    *("qcow2",) * 8,
    *("raw",) * 5,
    *("qcow", "luks", "nbd", "file", "foo", "", "vmdk", "vpc", "vdi", "QCOW2"),
    *("host_device",),
)
SIZES: Final = (
    *("1M", "5M", "8M", "64k", "4M", "0", "512", "1000", "1.5M", "+1M", "-1M", "+0"),
    *("1", "-1", "foo", "", "5x", "0x1000", "1e3", "8E", "16E", "9223372036854775807"),
    *("9223372036854775808", "99999999999999999999", "1K", "1kB", "1b", "1 M", " 1M"),
    *("+", "-", "1.", ".5M", "1T", "1,5M", "0x", "1\u0661M", "1_000", "0b1", "1G "),
    *("010", "inf", "NaN", "1e400M", "2097153", "-0", "0.1", "0x1M", "1.5", "\t5M"),
)  # fmt: skip
NUMBERS: Final = (
    *("1", "2", "3", "0", "16", "17", "-1", "", "x", "0x4", "4294967296", " 1"),
    *("99999999999999999999", "1k", "1M", "010", "1.5", "+3", "1_0", "2147483647"),
    "2147483648",
)
CACHES: Final = (
    *("none", "writeback", "writethrough", "directsync", "unsafe", "off", "foo", ""),
)
SNAPSHOTS: Final = (
    *("one", "two", "1", "2", "3", "", "new", "\u00e9", "snapshot.name=one"),
    *("snapshot.id=1", "snapshot.id=1,snapshot.name=two", "snapshot.x=1", "a,b"),
)
BITMAPS: Final = ("b0", "b1", "b2", "", "\u00e9", "a" * 1100)
OBJECTS: Final = (
    *("secret,id=s,data=one", "secret,id=s,file=secret", "secret,id=t,data=two"),
    *("secret,id=s,data=b25l,format=base64", "secret,id=s", "secret,data=x", "foo"),
    *("secret,id=s,file=absent", "secret,id=s,data=!,format=base64", "secret", ""),
    *("foo,id=s", "secret,id=s,data=a,,b", "secret,id=,data=x", "secret,id=1,data=x"),
    *("secret,id=s,data=one,format=foo", "secret,id=s,data=x,file=secret"),
    *('{"qom-type":"secret","id":"s","data":"one"}', '{"qom-type":"secret"}', "{"),
    *("secret,id=s,data=one,foo=1", "help", "secret,help"),
    *("qom-type=secret,id=s,data=one",),
)  # fmt: skip
CREATE_OPTIONS: Final = (
    *("cluster_size=4k", "cluster_size=512", "cluster_size=2M", "cluster_size=64k"),
    *("cluster_size=3", "cluster_size=", "compat=0.10", "compat=1.1", "compat=v2"),
    *("compat=v3", "compat=x", "lazy_refcounts=on", "lazy_refcounts", "size=3M"),
    *("nolazy_refcounts", "refcount_bits=1", "refcount_bits=8", "refcount_bits=64"),
    *("refcount_bits=x", "preallocation=metadata", "preallocation=off"),
    *("preallocation=falloc", "preallocation=full", "preallocation=x"),
    *("extended_l2=on",),
    *("compression_type=zstd", "compression_type=zlib", "backing_file=base.qcow2"),
    *("backing_fmt=qcow2", "backing_fmt=raw", "backing_file=a,,b.raw", "backing_file="),
    *("data_file=data", "data_file_raw=on", "encryption=on", "encryption=off"),
    *("size=x",),
    *("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "foo=1", "help"),
    *("encrypt.format=aes,encrypt.key-secret=s", "", ",", "?", "=", "=1", "nocow=on"),
    *("extent_size_hint=1M", "key-secret=s", "iter-time=10", "size=4M,,"),
    *("backing_file",),
    *("encrypt.format=x", "encrypt.key-secret=s", "subformat=dynamic", "size=0"),
)  # fmt: skip
IMAGE_OPTS: Final = (
    *("driver=qcow2,file.filename={}", "file.filename={}"),
    *("driver=raw,file.filename={}",),
    *("driver=qcow2,file.driver=file,file.filename={}", "driver=foo,file.filename={}"),
    *("driver=qcow2,file={}", "driver=qcow2", "", "{}", "driver=file,filename={}"),
    *("driver=raw,offset=512,size=1k,file.filename={}",),
    *("file.filename={},read-only=on",),
    *("driver=qcow2,file.filename={},lazy-refcounts=x", "filename={},driver=raw"),
    *("driver=qcow2,file.filename={},backing.file.filename=base.qcow2,backing.driver=qcow2",),
    *("driver=qcow2,file.filename={},cache.direct=on",),
    *("driver=qcow2,,file.filename={}",),
    *("driver=qcow2,file.filename={},l2-cache-size=x",),
    *("driver=qcow2,file.filename={},foo=1",),
    *("driver=qcow2,file.filename={},encrypt.key-secret=s",),
    *("driver=luks,file.filename={}",),
    *("driver=qcow2,file.filename={},encrypt.format=luks,encrypt.key-secret=s",),
    *("driver=luks,key-secret=s,file.filename={}", "driver=null-co,size=1M", "driver"),
    *("driver=nbd,server.type=unix,server.path=none.sock",),
    *("driver=raw,file.driver=nbd",),
    *("driver=raw,size=x,file.filename={}", "driver=raw,offset=-1,file.filename={}"),
    *("driver=qcow2,file.filename={},discard=unmap",),
    *("driver=qcow2,file.filename={},discard=x",),
    *("driver=qcow2,file.filename={},backing=",),
    *("driver=qcow2,file.filename={},cache.foo=on",),
    *("driver=qcow2,file.filename={},detect-zeroes=on",),
    *("driver=qcow2,node-name=x,file.filename={}",),
    *("driver=qcow2,file.filename={},force-share=on",),
    *("driver=qcow2,file.filename={},auto-read-only=on",),
)  # fmt: skip
JSON_NAMES: Final = (
    *('json:{"driver":"qcow2","file":{"driver":"file","filename":"{}"}}',) * 2,
    *('json:{"driver":"qcow2","file.filename":"{}"}', 'json:{"file.filename":"{}"}'),
    *('json:{"driver":"raw","offset":512,"size":1024,"file.filename":"{}"}', "json:[]"),
    *('json:{"driver":"foo","file.filename":"{}"}', 'json:{"file":"{}"}'),
    *('json:{"a":1}',),
    *('json:{"driver":"qcow2","file":{"driver":"file","filename":"{}"},"x":null}',),
    *('json:{"driver":"qcow2","backing":null,"file.filename":"{}"}', "json:{"),
    *("json: ",),
    *('json:{"driver":"file","filename":"{}"}', 'json:{"filename":"{}"}', 'json:"{}"'),
    *("json:{'driver':'raw','file.filename':'{}'}",),
    *('json:{"driver":1,"file.filename":"{}"}',),
    *('json:{"driver":"null-co","size":"1M"}',),
    *('json:{"driver":"null-co","size":1048576}',),
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """What a command can be told: its options by name, and its operands."""

    options: dict[str, str]
    operands: tuple[str, ...]
    needed: tuple[str, ...] = field(default=())


_OPEN: Final = {"object": "object", "image-opts": "", "f": "format"}
# A value names a pool; options with the same name in qemu-img's help. "" is none.
COMMANDS: Final = {
    "amend": Command(
        {**_OPEN, "p": "", "q": "", "t": "cache", "force": "", "o": "options"},
        ("image",),
        ("o",),
    ),
    "bench": Command(
        {
            "f": "format",
            "image-opts": "",
            "d": "number",
            "s": "size",
            "S": "size",
            "o": "size",
            "w": "",
            "pattern": "number",
            "flush-interval": "number",
            "no-drain": "",
            "n": "",
            "i": "aio",
            "t": "cache",
            "U": "",
            "q": "",
        },
        ("image",),
        ("c",),
    ),
    "bitmap": Command(
        {
            **_OPEN,
            "add": "",
            "remove": "",
            "clear": "",
            "enable": "",
            "disable": "",
            "merge": "bitmap",
            "g": "size",
            "b": "image",
            "F": "format",
        },
        ("bitmap-image", "bitmap"),
        ("bitmap-action",),
    ),
    "check": Command(
        {**_OPEN, "q": "", "output": "output", "r": "repair", "T": "cache", "U": ""},
        ("image",),
    ),
    "commit": Command(
        {
            **_OPEN,
            "q": "",
            "t": "cache",
            "b": "image",
            "r": "size",
            "d": "",
            "p": "",
        },
        ("overlay",),
    ),
    "compare": Command(
        {
            **_OPEN,
            "F": "format",
            "T": "cache",
            "p": "",
            "q": "",
            "s": "",
            "U": "",
        },
        ("image", "image"),
    ),
    "convert": Command(
        {
            **_OPEN,
            "target-image-opts": "",
            "target-is-zero": "",
            "bitmaps": "",
            "U": "",
            "C": "",
            "c": "",
            "p": "",
            "q": "",
            "n": "",
            "t": "cache",
            "T": "cache",
            "O": "format",
            "B": "image",
            "F": "format",
            "o": "options",
            "l": "snapshot",
            "S": "size",
            "r": "size",
            "m": "number",
            "W": "",
            "salvage": "",
            "skip-broken-bitmaps": "",
        },
        ("image", "out"),
    ),
    "create": Command(
        {
            "object": "object",
            "q": "",
            "f": "format",
            "b": "image",
            "F": "format",
            "u": "",
            "o": "options",
        },
        ("new", "size?"),
    ),
    "dd": Command(
        {"image-opts": "", "U": "", "f": "format", "O": "format", "object": "object"},
        ("dd",),
    ),
    "info": Command(
        {**_OPEN, "output": "output", "backing-chain": "", "U": ""}, ("image",)
    ),
    "map": Command(
        {
            **_OPEN,
            "start-offset": "size",
            "max-length": "size",
            "output": "output",
            "U": "",
            "s": "size",
            "l": "size",
        },
        ("image",),
    ),
    "measure": Command(
        {
            **_OPEN,
            "output": "output",
            "O": "format",
            "o": "options",
            "size": "size",
            "l": "snapshot",
            "U": "",
        },
        ("image?",),
    ),
    "rebase": Command(
        {
            **_OPEN,
            "U": "",
            "q": "",
            "t": "cache",
            "T": "cache",
            "p": "",
            "u": "",
            "F": "format",
        },
        ("overlay",),
        ("b",),
    ),
    "resize": Command(
        {**_OPEN, "preallocation": "preallocation", "q": "", "shrink": ""},
        ("image", "size"),
    ),
    "snapshot": Command(
        {
            "object": "object",
            "image-opts": "",
            "U": "",
            "q": "",
            "l": "",
            "a": "snapshot",
            "c": "snapshot",
            "d": "snapshot",
        },
        ("snapshot-image",),
    ),
}
LONG_NAMES: Final = {"f": "format", "U": "force-share", "r": "repair"}
"""Of short options; not every command has them."""
READING: Final = ("info", "map", "compare", "measure")


class CommandLines:
    """Random command lines. ``oddness`` is the share of odd words."""

    def __init__(self, seed: int, oddness: float = 0.12) -> None:
        self._random = random.Random(seed)
        self._oddness = oddness

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            line = self.line()
            if is_harmless(line):
                yield line

    def of(self, name: str) -> Iterator[list[str]]:
        """Yield lines of one command."""
        while True:
            line = self.line(name)
            if is_harmless(line):
                yield line

    def line(self, name: str | None = None) -> list[str]:
        """Return one line: the command ``name``, or any."""
        choose = self._random
        name = name or choose.choice(list(COMMANDS))
        command = COMMANDS[name]
        count = min(choose.choice((0, 0, 1, 1, 1, 2, 2, 3, 4)), len(command.options))
        options = choose.sample(list(command.options), count)
        if options and choose.random() < 0.07:
            options.append(options[0])
        if command.needed and choose.random() > self._oddness / 2:
            options.append(command.needed[0])
        image_opts = "image-opts" in options
        words = [self._operand(kind, image_opts) for kind in command.operands]
        operands = [word for some in words for word in some]
        if choose.random() < self._oddness / 2:
            operands = operands[:-1] or [*operands, "base.qcow2"]
        if name == "convert" and choose.random() < 0.1:
            operands.insert(0, self._image())
        groups = [self._option(name, command, option) for option in options]
        if choose.random() < self._oddness / 3:
            groups.append(
                [choose.choice(("-x", "--foo", "--", "-", "--foo=1", "-qp", "-f"))]
            )
        line = groups if choose.random() < 0.85 else []
        rest = [] if line else groups
        line = [*line, *([word] for word in operands)]
        for group in rest:
            line.insert(choose.randrange(len(line) + 1), group)
        return [name, *(word for group in line for word in group)]

    def _odd(self) -> bool:
        return self._random.random() < self._oddness

    def _option(self, name: str, command: Command, option: str) -> list[str]:
        choose = self._random
        if option == "bitmap-action":
            option = choose.choice(("add", "remove", "clear", "enable", "merge"))
        kind = command.options.get(option, {"b": "image", "c": "count"}.get(option, ""))
        if option == "o" and kind == "":
            kind = "options"
        value = self._value(kind) if kind else None
        long = option if len(option) > 1 else LONG_NAMES.get(option)
        if len(option) > 1 or (long and choose.random() < 0.15):
            assert long is not None
            if choose.random() < 0.15:
                long = long[: choose.randrange(1, len(long) + 1)]
            if value is None:
                return [f"--{long}=x" if choose.random() < 0.01 else f"--{long}"]
            return (
                [f"--{long}={value}"] if choose.random() < 0.5 else [f"--{long}", value]
            )
        if value is None:
            return [f"-{option}"]
        if value and choose.random() < 0.2:
            return [f"-{option}{value}"]
        return [f"-{option}", value]

    def _value(self, kind: str) -> str:
        choose = self._random
        match kind:
            case "object":
                return choose.choice(OBJECTS[:1] * 15 + OBJECTS)
            case "format":
                return choose.choice(FORMATS if self._odd() else ("qcow2", "raw"))
            case "cache":
                return choose.choice(CACHES)
            case "size":
                return choose.choice(SIZES if self._odd() else SIZES[:8])
            case "number":
                return choose.choice(NUMBERS if self._odd() else NUMBERS[:3])
            case "count":
                return choose.choice(NUMBERS[:5] if self._odd() else NUMBERS[:3])
            case "snapshot":
                return choose.choice(SNAPSHOTS)
            case "bitmap":
                return choose.choice(BITMAPS[: 6 if self._odd() else 3])
            case "output":
                return choose.choice(
                    ("human", "json", "json", "xml", "")[: 5 if self._odd() else 3]
                )
            case "repair":
                return choose.choice(("leaks", "all", "foo", ""))
            case "aio":
                return choose.choice(("threads", "native", "io_uring", "foo"))
            case "preallocation":
                return choose.choice(("off", "metadata", "falloc", "full", "foo", ""))
            case "options":
                count = choose.choice((1, 1, 1, 2, 2, 3))
                return ",".join(choose.choice(CREATE_OPTIONS) for _ in range(count))
            case _:
                return self._image()

    def _image(self) -> str:
        choose = self._random
        kind = choose.random()
        if self._odd():
            return choose.choice(ODD)
        if kind < 0.08:
            return choose.choice(JSON_NAMES).replace("{}", self._image())
        return choose.choice(QCOW2 if kind < 0.75 else OTHERS)

    def _operand(self, kind: str, image_opts: bool) -> list[str]:
        choose = self._random
        match kind:
            case "size" | "size?":
                left_out = kind == "size?" and choose.random() < 0.4
                return [] if left_out else [self._value("size")]
            case "bitmap":
                return [self._value("bitmap")]
            case "new":
                return [choose.choice(NEW) if choose.random() < 0.9 else self._image()]
            case "out":
                return [choose.choice(NEW) if choose.random() < 0.7 else self._image()]
            case "dd":
                return self._dd(image_opts)
            case "image?" if choose.random() < 0.3:
                return []
        if choose.random() < 0.6:
            match kind:
                case "overlay":
                    return [self._wrap(choose.choice(QCOW2[1:4]), image_opts)]
                case "bitmap-image":
                    return [self._wrap("bitmaps.qcow2", image_opts)]
                case "snapshot-image":
                    return [self._wrap("snap.qcow2", image_opts)]
        return [self._wrap(self._image(), image_opts)]

    def _wrap(self, name: str, image_opts: bool) -> str:
        choose = self._random
        if not image_opts or self._odd():
            return name
        pattern = choose.choice(
            IMAGE_OPTS[: len(IMAGE_OPTS) if choose.random() < 0.5 else 2]
        )
        return pattern.replace("{}", name)

    def _dd(self, image_opts: bool) -> list[str]:
        choose = self._random
        words = [f"if={self._wrap(self._image(), image_opts)}"]
        words.append(
            f"of={choose.choice(NEW) if choose.random() < 0.9 else self._image()}"
        )
        for name, values in (("bs", SIZES), ("count", NUMBERS), ("skip", NUMBERS)):
            if choose.random() < 0.4:
                pool = values if self._odd() else values[:3]
                words.append(f"{name}={choose.choice(pool)}")
        if self._odd():
            words.append(
                choose.choice(("foo", "x=1", "bs", "=", "", "if=", "conv=sync"))
            )
        choose.shuffle(words)
        return words


_HUGE: Final = ("E", "T", "G", "9223372036854775807")


def is_harmless(line: list[str]) -> bool:
    """Whether a line neither fills the disk nor takes minutes."""
    text = " ".join(line)
    huge = any(word in text for word in _HUGE)
    written = ("preallocation", "prealloc", "-S 0", "-S0", "metadata", "full", "dd ")
    if huge and any(word in text for word in written):
        return False
    # A rate of some bytes per second; a request for each of many blocks.
    rated = line[0] in ("convert", "commit") and any(w.startswith("-r") for w in line)
    return not rated and not (huge and line[0] in ("bench",))


def shrink(line: list[str], fails: Callable[[list[str]], bool]) -> list[str]:
    """Return a line of which no word can be left out, and no part of a list of
    options, without it no longer failing."""
    changed = True
    while changed:
        changed = False
        for candidate in _smaller(line):
            if is_harmless(candidate) and fails(candidate):
                line, changed = candidate, True
                break
    return line


def _smaller(line: list[str]) -> Iterator[list[str]]:
    for size in (2, 1):
        for start in range(1, len(line) - size + 1):
            yield line[:start] + line[start + size :]
    for index, word in enumerate(line):
        parts = word.split(",")
        if len(parts) > 1:
            for number in range(len(parts)):
                shorter = ",".join(parts[:number] + parts[number + 1 :])
                yield [*line[:index], shorter, *line[index + 1 :]]
