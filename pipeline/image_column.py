"""The column of encoded images, in the forms in which writers keep it."""

from __future__ import annotations

import pyarrow as pa

IMAGE_FIELD = "bytes"
"""Of the struct<bytes, path> that Hugging Face's `Image` features are."""


def holds_images(kind: pa.DataType) -> bool:
    """Whether `encoded_images` can read a column of this type."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index(IMAGE_FIELD)
        return at >= 0 and _is_binary(kind.field(at).type)
    return _is_binary(kind)


def encoded_images(column: pa.Array) -> pa.Array:
    """The images as binary or large_binary, null where there is none.

    Args:
        column: Of a type that `holds_images`.
    """
    if pa.types.is_struct(column.type):
        # Of the fields `flatten` gives, unlike `field`, those of a null struct are null.
        column = column.flatten()[column.type.get_field_index(IMAGE_FIELD)]
    if pa.types.is_binary_view(column.type):
        return column.cast(pa.large_binary())
    return column


def _is_binary(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in kinds)
