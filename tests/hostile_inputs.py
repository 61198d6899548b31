"""Hostile and damaged pictures and Parquet files, made from real ones with a seed."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow.parquet import encryption

Rng = np.random.Generator
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LIE = 0xF0000000
"""Length of a PNG chunk that no file has."""


def encode(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def flip_bits(data: bytes, rng: Rng) -> bytes:
    content = bytearray(data)
    for position in rng.integers(len(content), size=rng.integers(1, 40)):
        content[position] ^= 1 << int(rng.integers(8))
    return bytes(content)


def flip_header_bits(data: bytes, rng: Rng) -> bytes:
    size = min(len(data), int(rng.choice([64, 200, 700])))
    return flip_bits(data[:size], rng) + data[size:]


def zero_block(data: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(len(data)))
    size = min(len(data) - start, int(rng.integers(1, 4096)))
    return data[:start] + bytes(size) + data[start + size :]


def cut_off(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(len(data)))]


def drop_bytes(data: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(len(data)))
    return data[:start] + data[start + int(rng.integers(1, 2000)) :]


def insert_noise(data: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(len(data)))
    return data[:start] + rng.bytes(int(rng.integers(1, 2000))) + data[start:]


def splice(data: bytes, other: bytes, rng: Rng) -> bytes:
    """The head of one and the tail of another."""
    return data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]


def swap_header(data: bytes, other: bytes, rng: Rng) -> bytes:
    size = int(rng.integers(2, 400))
    return other[:size] + data[size:]


def wrong_length(data: bytes, rng: Rng) -> bytes:
    """Another length in one of the first segments of a JPEG, or chunks of a PNG."""
    content = bytearray(data)
    places = []
    if data.startswith(PNG_SIGNATURE):
        position = 8
        while position + 8 <= len(data):
            places.append(position)
            position += 12 + struct.unpack_from(">I", data, position)[0]
        value = int(rng.choice([0, 1, 3, 2**31, LIE, int(rng.integers(2**32))]))
        struct.pack_into(">I", content, int(rng.choice(places)), value)
        return bytes(content)
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        places.append(position + 2)
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    value = int(rng.choice([0, 1, 2, 3, 0xFFFF, int(rng.integers(2**16))]))
    struct.pack_into(">H", content, int(rng.choice(places)), value)
    return bytes(content)


def no_picture(data: bytes, rng: Rng) -> bytes:
    return data[:3] + rng.bytes(int(rng.integers(0, 5000)))


MUTATIONS: tuple[Callable[[bytes, Rng], bytes], ...] = (
    flip_bits,
    flip_header_bits,
    zero_block,
    cut_off,
    drop_bytes,
    insert_noise,
    wrong_length,
    no_picture,
)


def mutant(originals: list[bytes], rng: Rng) -> bytes:
    """One of the pictures, damaged in one way or two."""
    data, other = (originals[index] for index in rng.integers(len(originals), size=2))
    kind = int(rng.integers(len(MUTATIONS) + 2))
    if kind == len(MUTATIONS):
        return splice(data, other, rng)
    if kind > len(MUTATIONS):
        return swap_header(data, other, rng)
    damaged = MUTATIONS[kind](data, rng)
    return flip_bits(damaged, rng) if damaged and rng.random() < 0.2 else damaged


def png_chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2, interlaced: int = 0
) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return PNG_SIGNATURE + png_chunk(b"IHDR", head) + b"".join(chunks) + png_chunk(b"IEND", b"")


def zeros(num_bytes: int) -> bytes:
    """Deflated: a thousandth of them."""
    packer, pieces = zlib.compressobj(6), []
    for start in range(0, num_bytes, 1 << 20):
        pieces.append(packer.compress(bytes(min(1 << 20, num_bytes - start))))
    return b"".join((*pieces, packer.flush()))


def black_png(width: int, height: int, depth: int = 1, colour: int = 0, **options: int) -> bytes:
    """All its pixels are there."""
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row_bytes = 1 + (width * depth * samples + 7) // 8
    data = png_chunk(b"IDAT", zeros(height * row_bytes))
    return png(width, height, data, depth=depth, colour=colour, **options)


def resized_jpeg(jpeg: bytes, width: int, height: int) -> bytes:
    """The header says another size than the pixels have."""
    content = bytearray(jpeg)
    marker = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    struct.pack_into(">HH", content, marker + 5, height, width)
    return bytes(content)


def many_scans(side: int, num_scans: int) -> bytes:
    """A progressive JPEG, the last scan of which comes again and again."""
    grey = encode(Image.new("L", (side, side), 90), progressive=True)
    last = grey.rindex(b"\xff\xda")
    return grey[:-2] + grey[last:-2] * num_scans + grey[-2:]


def jpeg_with(jpeg: bytes, *segments: bytes) -> bytes:
    """Application segments behind the first marker."""
    packed = [b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data for data in segments]
    return jpeg[:2] + b"".join(packed) + jpeg[2:]


def exif(*entries: tuple[int, int, int, int], next_offset: int = 0) -> bytes:
    """An EXIF segment with raw entries: tag, type, count, value."""
    packed = b"".join(struct.pack(">HHII", *entry) for entry in entries)
    head = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries))
    return head + packed + struct.pack(">I", next_offset)


def bombs(jpeg: bytes, tiny_png: bytes) -> dict[str, bytes]:
    """Small files that take much time or memory in decoders, by name."""
    idat = tiny_png[33:-12]
    inside = {
        "length_of_palette": png(7, 7, png_chunk(b"PLTE", b"abc", LIE)),
        "length_of_exif": png(7, 7, png_chunk(b"eXIf", b"MM\0*", LIE)),
        "profile": png(8, 8, png_chunk(b"iCCP", b"x\0\0" + zeros(50 << 20)), idat),
        "text": png(8, 8, *[png_chunk(b"zTXt", b"x\0\0" + zeros(25 << 20))] * 4, idat),
        "many_chunks": png(8, 8, *[png_chunk(b"tEXt", b"a\0b")] * 100_000, idat),
    }
    pixels = {
        "square_of_bits": png(30_000, 30_000, idat, depth=1, colour=0),
        "square_of_bits_below_the_cap": black_png(6_300, 6_300),
        "interlaced": black_png(6_000, 6_000, interlaced=1),
        "deep": black_png(2_000, 2_000, depth=16, colour=6),
        "wide": black_png(39_999_999, 1),
        "tall": black_png(1, 1_000_000),
        "data_beyond_the_pixels": png(8, 8, png_chunk(b"IDAT", zeros(60 << 20))),
        "no_pixels": png(0, 0),
        "most_pixels": png(2**31 - 1, 2**31 - 1, idat),
    }
    jpegs = {
        "jpeg_20000": resized_jpeg(jpeg, 20_000, 20_000),
        "jpeg_6300": resized_jpeg(jpeg, 6_300, 6_300),
        "jpeg_65535": resized_jpeg(jpeg, 65_535, 65_535),
        "jpeg_line": resized_jpeg(jpeg, 65_535, 1),
        "jpeg_0": resized_jpeg(jpeg, 0, 0),
        "scans": many_scans(4_000, 2_000),
        "scans_below_the_cap": many_scans(3_000, 90),
        "exif_segments": jpeg_with(jpeg, *[exif() + bytes(60_000)] * 150),
        "exif_count": jpeg_with(jpeg, exif((0x0112, 3, 2**32 - 1, 6 << 16))),
        "exif_loop": jpeg_with(jpeg, exif((0x8769, 4, 1, 8), next_offset=8)),
        "exif_turned": jpeg_with(jpeg, exif((0x0112, 3, 1, 6 << 16))),
        "comment": jpeg[:2] + b"\xff\xfe\xff\xff" * 2_000 + jpeg[2:],
        "empty_segments": jpeg[:2] + b"\xff\xfe\0\2" * 400_000 + jpeg[2:],
        "fill_bytes": jpeg[:2] + b"\xff" * 2_000_000 + jpeg[2:],
    }
    return inside | pixels | jpegs


def strangers(picture: Image.Image) -> dict[str, bytes | None]:
    """What is no JPEG and no PNG, by name."""
    formats = ("GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000")
    return {
        **{kind: encode(picture, kind) for kind in formats},
        "null": None,
        "empty": b"",
        "text": b"<!DOCTYPE html><title>403 Forbidden</title>",
        "zeros": bytes(10_000),
        "video": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(5_000),
        "avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(500),
        "matroska": b"\x1aE\xdf\xa3" + bytes(100),
        "zip": b"PK\3\4" + bytes(100),
        "pdf": b"%PDF-1.7\n",
        "program": b"\x7fELF\2\1\1" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
    }


def varint(value: int) -> bytes:
    """Of Thrift's compact protocol, zigzag."""
    rest, out = value << 1, bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes((*out, rest))


def footer_of(parquet: bytes) -> bytes:
    return parquet[-8 - int.from_bytes(parquet[-8:-4], "little") : -8]


def with_footer(parquet: bytes, footer: bytes) -> bytes:
    pages = parquet[: -8 - int.from_bytes(parquet[-8:-4], "little")]
    return pages + footer + struct.pack("<I", len(footer)) + b"PAR1"


def with_promise(parquet: bytes, found: int, promised: int) -> bytes:
    """Whatever count in the footer says `found` says `promised`.

    A count is a 64-bit field that follows the field before it (header 0x16): the rows of the file,
    of a row group, and the values of a column chunk.
    """
    footer = footer_of(parquet)
    return with_footer(parquet, footer.replace(b"\x16" + varint(found), b"\x16" + varint(promised)))


def parquet_bytes(table: pa.Table, rows_per_group: int, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    defaults = {"write_page_checksum": True, "compression": "zstd"}
    pq.write_table(table, sink, row_group_size=rows_per_group, **defaults | options)
    return bytes(sink.getvalue())


def with_encrypted(table: pa.Table, rows_per_group: int, *names: str) -> bytes:
    """A Parquet file of which some columns are encrypted, and the footer is not."""

    class Kms(encryption.KmsClient):
        def wrap_key(self, key: bytes, _: str) -> bytes:
            return base64.b64encode(key)

    settings = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"k": list(names)}, plaintext_footer=True
    )
    keys = encryption.CryptoFactory(lambda _: Kms()).file_encryption_properties(
        encryption.KmsConnectionConfig(), settings
    )
    return parquet_bytes(table, rows_per_group, encryption_properties=keys)


def mutant_parquet(data: bytes, other: bytes, rng: Rng) -> bytes:
    """A Parquet file, damaged in its pages or its footer."""
    footer_size = len(footer_of(data)) + 8
    pages, footer = data[:-footer_size], data[-footer_size:]
    kind = int(rng.integers(8))
    if kind == 0:
        return cut_off(data, rng)
    if kind == 1:
        return pages + flip_bits(footer, rng)
    if kind == 2:
        position = int(rng.integers(len(footer) - 8))
        changed = bytes([int(rng.integers(256))])
        return pages + footer[:position] + changed + footer[position + 1 :]
    if kind == 3:
        return pages[:4] + zero_block(pages[4:], rng) + footer
    if kind == 4:
        return splice(pages, other, rng) + footer
    if kind == 5:
        return pages + footer[:-8] + struct.pack("<I", int(rng.integers(2**32))) + b"PAR1"
    return pages[:4] + flip_bits(pages[4:], rng) + footer
