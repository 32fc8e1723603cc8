"""Videos in object storage, on a server of ours that speaks enough of S3."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from click.testing import CliRunner
from make_videos import make_video

from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors.remote import absolute, fetched, source_of, url_of
from mmdist_e2e.extractors.search import Video, list_lines, read_list
from mmdist_e2e.store import fast_digest

LISTING = (
    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult '
    'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
    "<IsTruncated>false</IsTruncated>{}</ListBucketResult>"
)
ENTRY = (
    "<Contents><Key>{}</Key><Size>{}</Size><ETag>&quot;0&quot;</ETag>"
    "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass>"
    "</Contents>"
)


class Storage:
    """The files of `root` as S3 buckets (its folders) and as plain HTTP.

    got: name and bytes of each answer. forbidden: names that cannot be read. cut: whether an
    answer that is a whole file ends half-way.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.got, self.cut = root, list[tuple[str, int]](), False
        self.forbidden = set[str]()
        storage = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                storage.answer(self, body=False)

            def do_GET(self) -> None:
                storage.answer(self, body=True)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        parts = urlsplit(request.path)
        path, query = self.root / unquote(parts.path).strip("/"), parse_qs(parts.query)
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            names = [p for p in sorted(path.rglob("*")) if p.is_file()]
            keys = {p.relative_to(path).as_posix(): p.stat().st_size for p in names}
            found = [ENTRY.format(k, size) for k, size in keys.items() if k.startswith(prefix)]
            self.send(request, 200, LISTING.format("".join(found)).encode(), "application/xml")
        elif not path.is_file() or (body and path.name in self.forbidden):
            request.send_error(403 if path.is_file() else 404)
        else:
            content, part = path.read_bytes(), request.headers.get("Range")
            first, last = 0, len(content) - 1
            if part is not None:
                begin, _, end = part.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end or last), last)
            if body:
                self.got.append((path.name, last - first + 1))
            where = f"bytes {first}-{last}/{len(content)}" if part else None
            size = None if body else last - first + 1
            piece = content[first : last + 1] if body else b""
            cut = len(piece) // 2 if self.cut and part is None else None
            self.send(request, 206 if part else 200, piece, "video/mp4", where, size, cut)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        kind: str,
        where: str | None = None,
        size: int | None = None,
        cut: int | None = None,
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content) if size is None else size))
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        request.send_header("ETag", '"0"')
        if where is not None:
            request.send_header("Content-Range", where)
        request.end_headers()
        request.wfile.write(content[:cut])
        if cut is not None:
            request.close_connection = True


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A bucket with three videos, a hidden file and a text; AWS's variables lead to it."""
    s3fs = pytest.importorskip("s3fs", reason="needs the extra s3")
    s3fs.S3FileSystem.clear_instance_cache()  # they know the server of the test before
    videos = tmp_path / "served" / "bucket" / "videos"
    (videos / "sub").mkdir(parents=True)
    make_video(videos / "a.mp4", 30)
    make_video(videos / "sub" / "b c.mp4", 40)
    (videos / "bad.mp4").write_bytes(b"no video" * 999)
    (videos / "._a.mp4").write_bytes(b"macOS")
    (videos / "notes.txt").write_bytes(b"text")
    storage = Storage(tmp_path / "served")
    monkeypatch.setenv("AWS_ENDPOINT_URL", storage.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield storage
    storage._http.shutdown()
    storage._http.server_close()


def extract(*given: object, out: Path, extractor: Path, workers: int = 0) -> tuple[int, str]:
    command = ["extract", *map(str, given), "--out", str(out), "--extractor", str(extractor)]
    command += ["--workers", str(workers)]
    run = CliRunner().invoke(main, command)
    return run.exit_code, run.output


def files_of(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.npz")}


@pytest.mark.slow
def test_a_bucket_gives_the_same_files_as_a_folder(tmp_path, storage, tiny_extractor):
    here, there = tmp_path / "here", tmp_path / "there"
    local = storage.root / "bucket" / "videos"
    assert extract(local, out=here, extractor=tiny_extractor)[0] == 3
    code, output = extract("s3://bucket/videos/", out=there, extractor=tiny_extractor, workers=1)
    assert code == 3
    assert "s3://bucket/videos/bad.mp4 is not a video" in output
    assert files_of(here) == files_of(there)
    assert {*files_of(there)} == {"a.rgb.npz", "sub/b c.rgb.npz"}
    assert not [*(tmp_path / "temporary").rglob("*.mp4")]
    assert "\n".join((there / "failed.txt").read_text().splitlines()) == (
        "# root: s3://bucket/videos\nbad.mp4"
    )

    storage.got.clear()
    again = extract("s3://bucket/videos", out=there, extractor=tiny_extractor)
    assert again[0] == 3
    # Two parts of each file are read (three if it is large); the bad one is fetched again.
    assert sorted(n for n, _ in storage.got) == sorted(
        ["a.mp4", "b c.mp4", "bad.mp4"] * 2 + ["bad.mp4"]
    )
    make_video(local / "a.mp4", 50)
    changed = extract("--list", there / "failed.txt", out=there, extractor=tiny_extractor)
    assert changed[0] == 1
    assert extract("s3://bucket/videos", out=there, extractor=tiny_extractor)[0] == 3
    assert files_of(there)["a.rgb.npz"] != files_of(here)["a.rgb.npz"]


@pytest.mark.slow
def test_one_video_by_http(tmp_path, storage, tiny_extractor):
    url = f"{storage.url}/bucket/videos/a.mp4"
    assert extract(url, out=tmp_path / "out", extractor=tiny_extractor)[0] == 0
    shutil.copy(storage.root / "bucket/videos/a.mp4", tmp_path / "a.mp4")
    assert extract(tmp_path / "a.mp4", out=tmp_path / "here", extractor=tiny_extractor)[0] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "here")


@pytest.mark.slow
def test_a_video_that_is_missing_or_forbidden_fails_alone(tmp_path, storage, tiny_extractor):
    storage.forbidden.add("a.mp4")
    names = ("a.mp4", "none.mp4", "sub")
    urls = [f"s3://bucket/videos/{name}" for name in names]
    code, output = extract(*urls, out=tmp_path / "out", extractor=tiny_extractor)
    assert code == 3
    assert "s3://bucket/videos/a.mp4 cannot be read: PermissionError" in output
    assert "s3://bucket/videos/none.mp4 has no videos" in output
    assert {*files_of(tmp_path / "out")} == {"b c.rgb.npz"}


def test_a_connection_that_is_lost_is_resumed(tmp_path, storage):
    storage.cut = True
    with fetched(Path("s3://bucket/videos/a.mp4")) as path:
        assert path.read_bytes() == (storage.root / "bucket/videos/a.mp4").read_bytes()
    assert not path.exists()


@pytest.mark.parametrize("size", [1, 7, 1 << 20, (1 << 20) + 1, (3 << 20) + 5])
def test_the_digest_of_a_url_is_that_of_the_file(storage, size):
    path = storage.root / "bucket" / "x.bin"
    path.write_bytes(bytes(i * 7 % 251 for i in range(1009)) * (size // 1009 + 1))
    path.write_bytes(path.read_bytes()[:size])
    storage.got.clear()
    assert source_of(Path("s3://bucket/x.bin")) == fast_digest(path)
    assert sum(part for _, part in storage.got) <= 3 << 20


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://b/k.mp4", "s3://b/k.mp4"),
        ("http://127.0.0.1:80/k.mp4", "http://127.0.0.1:80/k.mp4"),
        ("gs:///b/k", "gs://b/k"),
        ("C:/videos/k.mp4", None),
        ("videos/s3:/k.mp4", None),
        ("/s3://k", None),
        ("s3:", None),
        ("s3", None),
    ],
)
def test_which_paths_are_urls(text, url):
    assert url_of(Path(text)) == url
    assert absolute(Path(text)).is_absolute() == (url is None)


def test_a_folder_with_a_name_like_a_scheme_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    (tmp_path / "s3:" / "k.mp4").write_bytes(b"x")
    assert url_of(Path("s3:/k.mp4")) is None


def test_lists_keep_urls_and_ids():
    text = b"s3://b/videos/sub/a.mp4\n# root: s3://b/videos\nsub/a.mp4\nhttps://h/x.mp4\n"
    alone, inside, elsewhere = read_list(text)
    assert alone == (None, Path("s3://b/videos/sub/a.mp4"))
    assert inside == (Path("s3://b/videos"), Path("s3://b/videos/sub/a.mp4"))
    assert elsewhere == (Path("s3://b/videos"), Path("https://h/x.mp4"))  # refused by the search
    lines = list_lines([Video("sub/a", Path("s3://b/videos/sub/a.mp4"))])
    assert lines == "# root: s3://b/videos\nsub/a.mp4\n"


def test_without_the_library_the_message_names_it(tmp_path, tiny_extractor):
    code, output = extract("nowhere://b/a.mp4", out=tmp_path, extractor=tiny_extractor)
    assert code == 1
    assert "nowhere://b/a.mp4 cannot be read" in output
    assert "Traceback" not in output
