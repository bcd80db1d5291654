"""How others lay GPT-2 out in files, and what a checkpoint is made of.

    architecture, config, state = described(read_any("ckpt.pt"))    # ours, nanoGPT's, llm.c's ...
    sizes, state = read_huggingface("gpt2")                         # or a folder with config.json

All name parameters as OpenAI did. Hugging Face keeps the four matrices of a block as (in, out),
Conv1D, where torch's Linear has (out, in). One of them is square and would load in either
orientation. Raises weights.Damaged, whose message lacks the name of the file or model, and OSError.
"""

import math
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import weights
from pretrain.errors import first_line
from pretrain.weights import PICKLE, PICKLES, SAFETENSORS, SHARDS, Damaged, read_json, shown

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What model.py implements; other values in a config.json would be other models.
IMPLEMENTED: dict[str, list[Any]] = {
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
LLMC_MAGIC = struct.pack("<i", 20240326)
LLMC_HEADER_BYTES = 1024
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by the version of the format
LLMC_BLOCK = {  # in the file's order, shapes in multiples of n_embd
    "ln_1.weight": (1,),
    "ln_1.bias": (1,),
    "attn.c_attn.weight": (3, 1),
    "attn.c_attn.bias": (3,),
    "attn.c_proj.weight": (1, 1),
    "attn.c_proj.bias": (1,),
    "ln_2.weight": (1,),
    "ln_2.bias": (1,),
    "mlp.c_fc.weight": (4, 1),
    "mlp.c_fc.bias": (4,),
    "mlp.c_proj.weight": (1, 4),
    "mlp.c_proj.bias": (1,),
}


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes of DistributedDataParallel and torch.compile, and without the
    causal masks that old versions of GPT-2 kept as buffers."""
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise Damaged(
                f"its weights are not tensors with names: {str(key)[:60]!r} is"
                f" {type(value).__name__}"
            )
    state = {
        key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()
    }
    return {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of model.GPT for that of transformers' GPT2LMHeadModel, or GPT2Model, whose
    keys lack their first part."""
    state = without_wrappers(state)
    if "wte.weight" in state:
        state = {k if k.startswith("lm_head.") else f"transformer.{k}": v for k, v in state.items()}
    return {k: v.t() if k.endswith(CONV1D) and v.dim() == 2 else v for k, v in state.items()}


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


def read_huggingface(name_or_folder: str | Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes for GPTConfig and weights for model.GPT from a local folder or, by name, from the hub
    or its cache. Raises Damaged, OSError."""
    folder = Path(name_or_folder)
    get = _from_folder(folder) if folder.is_dir() else _from_hub(str(name_or_folder))
    config = get("config.json")
    if config is None:
        raise Damaged("no config.json in it")
    sizes = _sizes(read_json(config))
    for name, reader in ((SAFETENSORS, weights.read_safetensors), (PICKLE, weights.read)):
        if (file := get(name)) is not None:
            return sizes, from_huggingface(_state(reader(file)))
    for name, reader in ((SHARDS, weights.read_safetensors), (PICKLES, weights.read)):
        if (file := get(name)) is not None:
            state: dict[str, Tensor] = {}
            for shard in _shards(read_json(file), name):
                if (part := get(shard)) is None:
                    raise Damaged(f"{shard} is missing, which its {name} lists")
                state |= _state(reader(part))
            return sizes, from_huggingface(state)
    raise Damaged(f"neither {SAFETENSORS} nor {PICKLE} in it")


def _state(saved: Any) -> dict[str, Tensor]:
    if not isinstance(saved, dict):
        raise Damaged(f"it holds {type(saved).__name__}, not weights with names")
    return saved


def _shards(index: Mapping[str, Any], name: str) -> list[str]:
    """Names of the files that an index lists, in this folder."""
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise Damaged(f"its {name} lists no weights (weight_map)")
    for file in listed.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*", file):
            raise Damaged(f"its {name} lists {str(file)[:60]!r}, no file of this folder")
    return sorted(set(listed.values()))


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    sizes = {ours: config[theirs] for theirs, ours in SIZES.items() if theirs in config}
    for name, value in sizes.items():
        if type(value) is not int or not 0 < value < 2**31:
            raise Damaged(f"its config.json has {name} {shown(value)}, not a size")
    implemented = IMPLEMENTED | {"n_inner": [None, 4 * sizes.get("n_embd", 768)]}
    other = [
        key for key, values in implemented.items() if key in config and config[key] not in values
    ]
    if other:
        settings = ", ".join(f"{key}={shown(config[key])}" for key in other)
        raise Damaged(f"not the GPT-2 that is implemented here: {settings} in its config.json")
    return sizes


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
            problem = f"the Hugging Face hub says: {first_line(error)}"
        raise Damaged(f"no such folder, and {problem}")

    return get


# ---- A checkpoint: ours, nanoGPT's, build-nanogpt's, or a bare state dict


def read_any(path: str | Path) -> Any:
    """What torch.save or llm.c wrote in a file, the latter as a checkpoint of the former."""
    with weights.opened(path) as file:
        is_llmc = file.read(4) == LLMC_MAGIC
    return read_llmc(path) if is_llmc else weights.read(path)


def described(saved: Any) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(architecture, configuration, weights) of a checkpoint."""
    content = saved if isinstance(saved, dict) else {}
    if "model" in content:
        names = ("model_config", "model_args", "config")  # ours, nanoGPT's, build-nanogpt's
        config = next((content[n] for n in names if isinstance(content.get(n), dict)), None)
        if config is None or not isinstance(content["model"], dict):
            raise Damaged("not a checkpoint of train_gpt2.py (no model and model_config in it)")
        architecture = content.get("architecture", "gpt2")
        return architecture, config, without_wrappers(content["model"])
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise Damaged("not a checkpoint of train_gpt2.py (no model and model_config in it)")
    return "gpt2", *_bare(content)


def _bare(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a state dict alone: shapes say everything but the heads."""
    state = without_wrappers(state)
    if "wte.weight" in state:  # saved from GPT2Model
        state = {f"transformer.{k}": v for k, v in state.items()}
    shapes = [state.get(f"transformer.{name}.weight") for name in ("wte", "wpe", "h.0.attn.c_attn")]
    if any(tensor is None or tensor.dim() != 2 for tensor in shapes):
        raise Damaged("not a checkpoint of train_gpt2.py, and not the weights of a GPT-2")
    (rows, n_embd), (positions, _), attention = (tuple(t.shape) for t in shapes if t is not None)
    if n_embd % 64:
        raise Damaged(
            f"weights without a configuration, and {n_embd} numbers a token are not heads of 64 as"
            " in GPT-2: save them as {'model': weights, 'model_config': {'n_head': ...}}"
        )
    print(
        f"note: weights without a configuration: taken for {n_embd // 64} heads of 64, as in GPT-2",
        file=sys.stderr,
    )
    layers = {key.split(".")[2] for key in state if key.startswith("transformer.h.")}
    config = {
        "block_size": positions,
        "vocab_size": rows,
        "n_layer": len(layers),
        "n_head": n_embd // 64,
        "n_embd": n_embd,
        "bias": "transformer.ln_f.bias" in state,
    }
    return config, from_huggingface(state) if attention == (n_embd, 3 * n_embd) else state


# ---- llm.c


def read_llmc(path: str | Path) -> dict[str, Any]:
    """A checkpoint from a model file of llm.c: a header of 256 int32, then every parameter stacked
    over the layers, in float32 or bfloat16, matrices as torch's Linear has them."""
    with weights.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(LLMC_HEADER_BYTES)
    if len(header) < LLMC_HEADER_BYTES:
        raise Damaged("a model file of llm.c that is cut short")
    version, positions, vocab, layers, heads, n_embd, rows = struct.unpack_from("<7i", header, 4)
    if version not in LLMC_DTYPES:
        raise Damaged(f"a model file of llm.c in its format {version}; 3 and 5 are read")
    sizes = {
        "block_size": positions,
        "vocab_size": vocab,
        "n_layer": layers,
        "n_head": heads,
        "n_embd": n_embd,
    }
    c = n_embd
    shapes: dict[str, tuple[int, ...]] = {"wte": (rows, c), "wpe": (positions, c)}
    for name, shape in LLMC_BLOCK.items():
        shapes[name] = (layers, *(part * c for part in shape))
    shapes |= {"ln_f.weight": (c,), "ln_f.bias": (c,)}
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    dtype = LLMC_DTYPES[version]
    wanted = LLMC_HEADER_BYTES + sum(counts.values()) * dtype.itemsize
    if min(*sizes.values(), rows - vocab + 1) < 1 or wanted != size:
        raise Damaged(
            f"a model file of llm.c that is damaged or cut short: {size:,} bytes, but its header"
            f" says {wanted:,}"
        )
    numbers = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    parts = numbers[LLMC_HEADER_BYTES:].view(dtype).split(list(counts.values()))
    state: dict[str, Tensor] = {}
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        tensor = part.view(shape)
        if name in LLMC_BLOCK:
            state |= {f"transformer.h.{i}.{name}": layer for i, layer in enumerate(tensor)}
        else:
            state[f"transformer.{name}" + ".weight" * (name in ("wte", "wpe"))] = tensor
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab]
    return {"model": state, "model_config": sizes}
