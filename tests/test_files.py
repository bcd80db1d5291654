"""Files are whole or not there: what atomic writes leave, and what they refuse."""

import errno
import os
import resource
import stat

import pytest

from pretrain import files


@pytest.mark.parametrize("durable", [True, False])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, durable):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1}, durable=durable)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), files.atomic_write(path, durable=durable) as file:
        file.write(b"half of")
        1 / 0  # noqa: B018
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.write_text(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_what_a_full_disk_refuses_is_called_as_its_user_calls_it(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            files.write_text(tmp_path / "a.txt", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(OSError, match="File name too long") as long:
        files.write_text(tmp_path / ("x" * 253), "x")
    assert full.value.errno == errno.EFBIG and full.value.filename == str(tmp_path / "a.txt")
    assert long.value.filename == str(tmp_path / ("x" * 253))
    assert not list(tmp_path.iterdir())
