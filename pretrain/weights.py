"""Weights from files: safely read, and translated between Hugging Face's GPT-2 and model.py.

Both name parameters as OpenAI did. Hugging Face keeps the four matrices of a block as (in, out),
Conv1D, where torch's Linear has (out, in). One of them is square and would load in either
orientation.

Raises ValueError throughout; the message lacks the name of the file or model, which the caller
knows.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import UserError

SAFETENSORS, SHARDS, PICKLE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What model.py implements; other values in a config.json would be other models.
IMPLEMENTED = {
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}
SIZES = {"n_positions": "block_size"} | {
    name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")
}


class Damaged(UserError, ValueError):
    """What a file holds is no good; the message lacks its name."""


def read(path: str | Path, *, verify: bool = True) -> Any:
    """torch.load on the CPU that executes nothing from the file; tensors are mapped from it.

    verify: compare the checksums that torch.save stored (1 to 2 GB/s): torch.load alone does not
    notice a flipped bit. Raises Damaged for what the file holds, OSError for what the system says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            file.read(1)  # zipfile and torch would take what the system says for damage
            if is_zip := zipfile.is_zipfile(file):  # torch.save's format since 1.6
                with zipfile.ZipFile(file) as archive:
                    if verify and (damaged := archive.testzip()):
                        raise Damaged(f"damaged: {damaged} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise Damaged(
            "damaged, or it holds more than tensors and plain values, which is refused because loading it"
            f" could run code ({_first_line(error)})"
        ) from None
    except (Damaged, OSError):
        raise
    except Exception as error:  # zipfile and torch raise all kinds on damaged files
        raise Damaged(f"damaged or cut short ({_first_line(error)})") from None


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes of DistributedDataParallel and torch.compile, and without the
    causal masks that old versions of GPT-2 kept as buffers."""
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"its weights are not tensors with names: {key!r} is {type(value).__name__}"
            )
    state = {
        key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()
    }
    return {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}


def read_huggingface(name_or_folder: str | Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes for GPTConfig and weights for model.GPT from a local folder or, by name, from the hub
    or its cache."""
    folder = Path(name_or_folder)
    get = _from_folder(folder) if folder.is_dir() else _from_hub(str(name_or_folder))
    config = get("config.json")
    if config is None:
        raise ValueError("no config.json in it")
    sizes = _sizes(json.loads(config.read_text(encoding="utf-8")))
    if (file := get(SAFETENSORS)) is not None:
        state = _read_safetensors(file)
    elif (file := get(SHARDS)) is not None:
        state = {}
        for shard in sorted(
            set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        ):
            state |= _read_safetensors(get(shard))
    elif (file := get(PICKLE)) is not None:
        state = read(file)
    else:
        raise ValueError(f"neither {SAFETENSORS} nor {PICKLE} in it")
    # Saved from GPT2Model rather than GPT2LMHeadModel, keys lack their first part.
    if "wte.weight" in state:
        state = {
            key if key.startswith("lm_head.") else f"transformer.{key}": v
            for key, v in state.items()
        }
    return sizes, {
        k: v.t() if k.endswith(CONV1D) else v for k, v in without_wrappers(state).items()
    }


def to_huggingface(state: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The state dict of transformers.GPT2LMHeadModel for that of model.GPT."""
    new = {
        key: value.t().contiguous() if key.endswith(CONV1D) else value
        for key, value in state.items()
    }
    for key, value in state.items():
        bias = key.removesuffix("weight") + "bias"
        if (
            key.endswith(".weight")
            and bias not in state
            and not key.endswith(("wte.weight", "wpe.weight"))
        ):
            new[bias] = value.new_zeros(len(value))
    wte = state["transformer.wte.weight"][:vocab_size]
    return new | {"transformer.wte.weight": wte, "lm_head.weight": wte}


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    implemented = IMPLEMENTED | {"n_inner": [None, 4 * config.get("n_embd", 768)]}
    other = [
        key for key, values in implemented.items() if key in config and config[key] not in values
    ]
    if other:
        settings = ", ".join(f"{key}={config[key]!r}" for key in other)
        raise ValueError(f"not the GPT-2 that is implemented here: {settings} in its config.json")
    return {ours: config[theirs] for theirs, ours in SIZES.items() if theirs in config}


def _from_folder(folder: Path) -> Callable[[str], Path | None]:
    return lambda name: folder / name if (folder / name).is_file() else None


def _from_hub(repo: str) -> Callable[[str], Path | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def get(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError:
            problem = (
                "the Hugging Face hub cannot be reached (network, HF_ENDPOINT, HF_HUB_OFFLINE?)"
            )
        except EntryNotFoundError:
            return None
        except RepositoryNotFoundError:
            problem = (
                "the Hugging Face hub has no such model, or shows it only after `hf auth login`"
            )
        except (OSError, ValueError) as error:
            problem = f"the Hugging Face hub says: {_first_line(error)}"
        raise ValueError(f"no such folder, and {problem}")

    return get


def _read_safetensors(file: Path | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, TypeError) as error:
        what = file or "one of its shards"
        raise ValueError(
            f"{what} is damaged, cut short or missing ({_first_line(error)})"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
