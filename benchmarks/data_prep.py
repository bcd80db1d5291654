"""How fast fineweb.py is: whole processes, start-up included, beside two others in the same run.

baseline  the straightforward pipeline: one document at a time from parquet, tiktoken in a pool of
processes
ceiling   read the same column of the same file and encode it with gigatoken's own threads, nothing
else

    $ python benchmarks/data_prep.py
    corpus: 21,980 documents, 200 MB of text, from the sources and documentation of Python and its
    packages tokens: 93,583,130, the same from both, SHA-256 41e1cdfe7bc6a5fa...
    baseline    16.24 s,   5.8 M tokens/s,  29.90 s of CPU, 1.10 GB at most
    fineweb.py   1.64 s,  57.2 M tokens/s,   2.41 s of CPU, 0.67 GB at most
    ceiling      1.90 s,  49.3 M tokens/s,   2.59 s of CPU, 0.80 GB at most
    fineweb.py: 9.8 times the baseline (aim: 8.0), 1.17 of the ceiling (aim: 0.6)

The corpus is made of what any machine with Python has, in the columns of FineWeb. The tokens of
fineweb.py and the baseline are compared first. Each ratio is the median over rounds in which all
three run in turn.
"""

import argparse
import base64
import hashlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

ENDINGS = {".py", ".pyi", ".md", ".rst", ".txt"}
ROWS = 1000  # in a row group, as FineWeb's files have
OURS = "fineweb.py"
ROLES = ("baseline", OURS, "ceiling")
MIN_SPEEDUP, MIN_SHARE = 8.0, 0.6


# ---- corpus


def find_texts() -> Iterator[str]:
    """Distinct texts of at least 200 characters from the standard library and all installed
    packages."""
    seen = set()
    folders = dict.fromkeys(
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix not in ENDINGS or not path.is_file():
                continue
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if digest in seen:
                continue
            seen.add(digest)
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if len(text) >= 200:
                yield text


def make_corpus(path: Path, megabytes: int) -> tuple[int, int]:
    """Write texts to a parquet file with FineWeb's columns; returns documents and bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pretrain.tokens.tokenizer import Tokenizer

    texts, size = [], 0
    for text in find_texts():
        texts.append(text)
        size += len(text.encode())
        if size >= megabytes * 1_000_000:
            break
    n = len(texts)
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{i:032x}>" for i in range(n)],
        "dump": ["CC-MAIN-0000-00"] * n,
        "url": [f"file:///{i}" for i in range(n)],
        "date": ["2000-01-01T00:00:00Z"] * n,
        "file_path": ["local"] * n,
        "language": ["en"] * n,
        "language_score": [1.0] * n,
        "token_count": Tokenizer().encode_documents(pa.array(texts))[1] - 1,
    }
    pq.write_table(pa.table(columns), path, row_group_size=ROWS)
    return n, size


# ---- the two others, each a process of its own


def encode_document(text: str):
    import numpy as np

    from pretrain.tokens.tokenizer import load_encoding

    encoding = load_encoding()
    return np.array([encoding.eot_token, *encoding.encode_ordinary(text)], np.uint16)


def run_baseline(corpus: Path, out: Path, processes: int) -> None:
    """What a tutorial would write: rows from an iterator, a pool, an array that is saved when it is
    full."""
    import numpy as np
    import pyarrow.parquet as pq

    def rows():
        for batch in pq.ParquetFile(corpus).iter_batches(columns=["text"]):
            for row in batch.to_pylist():
                yield row["text"]

    shard, filled, index = np.empty(100_000_000, np.uint16), 0, 0
    with multiprocessing.Pool(processes) as pool:
        for tokens in pool.imap(encode_document, rows(), chunksize=16):
            while len(tokens):
                n = min(len(tokens), len(shard) - filled)
                shard[filled : filled + n] = tokens[:n]
                filled, tokens = filled + n, tokens[n:]
                if filled == len(shard):
                    np.save(out / f"baseline_{index:06d}", shard)
                    filled, index = 0, index + 1
    np.save(out / f"baseline_{index:06d}", shard[:filled])


def run_ceiling(corpus: Path, ranks: Path) -> None:
    """Read and encode, nothing else: no end-of-text, no check, no files. `ranks`: gigatoken's own
    format."""
    import awkward as ak
    import gigatoken
    import numpy as np
    import pyarrow.parquet as pq

    tokenizer = gigatoken.Tokenizer.from_tiktoken(ranks, pretokenizer="gpt2")
    parquet = pq.ParquetFile(corpus)
    strings, characters = {"__array__": "string"}, {"__array__": "char"}
    for batch in parquet.iter_batches(4 * ROWS, columns=["text"]):
        _, offsets, data = batch.column(0).buffers()
        starts = ak.index.Index64(
            np.frombuffer(offsets, np.int32)[: len(batch) + 1].astype(np.int64)
        )
        content = ak.contents.NumpyArray(np.frombuffer(data, np.uint8), parameters=characters)
        tokenizer.encode_batch(
            ak.Array(ak.contents.ListOffsetArray(starts, content, parameters=strings))
        )


# ---- measuring


@dataclass
class Result:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    files: list[Path]  # of tokens, in order


def run(
    role: str, corpus: Path, scratch: Path, processes: int, *, watch_memory: bool = False
) -> Result:
    """Run one of the three as a process; watching its memory takes time from it."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, __file__, "--role", role, str(corpus), str(folder), str(processes)]
    if role == OURS:
        command = [
            sys.executable,
            str(ROOT / "fineweb.py"),
            "--source",
            str(corpus),
            "--out_dir",
            str(folder),
        ]
    peak, before, t0 = 0, os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while watch_memory and process.poll() is None:
        peak = max(peak, sum(map(proportional_bytes, family(process.pid))))
        time.sleep(0.02)
    process.wait()
    seconds, after = time.perf_counter() - t0, os.times()
    if process.returncode:
        sys.exit(f"{role} failed with exit code {process.returncode}")
    cpu_seconds = sum(after[2:4]) - sum(before[2:4])  # of children that ended
    files = sorted(folder.rglob("*.npy"), key=lambda path: path.stem[-6:])
    return Result(seconds, cpu_seconds, peak, files)


def family(pid: int) -> list[int]:
    """A process and all below it, as far as /proc tells."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(each for child in children for each in family(int(child)))]


def proportional_bytes(pid: int) -> int:
    """Memory of a process, what it shares with others counted by its share (PSS); 0 where /proc is
    not."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def digest_of(files: list[Path]) -> tuple[str, int]:
    """SHA-256 of all tokens, one file after the other, and their number."""
    import numpy as np

    sha256, tokens = hashlib.sha256(), 0
    for path in files:
        array = np.load(path, mmap_mode="r")
        sha256.update(array)
        tokens += len(array)
    return sha256.hexdigest(), tokens


def write_ranks(path: Path) -> None:
    """GPT-2's vocabulary as gigatoken reads it: not a part of what is measured."""
    from pretrain.tokens.tokenizer import load_encoding

    encoding = load_encoding()
    tokens = (encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token))
    path.write_bytes(
        b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))
    )


def compare(corpus: Path, scratch: Path, processes: int, repeats: int) -> None:
    """Print the table, with the aims."""
    peaks, tokens = {}, None
    for role in (
        ROLES
    ):  # not timed: the files that Python and the system cache are read, the tokens compared
        result = run(role, corpus, scratch, processes, watch_memory=True)
        peaks[role] = result.peak_bytes / 1e9
        if result.files:
            if tokens and tokens != digest_of(result.files):
                sys.exit(f"{role} wrote other tokens than the baseline")
            tokens = digest_of(result.files)
        remove(result)
    print(f"tokens: {tokens[1]:,}, the same from both, SHA-256 {tokens[0][:16]}...", flush=True)
    rounds = []
    for _ in range(repeats):
        rounds.append({role: run(role, corpus, scratch, processes) for role in ROLES})
        for result in rounds[-1].values():
            remove(result)
    for role in ROLES:
        seconds = statistics.median(each[role].seconds for each in rounds)
        cpu_seconds = statistics.median(each[role].cpu_seconds for each in rounds)
        rate = f"{tokens[1] / seconds / 1e6:5.1f} M tokens/s"
        print(
            f"{role:10s} {seconds:6.2f} s, {rate}, {cpu_seconds:6.2f} s of CPU, "
            f"{peaks[role]:.2f} GB at most"
        )
    speedup = statistics.median(each["baseline"].seconds / each[OURS].seconds for each in rounds)
    share = statistics.median(each["ceiling"].seconds / each[OURS].seconds for each in rounds)
    print(f"{OURS}: {speedup:.1f} times the baseline (aim: {MIN_SPEEDUP}), ", end="")
    print(f"{share:.2f} of the ceiling (aim: {MIN_SHARE})")


def remove(result: Result) -> None:
    for path in result.files:
        path.unlink()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes", type=int, default=200, help="of text at most (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="of the baseline (default: one per core)",
    )
    parser.add_argument(
        "--role", nargs=4, metavar=("ROLE", "CORPUS", "FOLDER", "PROCESSES"), help=argparse.SUPPRESS
    )
    args = parser.parse_args(argv)
    if args.role:
        role, corpus, folder, processes = args.role
        if role == "baseline":
            run_baseline(Path(corpus), Path(folder), int(processes))
        else:
            run_ceiling(Path(corpus), Path(corpus).with_name("gpt2.tiktoken"))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.parquet")
        documents, size = make_corpus(corpus, args.megabytes)
        origin = "from the sources and documentation of Python and its packages"
        print(f"corpus: {documents:,} documents, {size / 1e6:.0f} MB of text, {origin}", flush=True)
        write_ranks(corpus.with_name("gpt2.tiktoken"))
        compare(corpus, Path(folder), args.processes, args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
