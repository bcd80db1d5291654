"""The same model and shards in other people's tools. Frameworks are imported only here, and none is
needed elsewhere: `pip install -r requirements-adapters.txt` brings them."""

import importlib.util

from pretrain.errors import UserError


class AdapterError(UserError, RuntimeError):
    """What keeps a trainer from starting; one line for the user."""


class FrameworkMissing(UserError, RuntimeError):
    """A framework that an adapter needs is not installed; the message says how to get it."""


def require(*modules: str) -> None:
    """Raise FrameworkMissing unless all of these can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise FrameworkMissing(
            f"{names} not installed; run `pip install -r requirements-adapters.txt`"
        )
