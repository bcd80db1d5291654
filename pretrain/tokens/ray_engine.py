"""Units as tasks of a Ray cluster: one machine, or as many as `ray start` has joined.

    with RayEngine("auto") as engine:          # the cluster that RAY_ADDRESS or this machine knows
        build_staged(source, folder, settings, work, engine, expected_tokens=tokens)

Ray decides where a task runs, and runs it again on another worker when its worker or its machine
dies. What the tasks make lies in a folder that all machines see; nothing but its description comes
back.
"""

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import UserError, first_line
from pretrain.text.documents import Source
from pretrain.tokens.build import Work
from pretrain.tokens.destination import StoreDestination
from pretrain.tokens.engines import Result
from pretrain.tokens.progress import in_bytes
from pretrain.tokens.scratch import UnitJob
from pretrain.tokens.shard_jobs import ShardJob
from pretrain.tokens.shards import Manifest, ShardError
from pretrain.tokens.staged import build_staged, scratch_bytes
from pretrain.tokens.verify import verify_folder

if TYPE_CHECKING:
    from pretrain.tokens.command import Request

INSTALL = "pip install -r requirements-ray.txt"
RETRIES = 20  # of a task whose worker died: machines come and go in a long build
AHEAD = 2  # tasks handed over for each core: the next one is there when one ends
ROOT = Path(__file__).parents[2]
VARIABLES = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # of workers


class RayError(UserError):
    """Ray is missing, or there is no cluster."""


def build_on_ray(
    request: "Request", source: Source, folder: Path, work: Work, *, name: str, tokens: int
) -> Manifest:
    """On a Ray cluster, or on one that is started here. Its shards are verified before they count:
    no engine's word is taken for them."""
    with RayEngine(request.ray_address, request.num_proc) as engine:
        here = "on this machine" if request.ray_address is None else f"at {request.ray_address}"
        scratch = in_bytes(scratch_bytes(request.settings, engine.workers))
        print(f"engine      Ray {here}, {engine.workers} workers, scratch of up to {scratch}")
        manifest = build_staged(
            source, folder, request.settings, work, engine, name=name, expected_tokens=tokens
        )
        store = work.destination
        if isinstance(store, StoreDestination):  # each shard was verified here before it was sent
            sent = store.in_full(manifest)
            problems = [f"{each.file} is not there" for each in manifest.shards if each not in sent]
        else:
            problems = verify_folder(folder, mapped=engine.map_in_order).problems
    if problems:
        raise ShardError(f"{store.shown(folder)}: {'; '.join(problems[:5])}")
    return manifest


class RayEngine:
    """An Engine (see engines.py); a context manager that leaves the cluster at its end."""

    def __init__(self, address: str | None = None, num_cpus: int | None = None):
        """address: "auto", "host:port" or "ray://host:port"; None starts a cluster on this machine,
        of num_cpus cores (default: all). Raises RayError."""
        try:
            import ray
        except ImportError:
            raise RayError(f"--engine ray: Ray is not installed; {INSTALL}") from None
        options: dict[str, Any] = {
            # Ray's own lines stay in its logs: a build has one progress bar.
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            # Without one Ray would join a cluster that RAY_ADDRESS names or this machine has.
            "address": address or "local",
        }
        if address is None:
            options |= {"num_cpus": num_cpus, "include_dashboard": False}
        else:
            package = str(Path(__file__).parents[1])
            options["runtime_env"] = {"py_modules": [package], "env_vars": VARIABLES}
        try:
            _reach(address)
            with _inherited() if address is None else contextlib.nullcontext():
                ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            if address is None:
                problem = first_line(error)
                raise RayError(f"--engine ray: no cluster starts here: {problem}") from None
            raise RayError(
                f"--ray_address {address}: no cluster there ({first_line(error)}); start one with "
                "`ray start --head`, or leave --ray_address out for one on this machine"
            ) from None
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        ray.shutdown()

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Result]:
        """See Engine: results as they come. Raises what the function raises, and RayError for a
        task whose workers died again and again."""
        import ray

        remote = ray.remote(max_retries=RETRIES)(function)
        waiting = iter(tasks)
        running: dict[Any, Any] = {}
        while True:
            # Up to a None: then what is to do next depends on what is running.
            free = itertools.islice(waiting, AHEAD * self.workers - len(running))
            for task in itertools.takewhile(lambda task: task is not None, free):
                running[remote.remote(task)] = task
            if not running:
                return
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(done)
            yield task, _result(done, task)

    def map_in_order(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """The results in the order of the items. Raises like map."""

        def of_item(numbered: tuple[int, Any]) -> Any:
            return function(numbered[1])

        found = {}
        for (index, _), result in self.map(of_item, enumerate(items)):
            found[index] = result
        return [found[index] for index in range(len(found))]


def _reach(address: str | None) -> None:
    """Raise OSError where nobody listens: Ray itself would wait for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _result(reference: Any, task: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception):
            raise cause from None
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.RayError) as error:
        where = "a shard's verification"
        if isinstance(task, UnitJob):
            where = task.source.files[task.unit.file].path
        elif isinstance(task, ShardJob):
            where = f"shard {task.index}"
        raise RayError(
            f"{where}: its worker died {RETRIES + 1} times ({type(error).__name__}: often a "
            "lack of memory, which `ray start --num-cpus N` with a smaller N eases); the same "
            "command continues"
        ) from None


@contextlib.contextmanager
def _inherited() -> Iterator[None]:
    """What workers on this machine need to import this package, in the environment that they take
    over from whoever starts the cluster: a runtime_env would throw away the workers that Ray has
    started in advance, and start others, which takes seconds."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before = dict(os.environ)
    os.environ.update(VARIABLES | {"PYTHONPATH": path})
    try:
        yield
    finally:
        for name in (*VARIABLES, "PYTHONPATH"):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
