"""Where the shards of a build go: the folder in which they are made, or from there to a store.

    with StoreDestination("s3://bucket/fineweb").opened() as destination:
        build_shards(source, destination.folder, settings, Work(tokenizer, destination=destination))

In a store a shard is there once the manifest there lists it: shards are made on this machine and
checked, sent whole, and the manifest goes last. Whatever stops that, the next run begins from the
store's manifest; what is on this machine is needed no more.

Two builders: the manifest is put only where the one that this builder read or wrote last still is
(on S3 the store itself decides that), and before a shard is sent the same is asked. So the second
one stops with a line. On one machine a lock says so at the start.
"""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pretrain.files import lock
from pretrain.text import stores
from pretrain.text.addresses import is_address, refuse_unknown
from pretrain.text.source import DRIVERS, Patience, SourceError
from pretrain.tokens.folder import BuildRefused, damaged_shards
from pretrain.tokens.formats import BARE_PATTERN, TOKEN, shard_bytes
from pretrain.tokens.manifest import LARGEST_BYTES, MANIFEST, NAME_PATTERN, Manifest, Shard
from pretrain.tokens.shards import ShardError, verify_shard

STAGING = Path("data/.stores")  # here shards are made that go elsewhere
LOCK = ".publishing"
BEGINNING = 1 << 19  # tokens of a shard that are looked at without downloading it


class Destination:
    """The folder in which shards are made is where they stay."""

    address: str | None = None  # of a store, where they do not
    folder: Path | None = None  # in which they are made, where the destination has it

    def shown(self, folder: Path) -> str:
        """What a folder of shards is called to its user."""
        return self.address or str(folder)

    def missing(self, folder: Path, manifest: Manifest) -> list[Shard]:
        """Listed shards that are not there, or of another size. Raises ShardError."""
        return damaged_shards(folder, manifest)

    def publish(self, folder: Path, manifest: Manifest) -> None:
        """The manifest lists what is durable in the folder: from now on that counts. Raises
        OSError."""
        manifest.save(folder)


class StoreDestination(Destination):
    """A folder of a store, by its address; `folder` is the one on this machine."""

    def __init__(self, address: str, patience: Patience | None = None):
        """Raises SourceError for an address that is no store's."""
        way_out = "shards are written to a folder, or to s3://, gs:// or az://"
        refuse_unknown(address, DRIVERS, way_out)
        self.address: str = address.rstrip("/")
        self.patience = patience or Patience()
        self.folder: Path = STAGING / re.sub(r"[^\w.-]+", "-", self.address)
        self._there: dict[str, str] = {}  # SHA-256 of the shards in the store, by name
        self._tag: str | None = None  # of the manifest there

    @contextlib.contextmanager
    def opened(self, only_look: bool = False) -> Iterator["StoreDestination"]:
        """Fetch what a build goes on from. It stays on this machine only where the build fails.

        only_look: nothing will be written. Raises files.Locked where a build of this machine goes
        on, BuildRefused for a place that holds other shards, SourceError, OSError.
        """
        if only_look:
            with tempfile.TemporaryDirectory() as scratch:
                self.folder = Path(scratch)
                self._fetch(with_shard=False)
                yield self
            return
        stores.require_driver(self.address)
        self.folder.mkdir(parents=True, exist_ok=True)
        problem = f"{self.address}: another process of this machine is writing there; wait for it"
        with lock(self.folder / LOCK, problem):
            self._fetch(with_shard=True)
            yield self
            shutil.rmtree(self.folder, ignore_errors=True)

    def missing(self, folder: Path, manifest: Manifest) -> list[Shard]:
        """Listed shards that the store did not have, in their size, when this build began, and that
        were not sent since."""
        return [each for each in manifest.shards if self._there.get(each.file) != each.sha256]

    def publish(self, folder: Path, manifest: Manifest) -> None:
        """Send what the store lacks of the listed shards, then the manifest. Raises BuildRefused
        where another builder published there, ShardError for a shard that was damaged here,
        SourceError."""
        for shard in self.missing(folder, manifest):
            path = folder / shard.file
            if path.exists():  # else it is one to be made again
                verify_shard(path, shard)
                self._refuse_others()
                stores.upload(path, f"{self.address}/{shard.file}", self.patience)
                self._there[shard.file] = shard.sha256
        try:
            text = manifest.text().encode()
            self._tag = stores.replace(self._at(MANIFEST), text, self._tag, self.patience)
        except stores.Replaced:
            raise self._others() from None
        manifest.save(folder)
        for shard in manifest.shards[:-1]:  # where a build goes on, it compares the last one
            (folder / shard.file).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """Bytes of the token files in the store, by name. Raises SourceError."""
        found = {}
        for entry in stores.listing(self.address, self.patience, depth=1):
            name = entry.address.rpartition("/")[2]
            if NAME_PATTERN.fullmatch(name) or BARE_PATTERN.fullmatch(name):
                found[name] = entry.size
        return found

    def in_full(self, manifest: Manifest, sizes: dict[str, int] | None = None) -> list[Shard]:
        """Listed shards that the store has in their size, as it says now or in `sizes`. Raises
        SourceError."""
        sizes = self.sizes() if sizes is None else sizes
        return [
            shard
            for shard in manifest.shards
            if sizes.get(shard.file) == shard_bytes(shard.file, shard.tokens)
        ]

    def download(self, name: str, folder: Path) -> Path:
        """A file of the store in a folder here. Raises SourceError, OSError."""
        path = folder / name
        stores.download(self._at(name), path, self.patience)
        return path

    def beginning(self, shard: Shard) -> np.ndarray:
        """The first tokens of a shard, BEGINNING of them at most. Raises SourceError."""
        header = shard_bytes(shard.file, 0)
        size = shard_bytes(shard.file, shard.tokens)
        with stores.StoreFile(self._at(shard.file), size, self.patience) as file:
            stored = file.read(header + TOKEN.itemsize * BEGINNING)
        return np.frombuffer(stored[header:], TOKEN)

    def _at(self, name: str) -> str:
        return f"{self.address}/{name}"

    def _fetch(self, with_shard: bool) -> None:
        """The store's manifest, and the shard that a build goes on behind, into the folder."""
        for path in self.folder.iterdir():
            if path.name == MANIFEST or NAME_PATTERN.fullmatch(path.name):
                path.unlink()
        sizes = self.sizes()
        try:
            text, entry = stores.read(self._at(MANIFEST), self.patience)
        except stores.Missing:
            if sizes:
                raise BuildRefused(
                    f"{self.address}: holds {min(sizes)} but no {MANIFEST}: not made here, so not "
                    "to be continued; choose another folder with --out_dir"
                ) from None
            return
        if len(text) > LARGEST_BYTES:
            raise ShardError(f"{self._at(MANIFEST)}: larger than {LARGEST_BYTES >> 20} MiB")
        (self.folder / MANIFEST).write_bytes(text)
        self._tag, manifest = entry.tag, Manifest.load(self.folder)
        assert manifest
        self._there = {shard.file: shard.sha256 for shard in self.in_full(manifest, sizes)}
        last = manifest.shards[-1] if manifest.shards else None
        if with_shard and last and not manifest.complete and last.file in self._there:
            verify_shard(self.download(last.file, self.folder), last)

    def _refuse_others(self) -> None:
        try:
            tag = stores.look(self._at(MANIFEST), self.patience).tag
        except stores.Missing:
            tag = None
        if tag != self._tag:
            raise self._others()

    def _others(self) -> BuildRefused:
        return BuildRefused(
            f"{self.address}: another process has published there since this one began; wait for "
            "it, or choose another folder with --out_dir"
        )


@contextlib.contextmanager
def opened(out_dir: str | Path | None, only_look: bool = False) -> Iterator[Destination]:
    """The destination that --out_dir names. Messages about the folder on this machine name the
    store instead."""
    if out_dir is None or not is_address(str(out_dir)):
        yield Destination()
        return
    store = StoreDestination(str(out_dir))
    try:
        with store.opened(only_look) as destination:
            yield destination
    except (BuildRefused, ShardError, SourceError) as error:
        message = str(error).replace(str(store.folder), store.address)
        raise type(error)(message) from None
