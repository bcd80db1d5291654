"""The harness on a checkpoint: the numbers of its own `hf` model on the exported folder, and what
is written beside a run. Tasks are made of local files; nothing is downloaded."""

import functools
import json
import math
import os

import pytest
import torch
from lazily import Lazily
from torch.utils import collect_env

from adapters import lm_eval as command
from model import GPT, GPTConfig
from pretrain.eval.generation import generate
from pretrain.models.modern import Modern, ModernConfig
from pretrain.report.runs import HARNESS, Run, harness_records, headline, task_results
from pretrain.tokens.tokenizer import END_OF_TEXT, load_encoding
from pretrain.train import checkpoint as checkpoints

pytest.importorskip("lm_eval")

instance, tasks_module = Lazily("lm_eval.api.instance"), Lazily("lm_eval.tasks")
harness_model = Lazily("adapters.harness_model")
SIZES = {"block_size": 24, "n_layer": 1, "n_head": 2, "n_embd": 16}
CONTEXTS = ["The ferry leaves", "The ferry leaves ", "", " ", "A long way " * 12 + "<|endoftext|>"]
ENDINGS = [" at noon", " at noon today", " at noon", "é", " without a word to anybody" * 3]
CHOICES = """task: boats
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
LAST_WORD = """task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{word}}}}"
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""


def make(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES)) if kind == "gpt2" else Modern(ModernConfig(**SIZES))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.3)  # so that texts differ by whole nats
    return model.eval()


def asked(kind="gpt2", **settings):
    model = make(kind)
    how = {"device": torch.device("cpu"), "dtype": torch.float32, **settings}
    return harness_model.CheckpointModel(model, **how), model


def instances(kind, arguments):
    return [instance.Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def plain_scores(model, context, ending):
    """One sequence at a time, by the whole logits: the log-likelihood, and whether it is greedy."""
    encoding = load_encoding()
    bare = context.rstrip()
    before = encoding.encode_ordinary(bare)
    tokens = encoding.encode_ordinary(bare + context[len(bare) :] + ending)
    if not before:
        before, tokens = [END_OF_TEXT], [END_OF_TEXT, *tokens]
    kept = tokens[-(model.config.block_size + 1) :]
    count = min(len(tokens) - len(before), model.config.block_size)
    with torch.no_grad():
        logits = model(torch.tensor([kept[:-1]]))[0][0, -count:, :50257].double()
    targets = torch.tensor(kept[-count:])
    found = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return found, bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("kind", ["gpt2", "modern"])
@pytest.mark.parametrize("batch_tokens", [None, 1])
def test_each_ending_has_the_likelihood_that_it_has_alone(kind, batch_tokens):
    lm, model = asked(kind, batch_tokens=batch_tokens)
    greedy = " " + load_encoding().decode(
        generate(
            model, torch.tensor(load_encoding().encode_ordinary(CONTEXTS[0])), 2, temperature=0
        ).tolist()[-2:]
    )
    pairs = [(context, ending) for context in CONTEXTS for ending in [*ENDINGS, greedy]]
    for pair, (found, is_greedy) in zip(
        pairs, lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True), strict=True
    ):
        expected, expected_greedy = plain_scores(model, *pair)
        assert found == pytest.approx(expected, abs=1e-4), pair
        assert is_greedy == expected_greedy


def test_what_a_greedy_reader_writes_is_greedy_and_nothing_else_is():
    lm, model = asked()
    context = torch.tensor(load_encoding().encode_ordinary(CONTEXTS[0]))
    likeliest = generate(model, context, 3, temperature=0).tolist()[len(context) :]
    other = [*likeliest[:2], (likeliest[2] + 1) % END_OF_TEXT]
    requests = [(None, context.tolist(), ending) for ending in (likeliest, other, [])]
    answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False, True]
    assert answers[2] == (0.0, True)


def test_a_text_is_scored_in_windows_that_follow_each_other():
    lm, model = asked()
    texts = ["", "Mud.", "Six hours later the same place is a mile of deep green water. " * 5]
    found = lm.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
    )
    size = model.config.block_size
    for text, value in zip(texts, found, strict=True):
        tokens = [END_OF_TEXT, *load_encoding().encode_ordinary(text)]
        expected, done = 0.0, 1
        while done < len(tokens):
            end = min(done + size, len(tokens))
            window = tokens[max(0, end - size - 1) : end]
            with torch.no_grad():
                logits = model(torch.tensor([window[:-1]]))[0][0, :, :50257].double()
            losses = logits.log_softmax(-1).gather(1, torch.tensor(window[1:])[:, None])[:, 0]
            expected += losses[-(end - done) :].sum().item()
            done = end
        assert value == pytest.approx(expected, abs=1e-3)


def test_a_text_is_continued_up_to_its_first_stop():
    lm, model = asked()
    encoding = load_encoding()
    prompts = ["The ferry leaves", "A", "Nell Wren, when she was four", ""]
    free = {"until": [], "max_gen_toks": 6}
    texts = lm.generate_until(
        instances("generate_until", [(prompt, free) for prompt in prompts]), disable_tqdm=True
    )
    for prompt, text in zip(prompts, texts, strict=True):
        ids = encoding.encode_ordinary(prompt) or [END_OF_TEXT]
        new = generate(model, torch.tensor(ids), 6, temperature=0, stop_token=END_OF_TEXT).tolist()
        behind = new[len(ids) :]
        behind = behind[: behind.index(END_OF_TEXT)] if END_OF_TEXT in behind else behind
        assert text == encoding.decode(behind)
    stop = texts[0][len(texts[0]) // 2 :][:3]
    stopped = lm.generate_until(
        instances("generate_until", [(prompts[0], {"until": stop, "max_gen_toks": 6})]),
        disable_tqdm=True,
    )
    assert stopped == [texts[0].split(stop)[0]]


# ---- the command


@pytest.fixture(scope="module", autouse=True)
def _one_look_at_the_machine():
    """The harness asks a dozen programs about it after each checkpoint, for its own records."""
    with pytest.MonkeyPatch.context() as patch:
        asked = functools.cache(collect_env.get_pretty_env_info)
        patch.setattr(collect_env, "get_pretty_env_info", asked)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks of the harness, on local files."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "examples.jsonl"
    rows = [
        {
            "question": f"Boat {i} leaves",
            "choices": [" at noon", " at night", " never"],
            "answer": i % 3,
            "word": ["noon", "night", "four"][i % 3],
        }
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "boats.yaml").write_text(CHOICES.format(data=data), encoding="utf-8")
    (folder / "last_word.yaml").write_text(LAST_WORD.format(data=data), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder


def saved(folder, model, step):
    path = folder / checkpoints.iter_name(step, 9.0)
    config = {**SIZES, "vocab_size": model.config.vocab_size}
    state = {"format": 1, "step": step, "model": model.state_dict(), "model_config": config}
    checkpoints.save(path, state | {"architecture": "gpt2"})
    return path


@pytest.fixture
def run(tmp_path):
    """The folder of a training that was at steps 2 and 4."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"event": "start", "step": 0}\n{"event": "train", "step": 4, "loss": 9.0}\n'
    )
    model = make("gpt2")
    for step in (2, 4):
        path = saved(tmp_path, model, step)
    os.link(path, tmp_path / "best_val_loss.pt")
    return tmp_path


def _examples(tasks):
    lines = (tasks / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def score(run, tasks, *more):
    words = ["--checkpoint", str(run), "--include_path", str(tasks), "--device", "cpu"]
    return command.main([*words, "--tasks", "boats,last_word", *more])


def test_the_numbers_lie_beside_the_run_and_in_its_report(run, tasks, capsys):
    assert score(run, tasks) == 0
    printed = capsys.readouterr().out
    assert "step 4, boats" in printed and "6 examples" in printed
    (record,) = harness_records(run)
    boats, last = record["tasks"]["boats"], record["tasks"]["last_word"]
    model, examples = make("gpt2"), _examples(tasks)
    hits, words = 0, []
    for example in examples:
        sums = [plain_scores(model, example["question"], c)[0] for c in example["choices"]]
        hits += sums.index(max(sums)) == example["answer"]
        words.append(plain_scores(model, example["question"], f" {example['word']}")[0])
    assert (boats["acc"], boats["n"], boats["style"]) == (hits / 6, 6, "lm-eval")
    assert last["perplexity"] == pytest.approx(math.exp(-sum(words) / 6), rel=1e-4)
    assert json.loads((run / "lm_eval-4.json").read_text())["results"]["boats"]["alias"] == "boats"
    shown = task_results(Run.load(run))
    assert headline(shown["boats", "lm-eval"][0][1])[0] == "acc_norm"
    assert headline(shown["last_word", "lm-eval"][0][1]) == ("acc", last["acc"])
    from pretrain.report.__main__ import main as report

    assert report([str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "boats, lm-eval" in page and "acc at step 4" in page


def test_following_scores_every_checkpoint_once_and_ends_with_the_run(run, tasks, capsys):
    follow = ["--follow", "--limit", "2", "--tasks", "boats"]  # no perplexity: its error takes 2 s
    assert score(run, tasks, *follow) == 0
    assert [record["step"] for record in harness_records(run)] == [2, 4]
    saved(run, make("gpt2"), 6)
    (run / checkpoints.iter_name(8, 9.0)).write_bytes(b"half of one")
    capsys.readouterr()
    assert score(run, tasks, *follow) == 0
    out, err = capsys.readouterr()
    assert "step 6" in out and "step 4" not in out
    assert err.count("warning") == 1 and "iter-8" in err
    assert len((run / HARNESS).read_text().splitlines()) == 3


@pytest.fixture
def no_own_tasks(monkeypatch):
    """The harness without its own tasks, which take a quarter of a minute to list."""
    make = tasks_module.TaskManager.__init__

    def without(self, **given):
        make(self, **given | {"include_defaults": False})

    monkeypatch.setattr(tasks_module.TaskManager, "__init__", without)


@pytest.mark.usefixtures("no_own_tasks")
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "name at least one"),
        (["--tasks", "boats,no_such_task"], 1, "no_such_task: not known to the harness"),
        (["--tasks", "boats", "--include_path", "no_such_folder"], 2, "no such folder"),
        (["--tasks", "boats", "--follow", "--checkpoint", "no_such.pt"], 2, "the folder of a run"),
        (["--tasks", "boats", "--checkpoint", "no_such.pt"], 1, "no such file"),
    ],
)
def test_what_is_wrong_is_one_line(words, status, said, tasks, capsys):
    assert command.main(["--include_path", str(tasks), *words]) == status
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1
