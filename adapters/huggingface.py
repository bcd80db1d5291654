"""Export a checkpoint to a Hugging Face folder, import one, push one to the hub.

    $ python -m adapters.huggingface export checkpoints/best_val_loss.pt my-gpt2
    my-gpt2: 124.4M parameters, float32, 498 MB
    $ python -m adapters.huggingface import gpt2-medium medium.pt
    medium.pt: 354.8M parameters
    $ python -m adapters.huggingface push my-gpt2 user/my-gpt2 --private    # after `hf auth login`
    https://huggingface.co/user/my-gpt2

An export says so only after transformers has computed, from the files it wrote, the logits of the
model; it takes the place of an earlier one in one step. train_gpt2.py --init_from medium.pt begins
with an imported model.

The folder is what transformers itself writes for GPT-2: AutoModelForCausalLM, AutoTokenizer and
pipeline("text-generation", model="my-gpt2") load it without a network.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adapters import require
from adapters.exporting import CONFIG, FILES, WEIGHTS, HuggingFaceError, compare_logits, new_export
from adapters.hf_tokenizer import save_tokenizer
from adapters.model_card import RECORD, model_card, training_record
from pretrain import files
from pretrain.errors import UserError, program
from pretrain.flags import unknown_flags
from pretrain.tokens.tokenizer import END_OF_TEXT, VOCAB_SIZE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from model import GPT

# ---- export


def export(
    model: "GPT",
    out_dir: str | Path,
    *,
    record: dict[str, Any] | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Write `model` with GPT-2's tokenizer to out_dir, where it appears when it is complete.

    record: what training_record tells, for the model card. dtype: of the weights in the file. An
    existing out_dir must be empty or an export; others need overwrite, which replaces the files
    that an export has and leaves the rest alone. Raises HuggingFaceError, FrameworkMissing,
    OSError.
    """
    require("transformers", "safetensors")
    if model.config.vocab_size < VOCAB_SIZE:
        size = model.config.vocab_size
        raise HuggingFaceError(
            f"the model knows {size} tokens, but GPT-2's tokenizer has {VOCAB_SIZE}"
        )
    with new_export(out_dir, overwrite=overwrite) as temporary:
        files.write_json(
            temporary / RECORD, record or {"format": 1, "parameters": model.num_parameters()}
        )
        save_weights(model, temporary, dtype)
        save_tokenizer(temporary, model.config.block_size)
        compare_logits(model, temporary, dtype, out_dir)


def save_weights(model: "GPT", folder: Path, dtype: str) -> None:
    """config.json, generation_config.json and model.safetensors, without ids that the tokenizer
    lacks."""
    import torch
    from safetensors.torch import save_file

    c = model.config
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_inner": None,  # 4 * n_embd
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "torch_dtype": dtype,
    }
    files.write_json(folder / CONFIG, config)
    tokens = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    files.write_json(folder / "generation_config.json", tokens)
    state = model.huggingface_state_dict()
    del state["lm_head.weight"]  # the embedding again
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:VOCAB_SIZE]
    state = {
        key: value.to("cpu", getattr(torch, dtype)).contiguous() for key, value in state.items()
    }
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # it was written for its owner alone


# ---- import


def import_model(source: str, path: str | Path, *, overwrite: bool = False) -> "GPT":
    """Save a GPT-2 of the hub or of a folder as a checkpoint that train_gpt2.py --init_from begins
    with.

    Returns the model. Raises CheckpointError (of model.py, or of pretrain.train.checkpoint),
    HuggingFaceError.
    """
    require("safetensors")
    from model import GPT
    from pretrain.train import checkpoint

    path = Path(path)
    if path.suffix != ".pt":
        raise HuggingFaceError(f"{path}: the name of a checkpoint ends with .pt")
    if path.exists() and not overwrite:
        raise HuggingFaceError(f"{path}: exists; choose another name, or --overwrite")
    model = GPT.from_pretrained(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": checkpoint.FORMAT,
        "model": model.state_dict(),
        "model_config": asdict(model.config),
    }
    checkpoint.save(path, {**content, "step": 0, "tokens": 0, "config": {}})
    return model


# ---- push


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload an export in one commit, with its README.md or, where it has none, a card made from
    its record.

    The repository is created when it does not exist. The token is that of `hf auth login` or of
    HF_TOKEN. Returns the repository's address. Raises HuggingFaceError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise HuggingFaceError(f"{folder}: no {missing[0]} in it; make it with the export command")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        raise HuggingFaceError(f"{folder}: its {CONFIG} is not that of a GPT-2")
    if "/" not in repo_id:
        raise HuggingFaceError(f"{repo_id}: name the repository as user/name")
    token = get_token()
    if token is None:
        raise HuggingFaceError("no access token; run `hf auth login`, or set HF_TOKEN")
    contents: dict[str, Path | bytes] = {
        name: folder / name for name in FILES if (folder / name).is_file()
    }
    readme = folder / "README.md"
    contents["README.md"] = readme if readme.is_file() else model_card(folder, repo_id).encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    api = HfApi(token=token)
    try:
        validate_repo_id(repo_id)
        address = _repository(api, repo_id, private)
        api.create_commit(repo_id, operations, commit_message="Upload model and card")
    except HuggingFaceError:
        raise
    except Exception as error:  # whatever the hub's client meets, in its words but for the token
        words = " ".join(str(error).split()) or type(error).__name__
        raise HuggingFaceError(
            f"{repo_id}: not uploaded: {words.replace(token, '<token>')}"
        ) from None
    return address


def _repository(api: "HfApi", repo_id: str, private: bool) -> str:
    """The address of the repository, created if need be; a public one is not taken for a private
    one."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return str(api.create_repo(repo_id, private=private or None))
    if private and not found.private:
        raise HuggingFaceError(
            f"{repo_id}: exists and is public; make it private, or leave out --private"
        )
    return f"{api.endpoint}/{repo_id}"


# ---- command line


def build_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m adapters.huggingface",
                                     description="GPT-2 to and from Hugging Face's format and hub.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("export", help="a checkpoint to a folder that transformers loads")
    add = command.add_argument
    add("checkpoint", type=Path,
        help="a .pt file or a run's folder of train_gpt2.py, or a GPT-2 folder such as Trainer's")
    add("out_dir", type=Path, help="a new or empty folder, or an earlier export, which is replaced")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the weights (default: float32)")
    add("--overwrite", action="store_true",
        help="write into any other folder too; the rest of it stays")
    command = commands.add_parser("import", help="a GPT-2 of the hub or a folder to a checkpoint")
    add = command.add_argument
    add("source", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, user/name, or a folder")
    add("checkpoint", type=Path, help="file to write, for train_gpt2.py --init_from")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    about = ("Upload an export with a model card made from its run; a README.md in the folder"
             " takes the card's place. The access token is that of `hf auth login` or of HF_TOKEN.")
    help_of_push = "an exported folder to the hub"
    command = commands.add_parser("push", help=help_of_push, description=about)
    add = command.add_argument
    add("out_dir", type=Path, help="the exported folder")
    add("repository", metavar="user/name",
        help="created if it does not exist; files it has are replaced")
    add("--private", action="store_true",
        help="create it private; refused where it exists and is public")
    # fmt: on
    for command in commands.choices.values():
        command.allow_abbrev = False
        command.set_defaults(parser=command)
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Ends the process where something is wrong, with how its command is used."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.error("; ".join(unknown_flags(args.parser, unknown)))
    return args


def run(args: argparse.Namespace) -> None:
    if args.command == "push":
        print(push(args.out_dir, args.repository, private=args.private))
    elif args.command == "import":
        model = import_model(args.source, args.checkpoint, overwrite=args.overwrite)
        print(f"{args.checkpoint}: {model.num_parameters() / 1e6:.1f}M parameters")
        if model.config.vocab_size < VOCAB_SIZE:
            size = model.config.vocab_size
            print(f"note: it knows {size} tokens; shards are made with GPT-2's tokenizer, not its")
    else:
        run_export(args)


def run_export(args: argparse.Namespace) -> None:
    model, checkpoint, source = load_source(args.checkpoint)
    record = training_record(model, checkpoint, source)
    export(model, args.out_dir, record=record, dtype=args.dtype, overwrite=args.overwrite)
    size = f"{model.num_parameters() / 1e6:.1f}M parameters, {args.dtype}"
    print(f"{args.out_dir}: {size}, {(args.out_dir / WEIGHTS).stat().st_size / 1e6:.0f} MB")
    if (padding := model.config.vocab_size - VOCAB_SIZE) > 0:
        print(f"left out: {padding} token ids that GPT-2's tokenizer does not have")


def load_source(path: Path) -> "tuple[GPT, dict[str, Any], Path]":
    """(model, checkpoint, the file or folder that was read) of a .pt file, the folder of a run
    (its best checkpoint, or what its trainer exported), or a GPT-2 folder of transformers. Raises
    CheckpointError of model.py or of pretrain.train.checkpoint."""
    from model import GPT, load_checkpoint
    from pretrain.train import checkpoint as checkpoints

    if path.is_dir() and not any(
        (path / name).is_file() for name in (checkpoints.BEST, checkpoints.FINAL)
    ):
        exported = path / "export"  # where Accelerate's and Lightning's runs leave their model
        folder = exported if (exported / WEIGHTS).is_file() else path
        if folder == path and not _is_huggingface(path):
            path = checkpoints.model_file(path)  # says what is missing
        return GPT.from_pretrained(folder), {}, folder
    if path.is_dir():
        path = checkpoints.model_file(path)
    model, checkpoint = load_checkpoint(path)
    return model, checkpoint, path


def _is_huggingface(folder: Path) -> bool:
    """Whether a folder's config.json is that of a model; a run's has its flags."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / WEIGHTS).is_file()
    return isinstance(config, dict) and "model_type" in config


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with program(args.command) as outcome:
        try:
            run(args)
        except Exception as error:
            raise_as_line(error)
    return outcome.status


def raise_as_line(error: Exception) -> NoReturn:
    """The error as one that has a line for the user, or as it is."""
    from adapters.common import ERRORS, disk_problem

    if isinstance(error, UserError | OSError):
        raise error
    line = str(error) if isinstance(error, ERRORS) else disk_problem(error)
    if line is None:
        raise error
    raise HuggingFaceError(line) from None


if __name__ == "__main__":
    sys.exit(main())
