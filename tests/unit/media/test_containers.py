"""Containers and playlists that name other files or URLs get nowhere (safety catalogue S12; codecs: S16)."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import av
import pytest
from support.clips import replaced, sound, tone, video
from support.media_support import Canary, load, refusal
from support.pictures import data_url

from sensorium.media.container import opened
from sensorium.media.loader import MediaLoader
from sensorium.media.source import Refusal


def playlists(canary: str, secret: str) -> dict[str, bytes]:
    """Everything that ffmpeg would follow, and disguises of it."""
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{canary}\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile '{secret}'\nfile '{canary}'\n".encode()
    dash = (
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="0" mimeType="video/mp4"><BaseURL>{canary}</BaseURL></Representation></AdaptationSet>'
        f"</Period></MPD>"
    ).encode()
    sdp = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    return {
        "hls": hls,
        "hls in ftyp": b"\0\0\0\x18ftypisom" + bytes(12) + hls,
        "hls in ebml": b"\x1aE\xdf\xa3" + hls,
        "hls in avi": b"RIFF\xff\0\0\0AVI " + hls,
        "hls behind id3": b"ID3\4\0\0\0\0\0\0" + hls,
        "hls in ogg": b"OggS" + hls,
        "hls in wav": b"RIFF\xff\0\0\0WAVE" + hls,
        "hls in flac": b"fLaC" + hls,
        "concat": concat,
        "concat in mp4": b"\0\0\0\x08free" + concat,
        "dash": dash,
        "sdp": sdp,
        "imf": dash.replace(b"MPD", b"AssetMap"),
        "subfile": f"subfile,,start,0,end,9,,:{secret}".encode(),
        "m3u": canary.encode(),
        "asx": f'<asx><entry><ref href="{canary}"/></entry></asx>'.encode(),
        "sub": f"{{1}}{{2}}{secret}".encode(),
        "rtsp": f"[Reference]\nRef1={canary}\n".encode(),
    }


def outside_mp4(target: bytes, kind: bytes = b"url ") -> bytes:
    """An MP4 whose frames are said to lie in another file (a data reference without the flag that says "here")."""
    entry = struct.pack(">I4sI", 12 + len(target) + 1, kind, 0) + target + b"\0"
    reference = struct.pack(">II", 0, 1) + entry
    return replaced(video(), [b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"], lambda body: reference)


def alias(path: bytes) -> bytes:
    """QuickTime's `alis` record, with the absolute path that ffmpeg would open."""
    path += bytes(len(path) % 2)
    return bytes(10 + 28 + 12 + 64 + 16 + 4 + 16) + struct.pack(">HH", 2, len(path)) + path + b"\xff\xff\0\0"


@pytest.mark.parametrize("kind", ["video", "audio"])
async def test_playlists_are_refused_and_nothing_is_opened(
    kind: str, canary: Canary, tmp_path: Path, loader: MediaLoader
) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(video())
    for name, payload in playlists(f"http://127.0.0.1:{canary.port}/a.ts", str(secret)).items():
        error = await refusal(load(loader, data_url(payload, f"{kind}/mp4"), kind))  # type: ignore[arg-type]
        assert error.code in (f"unsupported_{kind}_media_type", f"{kind}_parse_error"), name
        if not name.startswith(("hls in", "hls behind", "concat in")):
            assert error.code == f"unsupported_{kind}_media_type", name
    assert canary.connections == 0


@pytest.mark.parametrize("make", [outside_mp4, lambda target: outside_mp4(alias(target), b"alis")])
async def test_references_out_of_an_mp4_are_not_followed(
    make: object, canary: Canary, tmp_path: Path, loader: MediaLoader
) -> None:
    """The frames of another file never come out, even though they lie at the very same offsets."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(video())
    for target in (f"http://127.0.0.1:{canary.port}/a.mp4", f"file://{secret}", str(secret)):
        payload = make(target.encode())  # type: ignore[operator]
        try:
            item = await load(loader, data_url(payload, "video/mp4"), "video")
        except Exception as error:
            assert getattr(error, "code", "") in ("video_parse_error", "unsupported_video_media_type")
        else:
            assert item.data.shape[0] == 30  # its own bytes
    assert canary.connections == 0


@pytest.mark.parametrize("name", ["hls", "dash", "concat", "sdp"])
def test_each_lock_holds_alone(name: str, canary: Canary, tmp_path: Path) -> None:
    """In a process that is not locked in, with the very demuxer that follows references forced."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(video())
    payload = playlists(f"http://127.0.0.1:{canary.port}/a.ts", str(secret))[name]
    opens: list[str] = []
    sys.addaudithook(lambda event, arguments: opens.append(str(arguments[0])) if event == "open" else None)
    with pytest.raises(Refusal) as caught, opened(payload, "video", name) as (container, stream):  # type: ignore[arg-type]
        list(container.decode(stream))
    assert caught.value.problem in ("parse", "type")
    assert not any("secret" in path for path in opens)
    assert canary.connections == 0


async def test_rare_codecs_are_refused(loader: MediaLoader) -> None:
    """S16: JPEG 2000 and others in an ordinary container."""
    for codec, container, pixels in (
        ("jpeg2000", "mp4", "yuv420p"),
        ("jpeg2000", "matroska", "yuv420p"),
        ("msmpeg4v3", "avi", "yuv420p"),
        ("ffv1", "matroska", "yuv420p"),
        ("png", "mov", "rgb24"),
    ):
        payload = video(codec, container, pixel_format=pixels, frames=3)
        error = await refusal(load(loader, data_url(payload, "video/mp4"), "video"))
        assert error.code == "unsupported_video_media_type"
    ac3 = sound(tone(1, 48000), 48000, "ac3", "matroska", "fltp")
    assert (await refusal(load(loader, data_url(ac3, "audio/webm"), "audio"))).code == "unsupported_audio_media_type"


async def test_a_container_without_the_wanted_stream(loader: MediaLoader) -> None:
    mp4 = sound(tone(1, 16000), 16000, "aac", "mp4", "fltp")
    assert (await refusal(load(loader, data_url(mp4, "video/mp4"), "video"))).code == "unsupported_video_media_type"
    assert (await refusal(load(loader, data_url(video(), "video/mp4"), "audio"))).code == "unsupported_audio_media_type"


def test_nothing_is_imported_after_the_door_is_closed(tmp_path: Path) -> None:
    """PyAV and soxr import all they need at the start."""
    (tmp_path / "v").write_bytes(video(turn=90))
    (tmp_path / "a").write_bytes(sound(tone(1, 44100), 44100, "aac", "mp4", "fltp"))
    script = (
        "import sys\nfrom pathlib import Path\nfrom sensorium.media.decoders import decoders_for\n"
        "from sensorium.media.source import Refusal\n"
        "decoders, folder = decoders_for('stream'), Path(sys.argv[1])\n"
        "video, audio = (folder / 'v').read_bytes(), (folder / 'a').read_bytes()\n"
        "before = set(sys.modules)\n"
        "job = dict(demuxer='mov', max_side=99, max_frame_pixels=9999, max_frames=9, max_pixels=9999,"
        " sampling={}, sample_rate=16000, max_seconds=9)\n"
        "for op, payload in (('video_info', video), ('video', video), ('audio_info', audio), ('audio', audio),"
        " ('audio', video), ('video', audio), ('video', video[:900])):\n"
        "    try: print(op, sum(piece.size for piece in decoders[op](payload, job).pieces))\n"
        "    except Refusal as refused: print(op, refused.problem)\n"
        "print([m for m in ('httpx', 'ssl', 'asyncio', 'torch', 'PIL.Image') if m in sys.modules])\n"
        "print(set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "set()"], done.stdout


def test_playlist_demuxers_exist_here() -> None:
    """Else the tests above would prove nothing."""
    assert {"hls", "dash", "concat", "sdp"} <= av.formats_available
