"""``nbdqcow-img``: image files, with the commands and options of qemu-img.

Each command is a module of its own, loaded when it is asked for.
"""

import gc
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NoReturn

from nbdqcow.cli.late_modules import load_late
from nbdqcow.cli.messages import describe, error, printable, program_name, version
from nbdqcow.cli.program import leave, run_program

_COMMANDS: Final = {
    "amend": (
        "nbdqcow.cli.img_amend",
        "change an image's options, or its passphrases",
        "[--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force] "
        "-o options filename",
    ),
    "bench": (
        "nbdqcow.cli.img_bench",
        "time requests to an image",
        "[-c count] [-d depth] [-f fmt] [--flush-interval=n] [-i aio] [-n] "
        "[--no-drain] [-o offset] [--pattern=byte] [-q] [-s buffer_size] "
        "[-S step_size] [-t cache] [-w] [-U] filename",
    ),
    "bitmap": (
        "nbdqcow.cli.img_bitmap",
        "add, remove and change an image's dirty bitmaps",
        "(--merge source | --add | --remove | --remove-all | --clear | --enable | "
        "--disable)... "
        "[-b source_file [-F source_fmt]] [-g granularity] [--object objectdef] "
        "[--image-opts | -f fmt] filename [bitmap]",
    ),
    "check": (
        "nbdqcow.cli.img_check",
        "look for errors in an image's tables, and repair them",
        "[--object objectdef] [--image-opts] [-q] [-f fmt] [--output=human|json] "
        "[-r leaks|all] [-T src_cache] [-U] filename",
    ),
    "commit": (
        "nbdqcow.cli.img_commit",
        "write what an image has into its backing file",
        "[--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] "
        "[-r rate_limit] [-d] [-p] filename",
    ),
    "compare": (
        "nbdqcow.cli.img_compare",
        "tell whether two disks have the same content",
        "[--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-pqsU] "
        "filename1 filename2",
    ),
    "convert": (
        "nbdqcow.cli.img_convert",
        "copy disks into a new image; - is standard input or output",
        "[--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] "
        "[--bitmaps "
        "[--skip-broken-bitmaps]] [--salvage] [-cCnpqUW] [-f fmt] [-O output_fmt] "
        "[-t cache] [-T src_cache] [-B backing_file [-F backing_fmt]] [-o options] "
        "[-l snapshot] [-S sparse_size] [-r rate_limit] [-m num_coroutines] "
        "filename [filename2 ...] output_filename",
    ),
    "create": (
        "nbdqcow.cli.img_create",
        "make an empty image",
        "[--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] "
        "[-o options] filename [size]",
    ),
    "dd": (
        "nbdqcow.cli.img_dd",
        "copy a part of a disk into a new image",
        "[--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] "
        "[skip=blocks] if=input of=output",
    ),
    "info": (
        "nbdqcow.cli.img_info",
        "show what an image says of itself",
        "[--object objectdef] [--image-opts] [-f fmt] [-t cache] "
        "[--output=human|json] [--backing-chain] [--limits] [-U] filename",
    ),
    "map": (
        "nbdqcow.cli.img_map",
        "show what is where in an image and its backing files",
        "[--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] "
        "[--max-length=length] [--output=human|json | --picture=file.svg|file.png] "
        "[-U] filename",
    ),
    "measure": (
        "nbdqcow.cli.img_measure",
        "tell how large a new image would be",
        "[--output=human|json] [-O output_fmt] [-o options] [--size N | "
        "[--object objectdef] [--image-opts] [-f fmt] [-l snapshot] filename]",
    ),
    "rebase": (
        "nbdqcow.cli.img_rebase",
        "give an image another backing file",
        "[--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] "
        "[-T src_cache] [-p] [-u] [-c] -b backing_file [-F backing_fmt] filename",
    ),
    "rename": (
        "nbdqcow.cli.img_rename",
        "move an image; what leads to its backing file is kept right",
        "[--object objectdef] [--image-opts] [-f fmt] filename new_filename",
    ),
    "resize": (
        "nbdqcow.cli.img_resize",
        "make a disk larger or smaller",
        "[--object objectdef] [--image-opts] [-f fmt] [--preallocation=mode] [-q] "
        "[--shrink] filename [+|-]size",
    ),
    "snapshot": (
        "nbdqcow.cli.img_snapshot",
        "list, make, apply and delete internal snapshots",
        "[--object objectdef] [--image-opts] [-U] [-q] [-l | -a snapshot | "
        "-c snapshot | -d snapshot] filename",
    ),
}
"""Commands by name: the module, whose ``run(arguments)`` returns the exit
status; what it is for, and its arguments for ``--help``."""

_GC_THRESHOLD: Final = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the command line names; return its exit status."""
    # Modules make tens of thousands of objects that stay, and a job tuples that
    # live for a moment: neither has cycles to look for so often.
    gc.set_threshold(_GC_THRESHOLD)
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_program(lambda: _run(arguments), print_failures_last=True)


def script() -> NoReturn:
    """The program ``nbdqcow-img``."""
    leave(main())


def _run(arguments: list[str]) -> int:
    from nbdqcow.errors import NbdQcowError, UsageError

    # File names are any bytes, and they leave as they came.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    try:
        if not arguments:
            raise UsageError("Not enough arguments")
        name = arguments[0]
        if name.startswith("-"):
            return _run_option(name)
        if name not in _COMMANDS:
            raise UsageError(f"Command not found: {name}")
        load_late()
        module = import_module(_COMMANDS[name][0])
        return int(module.run(arguments[1:]))
    except UsageError as exc:
        error(str(exc))
        print(f"Try '{program_name()} --help' for more information", file=sys.stderr)
    except (NbdQcowError, OSError) as exc:
        if isinstance(exc, BrokenPipeError):
            raise
        error(describe(exc))
    return 1


def _run_option(option: str) -> int:
    from nbdqcow.errors import UsageError

    # getopt_long takes any beginning of a long name.
    long = len(option) > 2
    if option == "-V" or (long and "--version".startswith(option)):
        print_version()
    elif option == "-h" or (long and "--help".startswith(option)):
        print_help()
    else:
        raise UsageError(f"unrecognized option '{printable(option)}'")
    return 0


def print_version() -> None:
    """Print the program's name and version."""
    print(f"{program_name()} version {version()}")


def print_help() -> None:
    """Print how the program is used."""
    print_version()
    print(f"usage: {program_name()} [-h | -V] command [options]\n")
    print("Create, describe and check disk images.\n\nCommands:")
    for name, (_, purpose, arguments) in sorted(_COMMANDS.items()):
        # Some look for a command's arguments in the line that begins with it.
        print(f"  {name} {arguments}\n      {purpose}")
    print(
        "\nOptions are those of qemu-img. A size is in bytes, or takes one of the\n"
        "suffixes k, M, G, T, P and E. '-o help' lists what a format can be told.\n"
        f"\nSupported formats: {' '.join(_format_names())}"
    )


def _format_names() -> list[str]:
    """Return what ``-f`` takes, with the files' drivers, as qemu-img lists them."""
    from nbdqcow.block.image_options import FILE_DRIVERS, NULL_DRIVERS
    from nbdqcow.block.registry import filter_names, tool_names

    return sorted({*tool_names(), *filter_names(), *FILE_DRIVERS, *NULL_DRIVERS, "nbd"})


if __name__ == "__main__":
    script()
