"""Ranks, devices, and stopping together. Two real processes over gloo run two_ranks.main once; the
tests of the second half look at what they wrote."""

import json
import os
import platform
import signal
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
import torch
from free_port import free_port

from pretrain import distributed
from pretrain.distributed import Ranks, pick_device, pick_dtype, seed_dropout
from pretrain.train.stopping import FiniteGuard, NotFinite, StopSignal

ROOT = Path(__file__).parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))


def test_devices_that_do_not_exist_are_refused_with_what_does():
    assert pick_device("cpu").type == "cpu"
    for name, message in (
        ("gpu", "not a device"),
        ("cuda:99", "GPUs are visible"),
        ("meta", "not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            pick_device(name)


def test_on_a_cpu_bfloat16_is_chosen_only_where_it_is_native(monkeypatch):
    cpu = torch.device("cpu")
    for avx512, amx, expected in (
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=avx512: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=amx: answer)
        assert pick_dtype("auto", cpu) == expected
    assert pick_dtype("float16", cpu) == torch.float16


def test_dropout_follows_from_seed_step_and_micro_batch_alone():
    def draw(*key):
        seed_dropout(*key)
        return torch.rand(8).tolist()

    first = draw(1337, 10, 3)
    torch.rand(1000)
    assert draw(1337, 10, 3) == first
    others = [draw(1337, 10, 4), draw(1337, 11, 3), draw(1338, 10, 3), draw(1337, 3, 10)]
    assert first not in others and len({tuple(other) for other in others}) == 4


def test_memory_is_counted_in_bytes():
    assert 10**7 < distributed.peak_memory(torch.device("cpu")) < 10**12


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are"
)
def test_memory_that_tensors_leave_serves_the_next_ones_without_page_faults():
    import resource

    distributed.keep_freed_memory()
    size, rounds = 64 << 20, 20
    for _ in range(2):  # the second time all memory is there
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            torch.ones(size, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert (
        faults < rounds * size / 4096 / 4
    )  # of pages of 4 KiB, all of which the kernel would give anew


def test_alone_a_rank_is_its_own_sum_and_audience():
    assert (
        ALONE.sum(1.5, 2) == [1.5, 2.0] and ALONE.gather("x") == ["x"] and ALONE.broadcast(3) == 3
    )
    assert ALONE.on_first(max, 1, 2) == 2
    with pytest.raises(ZeroDivisionError):
        ALONE.on_all(lambda: 1 / 0)


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopSignal(ALONE) as stop:
        stop.at_once = False
        assert stop.agreed() == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
        assert stop.agreed() == stop.agreed_now() == number
    assert signal.getsignal(number) == before


def test_with_nothing_to_save_a_signal_exits_at_once():
    with pytest.raises(SystemExit) as stopped, StopSignal(ALONE):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stopped.value.code == 143


def test_under_nohup_a_closed_terminal_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(ALONE) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agreed() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_signals_are_left_alone():
    done = []

    def enter():
        with StopSignal(ALONE) as stop:
            done.append(stop.agreed())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert done == [0]


def make_guard(scaled=False):
    return FiniteGuard(ALONE, torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("loss", "norm"), [(NAN, NAN), (2.0, INF)])
def test_a_number_that_is_not_finite_stops_before_the_update(loss, norm):
    guard = make_guard()
    guard.check(6, torch.tensor(1.0), torch.tensor(2.0))
    with pytest.raises(
        NotFinite, match=rf"step 7: loss {loss}.* on rank 0, gradient norm {norm}; stopped before"
    ):
        guard.check(7, torch.tensor(loss), torch.tensor(norm))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD])
def test_an_update_that_is_not_finite_is_left_out_whatever_the_optimizer(kind):
    weight, guard = torch.nn.Parameter(torch.eye(3)), make_guard()
    optimizer = kind([weight], lr=0.1)

    def update(step, gradient):
        weight.grad = torch.full_like(weight, gradient)
        guard.check(step, torch.tensor(1.0), weight.grad.norm())
        optimizer.step()

    update(0, 1.0)
    good = weight.detach().clone()
    assert not torch.equal(good, torch.eye(3))
    with pytest.raises(NotFinite, match=r"step 1: loss 1\.0000 on rank 0, gradient norm nan"):
        update(1, NAN)
    assert torch.equal(weight, good)


def test_a_loss_that_is_not_finite_makes_the_gradients_so():
    for value in (NAN, INF):
        x = torch.zeros((), requires_grad=True)
        loss = x + value  # whose plain gradient would be 1
        (loss * FiniteGuard.loss_weight(loss, 4)).backward()
        assert x.grad.isnan()
    x = torch.zeros((), requires_grad=True)
    ((x + 2) * FiniteGuard.loss_weight(x + 2, 4)).backward()
    assert x.grad == 0.25


def test_with_scaled_gradients_an_overflow_is_the_scalers_business_but_a_nan_loss_is_not():
    guard = make_guard(scaled=True)
    guard.scaler.scale(torch.ones(()))  # the scaler makes its scale when first used
    guard.check(0, torch.tensor(2.0), torch.tensor(INF))
    with pytest.raises(NotFinite, match="loss nan on rank 0"):
        guard.check(1, torch.tensor(NAN), torch.tensor(NAN))
    guard.scaler.load_state_dict({**guard.scaler.state_dict(), "scale": 1.0})
    with pytest.raises(NotFinite, match="gradient norm inf"):
        guard.check(2, torch.tensor(2.0), torch.tensor(INF))


TWO_RANKS = """
import json, os, signal, sys, time, torch
sys.path.insert(0, {root!r})
from pretrain.train.checkpoint import CheckpointError
from pretrain.distributed import Ranks
from pretrain.train.stopping import FiniteGuard, NotFinite, StopSignal

def attempt(function, *arguments):
    try:
        return function(*arguments)
    except (CheckpointError, NotFinite) as error:
        return f"{{type(error).__name__}}: {{error}}"

def fail(rank, only):
    if rank == only:
        raise CheckpointError(f"rank {{rank}} cannot")
    return rank

ranks = Ranks.start("cpu")
found = {{
    "rank": ranks.rank, "is_first": ranks.is_first,
    "sum": ranks.sum(0.1 + ranks.rank, 1),
    "gather": ranks.gather({{"rank": ranks.rank}}),
    "broadcast": ranks.broadcast(f"from {{ranks.rank}}"),
    "on_first": ranks.on_first(lambda: f"made by {{ranks.rank}}"),
    "on_first_fails": attempt(ranks.on_first, fail, ranks.rank, 0),
    "together": attempt(ranks.on_all, fail, ranks.rank, -1),
    "together_fails": attempt(ranks.on_all, fail, ranks.rank, 1),
    "on_every_disk": ranks.on_every_disk(lambda: f"made by {{ranks.rank}}"),
    "node_ranks": ranks.node_ranks,
}}
state = {{
    "step": 3, "names": ("a", None), "empty": torch.empty(0, 4), "scalar": torch.tensor(7.0),
    "model": {{"w": torch.arange(6.0).view(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16)}},
    "optimizer": {{"state": {{0: {{"step": torch.tensor(2)}}}}, "param_groups": [{{"lr": 0.1}}]}},
}}
got = ranks.broadcast_state(state if ranks.rank == 0 else None)
found["state"] = repr(got) == repr(state)
ranks.nodes = ["a", "b"]  # as if each were on a machine of its own
found["on_two_nodes"] = ranks.on_every_disk(lambda: f"made by {{ranks.rank}}")
found["on_two_nodes_fails"] = attempt(ranks.on_every_disk, fail, ranks.rank, 1)
guard = FiniteGuard(ranks, torch.amp.GradScaler("cpu", enabled=False))
nan = torch.tensor(float("nan"))
found["guard"] = attempt(guard.check, 5, nan if ranks.rank == 1 else torch.tensor(2.5), nan)
with StopSignal(ranks) as stop:
    stop.at_once = False
    answers = []
    for call in range(200):
        if ranks.rank == 1 and call == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        if ranks.rank == 0 and call % 7 == 0:
            time.sleep(0.001)  # ranks are never in step
        answers.append(stop.agreed())
        if answers[-1]:
            break
    found["agreed_at"], found["agreed_on"] = len(answers) - 1, answers[-1]
    found["agreed_now"] = stop.agreed_now()
ranks.stop()
with open(os.path.join({folder!r}, f"{{ranks.rank}}.json"), "w") as file:
    json.dump(found, file)
os._exit(0)  # torch 2.13 can abort in the threads of gloo while the interpreter ends
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    code = TWO_RANKS.format(root=str(ROOT), folder=str(folder))
    port = str(free_port())
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        forked.Popen([sys.executable, "-c", code], env={**os.environ, **shared, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_add_up_gather_and_broadcast(found):
    for rank, values in enumerate(found):
        assert values["rank"] == rank and values["is_first"] == (rank == 0)
        assert values["sum"] == pytest.approx([1.2, 2.0], abs=1e-15)
        assert values["gather"] == [{"rank": 0}, {"rank": 1}]
        assert values["broadcast"] == "from 0" and values["on_first"] == "made by 0"


def test_a_state_arrives_as_it_was_with_every_kind_of_tensor(found):
    assert [values["state"] for values in found] == [True, True]


def test_one_rank_a_machine_does_what_concerns_its_disk(found):
    for rank, values in enumerate(found):
        assert values["node_ranks"] == [0, 1] and values["on_every_disk"] == "made by 0"
        assert values["on_two_nodes"] == f"made by {rank}"
        assert values["on_two_nodes_fails"] == "CheckpointError: rank 1 cannot"


def test_what_fails_on_one_rank_is_raised_on_all(found):
    for rank, values in enumerate(found):
        assert values["on_first_fails"] == "CheckpointError: rank 0 cannot"
        assert values["together"] == rank
        assert values["together_fails"] == "CheckpointError: rank 1 cannot"


def test_all_ranks_stop_for_a_nan_of_one_and_name_it(found):
    for values in found:
        assert values["guard"].startswith(
            "NotFinite: step 5: loss nan on rank 1, gradient norm nan"
        )


def test_a_signal_to_one_rank_stops_both_at_the_same_call(found):
    assert found[0]["agreed_on"] == found[1]["agreed_on"] == signal.SIGTERM
    assert found[0]["agreed_at"] == found[1]["agreed_at"] == 21, "one call after it came"
    assert found[0]["agreed_now"] == found[1]["agreed_now"] == signal.SIGTERM
