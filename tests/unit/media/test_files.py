"""file: URLs (safety catalogue S9)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.media_support import PARAM, refusal

from sensorium.config import Limits
from sensorium.errors import StartupError
from sensorium.media.loader import MediaLoader
from sensorium.media.source import MediaSource


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "below").mkdir(parents=True)
    (root / "a.png").write_bytes(b"a")
    (root / "below" / "b c.png").write_bytes(b"bc")
    (root / "large.png").write_bytes(bytes(5000))
    (root / "empty.png").touch()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "media-other").mkdir()
    (tmp_path / "media-other" / "a.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret")
    (root / "inner-link.png").symlink_to(root / "a.png")
    (root / "link-out").symlink_to(tmp_path)
    os.mkfifo(root / "fifo")
    return root


async def read(root: Path | None, url: str) -> bytes:
    loader = MediaLoader(Limits(max_image_bytes=4096), local_root=root)
    try:
        return (await loader.fetch(MediaSource("image", PARAM, url=url))).payload
    finally:
        await loader.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "../../x.png",
        "FILE:///etc/passwd",
        "file:/etc/passwd",
        "file://localhost/etc/passwd",
        "file:etc/passwd",
        "file://host/etc/passwd",
    ],
)
async def test_off_by_default(url: str) -> None:
    assert (await refusal(read(None, url))).code == "invalid_image_url"


async def test_regular_files_inside_are_read(root: Path) -> None:
    assert await read(root, f"file://{root}/a.png") == b"a"
    assert await read(root, f"FILE://localhost{root}/below/b%20c.png") == b"bc"
    assert await read(root, f"file:{root}//a.png") == b"a"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret",
        "/below/../a.png",
        "/%2e%2e/secret",
        "/link.png",
        "/inner-link.png",
        "/fifo",
        "/link-out/secret",
        "",
        "/",
        "/below",
        "-other/a.png",
        "/missing.png",
        "/a.png%00.txt",
        "/a.png?x",
        "/a.png#x",
        "/a.png/x",
        "/%ff",
        "\\..\\secret",
    ],
)
async def test_nothing_else_is_read(root: Path, path: str) -> None:
    assert (await refusal(read(root, f"file://{root}{path}"))).code == "invalid_image_url"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file:///proc/self/environ",
        "file://host{root}/a.png",
        "file:a.png",
        "{root}/a.png",
        "file:////etc/passwd",
    ],
)
async def test_paths_outside(root: Path, url: str) -> None:
    assert (await refusal(read(root, url.format(root=root)))).code == "invalid_image_url"


async def test_sizes(root: Path) -> None:
    assert (await refusal(read(root, f"file://{root}/large.png"))).code == "image_file_too_large"
    assert (await refusal(read(root, f"file://{root}/empty.png"))).code == "empty_image_file"


async def test_root_behind_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert await read(tmp_path / "alias", f"file://{tmp_path}/alias/a.png") == b"a"
    assert await read(tmp_path / "alias", f"file://{root}/a.png") == b"a"


def test_root_must_exist(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="allowed-local-media-path"):
        MediaLoader(Limits(), local_root=tmp_path / "missing")
