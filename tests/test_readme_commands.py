"""Every command of README and of the pages under docs/ is run, in its order, by its own words with
a few smaller numbers behind them; one that compiles is not compiled.

A copy of the project in a temporary folder is the working directory, and a server on the loopback
interface the Hugging Face Hub. What needs a cluster, a container engine or an hour is not run: its
flags are read by the parser of the program that would get them (PARSED). `make quickstart` is not
run here (CI runs it), nor is `make test`, which runs this.
"""

import gzip
import io
import json
import os
import re
import shutil
import sys

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loopback_hub import LoopbackHub
from test_readme import PAGES, README, ROOT, commands, page
from torch.distributed.run import get_args_parser
from upload_hub import UploadHub

import fineweb
from adapters import huggingface, lm_eval
from model import GPT, GPTConfig
from pretrain import flags
from pretrain.train.settings import from_command_line

# Whole programs, one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
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
HUB = ("HF_HOME", "HF_ENDPOINT", "HF_TOKEN")
SIZES = "--n_layer 1 --n_head 2 --n_embd 16"
SHAPE = "--block_size 32 --batch_size 2"
LENGTH = "--max_iters 4 --warmup_iters 1 --lr_decay_iters 4 --eval_interval 2 --eval_iters 2"
RUN = f"{SHAPE} --gradient_accumulation_steps 1 {LENGTH}"
TRAINING = f"--sample_tokens 4 --device cpu --hellaswag_data {ITEMS} --hellaswag_limit 4"
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
    "--config configs/modern-124m.yaml": f"{SIZES} {SHAPE} --total_batch_tokens 256 {LENGTH} "
    + TRAINING,
    # Compiling it takes a minute. That two ranks train alike with --compile True is shown in
    # tests/train/test_parallel.py.
    "--compile True": f"{SIZES} {RUN} {TRAINING} --compile False",
    "--eval_only": f"--eval_iters 2 --device cpu --hellaswag_data {ITEMS}",
    "--val_tokens 10485760": "--val_tokens 64 --eval_iters 2 --device cpu "
    f"--hellaswag_data {ITEMS}",
    "--model my-gpt2": f"{RUN} --cpu",
}


# Pages whose commands need machines that are not here, and a benchmark that takes minutes.
PARSED = {
    "docs/many-machines.md": "",
    "docs/many-gpus.md": "",
    "docs/object-stores.md": "",
    "docs/gpus.md": "",
    "docs/changing-the-model.md": "benchmarks/",
    "docs/other-tools.md": "adapters.lm_eval",  # whose tasks are data sets of the Hub
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
        for some, instead in EXCEPTIONS.items():
            if some in " ".join(words):
                more = instead
        words = [
            "--nproc_per_node=2" if word.startswith("--nproc_per_node") else word for word in words
        ]
        start = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}[
            words[0]
        ]
        words = [sys.executable, *start, *words[1:], *more.split()]
        is_trainer = program.startswith("adapters") and program != "adapters.huggingface"
        # Trainers use no Hub: without its variables their forks are those of other tests.
        left_out = HUB if is_trainer else ()
        done = forked.run(
            words,
            popen=forked.AdapterPopen if is_trainer else forked.Popen,
            cwd=self.folder,
            env={name: value for name, value in self.environment.items() if name not in left_out},
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
    torch.manual_seed(0)
    (folder / name).mkdir()
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64))
    huggingface.save_weights(model, folder / name, "float32")


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def is_parsed(name, words):
    return name in PARSED and any(word.startswith(PARSED[name]) for word in words)


def run_of(name):
    """The commands of a page that start Python and are run here."""
    found = [words for words in commands(page(name)) if words[0] in ("python", "torchrun")]
    return [words for words in found if not is_parsed(name, words)]


def test_this_file_runs_or_parses_every_command_of_every_page():
    titles = (
        "1. Shards: `fineweb.py`",
        "2. Training: `train_gpt2.py`",
        "3. Accuracy: `hellaswag.py`",
        "Your own text, a laptop",
    )
    assert [words for title in titles for words in section(title)] == run_of("README.md")
    run_here = ["README.md", *RUN_BELOW]
    for name in PAGES:
        for words in commands(page(name)):
            if words[0] == "make":
                continue  # tests/test_readme.py compares them with the Makefile
            if words[0] == "pip":
                assert words[1:3] == ["install", "-r"] and (ROOT / words[3]).is_file()
            elif words[0].endswith("pre-commit"):
                assert (ROOT / ".pre-commit-config.yaml").is_file() and words[1] == "install"
            else:
                assert is_parsed(name, words) or (name in run_here and words in run_of(name)), words


RUN_BELOW = ["docs/own-data.md", "docs/changing-the-model.md", "docs/other-tools.md"]


def parse(words):
    """Have a command's flags read by the parsers of the programs that would get them."""
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        assert launch.training_script == "train_gpt2.py"
        words = ["python", launch.training_script, *launch.training_script_args]
    if words[0] == "sbatch":
        script = next(word for word in words[1:] if word.endswith(".sbatch"))
        assert (ROOT / script).is_file()
        program = re.findall(r"\b(fineweb|train_gpt2)\.py \"\$@\"", (ROOT / script).read_text())
        words = ["python", f"{program[0]}.py", *words[words.index(script) + 1 :]]
    if words[0] == "sky":
        assert (ROOT / words[3]).is_file()
        words = ["python", "train_gpt2.py", *words[-1].removeprefix("ARGS=").split()]
    if words[0] == "docker":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    elif words[0] == "ray":
        assert words[1] == "start" and words[2].split("=")[0] in ("--head", "--address")
    elif words[1] == "train_gpt2.py":
        assert from_command_line(words[2:]) is not None
    elif words[1:3] == ["-m", "adapters.lm_eval"]:
        assert flags.parse(lm_eval.build_parser(), words[3:])[2] == []
    elif words[1] == "fineweb.py":
        fineweb.parse_args(words[2:])  # ends the process where something is wrong
    else:
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        for flag in words[2:]:
            assert not flag.startswith("--") or f'"{flag}"' in source


@pytest.mark.parametrize("name", PARSED)
def test_commands_for_clusters_and_long_ones_are_understood(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data" / "fineweb-edu-sample-10BT"
    data.mkdir(parents=True)
    for file in ("a_val_000000.npy", "a_train_000001.npy"):
        np.save(data / file, np.zeros(9, np.uint16))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    parsed = [words for words in commands(page(name)) if is_parsed(name, words)]
    assert parsed
    for words in parsed:
        parse(words)


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
    forked.run(
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


def test_the_commands_for_ones_own_data(sandbox):
    document = json.dumps({"text": "The mill stands still. " * 200, "content": "It turns. " * 2000})
    for folder in ("corpus", "more"):
        (sandbox.folder / folder).mkdir()
    (sandbox.folder / "corpus" / "a.jsonl").write_text(document + "\n")
    (sandbox.folder / "more" / "b.jsonl.gz").write_bytes(gzip.compress(document.encode()))
    printed = []
    for words in run_of("docs/own-data.md"):
        if "checkpoints/mixed" in words:  # folders of shards that the page does not make
            for name in ("web", "books", "fineweb10B"):
                shutil.copytree(sandbox.folder / "data/input", sandbox.folder / "data" / name)
        printed.append(sandbox.run(words))
    assert len(printed) == 8
    assert "books" in printed[5] and "bits per byte" in printed[6]
    assert (sandbox.folder / "data/input-bin/input_train_000001.bin").is_file()
    assert (sandbox.folder / "checkpoints/from-bin/final_model.pt").is_file()


def test_the_commands_that_change_the_model(sandbox):
    sandbox.run("python fineweb.py --source input.txt --out_dir data/fineweb-sample-10BT")
    for words in run_of("docs/changing-the-model.md"):
        sandbox.run(words)
    runs = {path.parent.name for path in sandbox.folder.glob("checkpoints/*/final_model.pt")}
    assert runs == {"small", "modern-small", "modern-124m", "muon"}


def test_the_snippets_of_python_are_true(sandbox):
    sandbox.run("python train_gpt2.py --data input.txt")
    snippets = re.findall(r"```python\n(.*?)```", page("docs/python-api.md"), re.DOTALL)
    code = "\n".join(snippets) + "\nassert len(losses) > 0\n"
    forked.run(
        [sys.executable, "-c", code], cwd=sandbox.folder, env=sandbox.environment, check=True
    )
    others = [name for name in PAGES if "```python" in page(name)]
    assert others == ["README.md", "docs/python-api.md"]  # that of README is run above


def test_the_commands_of_the_adapters(sandbox):
    sandbox.run("python fineweb.py --source input.txt")
    sandbox.run("python train_gpt2.py --data_dir data/input")
    save_tiny_model(sandbox.folder, "gpt2-medium")
    with UploadHub("hf_secret") as hub:
        sandbox.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
        for words in run_of("docs/other-tools.md"):
            for folder in sandbox.folder.glob("out-*"):  # two commands would write to the same
                shutil.rmtree(folder)
            sandbox.run(words)
    assert "config.json" in hub.repositories["user/my-gpt2"].files
    assert hub.repositories["user/my-gpt2"].private
