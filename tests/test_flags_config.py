"""Flags from files, and those that contradict or follow from each other: parsed alone, and in short
runs."""

import math
from pathlib import Path

import pytest
from tiny_runs import flags, logged, write_shards

import train_gpt2
from model import GPT, GPTConfig
from pretrain.flags import parse_with_config
from pretrain.train.settings import OVERRIDES, build_parser, resolve

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", train_tokens=340)


def parsed(text, folder, *argv):
    """What the flags are with a configuration file of this text."""
    path = folder / "preset.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_with_config(build_parser(), ["--config", str(path), *argv], OVERRIDES)


def test_a_file_sets_flags_as_the_command_line_does_and_the_command_line_wins(tmp_path):
    text = "batch_size: 16\nlearning_rate: 6e-4\ncompile: false\nbias: no\n"
    text += "data: [a.txt, b.txt]\nout_dir: x"
    args, given, problems = parsed(text, tmp_path, "--batch_size", "4")
    assert problems == []
    assert (args.batch_size, args.learning_rate, args.compile, args.bias) == (4, 6e-4, False, False)
    assert (args.data, args.out_dir, args.n_layer) == (["a.txt", "b.txt"], "x", 12)
    assert given == {"config", "batch_size", "learning_rate", "compile", "bias", "data", "out_dir"}


def test_each_mistake_in_a_file_is_named_with_file_and_key_beside_those_of_the_command_line(
    tmp_path,
):
    text = "bach_size: 16\nn_layer: many\ndropout: 2\nn_head:\nseed: [1, 2]\n"
    text += "shuffle: maybe\nconfig: a.yaml"
    args, _, problems = parsed(text, tmp_path, "--n_embd", "-1")
    file = str(tmp_path / "preset.yaml")
    assert len(problems) == 8 and sum(problem.startswith(f"{file}: ") for problem in problems) == 7
    assert f"{file}: bach_size: unknown (did you mean batch_size?)" in problems
    assert f"{file}: n_layer: 'many' is not a whole number" in problems
    assert f"{file}: n_head: one value expected, got nothing" in problems
    assert (args.n_layer, args.dropout) == (12, 0.0)


@pytest.mark.parametrize(
    "text, part", [("a: [1\nb: 2", "not YAML in line 2"), ("- 1\n- 2", "lines such as")]
)
def test_a_file_that_is_no_list_of_flags_is_refused(tmp_path, text, part):
    (problem,) = parsed(text, tmp_path)[2]
    assert str(tmp_path / "preset.yaml") in problem and part in problem


def test_a_file_that_is_missing_is_one_error_and_nothing_is_started(tmp_path, capfd):
    assert (
        train_gpt2.main(
            ["--config", str(tmp_path / "gone.yaml"), "--out_dir", str(tmp_path / "out")]
        )
        == 2
    )
    assert capfd.readouterr().err.count("gone.yaml: cannot be read: No such file") == 1
    assert not (tmp_path / "out").exists()


def test_a_flag_puts_its_rival_in_the_file_out_of_force(tmp_path):
    text = "max_iters: 5000\nlr_decay_iters: 5000\ndata: input.txt\ntotal_batch_tokens: 1024\n"
    argv = ["--epochs", "3", "--data_dir", "shards", "--gradient_accumulation_steps", "2"]
    args, given, problems = parsed(text, tmp_path, *argv)
    assert problems == [] and given == {
        "config",
        "epochs",
        "data_dir",
        "gradient_accumulation_steps",
    }
    assert (args.max_iters, args.data, args.total_batch_tokens) == (600000, None, 0)
    given = parsed(text, tmp_path)[1]
    assert given == {"config", "max_iters", "lr_decay_iters", "data", "total_batch_tokens"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_configuration_that_is_shipped_is_understood(path):
    args, _, problems = parse_with_config(build_parser(), ["--config", str(path)], OVERRIDES)
    assert problems == []
    args, _ = resolve(["--config", str(path)], 1)
    assert args.out_dir == f"checkpoints/{path.stem}" and args.lr_decay_iters == args.max_iters
    world = 8 if args.total_batch_tokens else 1
    assert args.total_batch_tokens % (args.batch_size * args.block_size * world) == 0


def test_the_configurations_are_the_published_settings():
    found = {}
    for name in ("gpt2-124m", "gpt2-medium", "classic"):
        found[name] = parse_with_config(
            build_parser(), ["--config", str(ROOT / f"configs/{name}.yaml")]
        )[0]
    small, medium, classic = found.values()
    assert (small.total_batch_tokens, small.max_iters, small.warmup_iters) == (524288, 19073, 715)
    assert 9.99e9 < small.max_iters * small.total_batch_tokens < 1e10
    assert (classic.batch_size, classic.block_size, classic.learning_rate) == (16, 128, 6e-4)
    assert (classic.max_iters, classic.warmup_iters) == (5000, 100)
    sizes = ("n_layer", "n_head", "n_embd", "block_size")
    for args, parameters in ((small, 124_439_808), (medium, 354_823_168)):  # OpenAI's
        import torch

        with torch.device("meta"):
            model = GPT(GPTConfig(**{name: getattr(args, name) for name in sizes}))
        assert model.num_parameters() == parameters


@pytest.mark.parametrize(
    "argv, part",
    [
        (["--epochs", "2", "--max_iters", "5"], "--epochs and --max_iters: give one of them"),
        (["--data", "x.txt"], "--data and --data_dir: give one of them"),
        (["--early_stopping", "2", "--eval_interval", "0"], "--early_stopping: needs evaluations"),
        (["--key_token_alpha", "2"], "--key_token_alpha: needs --key_tokens"),
        (["--key_tokens", "gone.txt"], "--key_tokens gone.txt: cannot be read"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(data, tmp_path, capfd, argv, part):
    assert train_gpt2.main([*flags(data, tmp_path / "out"), *argv]) == 2
    assert part in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def epochs_run(data, out_dir, *more):
    argv = flags(data, out_dir, log_interval=1, eval_interval=0)
    for name in ("--max_iters", "--lr_decay_iters", "--warmup_iters"):
        at = argv.index(name)
        del argv[at : at + 2]
    return train_gpt2.main([*argv, *more])


def test_epochs_end_the_run_and_the_cosine_when_every_window_was_used_so_often(
    data, tmp_path, capfd
):
    assert epochs_run(data, tmp_path / "out", "--epochs", "3") == 0
    windows = (340 - 1) // 16  # 21 of 16 tokens, 4 an update
    updates = math.ceil(3 * windows / 4)
    rates = logged(tmp_path / "out", name="learning_rate")
    assert sorted(rates) == list(range(1, updates + 1))
    assert (
        rates[1] < rates[2] == max(rates.values()) == pytest.approx(0.01)
    )  # the warmup takes a tenth
    assert 0.001 < rates[updates] < 0.0015  # one update before the end of the cosine
    assert epochs_run(data, tmp_path / "out", "--epochs", "3") == 0
    assert "with a higher --epochs it goes on" in capfd.readouterr().out


def test_a_warmup_longer_than_the_epochs_is_refused(data, tmp_path, capfd):
    assert epochs_run(data, tmp_path / "out", "--epochs", "1", "--warmup_iters", "9") == 2
    error = capfd.readouterr().err
    assert "--warmup_iters 9: after --lr_decay_iters 6 (1 epochs are 6 updates)" in error


def test_overlapping_windows_are_more_and_leave_validation_as_it_is(data, tmp_path, capfd):
    import json

    for name, stride in (("plain", 0), ("half", 8)):
        assert (
            epochs_run(
                data,
                tmp_path / name,
                "--epochs",
                "1",
                "--stride",
                str(stride),
                "--eval_interval",
                "1000",
                "--eval_iters",
                "100",
            )
            == 0
        )
    plain, half = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "half")
    )
    assert plain["steps_per_epoch"] == 21 / 4
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("schedule")]
    assert ["epochs of windows that have each token 2 times;" in line for line in said] == [0, 1]
    assert half["steps_per_epoch"] == ((340 - 1 - 16) // 8 + 1) / 4
    assert half["evaluated_windows"]["val"] == plain["evaluated_windows"]["val"] == 5
    first = [logged(tmp_path / name, "eval", "val_loss")[0] for name in ("plain", "half")]
    assert first[0] == first[1]


def test_a_run_does_not_go_on_with_another_stride(data, tmp_path, capfd):
    argv = flags(data, tmp_path / "out", max_iters=1)
    assert train_gpt2.main(argv) == 0
    assert train_gpt2.main([*argv, "--max_iters", "2", "--stride", "8"]) == 1
    assert "stride: 16 in the checkpoint, 8 now" in capfd.readouterr().err


@pytest.mark.parametrize(
    "word, flag",
    [
        ("--lr", "--learning_rate"),
        ("--batch", "--batch_size"),
        ("--epoch", "--epochs"),
        ("--num-layers", "--n_layer"),
        ("--context_length=512", "--block_size"),
        ("--max-iters", "--max_iters"),
        ("--Learning_Rate", "--learning_rate"),
    ],
)
def test_what_a_flag_is_called_elsewhere_leads_to_its_name_here(tmp_path, word, flag):
    _, _, problems = parse_with_config(build_parser(), [word, "1"])
    assert problems[0] == f"{word}: unknown (did you mean {flag}?)"
    key = word.lstrip("-").split("=")[0]
    _, _, problems = parsed(f"{key}: 1", tmp_path)
    assert problems[0].endswith(f"{key}: unknown (did you mean {flag.lstrip('-')}?)")
