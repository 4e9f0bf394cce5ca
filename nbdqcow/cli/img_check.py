"""``nbdqcow-img check``: is an image sound, and can it be made so?"""

import sys
from collections.abc import Sequence
from typing import Any, Final

from nbdqcow.block.tools import (
    REPAIR_ALL,
    REPAIR_LEAKS,
    REPAIR_NONE,
    CheckResult,
    Secrets,
)
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_names import READ_ONLY, GivenObjects, ImageName
from nbdqcow.cli.img_open import check_backing_chain, open_image_file
from nbdqcow.cli.img_options import (
    check_cache,
    format_json,
    parse_arguments,
    wants_json,
)
from nbdqcow.cli.messages import error, printable, warn_of_guess
from nbdqcow.errors import ImageError, UsageError

_LONG: Final = {
    "help": "-h",
    "format=": "-f",
    "repair=": "-r",
    "output=": "--output",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "cache=": "-T",
    "quiet": "-q",
}
_REPAIRS: Final = {"leaks": REPAIR_LEAKS, "all": REPAIR_ALL}

_FAILED: Final = 1
_CORRUPT: Final = 2
_LEAKING: Final = 3
_NO_CHECKS: Final = 63


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":hf:r:T:qU", _LONG)
    format_, output, quiet, force_share = None, "human", False, False
    cache = "writeback"
    repair, image_opts = REPAIR_NONE, False
    objects = GivenObjects()
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-f":
                format_ = value
            case "-r":
                if value not in _REPAIRS:
                    raise UsageError(
                        "Unknown option value for -r (expecting 'leaks' or 'all'): "
                        f"{value}"
                    )
                repair = _REPAIRS[value]
            case "--output":
                output = value
            case "-q":
                quiet = True
            case "-U":
                force_share = True
            case "-T":
                cache = value
            case "--image-opts":
                image_opts = True
            case _:
                objects.add(value)
    if len(operands) != 1:
        raise UsageError("Expecting one image file name")
    json = wants_json(output)
    # It is nothing that a check could notice.
    check_cache(cache, "Invalid source cache option: ")
    named = objects.image_name(
        operands[0], format_, image_opts=image_opts, force_share=force_share
    )
    try:
        return _check(
            named,
            objects.secret,
            repair,
            json=json,
            quiet=quiet,
        )
    except ImageError as exc:
        if str(exc).startswith("Check failed"):
            if exc.__cause__ is not None:
                error(str(exc.__cause__))
            raise
        raise type(exc)(f"Could not open '{operands[0]}': {exc}") from None


def _check(
    named: ImageName,
    secrets: Secrets,
    repair: int,
    *,
    json: bool,
    quiet: bool,
) -> int:
    with open_image_file(
        named.filename,
        named.format,
        read_only=repair == REPAIR_NONE or named.read_only,
        force_share=named.force_share,
        pairs=named.pairs,
    ) as image:
        if repair != REPAIR_NONE and named.read_only:
            raise ImageError(READ_ONLY)
        tool, file = image.tool, image.file
        if repair != REPAIR_NONE and named.format is None and tool.name == "raw":
            warn_of_guess(named.filename)
        if not tool.supports_check:
            error("This image format does not support checks")
            return _NO_CHECKS
        sys.stdout.flush()
        info = tool.describe_for_check(file)
        if named.key_id is not None:
            tool.check_secret(file, secrets(named.key_id))
        for text in info.warnings:
            error(f"warning: {text}")
        check_backing_chain(
            image,
            info,
            force_share=named.force_share,
            data_file=named.pairs.get("data-file.filename"),
            read_only=repair == REPAIR_NONE,
        )
        result = tool.check(file, repair, _report)
        if result.leaks_fixed or result.corruptions_fixed:
            if not json and not quiet:
                _print_fixed(result)
            again = tool.check(file, REPAIR_NONE, _report)
            again.leaks_fixed = result.leaks_fixed
            again.corruptions_fixed = result.corruptions_fixed
            result = again
        if not quiet:
            if json:
                print(format_json(_as_json(result, named.text, tool.name)))
            else:
                _print_human(result)
    if result.check_errors:
        return _FAILED
    if result.corruptions:
        return _CORRUPT
    return _LEAKING if result.leaks else 0


def _print_fixed(result: CheckResult) -> None:
    print(
        "The following inconsistencies were found and repaired:\n\n"
        f"    {result.leaks_fixed} leaked clusters\n"
        f"    {result.corruptions_fixed} corruptions\n\n"
        "Double checking the fixed image now..."
    )
    sys.stdout.flush()


def _report(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _as_json(result: CheckResult, filename: str, format_: str) -> dict[str, Any]:
    """Return what json shows, in qemu-img's order: no zeroes but of errors."""
    counts = {
        "image-end-offset": result.image_end_offset,
        "compressed-clusters": result.compressed_clusters,
        "total-clusters": result.total_clusters,
        "corruptions": result.corruptions,
        "corruptions-fixed": result.corruptions_fixed,
        "check-errors": result.check_errors,
        "leaks": result.leaks,
        "leaks-fixed": result.leaks_fixed,
        "allocated-clusters": result.allocated_clusters,
        "filename": filename,
        "format": format_,
        "fragmented-clusters": result.fragmented_clusters,
    }
    return {
        name: value for name, value in counts.items() if value or name == "check-errors"
    }


def _print_human(result: CheckResult) -> None:
    if not (result.corruptions or result.leaks or result.check_errors):
        print("No errors were found on the image.")
    if result.corruptions:
        print(
            f"\n{result.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if result.leaks:
        print(
            f"\n{result.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if result.check_errors:
        print(
            f"\n{result.check_errors} internal errors have occurred during the check."
        )
    total, allocated = result.total_clusters, result.allocated_clusters
    if total and allocated:
        print(
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        print(f"Image end offset: {result.image_end_offset}")
