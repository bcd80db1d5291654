"""Token files of others: read as their own programs write and read them."""

import numpy as np
import pytest

from pretrain.tokens.formats import TokenFileError, header, open_tokens, token_files

TOKENS = np.array([50256, 15496, 995, 0, 50255], np.uint16)


def llm_c_bytes(tokens):
    """As llm.c's dev/data/data_common.py lays it out: 256 int32, of which three are used."""
    numbers = np.zeros(256, dtype=np.int32)
    numbers[0], numbers[1], numbers[2] = 20240520, 1, len(tokens)
    return numbers.tobytes() + np.asarray(tokens, np.uint16).tobytes()


def test_a_shard_of_llm_c_reads_as_its_tokens(tmp_path):
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(llm_c_bytes(TOKENS))
    assert np.array_equal(open_tokens(path), TOKENS)
    assert header("bin", len(TOKENS)) == llm_c_bytes(TOKENS)[:1024]


def test_a_file_of_nanogpt_reads_as_its_tokens(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")  # as nanoGPT's prepare.py does
    assert np.array_equal(open_tokens(tmp_path / "train.bin"), TOKENS)


def test_a_npy_header_is_the_one_that_numpy_writes(tmp_path):
    np.save(tmp_path / "a_train_000001.npy", TOKENS)
    written = (tmp_path / "a_train_000001.npy").read_bytes()
    assert header("npy", len(TOKENS)) + TOKENS.tobytes() == written
    assert np.array_equal(open_tokens(tmp_path / "a_train_000001.npy"), TOKENS)


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
    with pytest.raises(TokenFileError, match=said) as error:
        open_tokens(tmp_path / name)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_what_the_system_refuses_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_tokens(tmp_path / "a_train_000001.npy")
    (tmp_path / "a_train_000002.npy").mkdir()
    with pytest.raises(OSError, match="a_train_000002"):
        open_tokens(tmp_path / "a_train_000002.npy")


def test_files_of_a_folder_come_by_index_and_one_kind_at_a_time(tmp_path):
    for name in ("w_train_000010.bin", "w_train_000002.bin", "w_val_000000.bin", "notes.bin"):
        (tmp_path / name).write_bytes(llm_c_bytes(TOKENS))
    names = [path.name for path in token_files(tmp_path, "train")]
    assert names == ["w_train_000002.bin", "w_train_000010.bin"]
    assert len(token_files(tmp_path)) == 3
    np.save(tmp_path / "w_train_000003.npy", TOKENS)
    with pytest.raises(TokenFileError, match="different kinds"):
        token_files(tmp_path, "train")
