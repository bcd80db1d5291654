"""Do the plan and the manifest of all of FineWeb stay within memory and minutes?

    $ python benchmarks/plan_simulation.py --share 0.1
    files 2,587, units 66,000 ... (a tenth; sums are of all)

Nothing is downloaded: sizes are made up to the totals that are published or were counted, 15
trillion tokens in 44 TB of 25,868 parquet files, with row groups of a thousand documents. Planned,
pickled and written is by the code that does it in earnest. Seconds are of the processor, so that
other work on the machine changes them little; requests for the files' footers are not among them.
"""

import argparse
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pretrain.text.readers import parquet
from pretrain.text.source import File, Position, Source
from pretrain.tokens import staged
from pretrain.tokens.manifest import LARGEST_BYTES, Manifest, Shard

FILES, FILE_BYTES = 25_868, 44e12
TOKENS, TEXT_BYTES = 15e12, 42e12  # 2.8 stored bytes of the text column a token, as in sample-10BT
GROUP_ROWS = 1000
GROUP_BYTES = 1000 * 2_000  # of text as stored: some 700 tokens a document


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of FineWeb's files (1)")
    args = parser.parse_args(argv)
    source = make_source(round(FILES * args.share))
    scale = FILES / len(source.files)
    units, seconds = timed(lambda: plan(source))
    print(f"files {len(source.files):,}, units {units:,} of {staged.UNIT_BYTES >> 20} MiB")
    print(f"planned in {seconds:.1f} s; of all files {seconds * scale:.0f} s")
    report_tasks(source)
    for shard_size in (10**8, 10**9):
        report_manifest(source, round(TOKENS / scale / shard_size), shard_size, scale)
    print(f"a build takes {staged.PUBLISHING_SHARE:.0%} of its time for writing it, at most")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"memory at most {peak:.2f} GB")
    return 0


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returns, and how many seconds of the processor it took."""
    t0 = time.process_time()
    return work(), time.process_time() - t0


def make_source(count: int) -> Source:
    """A source like FineWeb's on the Hub, of so many files."""
    size = round(FILE_BYTES / FILES)
    url = "https://huggingface.co/datasets/HuggingFaceFW/fineweb/resolve/{}/{}"
    files, described = [], []
    for index in range(count):
        dump, number = divmod(index, 270)  # 96 of them
        path = f"data/CC-MAIN-{2013 + dump // 8}-{dump:02d}/{number:03d}_00000.parquet"
        files.append(File(path, size, "parquet", url=url.format("9" * 40, path)))
        described.append({"path": path, "size": size, "sha256": f"{index:064x}"})
    description = {"kind": "hub", "dataset": "HuggingFaceFW/fineweb", "files": described}
    return Source("fineweb", tuple(files), "text", description)


def plan(source: Source) -> int:
    """Plan all units, a file at a time as a build does; returns how many there are."""
    groups = round(TEXT_BYTES / FILES / GROUP_BYTES)
    ranges = [[(i * GROUP_BYTES, (i + 1) * GROUP_BYTES)] for i in range(groups)]
    footer = SimpleNamespace(
        metadata=SimpleNamespace(num_row_groups=groups),
        num_rows=lambda group: GROUP_ROWS,
        ranges=ranges.__getitem__,
    )
    with patch.object(parquet, "footer", lambda *_: footer):
        return sum(
            sum(1 for _ in staged.file_units(source, index)) for index in range(len(source.files))
        )


def report_tasks(source: Source) -> None:
    """What goes to a worker with each unit, beside the tokenizer."""
    task = staged.with_one_file(source, len(source.files) - 1)
    whole, alone = len(pickle.dumps(source)), len(pickle.dumps(task))
    print(f"with a unit go {alone:,} bytes of the source, which has {whole / 1e6:.1f} MB")


def report_manifest(source: Source, shards: int, shard_size: int, scale: float) -> None:
    """How long a manifest of so many shards takes to write and to read, and its size."""
    first = Position(len(source.files) - 1, 1_000_000, 500).to_json()
    counts = {"source": shard_size, "written": shard_size}
    listed = [
        Shard(
            f"fineweb_train_{i:06d}.npy",
            "train",
            shard_size,
            150_000,
            f"{i:064x}",
            first,
            {},
            counts,
        )
        for i in range(shards)
    ]
    tokenizer = {"name": "gpt2", "vocabulary_sha256": "0" * 64, "end_of_text": 50256}
    manifest = Manifest("fineweb", source.description, {}, tokenizer, shard_size, listed, first)
    with tempfile.TemporaryDirectory() as folder:
        _, written = timed(lambda: manifest.save(Path(folder)))
        size = (Path(folder) / "manifest.json").stat().st_size
        _, read = timed(lambda: Manifest.load(folder))
    fits = "below" if size * scale < LARGEST_BYTES else "ABOVE"
    print(
        f"manifest of {shards:,} shards of {shard_size:,} tokens: {size / 1e6:.1f} MB, written in"
        f" {written:.2f} s, read in {read:.2f} s; of all {size * scale / 1e6:.0f} MB, {fits} the"
        f" limit of {LARGEST_BYTES >> 20} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
