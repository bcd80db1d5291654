"""BabyGPT and LLMDataModule: losses, schedule, validation and resuming as they should be."""

import json
import math
import os
import sys
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from lazily import Lazily
from tiny_runs import SIZES, flags, initial_model, logged, plain_loop, validation_loss, write_shards

import hellaswag
from adapters import huggingface
from model import GPT
from pretrain.tokens.shards import find_shards
from pretrain.train.loader import ShardLoader

ROOT = Path(__file__).parents[2]
lightning = Lazily("lightning.pytorch")
lightning_data = Lazily("adapters.lightning_data")
lightning_module = Lazily("adapters.lightning_module")
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, and no cache outside the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """The folder of a finished run on shards."""
    out_dir = tmp_path_factory.mktemp("run")
    assert train(data_dir, out_dir) == 0
    return out_dir


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    huggingface.export(initial_model(), folder)
    return folder


def train(data_dir, out_dir, *more, **changes):
    return lightning_module.main([*flags(data_dir, out_dir, **changes), "--cpu", *more])


def new_record():
    """A callback that keeps windows, losses and learning rates of each micro-batch."""

    class Record(lightning.Callback):
        def __init__(self):
            self.windows, self.losses, self.rates = [], [], []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.windows.append(batch["input_ids"].tolist())
            self.losses.append(outputs["loss"].item())
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    return Record()


# ---- the module


def test_losses_are_those_of_a_plain_loop(data_dir, run):
    losses, val_loss = plain_loop(data_dir)
    assert list(logged(run).values()) == pytest.approx(losses, abs=1e-5)
    assert logged(run, "eval", "val_loss")[4] == pytest.approx(val_loss, abs=1e-5)
    assert logged(run, "eval", "perplexity")[4] == pytest.approx(math.exp(val_loss), rel=1e-4)


def test_matrices_decay_and_biases_and_norms_do_not():
    module = lightning_module.BabyGPT(initial_model(), weight_decay=0.3, decay_steps=10)
    decayed, others = module.configure_optimizers()["optimizer"].param_groups
    assert {p.dim() for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.3
    assert {p.dim() for p in others["params"]} == {1} and others["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(others["params"]) == len(list(module.parameters()))


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_steps": 13, "max_epochs": -1}])
def test_the_cosine_ends_with_the_last_update_however_the_run_is_limited(limit, tmp_path):
    data = lightning_data.LLMDataModule(
        str(write_shards(tmp_path, train_tokens=700)),
        batch_size=2,
        block_size=16,
        accumulation_steps=3,
    )
    module, record = (
        lightning_module.BabyGPT(initial_model(), learning_rate=1.0, min_lr=0.0, warmup_steps=2),
        new_record(),
    )
    trainer = lightning.Trainer(
        accumulate_grad_batches=3,
        callbacks=[record],
        limit_val_batches=0,
        enable_checkpointing=False,
        **limit,
        **QUIET,
    )
    trainer.fit(module, data)
    updates = trainer.global_step
    assert updates == (
        14 if "max_steps" not in limit else 13
    )  # 43 windows: 7 updates of 6 in an epoch
    assert len(record.rates) == 3 * updates
    # What is in the optimizer after micro-batch i is for update (i + 1) // 3: constant within an
    # update.
    after_updates = record.rates[2::3]
    cosine = [
        0.5 * (1 + math.cos(math.pi * (step - 2) / (updates - 2))) for step in range(2, updates + 1)
    ]
    assert after_updates == pytest.approx([2 / 3, *cosine], abs=1e-9)
    assert record.rates[0] == record.rates[1] == pytest.approx(1 / 3)


def test_validation_loss_is_the_mean_over_all_windows_and_perplexity_is_of_that_mean(data_dir):
    data = lightning_data.LLMDataModule(str(data_dir), batch_size=2, block_size=16)
    trainer = lightning.Trainer(**QUIET)
    (metrics,) = trainer.validate(lightning_module.BabyGPT(initial_model()), data, verbose=False)
    expected = validation_loss(initial_model(), data_dir)  # five windows in batches of two
    assert metrics["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_any_causal_language_model_of_a_folder_trains_like_ours(data_dir, exported):
    ours, theirs = (
        lightning_module.BabyGPT(initial_model()),
        lightning_module.BabyGPT(str(exported)),
    )
    assert theirs.model.training
    batch = next(
        iter(ShardLoader(find_shards(data_dir, "train"), batch_size=3, block_size=16).batch(0))
    )
    x, y = batch[0], batch[0].roll(-1, dims=1)
    assert theirs(x, y).item() == pytest.approx(ours(x, y).item(), abs=1e-5)
    assert isinstance(ours.model, GPT) and type(theirs.model).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_gradient_checkpointing_recomputes_blocks_and_gives_the_same_gradients(kind, exported):
    x = torch.arange(32).view(2, 16)
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = initial_model() if kind == "ours" else str(exported)
        module = lightning_module.BabyGPT(model, gradient_checkpointing=checkpointing).train()
        mlp = module.model.transformer.h[0].mlp
        count = []
        mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        module(x, x + 1).backward()
        calls.append(len(count))
        gradients.append(mlp.c_fc.weight.grad)
    assert calls == [1, 2]
    torch.testing.assert_close(*gradients)


# ---- the data


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_reads_what_the_loader_would_give_it_through_all_epochs(rank, data_dir):
    data = lightning_data.LLMDataModule(
        str(data_dir), batch_size=3, block_size=16, accumulation_steps=2, seed=5
    )
    data.setup()
    sampler = lightning_data.PositionSampler(
        data.train, batch_size=3, accumulation_steps=2, rank=rank, world_size=2
    )
    loader = ShardLoader(
        find_shards(data_dir, "train"),
        batch_size=3,
        block_size=16,
        accumulation_steps=2,
        rank=rank,
        world_size=2,
        seed=5,
    )
    steps = loader.windows_per_epoch // loader.global_batch
    for epoch in range(2):
        sampler.set_epoch(epoch)
        samples = [data.train[position] for position in sampler]
        assert len(samples) == len(sampler) == steps * 2 * 3
        x, y = zip(*(loader.batch(epoch * steps + step) for step in range(steps)), strict=True)
        assert torch.equal(
            torch.stack([s["input_ids"] for s in samples]), torch.cat(x).reshape(-1, 16)
        )
        assert torch.equal(
            torch.stack([s["labels"] for s in samples]), torch.cat(y).reshape(-1, 16)
        )


def test_raw_text_is_shuffled_anew_every_epoch_and_validated_on_its_end(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(" ".join(f"The owl saw boat number {i} on the river." for i in range(60)))
    data = lightning_data.LLMDataModule(text=[str(path)], batch_size=2, block_size=16)
    data.setup()
    epochs = []
    for epoch in range(2):
        first = epoch * len(data.train)
        samples = data.train.__getitems__(range(first, first + len(data.train)))
        epochs.append([tuple(sample["input_ids"].tolist()) for sample in samples])
        assert all(torch.equal(s["input_ids"][1:], s["labels"][:-1]) for s in samples)
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(epochs[0])) == len(data.train) > 20
    held_out = {
        tuple(sample["input_ids"].tolist())
        for sample in map(data.val.__getitem__, range(len(data.val)))
    }
    assert (
        not held_out & set(epochs[0]) and len(held_out) == (len(data.train) + len(held_out)) // 10
    )


# ---- runs


TWO_PROCESSES = """
import sys
from pathlib import Path
from lightning.pytorch import Trainer
from adapters.lightning_module import BabyGPT, LLMDataModule, RunLogger
from pretrain.report.runlog import RunLog
from tiny_runs import initial_model

module = BabyGPT(initial_model(), learning_rate=0.01, min_lr=0.001, warmup_steps=1)
data = LLMDataModule(sys.argv[1], batch_size=2, block_size=16, accumulation_steps=1, seed=3)
Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=4, max_epochs=-1, gradient_clip_val=1.0,
    val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0, log_every_n_steps=1,
    logger=RunLogger(RunLog(sys.argv[2])), enable_checkpointing=False, enable_progress_bar=False,
).fit(module, data)
"""


def test_two_processes_train_and_evaluate_like_one_with_twice_the_micro_batches(
    data_dir, run, tmp_path
):
    """The five validation windows are three on one process and two on the other."""
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = forked.run(
        [*torchrun, tmp_path / "two.py", data_dir, tmp_path],
        popen=forked.AdapterPopen,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for event, name in (("train", "loss"), ("train", "learning_rate"), ("eval", "val_loss")):
        assert logged(tmp_path, event, name) == pytest.approx(logged(run, event, name), abs=1e-5)


@pytest.mark.parametrize("stop", [4, 9])  # within the first epoch, and within the second
def test_a_run_resumed_with_ckpt_path_goes_on_as_if_it_had_not_stopped(stop, tmp_path):
    data_dir = str(write_shards(tmp_path, train_tokens=700))  # 7 updates in an epoch

    def fit(max_steps, ckpt_path=None, callbacks=()):
        record = new_record()
        data = lightning_data.LLMDataModule(
            data_dir, batch_size=2, block_size=16, accumulation_steps=3
        )
        trainer = lightning.Trainer(
            max_epochs=2,
            max_steps=max_steps,
            accumulate_grad_batches=3,
            callbacks=[record, *callbacks],
            limit_val_batches=0,
            enable_checkpointing=bool(callbacks),
            **QUIET,
        )
        trainer.fit(
            lightning_module.BabyGPT(initial_model(), decay_steps=12), data, ckpt_path=ckpt_path
        )
        return record

    whole = fit(12)
    fit(
        stop,
        callbacks=[
            lightning.callbacks.ModelCheckpoint(tmp_path, "stopped", every_n_train_steps=stop)
        ],
    )
    rest = fit(12, tmp_path / "stopped.ckpt")
    assert len(rest.losses) == 3 * (12 - stop)
    assert rest.windows == whole.windows[3 * stop :]
    assert rest.losses == whole.losses[3 * stop :]
    assert rest.rates == whole.rates[3 * stop :]


@pytest.mark.parametrize("stop", [2, 3])  # with an evaluation, and between two
def test_the_same_command_continues_an_interrupted_run(stop, data_dir, run, tmp_path):
    assert train(data_dir, tmp_path, max_iters=stop) == 0
    assert train(data_dir, tmp_path) == 0
    for event, name in (("train", "loss"), ("train", "learning_rate"), ("eval", "val_loss")):
        assert logged(tmp_path, event, name) == logged(run, event, name)


def test_the_best_checkpoint_is_the_one_of_the_lowest_loss_and_the_last_is_kept_too(
    data_dir, tmp_path
):
    """So high a learning rate that the loss rises after the first evaluations."""
    changes = {
        "learning_rate": 3,
        "min_lr": 3,
        "warmup_iters": 0,
        "eval_interval": 1,
        "max_iters": 5,
    }
    assert train(data_dir, tmp_path, **changes | {"lr_decay_iters": 5}) == 0
    val_losses = logged(tmp_path, "eval", "val_loss")
    best = min(val_losses, key=val_losses.get)
    assert best < 5
    steps = [
        torch.load(tmp_path / name, weights_only=True)["global_step"]
        for name in ("best.ckpt", "last.ckpt")
    ]
    assert steps == [best, 5]
    exported = GPT.from_pretrained(tmp_path / "export")
    assert validation_loss(exported, data_dir) == pytest.approx(val_losses[best], rel=1e-5)


def test_a_trained_model_goes_through_hellaswag(run, tmp_path):
    item = {
        "activity_label": "Owls",
        "ctx": "The owl",
        "endings": ["saw", "sat", "ran", "was"],
        "label": 1,
    }
    (tmp_path / "items.jsonl").write_text((json.dumps(item) + "\n") * 3)
    argv = [
        "--model",
        str(run / "export"),
        "--data",
        str(tmp_path / "items.jsonl"),
        "--device",
        "cpu",
    ]
    assert hellaswag.main([*argv, "--output", str(tmp_path / "results.json")]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["n"] == 3


def test_a_folder_is_trained_on_raw_text_and_exported_with_its_tokenizer(exported, tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("The owl saw a boat on the river. " * 60)
    out_dir = tmp_path / "out"
    changes = {"learning_rate": 0.1, "max_iters": 6, "lr_decay_iters": 6, "eval_interval": 3}
    assert train(None, out_dir, "--text", str(path), "--model", str(exported), **changes) == 0
    val_losses = logged(out_dir, "eval", "val_loss")
    assert val_losses[6] < val_losses[3] < 10
    model = GPT.from_pretrained(out_dir / "export")
    assert model.config.n_embd == SIZES["n_embd"]
    with torch.no_grad():
        ids = torch.tensor([[464, 39610, 2497, 257]])  # The owl saw a
        assert F.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:]).item() < 10
    assert (out_dir / "export" / "tokenizer.json").exists()


def test_precision_is_right_for_the_device(data_dir, tmp_path, monkeypatch):
    seen = []
    original = GPT.hidden_states

    def spy(self, *args, **kwargs):
        if self.transformer.wte.weight.dtype != torch.float64:  # as which an export is compared
            enabled = torch.is_autocast_enabled("cpu")
            seen.append(torch.get_autocast_dtype("cpu") if enabled else None)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden_states", spy)
    assert train(data_dir, tmp_path, dtype="bfloat16", max_iters=2) == 0
    assert set(seen) == {torch.bfloat16}
    with pytest.raises(SystemExit):  # Lightning would take bfloat16 instead
        train(data_dir, tmp_path, dtype="float16")


@pytest.fixture
def workplace(tmp_path, exported, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("exported").symlink_to(exported)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "exported", "--block_size", "32"], "16 positions; needed are"),
        (["--text", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_mistakes_are_one_line(more, complaint, data_dir, workplace, capsys):
    assert train(None if "--text" in more else data_dir, "out", *more) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and complaint in lines[0]


def test_shards_and_text_are_not_mixed():
    with pytest.raises(RuntimeError, match="one of them"):
        lightning_data.LLMDataModule("data", text=["input.txt"])
    with pytest.raises(RuntimeError, match="one of them"):
        lightning_data.LLMDataModule()
