"""A mixture in the loader, in the settings and in a run of train_gpt2.py."""

import os
import re
import signal
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from tiny_runs import flags

import train_gpt2
from pretrain.eval.validation import weighted
from pretrain.report.lines import eval_line
from pretrain.report.page import key_figures
from pretrain.report.plots import plots
from pretrain.report.runlog import last_per_step, read_log
from pretrain.report.runs import Run
from pretrain.tokens.formats import shard_header
from pretrain.tokens.shards import ShardError
from pretrain.train import loader as loader_module
from pretrain.train.data import TrainingData
from pretrain.train.settings import resolve

BLOCK = 4


def numbered(folder, num_windows, first, ending="npy"):
    """A folder in which window i of train begins with token first + i, in two shards."""
    folder.mkdir(parents=True)
    tokens = np.append(np.repeat(first + np.arange(num_windows), BLOCK), 0).astype("<u2")
    parts = {"val_000000": tokens[: 5 * BLOCK + 1]}
    parts |= {f"train_{i + 1:06d}": part for i, part in enumerate(np.array_split(tokens, 2))}
    for name, part in parts.items():
        content = shard_header(len(part), ending) + part.tobytes()
        (folder / f"t_{name}.{ending}").write_bytes(content)
    return folder


@pytest.fixture(autouse=True, scope="module")
def short_blocks():
    """So that the thread makes hundreds of steps at a time, not the 26,000 that a MiB holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "READ_AHEAD_TOKENS", 8_000)
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    web = numbered(folder / "web", 97, 0)
    books = numbered(folder / "books", 41, 1000, "bin")
    code = numbered(folder / "code", 30, 2000)
    return [f"web={web}:0.7", f"books={books}:0.2@40:0.5", f"code={code}:0.1"]


def loader_of(words, batch_size=8, accumulation_steps=1, **changes):
    settings = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
    return TrainingData(words).loader(block_size=BLOCK, **settings, **changes)


def firsts(loader, step):
    """The window of each sequence, micro-step after micro-step: (micro_steps, batch_size)."""
    return loader.batch(step)[0][..., 0].numpy()


@pytest.fixture(scope="module")
def used(words):
    """The first 10,000 steps, of 8 sequences: (10000, 8) first tokens of windows, read as a run
    does."""
    with closing(loader_of(words).prefetch()) as batches:
        return np.stack([next(batches)[0][0, :, 0].numpy() for _ in range(10_000)])


def test_one_two_and_four_ranks_and_a_run_that_goes_on_have_the_same_batches(words, used):
    for step in (0, 7, 39, 40, 41, 3001):
        for world_size, batch_size in ((1, 8), (2, 4), (2, 2), (4, 2), (4, 1)):
            steps = 8 // (world_size * batch_size)
            parts = [
                firsts(loader_of(words, batch_size, steps, rank=r, world_size=world_size), step)
                for r in range(world_size)
            ]
            assert np.concatenate(parts, axis=1).reshape(-1).tolist() == used[step].tolist()
    with closing(loader_of(words).prefetch(777)) as batches:
        for step in range(777, 790):
            assert next(batches)[0][0, :, 0].tolist() == used[step].tolist()


def test_the_share_of_each_source_is_within_one_sequence_of_its_weight_at_every_step(words, used):
    had = np.cumsum([(used // 1000 == s).sum(axis=1) for s in range(3)], axis=1)
    steps = np.arange(1, 10_001)
    for s, (early, late) in enumerate(((0.7, 0.7 / 1.3), (0.2, 0.5 / 1.3), (0.1, 0.1 / 1.3))):
        wanted = 8 * early * np.minimum(steps, 40) + 8 * late * np.maximum(steps - 40, 0)
        first = np.abs(had[s] - wanted)[:40]
        later = np.abs((had[s] - had[s, 39]) - (wanted - wanted[39]))[40:]
        assert max(first.max(), later.max()) < 1
    progress = loader_of(words).progress(10_000)
    for s, (name, size) in enumerate((("web", 97), ("books", 41), ("code", 30))):
        assert progress[name] == {"tokens": had[s, -1] * BLOCK, "epochs": had[s, -1] / size}


def test_every_window_of_a_source_is_used_once_in_each_epoch_of_its_own(used):
    orders = []
    for first, size in ((0, 97), (1000, 41), (2000, 30)):
        order = used[used // 1000 == first // 1000]
        epochs = order[: len(order) // size * size].reshape(-1, size)
        assert np.array_equal(
            np.sort(epochs, axis=1), np.tile(first + np.arange(size), (len(epochs), 1))
        )
        assert len(np.unique(epochs, axis=0)) == len(epochs) > 20
        orders.append(order)
    assert (orders[1][:30] - 1000).tolist() != (orders[2][:30] - 2000).tolist()


def test_small_pools_and_two_copies_of_a_text_are_read_each_in_its_own_order(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "CHUNK_WINDOWS", 4)
    monkeypatch.setattr(loader_module, "POOL_CHUNKS", 3)
    a, b = numbered(tmp_path / "a", 97, 0), numbered(tmp_path / "b", 97, 0)
    loader = loader_of([f"a={a}:1", f"b={b}:1"])
    with closing(loader.prefetch()) as batches:
        rows = np.concatenate([next(batches)[0][0, :, 0].numpy() for _ in range(49)])
    part = loader.schedule.pick(np.arange(49 * 8))[0]
    orders = [rows[part == s][:97].tolist() for s in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(97)) and orders[0] != orders[1]


def test_the_order_in_which_sources_are_named_changes_nothing(words):
    turned = words[::-1]
    assert firsts(loader_of(words), 5).tolist() == firsts(loader_of(turned), 5).tolist()
    assert TrainingData(words).fingerprint() == TrainingData(turned).fingerprint()
    assert TrainingData(words).identity() == TrainingData(turned).identity()


def test_identity_and_fingerprint_cover_names_weights_and_shards(words, tmp_path):
    known = TrainingData(words)
    other = numbered(tmp_path / "other", 97, 5)
    for changed in (
        [words[0].replace("web=", "net="), *words[1:]],
        [words[0].replace(":0.7", ":0.6"), *words[1:]],
        [words[0], words[1].replace("@40", "@50"), words[2]],
        [f"web={other}:0.7", *words[1:]],
        words[:2],
    ):
        assert TrainingData(changed).fingerprint() != known.fingerprint()
        assert TrainingData(changed).identity() != known.identity()
    doubled = [words[0].replace(":0.7", ":1.4"), words[1].replace("0.2@40:0.5", "0.4@40:1")]
    doubled.append(words[2].replace(":0.1", ":0.2"))
    assert TrainingData(doubled).identity() == known.identity(), "weights are relative"


def test_every_source_is_verified_and_compared_between_machines(words, tmp_path):
    good, bad = numbered(tmp_path / "good", 9, 0), numbered(tmp_path / "bad", 9, 60_000)
    data = TrainingData([f"good={good}:1", f"bad={bad}:1"])
    with pytest.raises(ShardError, match=r"bad.*holds id"):
        data.verify(None, 0, 1)
    found = data.fingerprints()
    data.refuse_different([found, dict(found)])
    with pytest.raises(ShardError, match="good: on the machine of rank 1"):
        data.refuse_different([found, found | {"good": "x"}])


def test_weighted_scores_are_those_of_the_text_of_the_sources_by_share():
    # Per token: 2 nats and 4 bytes, 3 nats and 2 bytes; of 100 tokens 75 and 25.
    scores = {
        f"{split}/{name}": {
            "loss": loss,
            "accuracy": loss / 10,
            "bits_per_byte": loss / np.log(2) / size,
            "tokens": 10,
        }
        for split in ("val", "train")
        for name, loss, size in (("web", 2.0, 4), ("books", 3.0, 2))
    }
    val = weighted(scores, {"web": 0.75, "books": 0.25})["val"]
    assert val["loss"] == pytest.approx((75 * 2 + 25 * 3) / 100)
    assert val["accuracy"] == pytest.approx(0.225) and val["tokens"] == 20
    assert val["bits_per_byte"] == pytest.approx(225 / np.log(2) / (75 * 4 + 25 * 2))
    assert weighted(scores, {}) is scores


# ---- flags


def test_one_folder_stays_a_string_and_a_list_in_a_file_of_flags_is_a_mixture(words, tmp_path):
    folder = words[0].split("=")[1].removesuffix(":0.7")
    settings, problems = resolve(["--data_dir", folder], 1)
    assert not problems and settings.data_dir == settings.flags["data_dir"] == folder
    config = tmp_path / "run.yaml"
    config.write_text("data_dir:\n" + "".join(f"  - {word}\n" for word in words))
    settings, problems = resolve(["--config", str(config)], 1)
    assert not problems and settings.data_dir == words
    settings, problems = resolve(["--config", str(config), "--data_dir", folder], 1)
    assert not problems and settings.data_dir == folder


def test_what_is_wrong_with_a_mixture_is_said_all_at_once_one_line_each(words, tmp_path):
    folder = words[0].split("=")[1].removesuffix(":0.7")
    wrong = ["plain", f"a={tmp_path / 'none'}:1", f"b={folder}:1.2.3", f"c={folder}:1"]
    _, problems = resolve(["--data_dir", *wrong, f"d={folder}/:1", "--batch_size", "4"], 1)
    for said in ("'plain' is not a source", "a: .*no such folder", "a weight is a", "c and d are"):
        assert sum(bool(re.search(said, problem)) for problem in problems) == 1
    assert len(problems) == 4 and not any("\n" in problem for problem in problems)
    _, problems = resolve(["--data_dir", f"web={folder}"], 1)
    assert len(problems) == 1 and "NAME=FOLDER:WEIGHT" in problems[0]
    _, problems = resolve(["--data_dir", f"web={folder}:0.1234567", words[1]], 1)
    assert len(problems) == 1 and "round them" in problems[0]


# ---- runs


def write_source(folder, seed, ending="npy"):
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for name, length in (("val_000000", 170), ("train_000001", 700)):
        tokens = (random.zipf(1.3, length) % 500).astype("<u2")
        content = shard_header(length, ending) + tokens.tobytes()
        (folder / f"t_{name}.{ending}").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    web, books = write_source(folder / "web", 1), write_source(folder / "books", 2, "bin")
    return [f"web={web}:0.7", f"books={books}:0.3@3:0.6"]


def command(words, out_dir, **changes):
    quiet = {"hellaswag": False, "sample_interval": 0, "eval_iters": 1, "device": "cpu"}
    sizes = {"val_tokens": 100, "max_iters": 4, "eval_interval": 2}
    return ["--data_dir", *words, *flags(None, out_dir, **quiet | sizes | changes)]


def records(out_dir, event):
    return last_per_step(read_log(out_dir / "metrics.jsonl"), event)


@pytest.fixture(scope="module")
def whole(mixture, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    assert train_gpt2.main(command(mixture, out_dir)) == 0
    return out_dir


COMPARED = ("step", "loss", "grad_norm", "val_loss", "train_loss", "sources")


def test_an_interrupted_run_on_a_mixture_ends_as_if_it_had_not_been(
    mixture, whole, tmp_path, monkeypatch
):
    log_update = train_gpt2.Run._log_update

    def interrupted(self, *numbers):
        log_update(self, *numbers)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.Run, "_log_update", interrupted)
        assert train_gpt2.main(command(mixture, tmp_path)) == 143
    assert train_gpt2.main(command(mixture[::-1], tmp_path)) == 0
    for event in ("train", "eval"):
        mine, theirs = (
            [[record.get(name) for name in COMPARED] for record in records(folder, event)]
            for folder in (tmp_path, whole)
        )
        assert mine == theirs
    mine, theirs = (
        torch.load(folder / "final_model.pt", weights_only=True)["model"]
        for folder in (tmp_path, whole)
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_log_has_each_source_and_the_weighted_loss_decides_which_is_best(whole):
    evals = records(whole, "eval")
    for record, web in zip(evals, (0.7, 0.7, 0.7 / 1.3), strict=True):
        parts = record["sources"]
        for name in ("val_loss", "train_loss", "accuracy"):
            mean = web * parts["web"][name] + (1 - web) * parts["books"][name]
            assert record[name] == pytest.approx(mean)
        assert record["val_tokens"] == 2 * 96, "whole windows of 16 in 100 tokens, of each source"
    assert parts["web"]["val_loss"] != parts["books"]["val_loss"]
    best = torch.load(whole / "best_val_loss.pt", weights_only=True)
    assert best["best_val_loss"] == min(record["val_loss"] for record in evals)
    for record in (*records(whole, "train"), *evals):
        tokens = {name: part["tokens"] for name, part in record["sources"].items()}
        assert sum(tokens.values()) == record["tokens"]
        assert record["sources"]["web"]["epochs"] == tokens["web"] / 16 / 43
    line = eval_line(evals[-1], 4)
    assert (
        f"web {parts['web']['val_loss']:.4f} ({parts['web']['tokens']} tokens" in line
        and "bits per byte" in line
    )


def test_the_report_shows_tokens_epochs_and_losses_of_each_source(whole):
    run = Run.load(whole)
    shown = {figure.label: figure for figure in key_figures(run)}
    last = records(whole, "eval")[-1]["sources"]["books"]
    figure = shown["Source books"]
    assert figure.value == f"{last['tokens']} tokens"
    assert figure.note == f"{last['epochs']:.2f} epochs; validation loss {last['val_loss']:.4f}"
    assert "sources" in [plot.name for plot in plots([run])]


def test_the_start_names_the_sources_and_other_weights_are_refused_with_what_differs(
    mixture, whole, tmp_path, capfd
):
    other = [mixture[0], mixture[1].replace("@3:0.6", "@3:0.5")]
    assert train_gpt2.main(command(other, whole, max_iters=6)) == 1
    error = capfd.readouterr().err
    assert "data books: " in error and "0.3 from step 0" in error and "now" in error
    assert train_gpt2.main(command(mixture[:1], whole, max_iters=6)) == 1
    assert "data books: " in capfd.readouterr().err
    assert train_gpt2.main(command(mixture, tmp_path, max_iters=1, val_tokens=96)) == 0
    out, error = capfd.readouterr()
    assert "6 windows of val/books" in out and "0.7 of each batch, 0.5385 from step 3" in out
    assert "--val_tokens" not in error


def test_val_tokens_scores_exactly_the_first_tokens(mixture, tmp_path, capfd):
    folder = mixture[0].split("=")[1].removesuffix(":0.7")
    run = partial(command, [folder], max_iters=1, eval_interval=1)
    assert train_gpt2.main(run(tmp_path / "a", val_tokens=100)) == 0
    out, error = capfd.readouterr()
    assert error.count("--val_tokens 100: scored are 96") == 1 and "6 windows of val" in out
    assert train_gpt2.main(run(tmp_path / "b", val_tokens=0, eval_iters=3)) == 0
    mine, theirs = records(tmp_path / "a", "eval"), records(tmp_path / "b", "eval")
    assert [r["val_loss"] for r in mine] == [r["val_loss"] for r in theirs]
    assert "val_tokens" in mine[0] and "val_tokens" not in theirs[0]
    capfd.readouterr()
    for wrong in (10, 1000):
        assert train_gpt2.main(run(tmp_path / "c", val_tokens=wrong)) == 2
        assert f"--val_tokens {wrong:,}: {folder} has 160 to score" in capfd.readouterr().err
