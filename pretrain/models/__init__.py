"""Architectures by name, and the only place where a model is built from weights.

    model, checkpoint = load("checkpoints")              # the best checkpoint of a run's folder
    model = build("gpt2", {"n_layer": 12, ...}, state)   # in eval mode, on the CPU

A further architecture is a module in this folder and a line in ARCHITECTURES. Its model takes its
configuration, a dataclass with padded_vocab_size, and has the methods of model.GPT.
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import layouts, weights
from pretrain.errors import first_line
from pretrain.models.source import warn_of_source
from pretrain.weights import Damaged, shown

MAX_SIZE = 2**31 - 1


class Architecture(NamedTuple):
    module: str
    model: str
    config: str

    def load(self) -> tuple[type[nn.Module], type]:
        """The classes of the model and of its configuration."""
        module = importlib.import_module(self.module)
        return getattr(module, self.model), getattr(module, self.config)


ARCHITECTURES = {
    "gpt2": Architecture("model", "GPT", "GPTConfig"),
    "modern": Architecture("pretrain.models.modern", "Modern", "ModernConfig"),
}


def architecture_of(model: nn.Module) -> str:
    """The name of a model's architecture, as a checkpoint records it; a subclass has it too."""
    kinds = [(kind.__module__, kind.__name__) for kind in type(model).__mro__]
    return next(name for name, a in ARCHITECTURES.items() if (a.module, a.model) in kinds)


def load(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """(model in eval mode on the CPU, the checkpoint: {} for weights alone) of a checkpoint, of a
    run's folder, or of a folder in Hugging Face's format. Raises CheckpointError, OSError."""
    with _named(path):
        if weights.is_huggingface(Path(path)):
            sizes, state = layouts.read_huggingface(path)
            return build("gpt2", sizes, state), {}
        saved = layouts.read_any(weights.model_file(path))
        model = build(*layouts.described(saved))
        warn_of_source(model, saved, path)
        return model, saved if "model" in saved else {}


def from_pretrained(name_or_folder: str | Path, dropout: float = 0.0) -> Any:
    """A GPT-2 in Hugging Face's format, from a folder or by its name on the hub, or what load()
    takes; in eval mode on the CPU. Raises model.CheckpointError, OSError."""
    path = Path(name_or_folder)
    with _named(name_or_folder):
        if path.is_file() or (_is_run(path) and not weights.is_huggingface(path)):
            saved = layouts.read_any(weights.model_file(path))
            architecture, config, state = layouts.described(saved)
        else:
            saved = {}
            architecture, (config, state) = "gpt2", layouts.read_huggingface(name_or_folder)
        model = build(architecture, {**config, "dropout": dropout}, state)
        warn_of_source(model, saved, name_or_folder)
        return model


@contextlib.contextmanager
def _named(source: str | Path) -> Iterator[None]:
    """What is wrong with a source, with its name, as the error of model.py."""
    from model import CheckpointError

    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{source}: no such file") from None
    except Damaged as error:
        raise CheckpointError(f"{source}: {error}") from None


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (weights.BEST, weights.FINAL))


# ---- From weights to a model


def build(architecture: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """A model in eval mode with these weights, on the CPU. Nothing is allocated before they are
    known to fit its configuration. Raises Damaged when they do not."""
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise Damaged(
            f"its architecture {shown(architecture)} is not known here ({', '.join(ARCHITECTURES)})"
        )
    model_class, config_class = ARCHITECTURES[architecture].load()
    settings = _configured(config_class, config)
    if settings.n_layer > len(state):
        raise Damaged(f"{UNFIT}: {settings.n_layer} layers, but {len(state)} tensors")
    try:
        with torch.device("meta"):
            model = model_class(settings)
    except RuntimeError as error:  # sizes whose product no computer can count
        raise Damaged(f"{UNFIT}: {first_line(error)}") from None
    state = _fitted(dict(state), model)
    model.to_empty(device="cpu").load_state_dict(state)
    return model.eval()


def _configured(config_class: type, config: Mapping[str, Any]) -> Any:
    """A configuration from what a file says of it."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(config_class)}
    for name, value in config.items():
        kind = kinds.get(name)
        if kind is None:
            raise Damaged(f"its model_config does not describe a GPT: {shown(name)} is not known")
        if kind is int:
            fits = type(value) is int and 0 < value <= MAX_SIZE
        elif kind is float:
            fits = type(value) in (int, float) and 0 <= value < 1
        else:
            fits = isinstance(value, kind)
        if not fits:
            raise Damaged(f"its model_config has {name} {shown(value)}, which no model has")
    try:
        return config_class(**config)
    except (ValueError, TypeError) as error:
        raise Damaged(first_line(error)) from None


UNFIT = "its weights do not fit its configuration"


def _fitted(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The weights with the rows that pad the vocabulary, without a second name of the embedding."""
    _refuse_repetition(state)
    expected = model.state_dict()
    if not any(key in state for key in expected):
        raise Damaged(f"no {next(iter(expected))} in it")
    if "lm_head.weight" in state and "lm_head.weight" not in expected:
        head, embedding = state.pop("lm_head.weight"), state.get("transformer.wte.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise Damaged("its output head is not its embedding, as in GPT-2")
    rows, padded = model.config.vocab_size, model.config.padded_vocab_size
    for key, want in expected.items():
        have = state.get(key)
        if have is None:
            raise Damaged(f"{UNFIT}: no {key}")
        if have.dim() and have.shape == (rows, *want.shape[1:]) and len(want) == padded > rows:
            have = state[key] = F.pad(have, (0, 0) * (have.dim() - 1) + (0, padded - rows))
        if have.shape != want.shape:
            raise Damaged(f"{UNFIT}: {key} is {tuple(have.shape)}, not {tuple(want.shape)}")
        if not have.is_floating_point() or have.is_meta:
            raise Damaged(f"{UNFIT}: {key} is {have.dtype}, not weights")
    if further := state.keys() - expected.keys():
        raise Damaged(f"{UNFIT}: {shown(min(further))} is no part of it")
    return state


def _refuse_repetition(state: Mapping[str, Tensor]) -> None:
    """Tensors may share memory (the head is the embedding), but a small file whose tensors are all
    views of a few numbers would become a model of any size."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
    if sum(t.numel() * t.element_size() for t in state.values()) > 2 * sum(held.values()):
        raise Damaged("its tensors are larger than what it holds: views that repeat a few numbers")
