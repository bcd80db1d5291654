"""Rows, batches and losses of endings, against one sequence at a time."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import GPT, GPTConfig
from pretrain.eval.choices import (
    Item,
    attention_mask,
    collate,
    computing,
    fit,
    make_batches,
    make_rows,
    score,
    take_apart,
)

CPU = torch.device("cpu")


def random_items(count, seed=0, context=(1, 30), ending=(1, 12), vocabulary=50):
    draw = random.Random(seed)

    def tokens(low, high):
        return [draw.randrange(vocabulary) for _ in range(draw.randint(low, high))]

    return [Item(tokens(*context), [tokens(*ending) for _ in range(4)]) for _ in range(count)]


def small_gpt(block_size=96, seed=0):
    """Larger weights than GPT-2's initialisation, so that losses differ by whole nats."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(block_size=block_size, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 15
    return model


def losses_of(model, items, batch_tokens=256, share=True):
    parts = take_apart(model)
    found = torch.full((len(items), 4), torch.nan, dtype=torch.float64)
    batches = make_batches(make_rows(items, parts.block_size, share and parts.packs), batch_tokens)
    with computing(CPU, None):
        for scores in score(parts, batches, CPU):
            assert found[scores.items, scores.choices].isnan().all(), "an ending was scored twice"
            found[scores.items, scores.choices] = torch.from_numpy(scores.sums)
    return found


@torch.no_grad()
def losses_one_by_one(model, items, block_size):
    """Every context and ending as a sequence of its own, the last block_size + 1 tokens of it."""
    found = []
    for item in items:
        for ending in item.endings:
            sequence = torch.tensor((item.context + ending)[-(block_size + 1) :])
            logits = model(sequence[None, :-1])[0][0]
            losses = F.cross_entropy(logits, sequence[1:], reduction="none")
            found.append(losses[-len(ending) :].double().sum())
    return torch.stack(found).view(-1, 4)


@pytest.mark.parametrize("block_size", [96, 40, 20, 8])
def test_losses_equal_those_of_one_sequence_at_a_time_whatever_has_to_be_cut(block_size):
    items, model = random_items(60), small_gpt(block_size)
    expected = losses_one_by_one(model, items, block_size)
    assert expected.std() > 5
    assert (losses_of(model, items) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_the_size_of_a_batch_changes_nothing(batch_tokens):
    items, model = random_items(30), small_gpt()
    assert (
        losses_of(model, items, batch_tokens) - losses_one_by_one(model, items, 96)
    ).abs().max() < 1e-4


def test_an_ending_longer_than_the_model_is_scored_on_its_last_tokens():
    item = Item([1, 2, 3], [list(range(10, 40)), [5], [6], [7]])
    model = small_gpt(block_size=8)
    assert fit(*[item.context, item.endings[0]], 8) == ([31], [32, 33, 34, 35, 36, 37, 38, 39])
    assert (losses_of(model, [item]) - losses_one_by_one(model, [item], 8)).abs().max() < 1e-4


def test_four_endings_share_one_row_and_their_last_tokens_are_left_out():
    (row,) = make_rows(
        [Item([1, 2, 3], [[4, 5], [6], [7, 8, 9], [4]])], block_size=None, share=True
    )
    batch = collate([row], width_multiple=4)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 7, 8, 0, 0]]
    assert batch.positions[0, :6].tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.branches.tolist() == [[0, 0, 0, 1, 3, 3, -1, -1]]
    assert batch.sources.tolist() == [2, 3, 2, 2, 4, 5, 2]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 9, 4]


def test_the_mask_shows_the_context_and_the_own_ending_only():
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_rows_stay_within_the_block_and_batches_within_the_budget():
    items = random_items(200)
    rows = make_rows(items, block_size=48, share=True)
    assert all(row.length <= 48 for row in rows)
    assert sorted((row.item, c) for row in rows for cs in row.choices for c in cs) == [
        (i, c) for i in range(200) for c in range(4)
    ]
    batches = make_batches(rows, 256)
    assert [len(batch) * max(row.length for row in batch) <= 256 for batch in batches]
    assert sum(len(batch) for batch in batches) == len(rows)
    positions = sum(len(batch) * batch[0].length for batch in batches)
    assert positions < 1.02 * sum(row.length for row in rows), (
        "rows of different length share batches"
    )


def test_equal_endings_get_equal_losses_without_being_computed_twice():
    item = Item([1, 2], [[5, 6], [7], [5, 6], [7]])
    (row,) = make_rows([item], 96, share=True)
    assert row.choices == [[0, 2], [1, 3]] and row.length == 3
    (losses,) = losses_of(small_gpt(), [item]).tolist()
    assert losses[0] == losses[2] and losses[1] == losses[3]


def transformers_gpt2(attention):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        n_positions=64, vocab_size=50, n_layer=2, n_head=2, n_embd=16, attn_implementation=attention
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 15
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_gpt2_shares_contexts_too(attention):
    items, model = random_items(40), transformers_gpt2(attention)
    assert take_apart(model).packs
    expected = losses_one_by_one(lambda x: (model(x).logits, None), items, 64)
    assert (losses_of(model, items) - expected).abs().max() < 1e-4


class Tuple(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize(
    "wrap",
    [lambda model: lambda x: model(x)[0], Tuple, lambda model: transformers_gpt2("sdpa").forward],
)
def test_anything_that_maps_tokens_to_logits_can_be_scored(wrap):
    items = random_items(20)
    model = wrap(small_gpt())

    def logits(x):
        out = model(x)
        return (
            out if isinstance(out, torch.Tensor) else out[0],
        )  # a ModelOutput's first is its logits

    assert not take_apart(model).packs
    assert (losses_of(model, items) - losses_one_by_one(logits, items, 96)).abs().max() < 1e-4


def test_wrappers_are_taken_off():
    model = small_gpt()
    compiled = torch.compile(model, backend="eager")
    assert take_apart(compiled).body.__closure__[0].cell_contents is model


def test_a_compiled_block_is_not_compiled_again_for_other_lengths():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model, items = small_gpt(), random_items(150, context=(1, 40))
    expected = losses_of(model, items)
    for block in model.transformer.h:
        block.compile(dynamic=True, backend=backend, fullgraph=True)
    batches = make_batches(make_rows(items, 96, True), 256)
    assert len({(len(batch), batch[0].length) for batch in batches}) > 20
    assert (losses_of(model, items) - expected).abs().max() < 1e-4
    assert len(graphs) <= 2  # any number of rows, and a single one
