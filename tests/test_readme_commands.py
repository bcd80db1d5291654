"""Every command of README is run, in its order, by its own words with a few smaller numbers behind
them.

A copy of the project in a temporary folder is the working directory, and a server on the loopback
interface the Hugging Face Hub. `make quickstart` is not run here (CI runs it), nor is `make test`,
which runs this.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loopback_hub import LoopbackHub
from test_readme import README, ROOT, commands
from upload_hub import UploadHub

from model import GPT, GPTConfig

ITEMS = "tests/data/hellaswag_items.jsonl"
COPIED = (
    "fineweb.py",
    "train_gpt2.py",
    "hellaswag.py",
    "sample.py",
    "model.py",
    "input.txt",
    "pretrain",
    "adapters",
    "configs",
    ITEMS,
)
SIZES = "--n_layer 1 --n_head 2 --n_embd 16"
SHAPE = "--block_size 32 --batch_size 2"
LENGTH = "--max_iters 4 --warmup_iters 1 --lr_decay_iters 4 --eval_interval 2 --eval_iters 2"
RUN = f"{SHAPE} --gradient_accumulation_steps 1 {LENGTH}"
TRAINING = f"--sample_tokens 4 --device cpu --hellaswag_data {ITEMS}"
SMALLER = {  # what is put behind the flags of a program
    "fineweb.py": "--shard_size 3000",
    "train_gpt2.py": f"{SIZES} {RUN} {TRAINING}",
    "hellaswag.py": f"--data {ITEMS} --device cpu",
    "sample.py": "--max_new_tokens 4 --device cpu",
    "adapters.hf_trainer": f"{SIZES} {RUN} --cpu",
    "adapters.accelerate_loop": f"{SIZES} {RUN} --cpu",
    "adapters.lightning_module": f"{SIZES} {RUN} --cpu",
}
EXCEPTIONS = {  # the same for commands with these words in them
    "--verify": "",
    "--config configs/gpt2-124m.yaml": f"{SIZES} {SHAPE} --total_batch_tokens 256 {LENGTH} "
    + TRAINING,
    "--eval_only": f"--eval_iters 2 --device cpu --hellaswag_data {ITEMS}",
    "--model my-gpt2": f"{RUN} --cpu",
}


class Sandbox:
    """A folder with the project's files in it, where commands run as a user would type them."""

    def __init__(self, folder):
        self.folder = folder
        for name in COPIED:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, target)
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "hf"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing answers there
        }

    def run(self, command, stdin=""):
        """What a command of README, as a string or as words, prints when it is made smaller."""
        words = command.split() if isinstance(command, str) else list(command)
        program = next(
            word for word in words if word.endswith(".py") or re.match("adapters|pretrain", word)
        )
        more = SMALLER.get(program, "")
        for some, flags in EXCEPTIONS.items():
            if some in " ".join(words):
                more = flags
        words = [
            "--nproc_per_node=2" if word.startswith("--nproc_per_node") else word for word in words
        ]
        start = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}[
            words[0]
        ]
        words = [sys.executable, *start, *words[1:], *more.split()]
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def section(title):
    """The commands under a heading of README that start Python, word by word."""
    text = re.search(
        rf"^##+ {re.escape(title)}\n(.*?)(?=^##)", README, re.MULTILINE | re.DOTALL
    ).group(1)
    found = [words for words in commands(text) if words[0] in ("python", "torchrun")]
    assert found
    return found


def save_tiny_model(folder, name):
    """A random model as a folder that transformers would read."""
    from adapters import huggingface

    torch.manual_seed(0)
    huggingface.export(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64)), folder / name)


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_this_file_runs_every_command_that_starts_python():
    titles = (
        "1. Shards: `fineweb.py`",
        "2. Training: `train_gpt2.py`",
        "3. Accuracy: `hellaswag.py`",
        "Your own text, a laptop",
        "Other trainers, other tools",
    )
    run_here = [words for title in titles for words in section(title)]
    assert {"fineweb.py", "train_gpt2.py", "hellaswag.py", "sample.py"} <= {
        words[1] for words in run_here
    }
    assert run_here == [words for words in commands() if words[0] in ("python", "torchrun")]
    assert [words for words in commands() if words[0] == "make"] == [
        ["make", "quickstart"],
        ["make", "test"],
    ]


def test_the_commands_that_make_shards(sandbox):
    texts = (ROOT / "input.txt").read_text(encoding="utf-8").split("<|endoftext|>\n")
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    card = b"---\nconfigs:\n- config_name: sample-10BT\n  data_files: sample/10BT/*\n---\n"
    files = {"README.md": card, "sample/10BT/000_00000.parquet": file.getvalue()}
    names = ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb")
    with LoopbackHub(dict.fromkeys(names, files)) as hub:
        sandbox.environment["HF_ENDPOINT"] = hub.url
        for words in section("1. Shards: `fineweb.py`"):
            if (
                "--max_tokens" in words
            ):  # another size than that of the first command, in the same folder
                words = [*words, "--out_dir", "data/first"]
            sandbox.run(words)
    folders = {path.parent.name for path in sandbox.folder.glob("data/*/*_train_000001.npy")}
    assert folders == {"fineweb-edu-sample-10BT", "first", "fineweb-sample-10BT", "input"}


def test_the_commands_that_train_and_score(sandbox):
    sandbox.run("python fineweb.py --source input.txt --out_dir data/fineweb-edu-sample-10BT")
    for words in section("2. Training: `train_gpt2.py`"):
        sandbox.run(words)
    assert (sandbox.folder / "checkpoints" / "gpt2-124m" / "final_model.pt").is_file()
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    subprocess.run(
        [sys.executable, "-c", code], cwd=sandbox.folder, env=sandbox.environment, check=True
    )
    for name in ("gpt2", "gpt2-xl"):
        save_tiny_model(sandbox.folder, name)
    printed = "".join(map(sandbox.run, section("3. Accuracy: `hellaswag.py`")))
    assert printed.count("18 examples") == 4 and "perplexity" in printed
    assert json.loads((sandbox.folder / "results.json").read_text())["style"] == "lm-eval"


def test_the_commands_for_a_text_of_ones_own(sandbox):
    printed = [sandbox.run(words, "The boat\n\n") for words in section("Your own text, a laptop")]
    assert any("The ferry" in text for text in printed)
    assert (sandbox.folder / "checkpoints" / "mine" / "report.html").is_file()


def test_the_commands_of_the_adapters(sandbox):
    sandbox.run("python fineweb.py --source input.txt")
    sandbox.run("python train_gpt2.py --data_dir data/input")
    save_tiny_model(sandbox.folder, "gpt2-medium")
    with UploadHub("hf_secret") as hub:
        sandbox.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
        for words in section("Other trainers, other tools"):
            for folder in sandbox.folder.glob("out-*"):  # two commands would write to the same
                shutil.rmtree(folder)
            sandbox.run(words)
    assert "config.json" in hub.repositories["user/my-gpt2"].files
    assert hub.repositories["user/my-gpt2"].private
