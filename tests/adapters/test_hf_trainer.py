"""transformers.Trainer on shards and on raw text: what it logs, computes and leaves behind."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lazily import Lazily
from tiny_runs import flags, initial_model, logged, plain_loop, validation_loss
from upload_hub import UploadHub

import hellaswag
from adapters import common, huggingface
from adapters.hf_tokenizer import build_tokenizer
from model import GPT
from pretrain.tokens.tokenizer import END_OF_TEXT, load_encoding

state, transformers = Lazily("accelerate.state"), Lazily("transformers")
hf_trainer = Lazily("adapters.hf_trainer")
STORIES = [
    "The river was high. " * 20,
    "A boat came down the river, and the owl saw it. " * 20,
    "Too short.",
]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, no cache outside the test, and Accelerate as if no other test had configured
    it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """The folder of a finished run on shards."""
    out_dir = tmp_path_factory.mktemp("run")
    assert train(data_dir, out_dir) == 0
    return out_dir


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"story": story}) + "\n" for story in STORIES))
    return ["--text", str(path), "--text_column", "story"]


def train(data_dir, out_dir, *more, **changes):
    return hf_trainer.main([*flags(data_dir, out_dir, **changes), "--cpu", *more])


def make_trainer(data_dir, out_dir, *more, **changes):
    args, given = common.parse(
        "",
        [*flags(data_dir, out_dir, **changes), "--cpu", *more],
        "out",
        hf_trainer.hf_trainer_flags,
    )
    return hf_trainer.build_trainer(args, given)


# ---- numbers


def test_logged_losses_and_evaluations_are_those_of_a_plain_loop(data_dir, run):
    losses, val_loss = plain_loop(data_dir)
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [record["loss"] for record in history if "loss" in record] == pytest.approx(
        losses, abs=1e-5
    )
    assert list(logged(run).values()) == pytest.approx(losses, abs=1e-5)
    last = [record for record in history if "eval_loss" in record][-1]
    assert last["eval_loss"] == pytest.approx(val_loss, abs=1e-5)
    assert last["eval_perplexity"] == pytest.approx(math.exp(val_loss), rel=1e-4)


def recorded_run(trainer):
    """Train; the batches it saw, and the losses it logged."""
    batches, collate = [], trainer.data_collator
    trainer.data_collator = lambda samples: batches.append(collate(samples)) or batches[-1]
    trainer.train()
    return batches, [record["loss"] for record in trainer.state.log_history if "loss" in record]


def means_of_two(losses):
    return [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]


# A learning rate of 0 keeps the weights, so that any batch can be computed afterwards. Evaluation
# is off: its batches would go through the collator too.
STILL = {"learning_rate": 0, "min_lr": 0, "eval_interval": 0}


def test_logged_losses_on_raw_text_are_means_over_the_predicted_tokens(stories, tmp_path):
    trainer = make_trainer(None, tmp_path / "out", *stories, **STILL)
    batches, losses = recorded_run(trainer)
    model = initial_model()
    with torch.no_grad():
        expected = [
            F.cross_entropy(
                model(b["input_ids"])[0][:, :-1].transpose(1, 2), b["input_ids"][:, 1:]
            ).item()
            for b in batches[:8]
        ]
    assert losses == pytest.approx(means_of_two(expected), abs=1e-5)


@pytest.mark.parametrize("source", ["shards", "text"])
def test_key_tokens_weight_each_sequence_as_the_formula_says(source, data_dir, stories, tmp_path):
    keys, alpha = tmp_path / "keys.txt", 0.3
    ids = [1, 2, 7850]  # frequent in the shards, frequent in the stories
    keys.write_text("".join(load_encoding().decode([token]) + "\n" for token in ids))
    more = ["--key_tokens", str(keys), "--key_token_alpha", str(alpha)]
    more += stories if source == "text" else []
    trainer = make_trainer(None if source == "text" else data_dir, tmp_path / "out", *more, **STILL)
    batches, losses = recorded_run(trainer)
    model, expected, weights = initial_model(), [], []
    for batch in batches[:8]:
        x = batch["input_ids"]
        y = batch["labels"] if source == "shards" else x[:, 1:]
        with torch.no_grad():
            logits = model(x)[0][:, : y.size(1)]
        rows = []
        for b in range(2):
            weights.append(alpha * (1 + sum(token in ids for token in x[b].tolist())))
            rows.append(weights[-1] * F.cross_entropy(logits[b], y[b]).item())
        expected.append(sum(rows) / 2)
    assert losses == pytest.approx(means_of_two(expected), rel=1e-5)
    assert len(set(weights)) > 1


def test_evaluation_is_not_weighted_by_key_tokens(data_dir, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text(load_encoding().decode([1]) + "\n")
    trainer = make_trainer(data_dir, tmp_path / "out", "--key_tokens", str(keys))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        validation_loss(initial_model(), data_dir), abs=1e-5
    )


def test_matrices_decay_and_biases_and_norms_do_not(data_dir, tmp_path):
    trainer = make_trainer(data_dir, tmp_path)
    groups = trainer.create_optimizer().param_groups
    assert {p.dim() for p in groups[0]["params"]} == {2} and groups[0]["weight_decay"] == 0.1
    assert {p.dim() for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))
    assert groups[0]["betas"] == (0.9, 0.95)


def test_a_schedule_of_transformers_can_be_named(stories, tmp_path):
    trainer = make_trainer(
        None,
        tmp_path,
        *stories,
        "--lr_scheduler",
        "cosine",
        max_iters=10,
        warmup_iters=2,
        lr_decay_iters=10,
    )
    trainer.create_optimizer_and_scheduler(10)
    rates = [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(11)]
    expected = [0, 0.5] + [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert rates == pytest.approx(expected)


def test_bfloat16_computes_in_bfloat16_on_a_cpu_too(data_dir, tmp_path):
    trainer = make_trainer(data_dir, tmp_path, dtype="bfloat16", max_iters=1, lr_decay_iters=1)
    seen = []
    attention = trainer.model.transformer.h[0].attn.c_attn
    attention.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_memory_and_not_the_losses(data_dir, run, tmp_path):
    trainer = make_trainer(data_dir, tmp_path, "--gradient_checkpointing", max_iters=2)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    assert [logged(tmp_path)[step] for step in (1, 2)] == pytest.approx(
        [logged(run)[step] for step in (1, 2)], abs=1e-6
    )


def test_a_run_begins_with_the_weights_of_a_checkpoint(data_dir, tmp_path, capsys):
    model = initial_model(n_layer=2, block_size=32)
    torch.save(
        {"model": model.state_dict(), "model_config": asdict(model.config)}, tmp_path / "a.pt"
    )
    more = ["--init_from", str(tmp_path / "a.pt")]
    trainer = make_trainer(data_dir, tmp_path, *more, n_layer=2)
    assert trainer.train_dataset[0]["input_ids"].shape == (16,)  # as --block_size asks
    assert trainer.model.config.n_positions == 32
    assert torch.equal(trainer.model.transformer.wpe.weight, model.transformer.wpe.weight)
    assert train(data_dir, tmp_path, *more, block_size=64) == 1
    assert "leave out --n_layer, --block_size" in capsys.readouterr().err


# ---- raw text


def test_text_becomes_full_chunks_that_do_not_cross_documents(stories):
    chunks = common.text_chunks(common.load_text([stories[1]], "story"), build_tokenizer(16), 16)
    expected = []
    for story in STORIES:
        ids = load_encoding().encode_ordinary(story)
        expected += [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert chunks["input_ids"][:] == expected
    assert chunks.column_names == ["input_ids"]
    parts = common.split_chunks(chunks)
    assert [*parts[0]["input_ids"], *parts[1]["input_ids"]] == expected
    assert len(parts[1]) == len(expected) // 10


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("First line.\n\nSecond paragraph.\n" * 10)
    assert common.load_text([path])["text"][:] == [path.read_text()]


def test_genuine_end_of_text_is_learnt_and_padding_is_not():
    tokenizer = build_tokenizer(16)
    tokenizer.pad_token = tokenizer.eos_token
    collate = hf_trainer.ChunkCollator(tokenizer, mlm=False)
    full = collate([{"input_ids": [5, END_OF_TEXT, 6]}, {"input_ids": [7, 8, END_OF_TEXT]}])
    assert full["labels"].tolist() == full["input_ids"].tolist()
    padded = collate([{"input_ids": [5, END_OF_TEXT, 6]}, {"input_ids": [END_OF_TEXT]}])
    assert padded["labels"].tolist() == [[5, END_OF_TEXT, 6], [END_OF_TEXT, -100, -100]]


# ---- what is left behind


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(data_dir, run, tmp_path):
    assert train(data_dir, tmp_path, max_iters=2) == 0
    assert train(data_dir, tmp_path) == 0
    assert logged(tmp_path) == logged(run)
    assert logged(tmp_path, "eval", "val_loss") == logged(run, "eval", "val_loss")
    names = {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    assert names <= {path.name for path in (tmp_path / "checkpoint-4").iterdir()}


def test_the_last_step_is_saved_even_between_evaluations(data_dir, tmp_path):
    assert train(data_dir, tmp_path, max_iters=3) == 0
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_trained_model_goes_to_transformers_to_our_model_and_through_hellaswag(
    data_dir, run, tmp_path
):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run).eval()
    ours = GPT.from_pretrained(run)
    assert validation_loss(ours, data_dir) == pytest.approx(
        logged(run, "eval", "val_loss")[4], abs=1e-5
    )
    assert validation_loss(theirs, data_dir) == pytest.approx(
        validation_loss(ours, data_dir), abs=1e-5
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    assert tokenizer("naïve river")["input_ids"] == load_encoding().encode_ordinary("naïve river")

    items = [
        {
            "activity_label": "Owls",
            "ctx": "The owl",
            "endings": ["saw", "sat", "ran", "was"],
            "label": 1,
        }
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items * 4))
    assert huggingface.main(["export", str(run / "checkpoint-4"), str(tmp_path / "out")]) == 0
    argv = ["--data", str(tmp_path / "items.jsonl"), "--device", "cpu", "--dtype", "float32"]
    for folder in (run, tmp_path / "out"):
        results = tmp_path / f"{folder.name}.json"
        assert hellaswag.main(["--model", str(folder), *argv, "--output", str(results)]) == 0
        assert json.loads(results.read_text())["n"] == 4


def test_push_to_hub_uploads_the_trained_model(data_dir, tmp_path, monkeypatch):
    token = "hf_" + "a" * 34
    with UploadHub(token) as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.token", token)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert train(data_dir, tmp_path, "--push_to_hub", "somebody/tiny", max_iters=2) == 0
    files = hub.repositories["somebody/tiny"].files
    assert files["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "README.md"} <= set(files)


# ---- mistakes


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--dtype", "float16"], "--dtype float16: on a CPU"),
        (["--text", "input.txt"], "--text and --data_dir: give one of them"),
        (["--batch_size", "0", "--colour", "red"], "--batch_size: 0 must be at least 1"),
        (["--n_head", "3"], "--n_embd 8: not a multiple of --n_head 3"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_anything_happens(
    more, complaint, data_dir, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        train(data_dir, tmp_path / "out", *more)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("not a single token")
    Path("b.jsonl").write_text('{"story": "once"}\n')


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--no-bias"], "transformers' GPT-2 has biases"),
        (["--init_from", "nowhere.pt"], "nowhere.pt: no such folder"),
        (["--text", "missing.txt"], "missing.txt: no such file"),
        (["--text", "a.txt", "b.jsonl"], "must be all .txt, .jsonl or .parquet"),
        (["--text", "a.txt"], "too few to train on"),
        (["--text", "b.jsonl"], "no column 'text'; it has story"),
    ],
)
def test_mistakes_are_one_line(more, complaint, data_dir, capsys, workplace):
    assert train(None if "--text" in more else data_dir, "out", *more) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and complaint in lines[0]


def test_key_tokens_that_are_none_are_refused_before_anything_happens(data_dir, capsys, workplace):
    with pytest.raises(SystemExit) as stop:
        train(data_dir, "out", "--key_tokens", "a.txt")
    assert stop.value.code == 2 and "each line must be one token" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_missing_framework_is_named_with_the_requirements_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit, match=r"accelerate not installed; .*requirements-adapters\.txt"):
        common.require_for("__main__", "accelerate")
