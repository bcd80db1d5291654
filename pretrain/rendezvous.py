"""How the processes of one torchrun find each other, and notice when they have lost each other.

    place = Place.from_environment()     # rank 3 of 8, or 0 of 1 without torchrun
    store = meeting_point(place)         # holds nothing but what these processes write to it

No wait is for ever: a start is over after START_SECONDS, a rank that hangs ends the run after
HANG_SECONDS, and a rank whose torchrun is gone saves what there is to save and goes too.
"""

import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import UserError, first_line, say

if TYPE_CHECKING:  # flags are read before torch is loaded, and what they mean depends on ranks
    from torch.distributed import Store

POLL_SECONDS = 0.05
WATCH_SECONDS = 0.5  # between two looks of a Watch
NAME_SECONDS = 30  # until a machine that just starts has its name
ORPHAN_SECONDS = 60  # for a checkpoint, after torchrun has gone


class RankError(UserError):
    """The processes of a run cannot be brought together, or have lost each other."""


def environment(name: str, default: int) -> int:
    """A whole number that torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_PORT), or a number of
    seconds of this program's (PRETRAIN_...). Raises RankError for one that is none."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if number < (0 if name.endswith("RANK") or name.endswith("COUNT") else 1):
        raise _odd(name, text)
    return number


def _odd(name: str, text: str) -> RankError:
    error = RankError(f"{name}={text[:80]!r}: {_expected(name)}")
    error.on_all_ranks = not name.endswith("RANK")
    return error


def _expected(name: str) -> str:
    if name == "MASTER_PORT":
        return "not a port from 1 to 65535; choose a free one, or start with torchrun, which does"
    if name.startswith("PRETRAIN_"):
        return "not a whole number of seconds from 1 on"
    return "not what torchrun sets; start with torchrun, or unset it to run one process alone"


def start_seconds() -> int:
    """How long a start may take, until every rank is there: imports on a cold network disk do."""
    return environment("PRETRAIN_START_SECONDS", 600)


def hang_seconds() -> int:
    """How long a rank may make others wait in training: compiling and saving take minutes."""
    return environment("PRETRAIN_HANG_SECONDS", 1800)


def is_first_rank() -> bool:
    """Whether this process says what is true of all; by the environment alone, and never raises."""
    return os.environ.get("RANK", "").strip() in ("", "0")


@dataclass(frozen=True)
class Place:
    """Which process this is among how many, and where they meet."""

    rank: int = 0
    world_size: int = 1
    node: str = ""  # the same for the processes of one machine
    start: str = ""  # the same for the processes that one torchrun started on this machine
    address: str = ""
    port: int = 0

    @classmethod
    def from_environment(cls) -> "Place":
        """As torchrun's variables say. Raises RankError for those that do not fit together."""
        rank, world_size = environment("RANK", 0), environment("WORLD_SIZE", 1)
        if rank >= world_size:
            raise RankError(f"RANK={rank}: not below WORLD_SIZE={world_size}; start with torchrun")
        if world_size == 1:
            return cls()
        address, port = os.environ.get("MASTER_ADDR", "").strip(), environment("MASTER_PORT", 0)
        if not address or not port:
            unset = "MASTER_PORT" if address else "MASTER_ADDR"
            raise RankError(
                f"WORLD_SIZE={world_size} needs {unset}, which is not set; start with torchrun,"
                " which sets it"
            )
        if port >= 2**16:
            raise _odd("MASTER_PORT", str(port))
        names = (os.environ.get(name) for name in ("GROUP_RANK", "SLURM_NODEID"))
        node = next((name for name in names if name), socket.gethostname())
        # torchrun gives each worker a file in a folder of this very start and attempt.
        file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
        start = str(Path(file).parent.parent) if file else ""
        return cls(rank, world_size, node, start, address, port)


def has_agent() -> bool:
    """Whether torchrun started this process; whoever sets the variables by hand may leave."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def connect(place: Place) -> "Store":
    """The key-value store at place.address: torchrun's, or without it rank 0's. Raises
    RankError."""
    from torch.distributed import TCPStore

    where = f"{place.address}:{place.port}"
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = place.rank == 0 and not is_agents
    try:
        # torch would fill the screen with its own calls before it says that nobody is there.
        if hosts:
            socket.getaddrinfo(place.address, place.port)
        else:
            _await_listener(place, patient=not is_agents)
        return TCPStore(
            place.address,
            place.port,
            is_master=hosts,
            timeout=timedelta(seconds=start_seconds()),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (socket.gaierror, UnicodeError) as error:  # the latter: a label of 64 characters
        raise RankError(
            f"rank {place.rank}: MASTER_ADDR={place.address[:80]!r} is no name or address that is"
            f" known here ({first_line(error)})"
        ) from None
    except ConnectionRefusedError:
        gone = f"the torchrun that listened on {where} is gone"
        silent = f"nobody answers at {where}: is rank 0 started?"
        raise RankError(f"rank {place.rank}: {gone if is_agents else silent}") from None
    except (OSError, RuntimeError) as error:  # torch's DistNetworkError is a RuntimeError
        problem = "cannot listen on" if hosts else "nobody answers at"
        way_out = "take another MASTER_PORT" if hosts else "is rank 0 started?"
        raise RankError(
            f"rank {place.rank}: {problem} {where}: {way_out} ({first_line(error)})"
        ) from None


def _await_listener(place: Place, *, patient: bool) -> None:
    """Return once somebody listens at place.address. patient: rank 0 may start after this rank, and
    its name be known later still; torchrun was there before: it will not come back. Raises
    OSError."""
    begun = time.monotonic()
    while True:
        try:
            socket.create_connection((place.address, place.port), start_seconds()).close()
            return
        except OSError as error:
            limit = NAME_SECONDS if isinstance(error, socket.gaierror) else start_seconds()
            if not patient or time.monotonic() - begun > min(limit, start_seconds()):
                raise
        time.sleep(4 * POLL_SECONDS)


def meeting_point(place: Place, watch: "Watch | None" = None) -> "Store":
    """A key-value store that holds nothing but what these processes write to it.

    The one that torchrun keeps for its workers outlives them, so that after a restart a process may
    find the address of a dead one there (torch 2.13: "Gloo connectFullMesh failed"), and restart
    counts differ between nodes. So the first rank gives out a new name, under which all then write:
    each other rank shows an id of its own, and a name that answers this id comes from a first rank
    that lives. On the first rank's machine only those of the same start are heard: a rank that has
    outlived its torchrun may meet the next one's store, at the same port.

    watch: ends this process where another program listens at the address and never answers, for
    which torch's store waits without a limit. Raises RankError that names the ranks which have not
    come within start_seconds().
    """
    from torch.distributed import PrefixStore

    if watch:
        foreign = (
            f"rank {place.rank}: what listens on {place.address}:{place.port} does not answer as"
            " torchrun or rank 0 does; take another MASTER_PORT"
        )
        watch.within(1.1 * start_seconds() + 2, lambda: foreign)
    store = connect(place)
    if watch:
        watch.relax()
    deadline = time.monotonic() + start_seconds()
    name = uuid.uuid4().hex
    try:
        if place.rank == 0:
            _invite(store, place, name, deadline)
        else:
            name = _ask(store, place, name, deadline)
    except RuntimeError as error:  # of the store
        raise RankError(
            f"rank {place.rank}: lost {place.address}:{place.port} while ranks were starting"
            f" ({first_line(error)})"
        ) from None
    return PrefixStore(name, store)


def _invite(store: "Store", place: Place, name: str, deadline: float) -> None:
    """Rank 0: answer every other rank until all have come in."""
    waited_for = set(range(1, place.world_size))
    while waited_for:
        for rank in sorted(waited_for):
            if asker := _asker(store, place, rank):
                store.set(f"answer/{asker}", name)
            if store.check([f"{name}/{rank}"]):
                waited_for.remove(rank)
        if waited_for and time.monotonic() > deadline:
            raise RankError(
                f"{in_words(waited_for)} of {place.world_size} did not come within"
                f" {start_seconds()} s; is every node started, with the same --nnodes,"
                " --rdzv_id and --rdzv_endpoint?"
            )
        time.sleep(POLL_SECONDS / 5)
    store.set(f"{name}/all", "")


def _asker(store: "Store", place: Place, rank: int) -> str | None:
    """The id that this rank shows. On rank 0's own machine the start must be the same; on others
    torchrun has a folder of its own, and the last to ask is heard."""
    neighbour = f"ask/{rank}/{place.node}/{place.start}"
    if store.check([neighbour]):
        return store.get(neighbour).decode()
    if store.check([f"ask/{rank}"]):
        node, _, asker = store.get(f"ask/{rank}").decode().rpartition("/")
        return asker if node != place.node else None
    return None


def _ask(store: "Store", place: Place, own_id: str, deadline: float) -> str:
    """Any other rank: the name that rank 0 gives out, once all have come in."""
    name = ""
    while not (name and store.check([f"{name}/all"])):
        if not name:
            store.set(f"ask/{place.rank}/{place.node}/{place.start}", own_id)
            store.set(f"ask/{place.rank}", f"{place.node}/{own_id}")
            if store.check([f"answer/{own_id}"]):
                name = store.get(f"answer/{own_id}").decode()
                store.set(f"{name}/{place.rank}", "")
        if time.monotonic() > deadline:
            problem = "other ranks did not come" if name else "rank 0 did not answer"
            raise RankError(f"rank {place.rank}: {problem} within {start_seconds()} s")
        time.sleep(POLL_SECONDS)
    return name


def in_words(ranks: Iterable[int]) -> str:
    """The ranks of a message; of many the first.

    >>> in_words([3, 1])
    'ranks 1, 3'
    """
    numbers = sorted(ranks)
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return ("ranks " if len(numbers) > 1 else "rank ") + ", ".join(map(str, numbers[:8])) + more


class Watch:
    """A thread that ends this process when torchrun is gone, or when it has waited for too long.

    A process that is stuck in a collective cannot see either. When torchrun is gone it first sends
    itself SIGTERM: in training that saves a checkpoint, before it ends the process.
    """

    def __init__(self, rank: int):
        """Raises RankError when torchrun has gone already."""
        self.rank = rank
        self._parent = os.getppid() if has_agent() else None
        if self._parent == 1 and not _first_process_is_python():
            raise RankError(f"rank {rank}: the torchrun that started it is gone")
        self._limit: tuple[float, Callable[[], str]] | None = None
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def within(self, seconds: float, explain: Callable[[], str]) -> None:
        """End the process unless within() or relax() is called again in time. explain: says why, in
        one line; may ask the other ranks; "" where another rank says it."""
        self._limit = (time.monotonic() + seconds, explain)

    def relax(self) -> None:
        """No limit: what comes now may take its time."""
        self._limit = None

    def _run(self) -> None:
        last_look = time.monotonic()
        while True:
            time.sleep(WATCH_SECONDS)
            now, limit = time.monotonic(), self._limit
            if limit and now - last_look > 10 * WATCH_SECONDS:  # stopped and continued, as by Slurm
                self._limit = limit = (limit[0] + now - last_look, limit[1])
            last_look = now
            if self._parent is not None and os.getppid() != self._parent:
                say("train", f"rank {self.rank}: torchrun is gone: stopping", kind="warning")
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(ORPHAN_SECONDS)
                os._exit(128 + signal.SIGTERM)
            if limit and now > limit[0] and limit is self._limit:
                self._explain(limit[1])
                os._exit(1)

    def _explain(self, explain: Callable[[], str]) -> None:
        def work() -> None:
            if problem := explain():
                say("train", problem)

        asking = threading.Thread(target=work, daemon=True)
        asking.start()
        asking.join(_patience() + 60)  # the store that it asks may hang too


def _first_process_is_python() -> bool:
    """Whether process 1 may be a torchrun, as in a container, and not what adopts orphans."""
    try:
        command = Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return True  # nothing is known: assume no harm
    return b"python" in command or b"torchrun" in command


def name_those_who_hang(store: "Store", rank: int, world_size: int, position: int) -> str:
    """What to say when nothing has gone on for hang_seconds(): the ranks that are behind the others
    or do not answer, and where each is in its code; "" on all ranks but the first that can speak.

    position: how often this rank has been where all ranks come by. All that still run call this
    within a step or so of each other, and the one that hangs calls it first.
    """
    store.set(f"stuck/{rank}", f"{position} {_place_in_code()}")
    answers: dict[int, list[str]] = {}
    deadline = time.monotonic() + _patience()
    while len(answers) < world_size and time.monotonic() < deadline:
        time.sleep(WATCH_SECONDS)
        for other in range(world_size):
            if other not in answers and store.check([f"stuck/{other}"]):
                answers[other] = store.get(f"stuck/{other}").decode().split(" ", 1)
    if rank != min(answers):
        time.sleep(
            10 * WATCH_SECONDS
        )  # a rank that ends is an error to those that have yet to speak
        return ""
    furthest = max(int(position) for position, _ in answers.values())
    behind = [
        other
        for other in range(world_size)
        if other not in answers or int(answers[other][0]) < furthest
    ]
    who = f"{in_words(behind)} did not come; " if behind else ""
    where = [
        f"rank {other} is at {answers[other][1]}" if other in answers else f"rank {other} is silent"
        for other in (behind or sorted(answers))[:8]
    ]
    return f"nothing went on for {hang_seconds()} s: {who}{', '.join(where)}"


def _patience() -> float:
    """Seconds between the first rank that finds that nothing goes on, and the last: a long step."""
    return max(10 * WATCH_SECONDS, hang_seconds() / 10)


def _place_in_code() -> str:
    """file.py:line of the main thread, in the innermost code that is not of a library."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and frame.f_back and "site-packages" in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "its end"
