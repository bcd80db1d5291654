"""Folders of shards that are damaged, edited or odd: what is said of them, and what is mended."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from fuzzing import bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st

import fineweb
from pretrain.errors import UserError
from pretrain.tokens import shards as shards_module
from pretrain.tokens.formats import shard_header
from pretrain.tokens.owntext import prepare
from pretrain.tokens.shards import Manifest, ShardError, data_fingerprint, find_shards, open_shard
from pretrain.tokens.verify import verify_folder

ROOT = Path(__file__).parent.parent.parent
LINES = [json.dumps({"text": f"{i} wheels turn {i * i} times by the river"}) for i in range(300)]


pytestmark = pytest.mark.usefixtures("no_fsync")


def main(*args) -> int:
    return fineweb.main([str(arg) for arg in args])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def built_in(folder: Path) -> dict[str, bytes]:
    """All files but the manifest's content, which has the path of the source."""
    return contents(folder) | {"manifest.json": b""}


def command_in(folder: Path) -> list:
    args = ["--source", folder / "river.jsonl", "--shard_size", 500, "--num_proc", 1]
    return [*args, "--out_dir", folder / "out", "--tokenizer_backend", "tiktoken"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "river.jsonl").write_text("\n".join(LINES), encoding="utf-8")
    assert main(*command_in(folder)) == 0
    return folder


@pytest.fixture
def args(tmp_path, finished):
    """A command whose folder is built: 300 documents in shards of 500 tokens."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return command_in(tmp_path)


def edit_manifest(folder: Path, change) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    change(record)
    record["tokens"] = sum(shard["tokens"] for shard in record["shards"])
    record["documents"] = sum(shard["documents"] for shard in record["shards"])
    (folder / "manifest.json").write_text(json.dumps(record))


def unfinish(folder: Path) -> None:
    """As a kill before the last two shards leaves it."""

    def cut(record):
        del record["shards"][-1]
        record["next"] = record["shards"].pop()["first"]
        record["complete"] = False

    edit_manifest(folder, cut)


# ---- shards that are missing


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
def test_listed_shards_that_are_not_there_are_named_and_made_again_to_the_same_bytes(
    tmp_path, args, capsys, complete, damage
):
    out = tmp_path / "out"
    expected = contents(out)
    names = sorted(name for name in expected if name.endswith(".npy"))
    if not complete:
        unfinish(out)
    for name in (names[0], names[2], names[-1]):
        if damage == "missing":
            (out / name).unlink()
        else:
            extra = expected[name] + b"xx"
            (out / name).write_bytes(expected[name][:-100] if damage == "cut" else extra)
    capsys.readouterr()
    assert main(*args) == 0
    printed = capsys.readouterr().out
    assert "nothing is left to do" not in printed
    assert all(name in printed for name in (names[0], names[2], names[-1]))
    assert contents(out) == expected
    assert main(*args) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_a_shard_that_its_documents_do_not_give_any_more_is_an_error_that_leaves_all_as_it_was(
    tmp_path, args, capsys
):
    out = tmp_path / "out"
    edit_manifest(out, lambda record: record["shards"][1].update(sha256="0" * 64))
    find_shards(out, "train")[0].unlink()
    before = contents(out)
    assert main(*args) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "river_train_000001.npy" in error and "Restore" in error
    assert contents(out) == before


# ---- positions


@pytest.mark.parametrize(
    "edit",
    [
        {"row": -3},
        {"file": 99},
        {"file": -1},
        {"file": 1, "row": 0, "offset": 0},
        {"offset": 10**9},
        {"offset": None},
        {"token": 10**6},
        {"token": 0},
        {"token": True},
        {"row": 10**12},
        {"row": 1.5},
        {"more": 1},
        "gone",
        "one token less",
        "the next document",
    ],
    ids=str,
)
def test_an_edited_position_is_refused_in_one_line_and_nothing_is_written(
    tmp_path, args, capsys, edit
):
    out = tmp_path / "out"
    unfinish(out)

    def change(record):
        place = record["next"]
        if edit == "gone":
            record["next"] = None
        elif edit == "one token less":
            place["token"] += -1 if place["token"] > 1 else 1
        elif edit == "the next document":
            place["offset"] += len(LINES[place["row"]]) + 1
            place["row"] += 1
        else:
            place |= edit

    edit_manifest(out, change)
    listed = {shard["file"] for shard in json.loads((out / "manifest.json").read_text())["shards"]}
    before = {name: content for name, content in contents(out).items() if name in listed}
    assert main(*args) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "manifest.json" in error, error
    after = contents(out)
    assert {name: after[name] for name in listed} == before
    assert not list(out.glob("*.tmp"))


# ---- what the system says


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_what_the_system_refuses_is_said_and_not_called_damage(tmp_path, args, monkeypatch, number):
    path = find_shards(tmp_path / "out", "train")[0]
    opened = os.open

    def refuse(name, *more, **options):
        if Path(name) == path:
            raise OSError(number, os.strerror(number), str(name))
        return opened(name, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    for read in (open_shard, shards_module.verify_shard):
        with pytest.raises(ShardError, match=os.strerror(number)) as error:
            read(path)
        assert "build" not in str(error.value) and "damaged" not in str(error.value)


@pytest.mark.parametrize("call", range(1, 9))
def test_a_disk_that_is_full_at_any_moment_leaves_nothing_half_written(
    tmp_path, args, monkeypatch, capsys, call
):
    expected, out, calls = built_in(tmp_path / "out"), tmp_path / "again", 0
    args = [*args, "--out_dir", out]

    def fsync(handle):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("pretrain.files.fsync_folder", lambda folder: None)
    assert main(*args) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and "there is room" in error
    there = built_in(out) if Manifest.load(out) else contents(out)
    assert there.items() <= expected.items()  # whole files, and nothing temporary
    assert main(*args) == 0
    assert built_in(out) == expected


# ---- odd files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
@pytest.mark.parametrize("name", ["manifest.json", "river_train_000001.npy", "x_train_000099.npy"])
def test_a_pipe_in_the_folder_is_named_and_waited_for_by_nobody(tmp_path, args, capsys, name):
    out = tmp_path / "out"
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    assert main("--verify", "--out_dir", out) == (0 if name.startswith("x") else 1)
    assert name in "".join(capsys.readouterr())
    if name.startswith("x"):
        (out / "manifest.json").unlink()
        assert main("--verify", "--out_dir", out) == 1
        assert main(*args) == 1
    else:
        assert main(*args) == 1
        assert f"{name}: not a regular file" in capsys.readouterr().err


def test_verify_does_not_walk_through_a_folder_that_stands_for_a_file(tmp_path, args, capsys):
    edit = {"path": "/", "size": 1}
    edit_manifest(tmp_path / "out", lambda record: record["source"]["files"][0].update(edit))
    for shard_file in (tmp_path / "out").glob("*.npy"):
        assert shard_file.is_file()
    edit_manifest(
        tmp_path / "out",
        lambda record: (
            [shard.update(first={}) for shard in record["shards"]] and record.update(next=None)
        ),
    )
    assert main("--verify", "--out_dir", tmp_path / "out") == 0
    assert "no such file" in capsys.readouterr().out


# ---- documents that changed


def test_documents_edited_in_their_middle_stop_a_build_and_are_told_by_verify(
    tmp_path, args, capsys
):
    source = tmp_path / "river.jsonl"
    unfinish(tmp_path / "out")
    here = {"path": str(source)}  # and not where the finished folder was copied from
    edit_manifest(tmp_path / "out", lambda record: record["source"]["files"][0].update(here))
    data = bytearray(source.read_bytes())
    place = data.index(b"river", len(data) // 2)
    data[place : place + 5] = b"RIVER"  # the size stays, and so do the first and last bytes
    source.write_bytes(data)
    assert main(*args) == 1
    assert "river.jsonl" in capsys.readouterr().err
    main("--verify", "--out_dir", tmp_path / "out")
    assert "river.jsonl" in capsys.readouterr().out


# ---- a run's own output is no document


def documents_of(folder: Path) -> list[str]:
    return sorted(file["path"] for file in Manifest.load(folder).source["files"])


@pytest.mark.parametrize("where", ["run", "."])
def test_a_run_does_not_read_what_it_writes_at_first_or_again(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    Path("text/a.txt").write_text("The mill by the river. " * 50)
    Path("b.txt").write_text("Wheels turn. " * 50)
    prepare(["."], Path(where, "data"))
    first = contents(Path(where, "data"))
    assert documents_of(Path(where, "data")) == ["b.txt", "text/a.txt"]
    Path(where, "metrics.jsonl").write_text('{"step": 1}\n')
    Path(where, "data", "notes.txt").write_text("written later")
    prepare(["."], Path(where, "data"))
    Path(where, "data", "notes.txt").unlink()
    assert contents(Path(where, "data")) == first


def test_text_that_is_named_is_read_even_if_it_lies_in_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run/texts").mkdir(parents=True)
    for name in ("run/a.txt", "run/texts/b.txt", "run/log.txt"):
        Path(name).write_text("The mill by the river. " * 50)
    prepare(["run/a.txt", "run/texts/*"], Path("run/data"))
    assert documents_of(Path("run/data")) == ["run/a.txt", "run/texts/b.txt"]


def test_a_source_that_holds_the_output_folder_stays_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("The mill by the river. " * 50)
    assert main("--source", ".", "--out_dir", "shards") == 0
    Path("shards/build.txt").write_text("what a shell redirected here")
    assert main("--source", ".", "--out_dir", "shards") == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_advice_of_a_training_run_names_no_flag_that_training_lacks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "no text here"}\n' * 3)
    with pytest.raises(UserError) as error:
        prepare([tmp_path / "a.jsonl"], tmp_path / "out" / "data")
    assert "a.jsonl" in str(error.value) and "body" in str(error.value)
    assert "--text_column" not in str(error.value) and "--on_bad" not in str(error.value)
    assert "fineweb.py" in str(error.value) and "--data" in str(error.value)


def test_paths_in_commands_to_copy_are_quoted(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("The mill by the river. " * 50)
    out = tmp_path / "my shards; rm x"
    assert main("--source", tmp_path / "a.txt", "--out_dir", out) == 0
    assert f"--data_dir '{out}'" in capsys.readouterr().out
    with pytest.raises(ShardError, match=r"--out_dir '.*my other'"):
        find_shards(tmp_path / "my other", "train")


# ---- the program


def test_flags_that_are_misspelled_are_answered_with_the_right_ones_all_at_once(capsys):
    with pytest.raises(SystemExit) as stop:
        main("--sorce", "x", "--shard_sise=5", "--max_tokens", "1e400", "--num_proc", "nan")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    for part in ("did you mean --source?", "did you mean --shard_size?", "--max_tokens", "nan"):
        assert part in error


def test_the_version_is_printed(capsys):
    import pretrain

    with pytest.raises(SystemExit) as stop:
        main("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fineweb.py {pretrain.__version__}\n"


def command(*args) -> list[str]:
    return [sys.executable, str(ROOT / "fineweb.py"), *map(str, args)]


@pytest.mark.parametrize("output", ["closed pipe", "no stdout", "no stdout, no stderr"])
def test_output_that_goes_away_does_not_end_a_build(tmp_path, args, output):
    expected, out = built_in(tmp_path / "out"), tmp_path / "again"
    shell = {
        "closed pipe": '"$@" | true; exit ${PIPESTATUS[0]}',
        "no stdout": '"$@" >&-',
        "no stdout, no stderr": '"$@" >&- 2>&-',
    }[output]
    line = ["bash", "-c", shell, "_", *command(*args, "--out_dir", out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert built_in(out) == expected


def test_a_narrow_stdout_does_not_end_a_build(tmp_path, args):
    out = tmp_path / "日本 ẞ"
    done = subprocess.run(
        command(*args, "--out_dir", out),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert built_in(out) == built_in(tmp_path / "out")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_signals_of_terminals_and_schedulers_end_a_build_as_sigterm_does(tmp_path, args, name):
    number = getattr(signal, name)
    script = (
        "import os, fineweb\n"
        "from pretrain.tokens.build import Callbacks\n"
        "from pretrain.tokens import command\n"
        "class Stop(command.ConsoleProgress):\n"
        f"    def shard(self, shard): self.count = getattr(self, 'count', 0) + 1; "
        f"self.count == 3 and os.kill(os.getpid(), {int(number)})\n"
        "command.ConsoleProgress = Stop\n"
        f"raise SystemExit(fineweb.main({[str(a) for a in args[:-1]] + ['tiktoken']} "
        f"+ ['--out_dir', {str(tmp_path / 'again')!r}]))\n"
    )
    command = [sys.executable, "-c", script]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + number, done.stderr
    assert f"stopped by {name}; 3 finished shards" in done.stderr


# ---- bytes from outside


def mutations(value, values):
    """A JSON value with one place changed: removed, replaced, doubled, renamed."""
    paths = []

    def walk(here, path):
        paths.append(path)
        for key, each in here.items() if isinstance(here, dict) else enumerate(here):
            if isinstance(each, dict | list):
                walk(each, (*path, key))
            else:
                paths.append((*path, key))

    walk(value, ())

    @st.composite
    def mutate(draw):
        path = draw(st.sampled_from(paths))
        if not path:
            return draw(values)
        mutated = json.loads(json.dumps(value))
        parent = mutated
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "remove", "add", "nest"]))
        if how == "replace":
            parent[path[-1]] = draw(values)
        elif how == "remove":
            del parent[path[-1]]
        elif how == "nest":
            parent[path[-1]] = [parent[path[-1]]]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=5))] = draw(values)
        else:
            parent.append(draw(values))
        return mutated

    return mutate()


ODD = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["../x_train_000001.npy", "/", "C:\\x", "x" * 5000, "\0", "\ud800", "*"])
    | st.sampled_from([[], {}, [[]], {"": {}}])
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    (folder / "river.jsonl").write_text("\n".join(LINES[:60]), encoding="utf-8")
    args = ["--source", folder / "river.jsonl", "--out_dir", folder / "out"]
    assert main(*args, "--shard_size", 300, "--num_proc", 1) == 0
    return folder / "out", json.loads((folder / "out" / "manifest.json").read_text())


@fuzz(300)
@given(st.data())
def test_any_manifest_is_taken_or_refused_in_one_line(built, data):
    folder, record = built
    (folder / "manifest.json").write_text(json.dumps(data.draw(mutations(record, ODD))))
    for read in (verify_folder, data_fingerprint, lambda where: find_shards(where, "train")):
        try:
            with bounded():
                read(folder)
        except UserError as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 2_000


WORDS = [b"shape", b"<u2", b"False", b"(", b"9" * 20, b"-1", b"'|O'", b"__import__", b"\n"]


@fuzz(300)
@given(st.data(), st.sampled_from(["npy", "bin"]))
def test_any_bytes_of_a_header_are_taken_or_refused_in_one_line(tmp_path, data, ending):
    path = tmp_path / f"fuzzed_train_000001.{ending}"
    content = bytearray(shard_header(90, ending) + bytes(range(180)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 140))
        piece = data.draw(st.binary(max_size=4) | st.sampled_from(WORDS) | st.just(b"(" * 200))
        length = data.draw(st.sampled_from([0, len(piece)]))
        content[at : at + length] = piece
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), 7, 130]))])
    try:
        with bounded():
            tokens = open_shard(path)
    except ShardError as error:
        assert str(error).count("\n") == 0
    else:
        assert tokens.dtype == np.uint16 and tokens.ndim == 1 and len(tokens)


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, '{"a":' * 50_000, '{"format": NaN}', "9" * 10_000),
        *('{"format": 1, "tokens": 0', '{"format": 1, "name": "\\ud800"}'),
    ],
    ids=len,
)
def test_a_manifest_that_is_made_to_break_its_reader_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_a_manifest_of_more_bytes_than_any_folder_needs_is_refused_unread(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # a hole: no disk is taken
    with pytest.raises(ShardError, match="larger than"):
        Manifest.load(tmp_path)
