"""The options of a command line as those of a new image."""

from collections.abc import Mapping, Sequence

from nbdqcow.block.tools import (
    BACKING_FORMATS,
    PREALLOCATIONS,
    Measure,
    OptionValue,
    Secrets,
)
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2.create import (
    CreateOptions,
    CreatePlan,
    plan_create,
)
from nbdqcow.formats.qcow2.encryption_header import new_encryption
from nbdqcow.formats.qcow2.header import COMPAT_VERSIONS, COMPRESSION_TYPES
from nbdqcow.formats.qcow2.measure import measure


def plan_image(values: Mapping[str, OptionValue], secrets: Secrets) -> CreatePlan:
    """Plan a new image. Raises `ImageError`."""
    options = _create_options(values)
    options.check()
    encryption = new_encryption(values, secrets)
    return plan_create(options._replace(encryption=encryption))


def measure_image(
    values: Mapping[str, OptionValue],
    data_length: int,
    bitmaps: Sequence[tuple[str, int]] | None,
) -> Measure:
    """See `FormatTool.measure`."""
    return measure(_create_options(values), values, data_length, bitmaps)


def _create_options(values: Mapping[str, OptionValue]) -> CreateOptions:
    compat = str(values.get("compat", "1.1"))
    if compat not in COMPAT_VERSIONS:
        raise ImageError(f"Parameter 'version' does not accept value '{compat}'")
    choices = {"preallocation": PREALLOCATIONS, "compression_type": COMPRESSION_TYPES}
    for name, allowed in choices.items():
        value = values.get(name)
        if value is not None and value not in allowed:
            raise ImageError(
                f"Parameter '{name.replace('_', '-')}' does not accept value '{value}'"
            )
    backing_file = values.get("backing_file")
    if values.get("backing_fmt", "raw") not in BACKING_FORMATS:
        raise ImageError(
            f"Parameter 'backing-fmt' does not accept value '{values['backing_fmt']}'"
        )
    backing_format = values.get("backing_fmt")
    data_file = values.get("data_file")
    return CreateOptions(
        size=int(values.get("size", 0)),
        version=COMPAT_VERSIONS[compat],
        cluster_size=int(values.get("cluster_size", 65536)),
        backing_file=None if backing_file is None else str(backing_file),
        backing_format=None if backing_format is None else str(backing_format),
        refcount_bits=int(values.get("refcount_bits", 16)),
        lazy_refcounts=bool(values.get("lazy_refcounts", False)),
        preallocation=str(values.get("preallocation", "off")),
        compression_type=str(values.get("compression_type", "zlib")),
        extended_l2=bool(values.get("extended_l2", False)),
        data_file=None if data_file is None else str(data_file),
        data_file_raw=bool(values.get("data_file_raw", False)),
    )
