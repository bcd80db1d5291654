"""The switches for a GPU, as far as a CPU has them: what they refuse, that they change nothing but
rounding, where a trace goes, what an hour costs."""

import gzip
import json
import math
import time

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import flags, logged, write_shards

import train_gpt2
from pretrain.distributed import Ranks
from pretrain.report.compare import compare
from pretrain.report.lines import train_line
from pretrain.report.page import key_figures
from pretrain.report.runs import Run
from pretrain.train import costs, speed
from pretrain.train.costs import Meter, spent
from pretrain.train.settings import SettingsError, resolve
from pretrain.train.speed import Profile, attention, choose_compiler, residual_dtype

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards", train_tokens=1000)


def tiny(data, out_dir, **changes):
    quiet = {"hellaswag": False, "sample_interval": 0, "eval_iters": 1, "device": "cpu"}
    return flags(data, out_dir, **quiet | changes)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run in bfloat16 without any switch."""
    folder = tmp_path_factory.mktemp("plain")
    assert train_gpt2.main(tiny(data, folder, dtype="bfloat16")) == 0
    return logged(folder, "train", "loss")


def test_with_every_switch_that_a_cpu_has_a_run_trains_alike_traces_and_counts_dollars(
    data, plain, tmp_path, capsys
):
    switches = {"attention": "math", "bfloat16_residual": True, "head_rows": 16, "profile": 2}
    command = tiny(data, tmp_path, dtype="bfloat16", max_iters=8, price_per_hour=36, **switches)
    assert train_gpt2.main([*command, "--lr_decay_iters", "4"]) == 0
    losses = logged(tmp_path, "train", "loss")
    for step, loss in plain.items():
        assert losses[step] == pytest.approx(loss, abs=0.02)
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) >= 2
    assert f"profile: 2 updates in {tmp_path / 'trace.json.gz'}" in capsys.readouterr().out
    dollars = list(logged(tmp_path, "train", "dollars").values())
    assert dollars == sorted(dollars) and 0 < dollars[-1] < 36


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"attention": "cudnn"}, "--attention cudnn: needs a GPU"),
        ({"attention": "flash3"}, "--attention flash3: needs a GPU"),
        ({"bfloat16_residual": True}, "give --dtype bfloat16 too"),
    ],
)
def test_what_a_machine_does_not_have_is_refused_in_one_line(
    data, tmp_path, capsys, switches, message
):
    assert train_gpt2.main(tiny(data, tmp_path, **switches)) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_flash_attention_that_is_not_installed_is_named_with_its_package():
    with (
        pytest.raises(SettingsError, match="needs the package flash_attn_interface"),
        attention("flash3", torch.device("cuda")),
    ):
        pass


def test_attention_by_any_kernel_is_the_same_and_torchs_choice_is_back_after(monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    before = torch._C._get_sdp_priority_order()
    usual = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for name in ("auto", "flash", "math"):
        with attention(name, CPU):
            same = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(same, usual)
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_residual_in_bfloat16_needs_a_computation_in_it():
    assert residual_dtype(False, torch.float16) is None
    assert residual_dtype(True, torch.bfloat16) == torch.bfloat16
    with pytest.raises(SettingsError, match="computes in float16"):
        residual_dtype(True, torch.float16)


def test_the_compile_mode_is_the_one_without_cuda_graphs(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda what, **how: asked.append(how) or what)
    monkeypatch.setattr(speed, "compiler_problem", lambda device: None)
    for mode in ("default", "max-autotune"):
        command = tiny(data, tmp_path, compile=True, compile_mode=mode)
        settings, problems = resolve(command, 1)
        assert not problems
        compiler = choose_compiler(settings, CPU, pytest.fail)
        assert compiler(len) is len
    assert asked == [{}, {"mode": "max-autotune-no-cudagraphs"}]


def test_compiled_evaluations_measure_what_others_do(data, plain, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda what, **how: compiled.append(what) or what)
    monkeypatch.setattr(speed, "compiler_problem", lambda device: None)
    command = tiny(data, tmp_path, dtype="bfloat16", compile=True, compile_eval=True)
    assert train_gpt2.main(command) == 0
    assert [getattr(what, "__name__", "model") for what in compiled] == ["model", "score"]
    assert logged(tmp_path, "train", "loss") == plain


def test_a_run_that_ends_before_the_profile_begins_says_that_there_is_no_trace(tmp_path):
    said = []
    with Profile(3, tmp_path, said.append) as profile:
        profile.step()
    assert len(said) == 1 and "no trace" in said[0] and not list(tmp_path.iterdir())


# ---- dollars and energy


def test_dollars_and_energy_add_up_over_the_parts_of_a_run(tmp_path, monkeypatch):
    log = tmp_path / "metrics.jsonl"
    lines = [
        {"event": "train", "dollars": 5.0, "kilowatt_hours": 2.0},
        {"event": "train", "dollars": "nan"},
        {"event": "start"},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert spent(log) == {"dollars": 5.0, "kilowatt_hours": 2.0}
    joules = iter([1e6, 1e6 + 3.6e6, None])
    monkeypatch.setattr(costs, "energy_joules", lambda device: next(joules))
    meter = Meter(3600.0, Ranks(0, 1, torch.device("cuda")), log)
    time.sleep(0.02)
    values = meter.values()
    assert 5.0 + 0.02 <= values["dollars"] < 30 and values["kilowatt_hours"] == pytest.approx(3)
    assert set(meter.values()) == {"dollars"}  # a counter that went away
    assert Meter(0, Ranks(0, 1, CPU), log).values() == {}


def test_the_console_and_the_report_say_what_a_run_has_cost(tmp_path):
    record = {"step": 10, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 10**6}
    record |= {"tokens_per_second": 1e5, "milliseconds_per_step": 9.0, "memory_bytes": 10**9}
    assert "$" not in train_line(record, 20)
    record |= {"dollars": 12.345, "kilowatt_hours": 1.5}
    assert train_line(record, 20).endswith("1.0 GB | $12.35") or "$12.34" in train_line(record, 20)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "train", "time": 1, **record}))
    run = Run.load(tmp_path)
    figures = {figure.label: figure for figure in key_figures(run)}
    assert figures["Energy"].value == "1.50 kWh"
    assert figures["Cost"].note == "$12,345.00 a billion tokens"
    table = compare([run, run])
    assert math.isclose(float(table.rows[0][table.header.index("kWh")]), 1.5)
