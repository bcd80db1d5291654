"""Scores of the four endings, against a plain loop over examples; the command line; several
processes."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hellaswag
from hellaswag import Example, HellaSwagError, evaluate, load_examples
from model import GPT, GPTConfig, load_checkpoint
from pretrain.eval import hellaswag as examples
from pretrain.text import download
from pretrain.text.source import Patience
from pretrain.tokens.tokenizer import load_encoding

ROOT = Path(__file__).parent.parent
ITEMS = ROOT / "tests" / "data" / "hellaswag_items.jsonl"
ENCODING = load_encoding()


def sharp_gpt(block_size=256, seed=0, **changes):
    """Larger weights than GPT-2's initialisation, so that the losses of endings differ by whole
    nats."""
    torch.manual_seed(seed)
    config = GPTConfig(
        **{"block_size": block_size, "n_layer": 2, "n_head": 2, "n_embd": 16, **changes}
    )
    model = GPT(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 10
    return model


@pytest.fixture(scope="module")
def model():
    return sharp_gpt()


@pytest.fixture(scope="module")
def items():
    return load_examples(ITEMS)


@torch.no_grad()
def plain_loop(model, example):
    """What people do with one example: four padded rows, all logits. Losses and tokens of the
    endings."""
    context = ENCODING.encode_ordinary(example.ctx)
    endings = [ENCODING.encode_ordinary(" " + ending) for ending in example.endings]
    tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.int64)
    for row, ending in enumerate(endings):
        tokens[row, : len(context) + len(ending)] = torch.tensor(context + ending)
    logits = model(tokens)[0]  # (4, T, vocabulary)
    losses = []
    for row, ending in enumerate(endings):
        at = range(len(context), len(context) + len(ending))
        predicted = logits[row, at.start - 1 : at.stop - 1].double()
        losses.append(
            F.cross_entropy(predicted, tokens[row, at.start : at.stop], reduction="sum").item()
        )
    return losses, [len(ending) for ending in endings]


def made_up(count, seed=0):
    """Examples of all lengths from templates, of GPT-2's first 8,192 tokens: for a plain loop the
    logits of all 50,257 would be most of the work."""
    draw = random.Random(seed)
    people = [
        "a man",
        "the tall girl",
        "an old friend",
        "the boys",
        "my uncle Wilmin",
        "the postman",
    ]
    deeds = [
        "leaves the door of",
        "runs around",
        "cuts",
        "carefully turns",
        "plays with",
        "cannot find",
    ]
    things = [
        "a ship",
        "the table",
        "a hundred and two books",
        "the library's only map",
        "a dead cat",
    ]

    def sentence():
        more = draw.choice(["", "", " in the rain", " before work on Sunday", ", as always"])
        return f"{draw.choice(people)} {draw.choice(deeds)} {draw.choice(things)}{more}."

    def text(low, high):
        return " ".join(sentence() for _ in range(draw.randint(low, high)))

    return [
        Example(
            i, "", text(1, 2), None, None, tuple(sentence() for _ in range(4)), draw.randrange(4)
        )
        for i in range(count)
    ]


def assert_same(values, expected, picks):
    """Losses within 1e-4, and the same pick unless the two lowest losses are closer than that."""
    assert np.abs(values - expected).max() < 1e-4
    lowest = np.sort(expected, axis=1)
    clear = lowest[:, 1] - lowest[:, 0] > 1e-4
    assert clear.mean() > 0.95, "the model is too undecided for this test to mean anything"
    assert (picks == expected.argmin(axis=1))[clear].all()


def test_two_hundred_examples_score_as_in_the_plain_loop(monkeypatch):
    monkeypatch.setattr("pretrain.eval.scoring.VOCAB_SIZE", 8192)
    some, model = made_up(200), sharp_gpt(vocab_size=8192)
    result = evaluate(model, some)
    losses, counts = map(
        np.array, zip(*(plain_loop(model, example) for example in some), strict=True)
    )
    assert_same(result.losses, losses, result.picks)
    assert_same(result.losses_norm, losses / counts, result.picks_norm)
    labels = np.array([example.label for example in some])
    assert result.acc == pytest.approx((losses.argmin(1) == labels).mean(), abs=2 / 500)
    assert result.acc_norm == pytest.approx(
        ((losses / counts).argmin(1) == labels).mean(), abs=2 / 500
    )
    assert len({tuple(p) for p in np.stack([result.picks, result.picks_norm], 1).tolist()}) > 8


def test_transformers_gpt2_scores_the_same_from_the_same_weights(model, items):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(n_positions=256, n_layer=2, n_head=2, n_embd=16))
    theirs.load_state_dict(model.huggingface_state_dict())
    ours = evaluate(model, items).losses
    assert np.abs(evaluate(theirs, items).losses - ours).max() < 1e-4
    assert (
        np.abs(evaluate(lambda tokens: model(tokens)[0], items[:3]).losses - ours[:3]).max() < 1e-4
    )


def test_lm_eval_style_divides_by_characters(model, items):
    result = evaluate(model, items, style="lm-eval")
    for i, example in enumerate(items):
        _, endings = examples.prompt(example, "lm-eval")
        assert result.losses_norm[i] == pytest.approx(
            result.losses[i] / [len(ending) for ending in endings]
        )
    assert not np.allclose(result.losses, evaluate(model, items).losses)


class Uniform(torch.nn.Module):
    """Every token is equally likely after any text."""

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, 50257)


def test_of_equally_likely_endings_the_first_is_picked():
    endings = (" one two three", "one", "one", "one two")
    result = evaluate(Uniform(), [Example(0, "a", "b", None, None, endings, 1)])
    assert result.losses[0] == pytest.approx(math.log(50257) * np.array([4, 1, 1, 2]), rel=1e-5)
    assert (result.picks.tolist(), result.picks_norm.tolist()) == ([1], [0])
    assert (result.acc, result.acc_norm) == (1.0, 0.0)
    assert math.isnan(result.acc_stderr) and result.summary()["acc_stderr"] is None


def test_empty_endings_lose_by_character_and_count_one_token_otherwise():
    example = Example(0, "a", "b", None, None, ("", "one", "two", "three four"), 0)
    assert evaluate(Uniform(), [example]).losses_norm[0] == pytest.approx(
        [math.log(50257)] * 4, rel=1e-5
    )
    result = evaluate(Uniform(), [example], style="lm-eval")
    assert result.losses_norm[0, 0] == math.inf and result.picks_norm[0] == 3


def test_contexts_that_do_not_fit_are_counted_and_cut_on_the_left(items):
    model = sharp_gpt(block_size=32)
    result = evaluate(model, items)
    context = ENCODING.encode_ordinary(items[0].ctx)
    ending = ENCODING.encode_ordinary(" " + items[0].endings[0])
    kept = torch.tensor((context + ending)[-33:])
    losses = F.cross_entropy(model(kept[None, :-1])[0][0], kept[1:], reduction="none")
    assert result.losses[0, 0] == pytest.approx(losses[-len(ending) :].sum().item(), abs=1e-4)
    too_long = sum(
        len(ENCODING.encode_ordinary(e.ctx)) + len(ENCODING.encode_ordinary(" " + ending)) > 33
        for e in items
        for ending in e.endings
    )
    assert result.truncated == too_long > 0 == evaluate(sharp_gpt(), items).truncated


def test_the_standard_error_is_that_of_a_mean(model, items):
    result = evaluate(model, items)
    hits = (result.picks == result.labels).astype(float)
    assert result.acc == hits.mean()
    assert result.acc_stderr == pytest.approx(hits.std(ddof=1) / math.sqrt(len(hits)))


def test_the_model_is_left_as_it_was_and_can_be_trained_on(items):
    model = sharp_gpt(dropout=0.5)
    expected = evaluate(model, items).losses
    model.train()
    before = [p.clone() for p in model.parameters()]
    result = evaluate(model, items)
    assert model.training
    assert np.array_equal(result.losses, expected)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with torch.autocast(
        "cpu", torch.bfloat16
    ):  # whose cache must not keep tensors of the evaluation
        evaluate(model, items[:2], dtype=torch.bfloat16)
        model(torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64))[
            1
        ].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_that_fails_is_still_put_back_into_training_mode(items):
    model = sharp_gpt().train()
    model.transformer.wte.weight.data[100] = torch.nan
    with pytest.raises(HellaSwagError, match="not finite on 18 of 18"):
        evaluate(model, items)
    assert model.training


def test_sixteen_bits_come_close_to_thirty_two(model, items):
    some = items[:6]  # a CPU takes 20 times as long in 16 bits
    exact = evaluate(model, some).losses_norm
    for dtype in (torch.bfloat16, torch.float16):
        result = evaluate(model, some, dtype=dtype).losses_norm
        assert 0 < np.abs(result - exact).max() < 0.2


def test_an_evaluation_that_is_told_to_stop_gives_no_number(model, items):
    asked = []
    stop_after_two = lambda: asked.append(1) or len(asked) == 2  # noqa: E731
    assert evaluate(model, items, batch_tokens=100, interrupted=stop_after_two) is None
    assert len(asked) == 2


# ---- command line


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best_val_loss.pt"
    saved = {
        "format": 1,
        "model": model.state_dict(),
        "model_config": asdict(model.config),
        "step": 12,
    }
    torch.save(saved, path)
    return path


def command(checkpoint, *more):
    words = [
        "--checkpoint",
        checkpoint,
        "--data",
        ITEMS,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *more,
    ]
    return [str(word) for word in words]


@pytest.mark.parametrize("style", hellaswag.STYLES)
def test_the_command_line_prints_and_writes_what_evaluate_returns(
    style, checkpoint, tmp_path, capsys
):
    model, items = load_checkpoint(checkpoint)[0], load_examples(ITEMS)
    output, lines = tmp_path / "results.json", tmp_path / "each.jsonl"
    more = ("--style", style, "--output", output, "--per_example", lines, "--show", 2)
    assert hellaswag.main(command(checkpoint, *more)) == 0
    expected = evaluate(model, items, style=style)
    record = json.loads(output.read_text())
    for key in ("style", "n", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "truncated"):
        assert record[key] == expected.summary()[key]
    assert record["model"] == {
        "name": str(checkpoint),
        "step": 12,
        "parameters": model.num_parameters(),
    }
    assert record["data"]["sha256"] == examples.data_sha256(ITEMS)
    assert record["settings"]["dtype"] == "float32" and record["seconds"] > 0
    assert record["versions"]["torch"] == torch.__version__

    each = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [e["ind"] for e in each] == [e.ind for e in items]
    assert np.array_equal([e["losses"] for e in each], expected.losses)
    assert np.mean([e["pick_norm"] == e["label"] for e in each]) == expected.acc_norm

    out = capsys.readouterr().out
    assert f"acc_norm  {expected.acc_norm:.4f} +- {expected.acc_norm_stderr:.4f}" in out
    assert (
        "gpt2-xl " + {"completion": "0.3842 / 0.4893", "lm-eval": "0.4004 / 0.5089"}[style] in out
    )
    shown = [line for line in out.splitlines() if line.startswith("  *")]
    assert len(shown) == 2
    assert [line.split("  ")[-1] for line in shown] == [e.endings[e.label] for e in items[:2]]
    assert f"{expected.losses[0, items[0].label]:.3f}" in shown[0]


def test_a_limit_scores_a_choice_of_the_examples(checkpoint, tmp_path, capsys):
    assert hellaswag.main(command(checkpoint, "--limit", 5, "--output", tmp_path / "r.json")) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["n"], record["settings"]["limit"]) == (5, 5)


def test_two_processes_give_what_one_gives(checkpoint, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert hellaswag.main(command(checkpoint, "--batch_tokens", 200, "--per_example", one)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = command(checkpoint, "--batch_tokens", 200, "--per_example", two)
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    launch += [str(ROOT / "hellaswag.py"), *words]
    done = forked.run(launch, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nacc_norm ") == 1, "one rank prints"
    assert two.read_text() == one.read_text()


def fails(capsys, *words):
    """The error line of a command."""
    assert hellaswag.main([str(word) for word in words]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("hellaswag.py: error: ") and captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


def test_mistakes_end_in_one_line(checkpoint, tmp_path, capsys):
    assert "no such file" in fails(capsys, *command(tmp_path / "none.pt"))
    assert "No such file" in fails(
        capsys, "--checkpoint", checkpoint, "--data", tmp_path / "none.jsonl"
    )
    nowhere = tmp_path / "no" / "r.json"
    assert "is in none that exists" in fails(capsys, *command(checkpoint, "--output", nowhere))
    assert "cuda:77" in fails(capsys, *command(checkpoint, "--device", "cuda:77"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(ITEMS.read_text() + '{"ctx": 3}\n')
    assert "bad.jsonl, line 19: " in fails(capsys, *command(checkpoint, "--data", bad))
    small = tmp_path / "small.pt"
    little = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=8))
    torch.save({"model": little.state_dict(), "model_config": asdict(little.config)}, small)
    assert "vocabulary of 300 tokens" in fails(capsys, *command(small))


def test_without_data_and_network_the_error_says_what_to_do(
    checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(examples, "URL", "http://127.0.0.1:9/hellaswag_{split}.jsonl")
    monkeypatch.setattr(
        download, "PATIENCE", Patience(give_up_seconds=0.2, first_wait_seconds=0.05)
    )
    monkeypatch.setenv("HELLASWAG_DIR", str(tmp_path))
    line = fails(capsys, "--checkpoint", checkpoint)
    assert "hellaswag_val.jsonl" in line and "http://127.0.0.1:9/" in line and "--data" in line


@pytest.mark.parametrize("words", [["--limit", "0"], ["--batch_tokens", "-1"], ["--style", "both"]])
def test_wrong_flags_are_refused_before_anything_starts(words, capsys):
    with pytest.raises(SystemExit) as stop:
        hellaswag.main(words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_help_answers_without_torch():
    code = (
        "import sys, hellaswag\n"
        "try: hellaswag.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "0.2955" in done.stdout and "0.5089" in done.stdout
