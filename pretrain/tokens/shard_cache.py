"""Shards of a store, on this machine as long as they are needed.

    folder = open_cache("s3://bucket/fineweb", Path("data/.cache"), max_bytes=100 * 10**9)
    find_shards(folder, "train")        # as the manifest has them; none needs to be here yet
    open_shard(paths[3])                # brings it here, checks its SHA-256, maps it

A folder of the cache is known by MARK. Its manifest is that of the store, so that lengths, order
and fingerprint are those of the shards themselves. All processes of a machine share it: one brings
a shard, the others wait for that one; the shards that were not used for the longest time make room.
"""

import contextlib
import functools
import json
import os
import queue
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import UserError
from pretrain.files import atomic_write, lock, write_json
from pretrain.text import stores
from pretrain.text.addresses import refuse_unknown
from pretrain.text.source import DRIVERS
from pretrain.tokens.formats import shard_bytes
from pretrain.tokens.manifest import MANIFEST, Manifest, Shard, ShardError

MARK = ".store.json"
ROOM_LOCK = ".room.lock"
MAPS = 256
THREADS = 4  # that bring shards ahead of need, in a process


def open_cache(address: str, root: Path, max_bytes: int) -> Path:
    """The folder that stands for the shards of a store, with the manifest as the store has it now.

    max_bytes: of all shards below `root`. Raises ShardError where the store has no manifest,
    SourceError for a store that is away, OSError.
    """
    refuse_unknown(address, DRIVERS, "shards are read from a folder, or from s3://, gs:// or az://")
    address = address.rstrip("/")
    folder = root / re.sub(r"[^\w.-]+", "-", address)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"{folder}: is locked", wait_seconds=-1):
        try:
            text, _ = stores.read(f"{address}/{MANIFEST}")
        except stores.Missing:
            raise ShardError(
                f"{address}: no {MANIFEST}, which has the hashes that shards are checked by; make "
                "the shards with fineweb.py --out_dir, or copy the folder to this machine"
            ) from None
        path = folder / MANIFEST
        if not path.exists() or path.read_bytes() != text:
            before = _shards(folder) if path.exists() else {}
            with atomic_write(path) as file:
                file.write(text)
            for name, shard in _shards(folder).items():
                if before.get(name) != shard:
                    (folder / name).unlink(missing_ok=True)
        for name, shard in _shards(folder).items():
            with contextlib.suppress(FileNotFoundError):
                if os.stat(folder / name).st_size != shard_bytes(name, shard.tokens):
                    (folder / name).unlink()
        write_json(folder / MARK, {"address": address, "max_bytes": max_bytes})
    return folder


def is_cache(folder: Path) -> bool:
    """Whether shards of this folder may lie elsewhere."""
    return (folder / MARK).exists()


def cached_tokens(path: Path) -> int | None:
    """How many tokens a shard of a cache has, without bringing it; None for other shards."""
    return _shard(path).tokens if is_cache(path.parent) else None


def most_maps(paths: Sequence[Path]) -> int:
    """How many shards to keep mapped: each takes a file descriptor, and one of a cache its place on
    the disk, even after it has made room."""
    if not paths or not is_cache(paths[0].parent):
        return MAPS
    largest = max(shard_bytes(path.name, _shard(path).tokens) for path in paths)
    return min(MAPS, max(2, _mark(paths[0].parent)["max_bytes"] // largest))


def bring(path: Path) -> None:
    """Have a shard of a cache on this machine; at once for one that is here, or of another folder.

    Raises ShardError for one that is not what the manifest says, SourceError for a store that is
    away, OSError.
    """
    if not is_cache(path.parent):
        return
    if _use(path):
        return
    folder, shard = path.parent, _shard(path)
    mark = _mark(folder)
    address, size = f"{mark['address']}/{path.name}", shard_bytes(path.name, shard.tokens)
    with lock(folder / f".{path.name}.lock", f"{path}: is locked", wait_seconds=-1):
        if _use(path):  # brought while this process waited
            return
        _make_room(folder.parent, mark["max_bytes"] - size)
        try:
            stores.download(address, path, sha256=shard.sha256)
        except stores.Missing:
            raise ShardError(
                f"{address}: listed in {MANIFEST} but missing; run the command that made it again"
            ) from None
        except stores.Damaged:
            raise ShardError(
                f"{address}: its SHA-256 is not the one in {MANIFEST}: its content has changed; "
                "fineweb.py --verify --out_dir says which shards are damaged"
            ) from None


def bring_ahead(path: Path) -> None:
    """Have a shard of a cache on this machine soon; returns at once. What goes wrong is left to
    `bring`."""
    if is_cache(path.parent) and not _use(path):
        _bringers(os.getpid()).want(path)


def _mark(folder: Path) -> dict:
    return json.loads((folder / MARK).read_text(encoding="utf-8"))


def _use(path: Path) -> bool:
    """Whether a shard is here; it is the last to make room, then."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _make_room(root: Path, max_bytes: int) -> None:
    """Remove shards, those first that were not used for the longest time, down to max_bytes."""
    with lock(root / ROOM_LOCK, f"{root}: is locked", wait_seconds=-1):
        found = []
        for folder in filter(is_cache, root.iterdir()):
            for name in _shards(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(folder / name)
                    found.append((status.st_mtime_ns, status.st_size, folder / name))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= max_bytes:
                return
            with contextlib.suppress(OSError):  # Windows removes none that is mapped
                path.unlink()
                total -= size


def _shard(path: Path) -> Shard:
    try:
        return _shards(path.parent)[path.name]
    except KeyError:
        raise ShardError(f"{path}: not in {MANIFEST}") from None


def _shards(folder: Path) -> dict[str, Shard]:
    return _shards_at(folder, os.stat(folder / MANIFEST).st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _shards_at(folder: Path, mtime_ns: int) -> dict[str, Shard]:
    manifest = Manifest.load(folder)
    return {shard.file: shard for shard in manifest.shards} if manifest else {}


class _Bringers:
    """Threads that bring shards, in the order in which they are wanted."""

    def __init__(self) -> None:
        self.waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self.wanted: set[Path] = set()
        for _ in range(THREADS):  # daemons: the end of a run waits for no download
            threading.Thread(target=self._serve, name="shards", daemon=True).start()

    def want(self, path: Path) -> None:
        if path not in self.wanted:
            self.wanted.add(path)
            self.waiting.put(path)

    def _serve(self) -> None:
        while True:
            path = self.waiting.get()
            with contextlib.suppress(UserError, OSError):
                bring(path)
            self.wanted.discard(path)


@functools.lru_cache(maxsize=1)
def _bringers(pid: int) -> _Bringers:
    """Of this process: a forked one has none of its parent's threads."""
    return _Bringers()
