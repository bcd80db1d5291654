"""The files that an address of a source stands for, wherever it leads.

    find("s3://bucket/corpus/")                     # all below it, as of a folder on this machine
    find("hf://datasets/acme/web@main/data/*.parquet")
    find("https://host/a.jsonl.gz")                 # or a page of links, or a pattern over one

A file is frozen with its size and with what changes when its content does: the ETag or generation
of a store, the ETag of a server, the hash of the Hub. Names are told without passwords and queries.
"""

import functools
import glob
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from pretrain.text import stores
from pretrain.text.ranges import Fault, Waiting
from pretrain.text.readers import NAMED_ONLY, READABLE, format_of
from pretrain.text.source import DRIVERS, File, Patience, SourceError

if TYPE_CHECKING:
    from pretrain.text.hub import Repository

KNOWN = "s3://, gs://, az://, hf://datasets/ and https://"
DATASET = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<path>.*))?"
)
ASKED_AT_ONCE = 16  # addresses whose size is asked for side by side

Name = TypeVar("Name")


def is_address(text: str) -> bool:
    """Whether this is no path of this machine: it begins as s3:// or https:// do."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def refuse_unknown(address: str, known: Iterable[str], what: str) -> None:
    """Raise SourceError for a scheme that is not among the known ones, and for an address of a
    store with a password in it."""
    scheme, _, rest = address.partition("://")
    if scheme not in known:
        raise SourceError(f"{address}: no scheme that is known here; {what}")
    if scheme in DRIVERS and re.match(r"[^/@]*:[^/]*@", rest):
        where = stores.WHERE[DRIVERS[scheme]]
        raise SourceError(f"{address}: no address of a store has a password in it; set {where}")


def find(given: str, patience: Patience) -> list[File]:
    """The files of one address, in the order of their names. Raises SourceError for what does not
    exist, may not be read, or has no file in it that can be read."""
    scheme = given.partition("://")[0]
    known = (*DRIVERS, "hf", "http", "https")
    refuse_unknown(given, known, f"known are {KNOWN}; a file on this machine is given by its path")
    if scheme == "hf":
        files = _in_dataset(given, patience)
    elif scheme in ("http", "https"):
        files = _behind_http(given, patience)
    else:
        files = _in_store(given, patience)
    if not files:
        raise SourceError(f"{given}: no file in it can be read; a source is {READABLE}")
    return sorted(files, key=lambda file: file.path)


def find_all(given: Iterable[str], patience: Patience) -> dict[str, list[File]]:
    """The files of each address among what was given. Raises SourceError like find."""
    addresses = list(filter(is_address, given))
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        found = pool.map(lambda address: find(address, patience), addresses)
        return dict(zip(addresses, found, strict=True))


def name_of(given: str) -> str:
    """What a source is called by its address: the file's or folder's name, the folder's of a
    pattern."""
    parts = urlsplit(given)
    names = [parts.hostname or "", *filter(None, parts.path.split("/"))]
    while len(names) > 1 and glob.has_magic(names[-1]):
        names.pop()
    last = unquote(names[-1])
    return last.split(".")[0] if format_of(last) else last


# ---- which of the names in a listing


def below(names: dict[str, Name], folder: str) -> list[Name]:
    """Those of a folder, as of one on this machine: what begins with "." or "_" is left out, and
    .json is taken only where it is named. names: by their paths."""
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    return [
        names[path]
        for path in sorted(names)
        if path.startswith(prefix)
        and not any(part[:1] in "._" for part in path[len(prefix) :].split("/"))
        and format_of(path)
        and not path.lower().endswith(NAMED_ONLY)
    ]


def matching(names: dict[str, Name], pattern: str) -> list[Name]:
    """Those that a pattern matches, with ** for any number of folders."""
    parts = pattern.split("/")
    return [
        names[path] for path in sorted(names) if _fits(path.split("/"), parts) and format_of(path)
    ]


def _fits(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        folders = next((i for i, name in enumerate(path) if name.startswith(".")), len(path))
        rest = pattern[1:] or ["*"]
        return any(_fits(path[skipped:], rest) for skipped in range(folders + 1))
    if not path or (path[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def fixed_folder(pattern: str) -> str:
    """The folder that a pattern stays in: "data/10BT" of "data/10BT/*/x"."""
    parts = pattern.split("/")[:-1]
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:fixed])


# ---- object stores


def _in_store(given: str, patience: Patience) -> list[File]:
    scheme, _, path = given.partition("://")
    if glob.has_magic(path.partition("/")[0]):
        raise SourceError(f"{given}: a pattern begins behind the bucket's name")
    if "/" in path.rstrip("/") and not path.endswith("/"):
        try:
            return _named(_stored(stores.look(given, patience)))
        except stores.Missing:  # then it is a folder or a pattern
            pass
    if found := _names(stores.listing(given.rstrip("/"), patience), scheme):
        return below(found, path.rstrip("/"))
    if not glob.has_magic(path):
        raise SourceError(f"{given}: no such object, and no folder with one")
    folder = f"{scheme}://{fixed_folder(path)}"
    found = _names(stores.listing(folder, patience), scheme)
    return _some(matching(found, path), given)


def _names(entries: list[stores.Entry], scheme: str) -> dict[str, File]:
    prefix = f"{scheme}://"
    return {entry.address.removeprefix(prefix): _stored(entry) for entry in entries}


def _stored(entry: stores.Entry) -> File:
    kind, compression = format_of(entry.address) or ("", None)
    return File(
        entry.address, entry.size, kind, compression, url=entry.address, tag=entry.tag or ""
    )


def _named(file: File) -> list[File]:
    """A file that was given by its own name."""
    if not file.kind:
        raise SourceError(f"{file.path}: cannot be read; a source is {READABLE}")
    return [file]


def _some(files: list[File], given: str) -> list[File]:
    if not files:
        raise SourceError(f"{given}: no file matches it")
    return files


# ---- the Hub


def _in_dataset(given: str, patience: Patience) -> list[File]:
    parts = DATASET.fullmatch(given)
    if not parts:
        raise SourceError(f"{given}: a dataset is hf://datasets/OWNER/NAME[@REVISION][/PATH]")
    dataset, path = parts["name"], (parts["path"] or "").strip("/")
    revision = unquote(parts["revision"] or "main")
    if glob.has_magic(path):
        found = _tree(dataset, revision, fixed_folder(path), True, patience)
        return _some(matching(found, path), given)
    if found := _tree(dataset, revision, path, True, patience):
        return below(found, path)
    found = _tree(dataset, revision, path.rpartition("/")[0], False, patience)
    if path not in found:
        raise SourceError(f"{given}: no such file or folder in the dataset")
    return _named(found[path])


@functools.lru_cache(maxsize=16)
def _repository(dataset: str, revision: str, patience: Patience) -> "Repository":
    from pretrain.text import hub

    return hub.open_repository(dataset, revision, patience)


@functools.lru_cache(maxsize=64)
def _tree(
    dataset: str, revision: str, folder: str, is_recursive: bool, patience: Patience
) -> dict[str, File]:
    """The files below a folder of a dataset by their paths, at the commit that the revision has
    now."""
    repo = _repository(dataset, revision, patience)
    files = {}
    for entry in repo.tree(folder, is_recursive):
        path = entry["path"]
        kind, compression = format_of(path) or ("", None)
        tag = (entry.get("lfs") or {}).get("oid") or entry.get("oid") or ""
        shown = f"hf://datasets/{dataset}@{repo.commit}/{path}"
        files[path] = File(shown, entry["size"], kind, compression, url=repo.url(path), tag=tag)
    return files


# ---- HTTP


def _behind_http(given: str, patience: Patience) -> list[File]:
    path = urlsplit(given).path.lstrip("/")
    urls: list[str] = [given]
    if glob.has_magic(path):
        folder = urlunsplit(urlsplit(given)._replace(path=f"{fixed_folder(path)}/", query=""))
        urls = matching(_links(folder, patience), path)
    elif path.endswith("/") or not path:
        urls = below(_links(given, patience), path.rstrip("/"))
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(lambda url: _behind_url(url, patience), urls))


def _links(page: str, patience: Patience) -> dict[str, str]:
    """The addresses that a page and the pages below it link to, by their paths."""
    found = stores.listing(page, patience)
    return {unquote(urlsplit(entry.address).path).lstrip("/"): entry.address for entry in found}


def _behind_url(url: str, patience: Patience) -> File:
    """The file at an address: its first byte is asked for, which tells the size of all."""
    from pretrain.text.remote import Refused, attempt, hub_token, is_hub, tag_of

    parts = urlsplit(url)
    shown = urlunsplit(
        parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
    )
    kind, compression = format_of(unquote(parts.path)) or ("", None)
    if not kind:
        raise SourceError(f"{shown}: cannot be read; a source is {READABLE}")
    token = hub_token() if is_hub(url) else None
    waiting = Waiting(url, patience)
    while True:
        try:
            timeouts = waiting.timeouts()
            response, _ = attempt(url, home=url, token=token, timeouts=timeouts, byte_range=(0, 1))
            break
        except Refused as error:
            if error.status == 416:  # there is no first byte
                return File(shown, 0, kind, compression, url=url, tag="")
            raise
        except Fault as fault:
            waiting.after(fault)
    response.close()
    size = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code == 200:
        size = response.headers.get("Content-Length", "")
    if not size.isdigit():
        raise SourceError(
            f"{shown}: its server does not tell how large it is; download it, and give the file"
        )
    return File(shown, int(size), kind, compression, url=url, tag=tag_of(response) or "")
