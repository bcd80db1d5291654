"""The source that computes a model, as a checkpoint records it.

source_of(model)                              # {"model.py": SHA-256, "ops.py": SHA-256}
warn_of_source(model, checkpoint, path)       # where it is not what trained the checkpoint
"""

import contextlib
import hashlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pretrain.rendezvous import is_first_rank


def own_class(model: nn.Module) -> type[Any]:
    """The class that computes a model: fully_shard makes a subclass of torch's."""
    kinds = type(model).__mro__
    return next(kind for kind in kinds if not kind.__module__.startswith("torch."))


def source_of(model: nn.Module) -> dict[str, str]:
    """SHA-256, by file name, of the source that computes a model: a run that goes on with other
    code trains another model, though all shapes agree."""
    found = {}
    with contextlib.suppress(TypeError, OSError):  # a class that no file has
        module = inspect.getsourcefile(own_class(model))
        paths = [Path(module)] if module else []
        ops = Path(__file__).parents[1] / "ops.py"
        for path in [*paths, *[ops] * ops.exists()]:
            text = path.read_text(encoding="utf-8")  # \r\n as \n
            found[path.name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def warn_of_source(model: nn.Module, saved: Mapping[str, Any], where: str | Path) -> None:
    """Say on the first rank's stderr, where a checkpoint was trained by other source than this: its
    loss, its score and an export of it may then be those of another function."""
    then = saved.get("model_source")
    if not isinstance(then, Mapping) or not is_first_rank():
        return
    if problem := source_problem(source_of(model), then):
        print(f"warning: {where}: {problem}", file=sys.stderr, flush=True)


def source_problem(now: dict[str, str], saved: Mapping[str, Any]) -> str | None:
    """What to say where a checkpoint was made by other source than this; None where it was not, or
    does not say."""
    changed = [name for name in sorted(set(now) & set(saved)) if now[name] != saved[name]]
    if not changed:
        return None
    hashes = ", ".join(
        f"{name} {str(saved[name])[:12]} then, {now[name][:12]} now" for name in changed
    )
    return (
        f"{' and '.join(changed)} is not as it was when this checkpoint was trained (SHA-256:"
        f" {hashes}); the model may compute something else with the same weights"
    )
