"""The model that a user names: whatever a path holds, and no tokenizer but GPT-2's."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import forked
import pytest
import torch

import hellaswag
import sample
from adapters.hf_tokenizer import save_tokenizer
from model import GPT, GPTConfig
from pretrain.errors import UserError
from pretrain.eval.loading import foreign_vocabulary, open_model

ROOT = Path(__file__).parents[2]
ITEMS = ROOT / "tests" / "data" / "hellaswag_items.jsonl"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=8)).eval()


@pytest.fixture
def run_folder(model, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    saved = {"format": 1, "model": model.state_dict(), "model_config": asdict(model.config)}
    torch.save(saved | {"step": 9}, folder / "best_val_loss.pt")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hf_folder(model, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(n_positions=64, n_layer=1, n_head=2, n_embd=8))
    theirs.load_state_dict(model.huggingface_state_dict())
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def own_vocabulary(folder, name="vocab.json"):
    """A tokenizer of the size of GPT-2's with other tokens."""
    vocabulary = {f"token{i}": i for i in range(50257)}
    content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    (folder / name).write_text(json.dumps(vocabulary if name == "vocab.json" else content))


@pytest.mark.parametrize("by", ["checkpoint", "model"])
def test_a_path_is_taken_for_what_it_holds(by, model, run_folder, hf_folder):
    for path in (run_folder, run_folder / "best_val_loss.pt", hf_folder):
        words = (path, None) if by == "checkpoint" else (None, str(path))
        found, about = open_model(*words)
        assert torch.equal(found.transformer.wte.weight, model.transformer.wte.weight)
        assert about["parameters"] == model.num_parameters()
        assert about.get("step") == (None if path == hf_folder else 9)


def test_gpt2s_own_tokenizer_is_known_in_both_of_its_forms(hf_folder):
    assert foreign_vocabulary(hf_folder) is None, "no tokenizer at all"
    save_tokenizer(hf_folder, 64)
    names = [name for name in ("vocab.json", "tokenizer.json") if (hf_folder / name).exists()]
    assert names and foreign_vocabulary(hf_folder) is None
    for name in names:
        tokens = json.loads((hf_folder / name).read_text())
        vocabulary = tokens if name == "vocab.json" else tokens["model"]["vocab"]
        vocabulary["<|mine|>"] = 50257  # others add tokens behind
        (hf_folder / name).write_text(json.dumps(tokens))
    assert foreign_vocabulary(hf_folder) is None


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_tokenizer_of_the_same_size_with_other_tokens_is_refused(hf_folder, name, capsys):
    own_vocabulary(hf_folder, name)
    data = ["--data", str(ITEMS), "--device", "cpu"]
    assert hellaswag.main(["--model", str(hf_folder), *data]) == 1
    assert sample.main(["--model", str(hf_folder), "--prompt", "Yes", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 2
    assert captured.err.count(f"({name}, 50,257 tokens) is not GPT-2's") == 2
    assert captured.err.count("--any_tokenizer") == 2
    assert hellaswag.main(["--model", str(hf_folder), *data, "--any_tokenizer"]) == 0


@pytest.mark.parametrize("content", ["[]", "{", "7", '{"model": 7}', "[" * 100_000, '{"a": "b"}'])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_damaged_tokenizer_is_refused_in_one_line(hf_folder, name, content):
    (hf_folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        open_model(None, str(hf_folder))


def test_the_same_tokens_with_other_merges_are_refused(hf_folder):
    save_tokenizer(hf_folder, 64)
    file = hf_folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    merges = tokenizer["model"]["merges"]
    pairs = [each.split(" ") if isinstance(each, str) else each for each in merges]
    assert foreign_vocabulary(hf_folder) is None
    (hf_folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs), ""]))
    assert foreign_vocabulary(hf_folder) is None
    merges[7], merges[8] = merges[8], merges[7]
    file.write_text(json.dumps(tokenizer))
    assert foreign_vocabulary(hf_folder) == (
        "its tokenizer (tokenizer.json, 50,000 merges) is not GPT-2's"
    )
    file.unlink()
    (hf_folder / "merges.txt").write_text("#version: 0.2\nx y\n")
    with pytest.raises(UserError, match=r"merges\.txt, 1 merges\) is not GPT-2's"):
        open_model(None, str(hf_folder))


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "merges.txt", "tokenizer.model"])
def test_a_link_of_a_tokenizer_that_leads_nowhere_is_no_folder_without_one(hf_folder, name):
    (hf_folder / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        open_model(None, str(hf_folder))


def test_a_folder_that_names_another_tokenizers_class_is_refused(hf_folder):
    file = hf_folder / "tokenizer_config.json"
    file.write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    assert foreign_vocabulary(hf_folder) is None
    file.write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: LlamaTokenizer\) is not GPT-2's"):
        open_model(None, str(hf_folder))


def test_a_sentencepiece_model_is_refused(hf_folder):
    (hf_folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        open_model(None, str(hf_folder))


# ---- the two programs


@pytest.mark.parametrize(
    ("script", "words", "answers"),
    [
        ("hellaswag", ["--ckpt", "x"], ["did you mean --checkpoint?"]),
        ("hellaswag", ["--limt", "3"], ["did you mean --limit?"]),
        ("hellaswag", ["--limit", "0", "--stile", "x"], ["--limit: 0", "did you mean --style?"]),
        ("sample", ["--temp", "1"], ["did you mean --temperature?"]),
        ("sample", ["--max_tokens=9"], ["did you mean --max_new_tokens?"]),
        (
            "sample",
            ["--top_p", "2", "--seed", "-1", "--top_k", "x"],
            ["--top_p: 2", "--seed: -1", "--top_k: 'x'"],
        ),
        ("sample", ["--seed", str(2**64)], ["--seed"]),
    ],
)
def test_all_wrong_flags_are_said_at_once_with_what_was_meant(script, words, answers, capsys):
    with pytest.raises(SystemExit) as stop:
        {"hellaswag": hellaswag, "sample": sample}[script].main(words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert all(answer in err for answer in answers), err
    assert all(line.startswith(f"{script}.py: error: ") for line in err.splitlines())


@pytest.mark.parametrize("script", ["hellaswag.py", "sample.py"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["--nonsense"]])
def test_help_and_wrong_flags_load_nothing_heavy(script, words):
    code = (
        f"import sys, {script[:-3]} as program\n"
        f"try: program.main({words})\n"
        "except SystemExit: pass\n"
        "sys.exit(str({'torch', 'numpy', 'tiktoken', 'transformers'} & set(sys.modules) or ''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "{" not in done.stderr
    if words == ["--version"]:
        assert done.stdout.split()[0] == script and done.stdout.split()[1][0].isdigit()


def test_a_missing_model_is_said_before_anything_is_downloaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hellaswag, "ensure_data", lambda *a, **k: pytest.fail("downloads"))
    assert hellaswag.main(["--checkpoint", str(tmp_path / "none.pt")]) == 1
    assert "none.pt" in capsys.readouterr().err
    words = ["--checkpoint", str(tmp_path / "none.pt"), "--data", str(tmp_path / "no.jsonl")]
    assert hellaswag.main(words) == 1
    assert "no.jsonl" in capsys.readouterr().err


def test_text_for_a_narrow_console_is_written_as_far_as_it_goes(run_folder):
    words = ["sample.py", "--checkpoint", run_folder, "--prompt", "日本 Müller", "--device", "cpu"]
    narrow = "import sys; sys.stdout.reconfigure(encoding='cp1252', errors='strict')"
    command = forked.prepared(narrow, [*words, "--max_new_tokens", 5])
    done = forked.run(command, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith("?? Müller".encode("cp1252"))


def test_a_stdout_that_is_closed_costs_no_result(run_folder, tmp_path):
    results = tmp_path / "results.json"
    words = ["hellaswag.py", "--checkpoint", run_folder, "--data", ITEMS, "--device", "cpu"]
    command = forked.prepared(forked.closed(1), [*words, "--output", results])
    done = forked.run(command, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(results.read_text())["n"] == 18


def test_a_full_disk_leaves_the_results_of_before(run_folder, tmp_path, monkeypatch, capsys):
    from pretrain import files

    results = tmp_path / "results.json"
    results.write_text("before")

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    words = ["--checkpoint", run_folder, "--data", ITEMS, "--device", "cpu", "--output", results]
    assert hellaswag.main([str(word) for word in words]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert results.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "run"]
