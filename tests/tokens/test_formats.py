"""Token files of others: read as their own programs write and read them."""

import numpy as np
import pytest

from pretrain.text.documents import local_source
from pretrain.tokens.build import BuildRefused, Settings, Work, build_shards
from pretrain.tokens.formats import shard_header, token_files
from pretrain.tokens.shards import ShardError, find_shards, open_shard
from pretrain.tokens.tokenizer import Tokenizer
from pretrain.tokens.verify import verify_folder
from pretrain.train.loader import TokenWindows

TOKENS = np.array([50256, 15496, 995, 0, 50255], np.uint16)


def llm_c_bytes(tokens):
    """As llm.c's dev/data/data_common.py lays it out: 256 int32, of which three are used."""
    numbers = np.zeros(256, dtype=np.int32)
    numbers[0], numbers[1], numbers[2] = 20240520, 1, len(tokens)
    return numbers.tobytes() + np.asarray(tokens, np.uint16).tobytes()


def test_a_shard_of_llm_c_reads_as_its_tokens(tmp_path):
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(llm_c_bytes(TOKENS))
    assert np.array_equal(open_shard(path), TOKENS)
    assert shard_header(len(TOKENS), "bin") == llm_c_bytes(TOKENS)[:1024]


def test_a_file_of_nanogpt_reads_as_its_tokens(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")  # as nanoGPT's prepare.py does
    assert np.array_equal(open_shard(tmp_path / "train.bin"), TOKENS)


def test_a_npy_header_is_the_one_that_numpy_writes(tmp_path):
    np.save(tmp_path / "a_train_000001.npy", TOKENS)
    written = (tmp_path / "a_train_000001.npy").read_bytes()
    assert shard_header(len(TOKENS)) + TOKENS.tobytes() == written
    assert np.array_equal(open_shard(tmp_path / "a_train_000001.npy"), TOKENS)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a_train_000001.bin", llm_c_bytes(TOKENS)[:-1], "cut short"),
        ("a_train_000001.bin", llm_c_bytes(TOKENS) + b"xx", "its header says 5 tokens"),
        ("a_train_000001.bin", llm_c_bytes([]), "no tokens in it"),
        ("a_train_000001.bin", llm_c_bytes(TOKENS)[:500], "version 1 of llm.c's"),
        ("a_train_000001.bin", TOKENS.tobytes(), "nanoGPT's names"),
        ("train.bin", TOKENS.tobytes() + b"x", "odd number of bytes"),
        ("train.bin", b"", "no tokens in it"),
        ("val.bin", np.array([20240801, 7], "<i4").tobytes(), "Llama 3 tokens"),
        ("a_train_000001.npy", b"\x93NUMPY\x01\x00", "not a whole .npy file"),
        ("a_train_000001.npy", b"PK\x03\x04 an archive", "not a whole .npy file"),
    ],
)
def test_what_is_not_whole_or_of_another_kind_is_named_in_a_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShardError, match=said) as error:
        open_shard(tmp_path / name)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_shards_in_both_formats_hold_the_same_tokens_and_one_goes_on_in_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("The mill stood at the river. " * 400)
    source = local_source([tmp_path / "a.txt"])
    work = Work(Tokenizer("tiktoken"))
    for form in ("npy", "bin"):
        settings = Settings(shard_size=700, format=form if form == "bin" else None)
        build_shards(source, tmp_path / form, settings, work, expected_tokens=10**6)
    for split in ("val", "train"):
        npy, llm_c = (find_shards(tmp_path / form, split) for form in ("npy", "bin"))
        assert [path.stem for path in npy] == [path.stem for path in llm_c]
        for one, other in zip(npy, llm_c, strict=True):
            assert np.array_equal(open_shard(one), open_shard(other))
            assert other.read_bytes() == llm_c_bytes(np.load(one))
    assert not verify_folder(tmp_path / "bin").problems
    with pytest.raises(BuildRefused, match="--format was bin, now not given"):
        build_shards(source, tmp_path / "bin", Settings(shard_size=700), work)


@pytest.mark.parametrize("name", ["train.bin", "x_train_000001.bin", "x_train_000001.npy"])
def test_the_loader_reads_the_same_windows_from_every_format(tmp_path, name):
    tokens = np.random.default_rng(1).integers(0, 50257, 5000).astype(np.uint16)
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, tokens)
    else:
        path.write_bytes(tokens.tobytes() if name == "train.bin" else llm_c_bytes(tokens))
    windows = TokenWindows(find_shards(tmp_path, "train"), block_size=16)
    read = windows.read(np.arange(len(windows)))
    assert np.array_equal(read[:, :-1].ravel(), tokens[: len(windows) * 16])


def test_files_of_a_folder_come_by_index_and_npy_before_bin(tmp_path):
    for name in ("w_train_000010.bin", "w_train_000002.bin", "w_val_000000.bin", "notes.bin"):
        (tmp_path / name).write_bytes(llm_c_bytes(TOKENS))
    TOKENS.tofile(tmp_path / "train.bin")
    names = [path.name for path in token_files(tmp_path, "train")]
    assert names == ["w_train_000002.bin", "w_train_000010.bin"]
    assert len(token_files(tmp_path)) == 3
    np.save(tmp_path / "w_train_000003.npy", TOKENS)
    assert [path.name for path in token_files(tmp_path)] == ["w_train_000003.npy"]
