from contextlib import nullcontext

import numpy as np
import pytest
import torch

from pretrain.distributed import Ranks
from pretrain.eval.validation import evaluate, first, padded_batch, spread
from pretrain.train.loader import TokenWindows


class Bigram(torch.nn.Module):
    """Scores by a table, as GPT.score does: sums of losses and of right predictions over targets
    not negative."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(
            torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
        )
        self.shapes, self.modes = set(), set()

    def score(self, x, y):
        self.shapes.add(tuple(x.shape))
        self.modes.add(self.training)
        logits, y = self.table[x].flatten(0, 1), y.flatten()
        loss = torch.nn.functional.cross_entropy(logits, y, ignore_index=-1, reduction="sum")
        return loss.double(), (logits.argmax(-1) == y).sum(), (y >= 0).sum()


class Pretended(Ranks):
    """Rank `rank` of `world_size` in one process: sums are left to the test."""

    def sum(self, *values):
        return list(values)


@pytest.fixture
def windows(tmp_path):
    np.save(
        tmp_path / "t_val_000000.npy",
        np.random.default_rng(0).integers(0, 50, 403).astype(np.uint16),
    )
    return TokenWindows([tmp_path / "t_val_000000.npy"], block_size=8)


def test_the_numbers_are_those_of_a_plain_loop_for_any_number_of_ranks_and_any_batch(windows):
    model = Bigram()
    numbers = first(windows, 23)
    rows = torch.from_numpy(windows.read(numbers).astype(np.int64))
    logits = model.table[rows[:, :-1]]
    losses = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    )
    right = (logits.argmax(-1) == rows[:, 1:]).double().mean().item()
    for world_size in (1, 2, 3, 30):
        for batch_size in (1, 4, 23):
            parts = [
                evaluate(
                    model,
                    {"val": (windows, numbers)},
                    batch_size=batch_size,
                    autocast=nullcontext(),
                    ranks=Pretended(rank, world_size, torch.device("cpu")),
                )["val"]
                for rank in range(world_size)
            ]
            tokens = [part["tokens"] for part in parts]
            assert sum(tokens) == 23 * 8 and max(tokens) - min(tokens) <= 8
            loss = sum(part["loss"] * part["tokens"] for part in parts) / sum(tokens)
            accuracy = sum(part["accuracy"] * part["tokens"] for part in parts) / sum(tokens)
            assert loss == pytest.approx(
                losses.mean().item(), abs=1e-6
            ) and accuracy == pytest.approx(right)


def test_all_batches_have_one_shape_and_the_model_is_in_eval_mode_meanwhile(windows):
    model = Bigram().train()
    alone = Ranks(0, 1, torch.device("cpu"))
    evaluate(
        model,
        {"val": (windows, first(windows, 10))},
        batch_size=4,
        autocast=nullcontext(),
        ranks=alone,
    )
    assert model.shapes == {(4, 8)} and model.modes == {False} and model.training


def test_windows_are_the_first_or_evenly_spread_and_never_more_than_there_are(windows):
    assert len(windows) == 50
    assert first(windows, 3).tolist() == [0, 1, 2] and spread(windows, 5).tolist() == [
        0,
        10,
        20,
        30,
        40,
    ]
    assert first(windows, 999).tolist() == spread(windows, 999).tolist() == list(range(50))


def test_padding_has_targets_that_do_not_count(windows):
    x, y = padded_batch(windows, np.array([3]), 3)
    assert x.shape == y.shape == (3, 8) and (y[0] >= 0).all() and (y[1:] == -1).all()
    assert torch.equal(x[0, 1:], y[0, :-1])


def test_an_interruption_leaves_the_rest_out(windows):
    model, calls = Bigram(), []

    def interrupted():
        calls.append(1)
        return len(calls) > 2

    alone = Ranks(0, 1, torch.device("cpu"))
    scores = evaluate(
        model,
        {"val": (windows, first(windows, 40))},
        batch_size=4,
        autocast=nullcontext(),
        ranks=alone,
        interrupted=interrupted,
    )
    assert scores["val"]["tokens"] == 2 * 4 * 8


class Counting(Bigram):
    """Counts its forward passes."""

    passes = 0

    def score(self, x, y):
        self.passes += 1
        return super().score(x, y)


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_every_rank_makes_the_same_number_of_forward_passes(windows, world_size, count):
    passes = set()
    for rank in range(world_size):
        model = Counting()
        evaluate(
            model,
            {"val": (windows, first(windows, count))},
            batch_size=2,
            autocast=nullcontext(),
            ranks=Pretended(rank, world_size, torch.device("cpu")),
        )
        passes.add(model.passes)
    assert len(passes) == 1, passes


def test_an_interruption_of_one_rank_stops_all_after_the_same_pass(windows):
    class OtherIsTold(Ranks):
        def sum(self, *values):
            return [value + 1 for value in values]

    model = Counting()
    evaluate(
        model,
        {"val": (windows, first(windows, 40))},
        batch_size=4,
        autocast=nullcontext(),
        ranks=OtherIsTold(0, 2, torch.device("cpu")),
    )
    assert model.passes == 0


def test_bits_per_byte_are_those_of_the_decoded_text(tmp_path):
    from pretrain.tokens.tokenizer import END_OF_TEXT, load_encoding

    encoding = load_encoding()
    text = "Der Müller, 日本語 🦉 and the mill. " * 9
    tokens = [END_OF_TEXT, *encoding.encode_ordinary(text)]
    tokens = tokens[: (len(tokens) - 1) // 8 * 8 + 1]
    np.save(tmp_path / "t_val_000000.npy", np.array(tokens, dtype=np.uint16))
    windows = TokenWindows([tmp_path / "t_val_000000.npy"], block_size=8)

    class Uniform(torch.nn.Module):
        def score(self, x, y):
            count = (y >= 0).sum()
            return count * np.log(50257), count * 0, count

    scores = evaluate(
        Uniform(),
        {"val": (windows, first(windows, 99))},
        batch_size=3,
        autocast=nullcontext(),
        ranks=Ranks(0, 1, torch.device("cpu")),
    )["val"]
    size = len(encoding.decode_bytes(tokens[1:]))
    assert scores["tokens"] == len(tokens) - 1
    assert scores["bits_per_byte"] == pytest.approx(
        (len(tokens) - 1) * np.log2(50257) / size, rel=1e-6
    )
