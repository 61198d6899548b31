"""One type for a copied column that the files of a date have in several."""

from __future__ import annotations

import pyarrow as pa

_GROWING = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal128,
    pa.types.is_timestamp,
)
"""Kinds whose wider types hold all values of the narrower ones, but for what `_loses` says."""


def as_stored(kind: pa.DataType) -> pa.DataType:
    """One type for those that Parquet keeps alike."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(as_stored(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, as_stored(field.type)) for field in kind])
    return kind


def without_views(column: pa.Array) -> pa.Array:
    """Text and bytes of a column, or inside it, as large ones: Arrow cannot filter views (26.0).

    Parquet has one type for both. Chunked columns are taken as well.
    """
    kind = _without_views(column.type)
    return column if kind == column.type else column.cast(kind)


def _without_views(kind: pa.DataType) -> pa.DataType:
    """Lists that are views themselves stay as they are: Arrow filters those, and casts none."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_field_without_views(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_field_without_views(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_field_without_views(kind.value_field), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([_field_without_views(field) for field in kind])
    if pa.types.is_map(kind):
        fields = map(_field_without_views, (kind.key_field, kind.item_field))
        return pa.map_(*fields, keys_sorted=kind.keys_sorted)
    return kind


def _field_without_views(field: pa.Field) -> pa.Field:
    return field.with_type(_without_views(field.type))


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The narrowest type that holds all values of both, as stored; None: some would be lost.

    Files of one table differ so where a writer takes types from values: a column without a value
    is null, small numbers are int32 here and int64 there.
    """
    one, other = as_stored(one), as_stored(other)
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_dictionary(one) or pa.types.is_dictionary(other):
        return common_type(_values(one), _values(other))
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = common_type(one.value_type, other.value_type)
        return inner and pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _common_struct(one, other)
    if not any(is_kind(one) and is_kind(other) for is_kind in _GROWING) or _loses(one, other):
        return None
    pair = [pa.schema([("", kind)]) for kind in (one, other)]
    try:
        wider = pa.unify_schemas(pair, promote_options="permissive").field(0).type
    except pa.ArrowException:  # time zones that differ
        return None
    return None if pa.types.is_decimal256(wider) else wider  # which few readers know


def _values(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _common_struct(one: pa.StructType, other: pa.StructType) -> pa.DataType | None:
    if [field.name for field in one] != [field.name for field in other]:
        return None
    kinds = {a.name: common_type(a.type, b.type) for a, b in zip(one, other, strict=True)}
    return None if None in kinds.values() else pa.struct(list(kinds.items()))


def _loses(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether the type that Arrow gives them does not hold all values."""
    if pa.types.is_timestamp(one):  # nanoseconds end in 2262, and 9999-12-31 is a usual date
        return bool((one.unit == "ns") != (other.unit == "ns"))
    # Arrow takes int64 for uint64 and a signed one.
    signed = {pa.types.is_signed_integer(one), pa.types.is_signed_integer(other)}
    return len(signed) == 2 and pa.uint64() in (one, other)
