"""Sizes in bytes: read, written, and read back."""

from __future__ import annotations

import pytest

from sensorium.units import GiB, MiB, decimal_text, parse_size, size_flag, size_text


@pytest.mark.parametrize(
    ("size_bytes", "message", "flag"),
    [
        (0, "0 bytes", "0"),
        (1, "1 bytes", "1"),
        (1024, "1 KiB", "1KiB"),
        (1536, "1.5 KiB", "1.5KiB"),
        (20 * MiB, "20 MiB", "20MiB"),
        (256 * MiB, "256 MiB", "256MiB"),
        (3 * GiB // 2, "1.5 GiB", "1.5GiB"),
        (1024 * GiB, "1 TiB", "1TiB"),
        (MiB + 1, "1 MiB", "1048577"),
        (123456789, "117.7 MiB", "123456789"),
        (-3 * MiB, "-3 MiB", "-3145728"),
    ],
)
def test_sizes_are_rounded_in_messages_and_exact_in_flags(size_bytes: int, message: str, flag: str) -> None:
    assert (size_text(size_bytes), size_flag(size_bytes)) == (message, flag)
    assert size_bytes < 0 or parse_size(flag) == size_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("4GB", 4 * 1000**3),
        ("4g", 4 * 1000**3),
        ("4G", 4 * GiB),
        (" 1.5 mib ", 3 * MiB // 2),
        ("2TiB", 2048 * GiB),
    ],
)
def test_sizes_are_read_with_every_unit(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "MiB", "4 apples", "-1", "1e9", "4GiBs", "1,5MiB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="write 256MiB, 4GB or a number of bytes"):
        parse_size(text)


def test_the_log_s_sizes_are_decimal() -> None:
    sizes = (0, 999, 1000, 1_536_000, 999_400, 2_000_000_000)
    assert [decimal_text(size) for size in sizes] == ["0 B", "999 B", "1.0 kB", "1.5 MB", "999.4 kB", "2.00 GB"]
