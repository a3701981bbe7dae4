"""collect: snapshots of folders, files, git repositories, pages and sitemaps."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages import collect
from stages.collect import LocalSource, Params, RemoteSource, file_name
from stages.params import read_section
from stages.program import BadInput, BadParams
from stages.records import Source, content_id, read_records


def local(path: object) -> Params:
    return Params(sources={"docs": LocalSource(path=str(path))}, remotes={})


def remote(**where: str) -> Params:
    return Params(sources={}, remotes={"docs": RemoteSource(**where)})


def collected(out: Path) -> dict[str, str]:
    """Path -> text of what lies in the snapshot, after checking that the manifest says the same."""
    texts = {
        file.relative_to(out / "files").as_posix(): file.read_text() for file in (out / "files").rglob("*") if file.is_file()
    }
    sources = read_records(out / "manifest.jsonl", Source)
    assert {source.path: source.sha256 for source in sources} == {
        path: hashlib.sha256(text.encode()).hexdigest() for path, text in texts.items()
    }
    assert all(source.id == content_id("docs", source.path) for source in sources)
    return texts


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "guide").mkdir(parents=True)
    (folder / "index.md").write_text("# Start\n")
    (folder / "guide" / "setup.md").write_text("# Set up\n")
    return folder


def test_a_folder_is_copied_with_a_manifest_and_one_closing_line(
    docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (docs / "big.txt").write_text("x" * 2985)  # with 8 and 9 bytes beside it: 3002
    collect.main("docs", tmp_path / "out", collect=local(docs))
    assert sorted(collected(tmp_path / "out")) == ["big.txt", "guide/setup.md", "index.md"]
    assert {source.revision for source in read_records(tmp_path / "out" / "manifest.jsonl", Source)} == {""}
    assert capsys.readouterr().out == "collect docs: 3 files, 3 kB\n"


def test_two_runs_give_the_same_bytes_and_an_old_file_does_not_stay(docs: Path, tmp_path: Path) -> None:
    collect.main("docs", tmp_path / "out", collect=local(docs))
    first = (tmp_path / "out" / "manifest.jsonl").read_bytes()
    collect.main("docs", tmp_path / "out", collect=local(docs))
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == first
    (docs / "index.md").unlink()
    collect.main("docs", tmp_path / "out", collect=local(docs))
    assert collected(tmp_path / "out") == {"guide/setup.md": "# Set up\n"}


def test_a_single_file_is_a_source_too(docs: Path, tmp_path: Path) -> None:
    collect.main("docs", tmp_path / "out", collect=local(docs / "index.md"))
    assert collected(tmp_path / "out") == {"index.md": "# Start\n"}


def test_excluded_files_stay_out_and_a_pattern_that_matches_none_is_told(
    docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (docs / "plot.png").write_bytes(b"PNG")
    (docs / "guide" / "deep").mkdir()
    (docs / "guide" / "deep" / "more.md").write_text("# More\n")
    excluded = Params(sources={"docs": LocalSource(path=str(docs), exclude=("guide/*", "*.png", "drafts/*"))}, remotes={})
    collect.main("docs", tmp_path / "out", collect=excluded)
    assert collected(tmp_path / "out") == {"index.md": "# Start\n"}
    assert capsys.readouterr().out == "collect docs: exclude: 'drafts/*' matches no file\ncollect docs: 1 files, 0 kB\n"


def test_what_is_not_a_regular_file_inside_the_source_is_reported_and_never_opened(
    docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.md").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.md").write_text("secret")
    (docs / "out.md").symlink_to(tmp_path / "secret.md")
    (docs / "folder").symlink_to(tmp_path / "elsewhere")
    (docs / "loop").symlink_to(docs)
    (docs / "gone.md").symlink_to("nowhere.md")
    (docs / "self.md").symlink_to("self.md")
    (docs / "again.md").symlink_to("guide/setup.md")
    (docs / "key.md").symlink_to(".git/config")
    os.mkfifo(docs / "pipe.md")  # opening it would wait for ever
    (docs / ".git").mkdir()
    (docs / ".git" / "config").write_text("token")
    (docs / ".hidden.md").write_text("hidden")
    collect.main("docs", tmp_path / "out", collect=local(docs))
    assert collected(tmp_path / "out") == {"index.md": "# Start\n", "guide/setup.md": "# Set up\n", "again.md": "# Set up\n"}
    assert capsys.readouterr().out.splitlines() == [
        "collect docs: folder: a link that leaves the source; skipped",
        "collect docs: gone.md: a link to nothing; skipped",
        "collect docs: key.md: a link to a hidden file; skipped",
        "collect docs: loop: a link to something other than a file; skipped",
        "collect docs: out.md: a link that leaves the source; skipped",
        "collect docs: pipe.md: not a regular file; skipped",
        "collect docs: self.md: a link to nothing; skipped",
        "collect docs: 3 files, 0 kB, 7 skipped",
    ]


def test_a_name_that_is_not_text_is_skipped(docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(os.fsdecode(os.fsencode(docs) + b"/caf\xe9.md")).write_text("x")
    collect.main("docs", tmp_path / "out", collect=local(docs))
    assert len(collected(tmp_path / "out")) == 2
    assert "caf\\udce9.md: its name is not UTF-8; skipped" in capsys.readouterr().out


def test_an_empty_folder_is_an_error_and_the_old_snapshot_stays(docs: Path, tmp_path: Path) -> None:
    collect.main("docs", tmp_path / "out", collect=local(docs))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no regular file"):
        collect.main("docs", tmp_path / "out", collect=local(tmp_path / "empty"))
    assert len(collected(tmp_path / "out")) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["docs", "empty", "out"]


def test_a_missing_path_says_which_setting_to_change(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere: no such file or folder; set collect\.sources\.docs\.path"):
        collect.main("docs", tmp_path / "out", collect=local(tmp_path / "nowhere"))


def test_a_source_that_holds_the_output_is_refused(docs: Path) -> None:
    with pytest.raises(BadInput, match="where the copy goes"):
        collect.main("docs", docs / "raw" / "docs", collect=local(docs))


def test_an_unknown_name_lists_the_known_ones(docs: Path, tmp_path: Path) -> None:
    with pytest.raises(BadParams, match=r"no source 'doc'\. Known: docs"):
        collect.main("doc", tmp_path / "out", collect=local(docs))


@pytest.mark.parametrize("name", ["../docs", "a/b", ".", "..", "-x", "a b", ""])
def test_a_name_that_is_no_simple_name_is_refused(name: str, docs: Path, tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="letters, digits"):
        collect.main(name, tmp_path / "out", collect=Params(sources={name: LocalSource(path=str(docs))}, remotes={}))


@pytest.mark.parametrize(
    ("remote_yaml", "message"),
    [
        ("{}", "exactly one of git, url and sitemap"),
        ("{url: 'http://a', sitemap: 'http://a'}", "exactly one of git, url and sitemap"),
        ("{git: a}", "git and revision go together"),
        ("{git: a, revision: main, path: ../b}", "path must lie inside"),
        ("{git: a, revision: --upload-pack=x}", "must not start with '-'"),
        ("{url: 'http://a', path: b}", "path and exclude go with git only"),
        ("{url: 'http://a', exclude: ['*.png']}", "path and exclude go with git only"),
    ],
)
def test_a_remote_is_exactly_one_of_three_kinds(remote_yaml: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(f"collect:\n  sources: {{}}\n  remotes:\n    docs: {remote_yaml}\n")
    with pytest.raises(BadParams, match=message):
        read_section("collect", Params, tmp_path / "params.yaml")


def test_a_licence_may_be_stated_for_any_source_and_changes_no_snapshot(docs: Path, tmp_path: Path) -> None:
    sources = {"docs": {"path": str(docs), "license": "MIT"}}
    remotes = {"site": {"url": "http://a", "license": "CC-BY-4.0"}}
    text = json.dumps({"collect": {"sources": sources, "remotes": remotes}})
    (tmp_path / "params.yaml").write_text(text)
    params = read_section("collect", Params, tmp_path / "params.yaml")
    assert (params.sources["docs"].license, params.remotes["site"].license) == ("MIT", "CC-BY-4.0")
    collect.main("docs", tmp_path / "out", collect=params)
    collect.main("docs", tmp_path / "unstated", collect=local(docs))
    assert local(docs).sources["docs"].license == ""
    assert (tmp_path / "out/manifest.jsonl").read_bytes() == (tmp_path / "unstated/manifest.jsonl").read_bytes()


def git(*arguments: str, cwd: Path) -> str:
    quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "PATH": os.environ["PATH"]}
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=cwd, env=quiet, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(docs: Path, tmp_path: Path) -> tuple[Path, str]:
    """A bare repository and its first commit; the second one changes docs/index.md."""
    work = tmp_path / "work"
    work.mkdir()
    git("init", "--quiet", cwd=work)
    docs.rename(work / "docs")
    (work / "code.py").write_text("print()\n")
    (work / "leak").symlink_to(tmp_path)
    git("add", "--all", cwd=work)
    git("commit", "--quiet", "--message", "first", cwd=work)
    first = git("rev-parse", "HEAD", cwd=work)
    (work / "docs" / "index.md").write_text("# Second\n")
    git("commit", "--quiet", "--all", "--message", "second", cwd=work)
    git("tag", "v2", cwd=work)
    git("clone", "--quiet", "--bare", str(work), str(tmp_path / "bare.git"), cwd=tmp_path)
    return tmp_path / "bare.git", first


def test_a_git_repository_is_read_at_a_commit_and_only_below_its_path(repository: tuple[Path, str], tmp_path: Path) -> None:
    bare, first = repository
    collect.main("docs", tmp_path / "out", collect=remote(git=str(bare), revision=first[:12], path="docs"))
    assert collected(tmp_path / "out") == {"index.md": "# Start\n", "guide/setup.md": "# Set up\n"}
    assert {source.revision for source in read_records(tmp_path / "out" / "manifest.jsonl", Source)} == {first}


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_a_branch_or_tag_is_resolved_to_its_commit(revision: str, repository: tuple[Path, str], tmp_path: Path) -> None:
    bare, first = repository
    collect.main("docs", tmp_path / "out", collect=remote(git=bare.as_uri(), revision=revision, path="docs/index.md"))
    assert collected(tmp_path / "out") == {"index.md": "# Second\n"}
    (source,) = read_records(tmp_path / "out" / "manifest.jsonl", Source)
    assert source.revision == git("rev-parse", "v2", cwd=bare) != first


def test_a_repository_whose_path_is_a_link_out_of_it_is_refused(repository: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="leak is a link that leaves the repository"):
        collect.main("docs", tmp_path / "out", collect=remote(git=str(repository[0]), revision="main", path="leak"))


@pytest.mark.parametrize(
    "change", [{"revision": "v9"}, {"path": "nowhere"}, {"git": "/nowhere.git"}, {"git": "--help"}, {"git": "ext::sh -c x"}]
)
def test_what_git_cannot_find_is_told_in_one_line(change: dict[str, str], repository: tuple[Path, str], tmp_path: Path) -> None:
    where = {"git": str(repository[0]), "revision": "main", "path": "docs"} | change
    with pytest.raises(BadInput, match=r"^collect\.remotes\.docs: git said .+; check the address") as error:
        collect.main("docs", tmp_path / "out", collect=remote(**where))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


class Site(http.server.BaseHTTPRequestHandler):
    """Serves a dict: path -> (status, headers, body)."""

    def __init__(self, pages: dict[str, tuple[int, dict[str, str], bytes]], asked: list[str], *rest: object):
        self.pages, self.asked = pages, asked
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, headers, body = self.pages.get(self.path, (404, {}, b"no"))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def site(pages: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, list[str]]]:
    """The address of a server for `pages`, and the paths it is asked for."""
    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, pages, asked)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


HTML = {"Content-Type": "text/html; charset=utf-8"}


def sitemap(*addresses: str, kind: str = "urlset") -> bytes:
    entry = {"urlset": "url", "sitemapindex": "sitemap"}[kind]
    locs = "".join(f"<{entry}><loc> {address} </loc></{entry}>" for address in addresses)
    return f'<?xml version="1.0"?><{kind} xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{locs}</{kind}>'.encode()


def test_a_page_is_fetched_through_a_redirect_and_named_by_its_content_type(tmp_path: Path) -> None:
    with site({"/a": (302, {"Location": "/guide/"}, b""), "/guide/": (200, HTML, b"<h1>Hi</h1>")}) as (address, _):
        collect.main("docs", tmp_path / "out", collect=remote(url=f"{address}/a"))
    assert collected(tmp_path / "out") == {"a.html": "<h1>Hi</h1>"}
    (source,) = read_records(tmp_path / "out" / "manifest.jsonl", Source)
    assert source.revision == f"{address}/a"


@pytest.mark.parametrize(
    ("url", "content_type", "name"),
    [
        ("https://a.org", "text/html", "index.html"),
        ("https://a.org/x/", "text/html", "x/index.html"),
        ("https://a.org/x/y.php", "text/html", "x/y.html"),
        ("https://a.org/v1.2", "text/html", "v1.2.html"),
        ("https://a.org/x.pdf", "application/pdf", "x.pdf"),
        ("https://a.org/raw/README.rst", "text/plain", "raw/README.rst"),
        ("https://a.org/notes", "text/plain", "notes.txt"),
        ("https://a.org/../%2e%2e/.ssh/a%00b", "text/markdown", "ssh/a-b.md"),
        ("https://a.org/x?v=2", "text/html", f"x-{content_id('v=2')[:8]}.html"),
    ],
)
def test_a_file_is_named_after_the_address(url: str, content_type: str, name: str) -> None:
    assert file_name(url, content_type) == name


@pytest.mark.parametrize(
    ("path", "message"),
    [("/gone", "HTTP 404"), ("/loop", "more than 5 redirects"), ("/file", "not an http"), ("/huge", "larger than")],
)
def test_a_page_that_cannot_be_had_is_an_error(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MAX_PAGE_BYTES", 1000)
    pages = {
        "/loop": (302, {"Location": "/loop"}, b""),
        "/file": (302, {"Location": "file:///etc/hostname"}, b""),
        "/huge": (200, {"Content-Encoding": "gzip", **HTML}, gzip.compress(b"x" * 5000)),  # 40 bytes on the wire
    }
    with site(pages) as (address, _), pytest.raises(BadInput, match=message):
        collect.main("docs", tmp_path / "out", collect=remote(url=address + path))
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no page could be fetched"):
        collect.main("docs", tmp_path / "out", collect=remote(url="http://127.0.0.1:9/x"))


def test_a_sitemap_gives_its_pages_and_never_leaves_its_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages: dict[str, tuple[int, dict[str, str], bytes]] = {
        "/a": (200, HTML, b"A"),
        "/b/": (200, HTML, b"B"),
        "/gone": (404, {}, b""),
    }
    with (
        site({"/secret": (200, HTML, b"secret"), "/x": (200, HTML, b"secret")}) as (other, asked_of_other),
        site(pages) as (address, asked),
    ):
        part = sitemap(*[address + path for path in ("/a", "/b/", "/gone", "/away")], f"{other}/secret", "file:///etc/hostname")
        pages["/away"] = (302, {"Location": f"{other}/x"}, b"")
        pages["/part.xml.gz"] = (200, {"Content-Type": "application/gzip"}, gzip.compress(part))
        pages["/sitemap.xml"] = (200, {}, sitemap(f"{address}/part.xml.gz", f"{address}/a-missing-part.xml", kind="sitemapindex"))
        collect.main("docs", tmp_path / "out", collect=remote(sitemap=f"{address}/sitemap.xml"))
    assert collected(tmp_path / "out") == {"a.html": "A", "b/index.html": "B"}
    assert asked_of_other == []
    assert asked == ["/sitemap.xml", "/a-missing-part.xml", "/part.xml.gz", "/a", "/away", "/b/", "/gone"]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("; skipped") for line in lines) == 5
    assert lines[-1] == "collect docs: 2 files, 0 kB, 5 skipped"


def test_a_sitemap_that_defines_entities_is_refused(tmp_path: Path) -> None:
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><urlset><url><loc>&b;</loc></url></urlset>'
    with site({"/sitemap.xml": (200, {}, bomb)}) as (address, _), pytest.raises(BadInput, match="EntitiesForbidden"):
        collect.main("docs", tmp_path / "out", collect=remote(sitemap=f"{address}/sitemap.xml"))


def test_a_login_in_an_address_is_sent_but_not_recorded(tmp_path: Path) -> None:
    with site({"/a": (200, HTML, b"A")}) as (address, _):
        collect.main("docs", tmp_path / "out", collect=remote(url=address.replace("//", "//me:secret@") + "/a"))
    assert b"secret" not in (tmp_path / "out" / "manifest.jsonl").read_bytes()
    assert collected(tmp_path / "out") == {"a.html": "A"}


def test_the_command_reads_params_yaml_and_fails_in_one_line(docs: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("collect:\n  sources:\n    docs:\n      path: docs\n  remotes: {}\n")

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(Path(collect.__file__).parents[1])}
        line = [sys.executable, "-m", "stages.collect", *arguments]
        return subprocess.run(line, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = command("docs", "data/raw/docs")
    assert (done.returncode, done.stdout, done.stderr) == (0, "collect docs: 2 files, 0 kB\n", "")
    failed = command("doc", "data/raw/doc")
    assert (failed.returncode, failed.stderr) == (1, "collect: params.yaml: collect has no source 'doc'. Known: docs\n")
