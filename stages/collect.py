"""One source of params.yaml -> a folder with files/ (a snapshot of its regular files) and manifest.jsonl (a Source each).

Costs one read of each file, or one clone or download. Hidden files are left out; links that leave the source, pipes and
devices are never opened. A git repository is read at one commit; pages of a sitemap stay on the sitemap's host.
"""

import contextlib
import fnmatch
import gzip
import hashlib
import io
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import msgspec

from stages.files import new_folder
from stages.program import BadInput, BadParams, progress, run, say
from stages.records import Source, content_id, write_records

MAX_PAGE_BYTES = 64_000_000
MAX_REDIRECTS = 5
HTTP_TIMEOUT_S = 30
GIT_TIMEOUT_S = 900
SUFFIX_OF_CONTENT_TYPE = {
    "application/pdf": ".pdf",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": ".pptx",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ".docx",
    "application/x-ipynb+json": ".ipynb",
    "application/xhtml+xml": ".html",
    "text/csv": ".csv",
    "text/html": ".html",
    "text/markdown": ".md",
    "text/x-rst": ".rst",
}


class LocalSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A folder or a file on this machine. `license`: an SPDX identifier or words, for the dataset card; the owner's word for it.

    `exclude`: patterns of paths below `path` that stay out, as "drafts/*" or "*.png"; "*" also stands for slashes.
    """

    path: str
    license: str = ""
    exclude: tuple[str, ...] = ()


class RemoteSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A git repository at a revision (`path`: the folder or file in it), one page, or the pages of a sitemap. `license`, `exclude`: as above."""

    git: str = ""
    revision: str = ""
    path: str = ""
    url: str = ""
    sitemap: str = ""
    license: str = ""
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if sum(map(bool, (self.git, self.url, self.sitemap))) != 1:
            raise ValueError("expected exactly one of git, url and sitemap")
        if bool(self.git) != bool(self.revision):
            raise ValueError("git and revision go together: name a commit, tag or branch")
        if (self.path or self.exclude) and not self.git:
            raise ValueError("path and exclude go with git only")
        if self.revision.startswith("-") or ".." in PurePosixPath(self.path).parts or self.path.startswith("/"):
            raise ValueError("revision must not start with '-'; path must lie inside the repository")


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names and addresses of everything that is read."""

    sources: dict[str, LocalSource]
    remotes: dict[str, RemoteSource]


class FetchFailed(Exception):
    """A page that could not be had; the message says why."""


def regular_files(root: Path, is_inside: Path) -> Iterator[tuple[str, Path | str]]:
    """Each entry under `root` in sorted order: its relative path, and the file to open or, as a str, why it is skipped.

    Hidden entries are left out without a word. A link to a file inside `is_inside` stands for that file.
    """
    if root.is_file():
        yield root.name, root
        return
    folders = [root]
    while folders:
        subfolders = []
        with os.scandir(folders.pop()) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                subfolders.append(path)
            else:
                yield path.relative_to(root).as_posix(), _openable(entry, is_inside)
        folders += reversed(subfolders)


def _openable(entry: os.DirEntry[str], is_inside: Path) -> Path | str:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    if entry.is_file(follow_symlinks=False):
        return Path(entry.path)
    if not entry.is_symlink():
        return "not a regular file"
    try:
        target = Path(entry.path).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a link to itself, before Python 3.13
        return "a link to nothing"
    if not target.is_relative_to(is_inside):
        return "a link that leaves the source"
    if any(part.startswith(".") for part in target.relative_to(is_inside).parts):
        return "a link to a hidden file"
    return target if target.is_file() else "a link to something other than a file"


def copy(path: Path, to: Path) -> tuple[str, int]:
    """Copies a regular file; its SHA-256 and size, both of the bytes that were read. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # it may have become a link or a pipe
    with open(descriptor, "rb") as source:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a regular file", str(path))
        to.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with open(to, "wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
                digest.update(block)
                size += len(block)
    return digest.hexdigest(), size


def snapshot(
    name: str, root: Path, is_inside: Path, revision: str, exclude: Sequence[str], files: Path
) -> tuple[list[Source], int, int]:
    """Copies the files under `root` into `files`; their records, their bytes in all, and how many entries were skipped.

    Entries whose path matches a pattern of `exclude` are left out; a pattern that matches none is told.
    """
    sources, size, skipped = [], 0, 0
    unmatched = set(exclude)
    for path, file in progress(regular_files(root, is_inside), f"collect {name}", unit="file"):
        if matching := {pattern for pattern in exclude if fnmatch.fnmatchcase(path, pattern)}:
            unmatched -= matching
            continue
        reason = file
        if isinstance(file, Path):
            try:
                sha256, length = copy(file, files / path)
            except OSError as error:
                (files / path).unlink(missing_ok=True)
                reason = f"cannot be read: {error.strerror}"
            else:
                sources.append(Source(id=content_id(name, path), source=name, path=path, sha256=sha256, revision=revision))
                size += length
                continue
        say(f"collect {name}: {ascii(path)[1:-1]}: {reason}; skipped")
        skipped += 1
    for pattern in sorted(unmatched):
        say(f"collect {name}: exclude: {pattern!r} matches no file")
    return sources, size, skipped


def git(*arguments: str, where: str) -> str:
    """What `git <arguments>` prints. Raises BadInput with git's own last words."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    environment |= {
        "GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh",
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }
    environment.setdefault("GIT_SSH_COMMAND", "ssh -oBatchMode=yes")
    try:
        done = subprocess.run(
            ["git", "-c", "core.hooksPath=/dev/null", *arguments],
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise BadInput(f"{where}: the program git is missing; install it") from None
    except subprocess.TimeoutExpired:
        raise BadInput(f"{where}: git took longer than {GIT_TIMEOUT_S} s; check the address and the network") from None
    if done.returncode:
        words = re.sub(r"//[^/@\s]*@", "//", (done.stderr.strip().splitlines() or ["no message"])[-1])
        raise BadInput(f"{where}: git said {words!r}; check the address, the revision, the path and your access")
    return done.stdout.strip()


def checkout(remote: RemoteSource, folder: Path, where: str) -> str:
    """Puts `remote.path` at `remote.revision` into `folder`; the commit's full hash. Raises BadInput."""
    git("clone", "--quiet", "--no-checkout", "--filter=blob:none", "--", remote.git, str(folder), where=where)
    here = ("-C", str(folder))
    try:  # a branch of the remote first: a fresh clone has only one of its own
        commit = git(*here, "rev-parse", "--verify", f"refs/remotes/origin/{remote.revision}^{{commit}}", where=where)
    except BadInput:
        commit = git(*here, "rev-parse", "--verify", f"{remote.revision}^{{commit}}", where=where)
    git(*here, "checkout", "--quiet", commit, "--", remote.path or ".", where=where)
    return commit


def fetch(client: Any, url: str, host: str = "") -> tuple[bytes, str]:
    """The body and the content type at `url`. With `host`, no request goes to another one. Raises FetchFailed."""
    import httpx

    try:
        request = client.build_request("GET", url)
        for _ in range(MAX_REDIRECTS + 1):
            if request.url.scheme not in ("http", "https") or not request.url.host:
                raise FetchFailed("not an http or https address")
            if host and request.url.netloc.decode() != host:
                raise FetchFailed(f"leads to {request.url.host}, away from {host}")
            response = client.send(request, stream=True)
            with contextlib.closing(response):
                if response.next_request is not None:
                    request = response.next_request
                    continue
                if response.status_code != 200:
                    raise FetchFailed(f"HTTP {response.status_code}")
                body = bytearray()
                for block in response.iter_bytes():
                    body += block
                    if len(body) > MAX_PAGE_BYTES:
                        raise FetchFailed(f"larger than {MAX_PAGE_BYTES // 1_000_000} MB")
                return bytes(body), response.headers.get("content-type", "").partition(";")[0].strip().lower()
        raise FetchFailed(f"more than {MAX_REDIRECTS} redirects")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise FetchFailed(f"{type(error).__name__}: {error}") from None


def file_name(url: str, content_type: str) -> str:
    """A relative path for the page at `url`: its own path made safe, with the suffix of its content type."""
    parts = urlsplit(url)
    segments = [re.sub(r"[^\w.-]+", "-", segment).lstrip(".-")[:80] for segment in unquote(parts.path).split("/")]
    path = PurePosixPath(*[segment for segment in segments if segment]) if any(segments) else PurePosixPath()
    if parts.path.endswith("/") or not path.name:
        path /= "index"
    suffix = SUFFIX_OF_CONTENT_TYPE.get(content_type) or path.suffix or ".txt"
    stem = path.name.removesuffix(path.suffix) if path.suffix in (suffix, ".htm", ".php", ".asp", ".aspx") else path.name
    query = "-" + content_id(parts.query)[:8] if parts.query else ""
    return str(path.with_name(stem + query + suffix))


def sitemap_pages(client: Any, address: str, host: str, is_nested: bool = False) -> tuple[set[str], list[str]]:
    """The addresses that the sitemap lists, through one level of index, and a line for each part that could not be read."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        body, _ = fetch(client, address, host)
        if body.startswith(b"\x1f\x8b"):
            body = gzip.GzipFile(fileobj=io.BytesIO(body)).read(MAX_PAGE_BYTES + 1)
        root = fromstring(body)
    except (FetchFailed, ParseError, DefusedXmlException, OSError, EOFError) as error:
        return set(), [f"{without_login(address)}: not a sitemap: {error}"]
    addresses = {(loc.text or "").strip() for loc in root.findall("{*}*/{*}loc")} - {""}
    if not root.tag.endswith("sitemapindex"):
        return addresses, []
    if is_nested:
        return set(), [f"{without_login(address)}: an index inside an index"]
    parts = [sitemap_pages(client, part, host, is_nested=True) for part in sorted(addresses)]
    return set().union(*(pages for pages, _ in parts)), [fault for _, faults in parts for fault in faults]


def without_login(url: str) -> str:
    """`url` without user and password, which belong in no record."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def download(name: str, remote: RemoteSource, files: Path) -> tuple[list[Source], int, int]:
    """Fetches one page or a sitemap's pages into `files`; records, bytes and failures as `snapshot`. Raises BadInput."""
    import httpx

    where = f"collect.remotes.{name}"
    sources: dict[str, Source] = {}
    size = 0
    with httpx.Client(timeout=HTTP_TIMEOUT_S, headers={"User-Agent": "docsmith"}) as client:
        faults: list[str] = []
        pages, host = {remote.url}, ""
        if remote.sitemap:
            host = urlsplit(without_login(remote.sitemap)).netloc.lower()
            pages, faults = sitemap_pages(client, remote.sitemap, host)
        for page in progress(sorted(pages), f"collect {name}", unit="page"):
            try:
                body, content_type = fetch(client, page, host)
            except FetchFailed as error:
                faults.append(f"{without_login(page)}: {error}")
                continue
            path = PurePosixPath(file_name(page, content_type))
            if str(path) in sources:
                path = path.with_name(f"{path.stem}-{content_id(page)[:8]}{path.suffix}")
            (files / path).parent.mkdir(parents=True, exist_ok=True)
            (files / path).write_bytes(body)
            sources[str(path)] = Source(
                id=content_id(name, str(path)),
                source=name,
                path=str(path),
                sha256=hashlib.sha256(body).hexdigest(),
                revision=without_login(page),
            )
            size += len(body)
    for fault in faults:
        say(f"collect {name}: {fault}; skipped")
    if not sources:
        raise BadInput(
            f"{where}: no page could be fetched ({faults[0] if faults else 'the sitemap is empty'}); check the address"
        )
    return list(sources.values()), size, len(faults)


def main(name: str, out: Path, *, collect: Params) -> None:
    known = sorted({*collect.sources, *collect.remotes})
    if name not in known:
        raise BadParams(f"params.yaml: collect has no source {name!r}. Known: {', '.join(known) or 'none'}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise BadParams(f"params.yaml: collect: the name {name!r} must be letters, digits, '-' and '_' only")
    if name in collect.sources and name in collect.remotes:
        raise BadParams(f"params.yaml: collect: {name} is both a source and a remote; rename one")
    with new_folder(out) as draft, tempfile.TemporaryDirectory(prefix="docsmith-") as scratch:
        files = draft / "files"
        files.mkdir()
        if name in collect.sources:
            place = collect.sources[name].path
            root = Path(place).resolve()
            if not root.exists():
                raise BadInput(f"{place}: no such file or folder; set collect.sources.{name}.path in params.yaml")
            if not (root.is_file() or root.is_dir()):
                raise BadInput(f"{place}: neither a file nor a folder; set collect.sources.{name}.path in params.yaml")
            if out.resolve().is_relative_to(root):
                raise BadInput(f"{place}: holds {out}, where the copy goes; name the folder that holds only the documents")
            sources, size, skipped = snapshot(name, root, root, "", collect.sources[name].exclude, files)
        elif collect.remotes[name].git:
            remote = collect.remotes[name]
            place = remote.path or remote.git
            clone = Path(scratch).resolve() / "clone"
            commit = checkout(remote, clone, f"collect.remotes.{name}")
            root = (clone / remote.path).resolve()
            if not root.is_relative_to(clone):
                raise BadInput(f"collect.remotes.{name}: {remote.path} is a link that leaves the repository")
            sources, size, skipped = snapshot(name, root, root if root.is_dir() else clone, commit, remote.exclude, files)
        else:
            place = collect.remotes[name].url or collect.remotes[name].sitemap
            sources, size, skipped = download(name, collect.remotes[name], files)
        if not sources:
            raise BadInput(f"{without_login(place)}: holds no regular file; put documents there or remove the source {name}")
        write_records(draft / "manifest.jsonl", sources)
    also = f", {skipped} skipped" if skipped else ""
    say(f"collect {name}: {len(sources)} files, {round(size / 1000)} kB{also}")


if __name__ == "__main__":
    run(main)
