"""Texts from a model, against greedy loops over transformers' GPT-2, tiktoken's decoder, and a
terminal."""

import io
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import forked
import pytest
import torch

import sample
from model import GPT, GPTConfig
from pretrain.eval.sampling import encode_prompt, sample_text, stream_texts
from pretrain.tokens.tokenizer import END_OF_TEXT, load_encoding

ROOT = Path(__file__).parent.parent
ENCODING = load_encoding()
CONFIG = GPTConfig(block_size=48, n_layer=2, n_head=2, n_embd=8)
NEW = 12
DEFAULTS = ["--device", "cpu", "--dtype", "float32"]


def save(model, path):
    torch.save(
        {"format": 1, "model": model.state_dict(), "model_config": asdict(model.config), "step": 7},
        path,
    )
    return path


@pytest.fixture(scope="module")
def model():
    """Larger weights than GPT-2's initialisation, so that each context has favourites of its
    own."""
    torch.manual_seed(3)
    model = GPT(CONFIG).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 20
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("run") / "best_val_loss.pt")


@pytest.fixture(scope="module")
def by_hand(model):
    """prompt -> prompt and what transformers' GPT-2 finds likeliest, computed anew for every
    token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_positions=48, n_layer=2, n_head=2, n_embd=8)
    reference = GPT2LMHeadModel(config).eval()
    reference.load_state_dict(model.huggingface_state_dict())

    def continuation(prompt, tokens=NEW):
        ids = ENCODING.encode_ordinary(prompt) or [END_OF_TEXT]
        start = len(ids)
        while len(ids) < start + tokens:
            with torch.no_grad():
                best = reference(torch.tensor([ids])).logits[0, -1].argmax().item()
            if best == END_OF_TEXT:
                break
            ids.append(best)
        return prompt + ENCODING.decode(ids[start:])

    return continuation


@pytest.fixture
def run(checkpoint, capsys):
    """sample.py in this process, with a checkpoint unless a model is named: (exit status, output,
    errors)."""

    def run(*argv, tokens=NEW):
        argv = [str(argument) for argument in argv]
        if not {"--checkpoint", "--model"} & set(argv):
            argv += ["--checkpoint", str(checkpoint)]
        status = sample.main([*DEFAULTS, *argv, "--max_new_tokens", str(tokens)])
        return status, *capsys.readouterr()

    return run


def texts(output):
    return output.removesuffix("\n").split("\n<|endoftext|>\n")


class Script:
    """A model that says what it is told: rows of tokens, whatever the prompts."""

    config = CONFIG

    def __init__(self, *rows):
        self.rows = rows

    def stream(self, prompts, max_new_tokens, stop_token, **sampling):
        assert len(prompts) == len(self.rows)
        ended = set()
        for step in range(max_new_tokens):
            if len(ended) == len(self.rows):
                return
            tokens = [
                row[step] if i not in ended else stop_token for i, row in enumerate(self.rows)
            ]
            ended |= {i for i, token in enumerate(tokens) if token == stop_token}
            yield torch.tensor(tokens)


def test_greedy_text_is_that_of_transformers_computing_everything_anew(model, by_hand):
    for prompt in ("The mill stood", "", "日本", "One. Two. Three,"):
        assert sample_text(model, ENCODING, prompt, NEW, temperature=0) == by_hand(prompt)
    assert len({by_hand(prompt)[-8:] for prompt in ("The mill stood", "", "日本")}) == 3


def test_a_character_made_of_several_tokens_comes_whole():
    text = "naïve 日本語 🦉🧮 é"
    tokens = ENCODING.encode_ordinary(text)
    assert len(tokens) > len(text), "the text must have characters of several tokens"
    steps = list(stream_texts(Script(tokens), ENCODING, [""], len(tokens)))
    assert len(steps) == len(tokens) + 1
    assert not any("\ufffd" in piece for (piece,) in steps)
    assert "🦉" in [piece for (piece,) in steps]
    assert "".join(piece for (piece,) in steps) == text


def test_any_tokens_give_the_text_that_tiktoken_decodes_them_to():
    draw = random.Random(5)
    pieces_of_characters = [
        i for i in range(END_OF_TEXT) if len(ENCODING.decode_single_token_bytes(i)) <= 2
    ]
    for _ in range(100):
        rows = [[draw.choice(pieces_of_characters) for _ in range(20)] for _ in range(3)]
        steps = list(stream_texts(Script(*rows), ENCODING, ["a", "b", "c"], 20))
        for row, tokens in enumerate(rows):
            assert "".join(step[row] for step in steps) == ENCODING.decode(tokens)


def test_a_text_ends_at_end_of_text_and_the_others_go_on(capsys):
    cut = ENCODING.encode_ordinary("日")[:1]  # the first byte or two of a character
    rows = [
        ENCODING.encode_ordinary(" b c") + cut + [END_OF_TEXT],
        ENCODING.encode_ordinary(" b c d e f g h"),
    ]
    for stream in (False, True):
        sample.print_texts(["a", "x"], stream_texts(Script(*rows), ENCODING, ["a", "x"], 6), stream)
        assert texts(capsys.readouterr().out) == ["a b c\ufffd", "x b c d e f g"]


def test_an_id_past_the_tokenizers_is_shown_as_unknown():
    steps = stream_texts(Script([50300, *ENCODING.encode_ordinary(" ok")]), ENCODING, ["a"], 2)
    assert "".join(piece for (piece,) in steps) == "\ufffd ok"


def test_a_prompt_may_hold_the_end_of_text_token():
    assert encode_prompt(ENCODING, "") == [END_OF_TEXT]
    assert encode_prompt(ENCODING, "<|endoftext|>Hello world") == [END_OF_TEXT, 15496, 995]
    assert encode_prompt(ENCODING, "Hello world") == [15496, 995]


def test_the_command_prints_the_prompt_and_its_continuation(run, by_hand):
    assert run("--prompt", "The mill", "--temperature", 0) == (0, by_hand("The mill") + "\n", "")
    assert run("--prompt", "The mill", "--top_k", 1)[1] == by_hand("The mill") + "\n"
    assert run("--prompt", "The mill", "--top_p", 1e-6)[1] == by_hand("The mill") + "\n"
    assert run("--prompt", "", "--temperature", 0)[1] == by_hand("") + "\n"
    assert (
        run("--prompt", "The mill", "--temperature", 0, tokens=5)[1]
        == by_hand("The mill", 5) + "\n"
    )


def test_texts_and_prompts_may_be_longer_than_the_context(run, by_hand):
    inside = run("--prompt", "The mill", "--temperature", 0, tokens=40)[1].removesuffix("\n")
    beyond = run("--prompt", "The mill", "--temperature", 0, tokens=120)[1]
    assert inside == by_hand("The mill", 40)
    assert beyond.startswith(inside) and len(beyond) > 2 * len(inside)
    prompt = "word " * 100
    status, output, errors = run("--prompt", prompt)
    assert (
        (status, errors) == (0, "") and output.startswith(prompt) and len(output) > len(prompt) + 1
    )


def test_prompts_of_different_lengths_in_a_file_get_what_each_gets_alone(run, by_hand, tmp_path):
    prompts = ["The mill stood\nby the river", "Yes", "At the end of the lane, nobody had ever"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(
        b"\xef\xbb\xbf"
        + "\r\n<|endoftext|>\r\n".join(prompts).replace("\nby", "\r\nby").encode()
        + b"\n"
    )
    for batch_size in (1, 2, 8):
        status, output, _ = run(
            "--prompt_file", file, "--temperature", 0, "--batch_size", batch_size
        )
        assert (status, texts(output)) == (0, [by_hand(prompt) for prompt in prompts])


def test_a_file_without_separators_is_one_prompt(run, by_hand, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("One\n\nTwo <|endoftext|> three", encoding="utf-8")
    assert sample.read_prompts(file) == ["One\n\nTwo <|endoftext|> three"]
    file.write_text("One\n\nTwo", encoding="utf-8")
    assert run("--prompt_file", file, "--temperature", 0)[1] == by_hand("One\n\nTwo") + "\n"


def test_a_seed_gives_the_same_texts_streamed_or_not_and_another_seed_others(run):
    sampled = ("--prompt", "The", "--num_samples", 5, "--batch_size", 2, "--temperature", 1.5)
    first = run(*sampled, "--seed", 1)[1]
    assert run(*sampled, "--seed", 1)[1] == first
    assert run(*sampled, "--seed", 1, "--stream")[1] == first
    assert run(*sampled, "--seed", 2)[1] != first
    assert run(*sampled)[1] != run(*sampled)[1]
    assert len(texts(first)) == len(set(texts(first))) == 5
    assert all(text.startswith("The") for text in texts(first))


def test_streaming_shows_each_token_before_the_next_is_computed(monkeypatch):
    shown, out = [], io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)

    class Watched(Script):
        def stream(self, *args, **kwargs):
            for tokens in super().stream(*args, **kwargs):
                shown.append(out.getvalue())
                yield tokens

    words = ENCODING.encode_ordinary(" one two three")
    sample.print_texts(["zero"], stream_texts(Watched(words), ENCODING, ["zero"], 3), stream=True)
    assert shown == ["zero", "zero one", "zero one two"]
    assert out.getvalue() == "zero one two three\n"


def test_lines_from_a_pipe_are_prompts_until_an_empty_one(run, by_hand, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The mill\nYes\n\nnever read\n"))
    status, output, errors = run("--temperature", 0)
    assert (status, texts(output), errors) == (0, [by_hand("The mill"), by_hand("Yes")], "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Yes"))
    assert run("--temperature", 0)[:2] == (0, by_hand("Yes") + "\n")


def test_interrupting_a_text_asks_for_the_next_and_interrupting_the_question_ends(
    monkeypatch, capsys
):
    answers = iter(["first", "second", KeyboardInterrupt])

    def answer(question):
        value = next(answers)
        if value is KeyboardInterrupt:
            raise value
        return value

    def write(prompts):
        written.append(prompts)
        if prompts == ["first"]:
            raise KeyboardInterrupt

    written = []
    monkeypatch.setattr("builtins.input", answer)
    sample.converse(write, "a model")
    assert written == [["first"], ["second"]]


def test_a_folder_in_the_hugging_face_format_and_a_runs_folder_serve_too(
    run, model, by_hand, checkpoint, tmp_path
):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(n_positions=48, n_layer=2, n_head=2, n_embd=8))
    theirs.load_state_dict(model.huggingface_state_dict())
    theirs.save_pretrained(tmp_path / "folder")
    greedy = ("--prompt", "Yes", "--temperature", 0)
    assert run(*greedy, "--model", tmp_path / "folder")[1] == by_hand("Yes") + "\n"
    assert run(*greedy, "--checkpoint", checkpoint.parent)[1] == by_hand("Yes") + "\n"
    assert run(*greedy, "--dtype", "bfloat16")[0] == 0


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--checkpoint", "nowhere.pt"], "nowhere.pt: no such file"),
        (["--checkpoint", "."], "neither best_val_loss.pt nor final_model.pt"),
        (["--checkpoint", "damaged.pt"], "damaged.pt: damaged"),
        (
            ["--checkpoint", "letters.pt"],
            "a vocabulary of 65 tokens, but GPT-2's tokenizer has 50257",
        ),
        (["--model", "./nowhere"], "no such folder"),
        (["--prompt_file", "empty.txt"], "empty.txt: no prompt in it"),
        (["--prompt_file", "latin1.txt"], "latin1.txt: not UTF-8 at byte 2"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt"),
        (["--device", "tpu"], "'tpu' is not"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_status(run, argv, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("damaged.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    save(GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=1, n_embd=4)), "letters.pt")
    Path("empty.txt").write_text("\n<|endoftext|>\n")
    Path("latin1.txt").write_bytes(b"ca\xe9")
    prompt = [] if "--prompt_file" in argv else ["--prompt", "Yes"]
    status, output, errors = run(*argv, *prompt)
    assert (status, output, errors.count("\n")) == (1, "", 1)
    assert complaint in errors


def test_without_a_checkpoint_the_ways_to_one_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--prompt", "Yes"]) == 1
    errors = capsys.readouterr().err
    assert "train_gpt2.py" in errors and "--model gpt2" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top_k", "-1"],
        ["--top_p", "0"],
        ["--num_samples", "0"],
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main([*argv, "--checkpoint", "nowhere.pt"])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"sample.py: error: {argv[0]}: ") and argv[1] in line


def test_help_loads_neither_torch_nor_a_tokenizer():
    code = (
        "import sys, sample\n"
        "try: sample.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "sys.exit(str({'torch', 'tiktoken', 'numpy'} & set(sys.modules) or ''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "" and "--prompt_file" in done.stdout


def test_a_closed_pipe_ends_it_quietly(checkpoint):
    argv = [
        sys.executable,
        "sample.py",
        "--checkpoint",
        str(checkpoint),
        "--prompt",
        "The mill stood",
        "--stream",
        "--max_new_tokens",
        "100000",
        "--temperature",
        "1",
    ]
    with forked.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(14) == b"The mill stood"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_it_asks_answers_and_ends_with_an_empty_line(checkpoint, by_hand):
    argv = [sys.executable, "sample.py", "--checkpoint", str(checkpoint), *DEFAULTS]
    argv += ["--temperature", "0", "--max_new_tokens", str(NEW)]
    terminal, its_side = os.openpty()
    ends = {"stdin": its_side, "stdout": its_side, "stderr": its_side, "start_new_session": True}
    process = forked.Popen(argv, cwd=ROOT, env={**os.environ, "TERM": "dumb"}, **ends)
    os.close(its_side)

    def read_until(text):
        """What the terminal shows up to this text, or, with None, up to the end."""
        shown = b""
        while text is None or text not in shown:
            try:
                new = os.read(terminal, 4096)
            except OSError:  # the program has ended
                new = b""
            if not new:
                break
            shown += new
        return shown.decode().replace("\r\n", "\n")

    try:
        greeting = read_until(b"\n> ")
        assert "step 7" in greeting and "an empty line ends" in greeting
        os.write(terminal, b"The mill\n")
        assert by_hand("The mill") + "\n\n> " in read_until(b"\n> ")
        os.write(terminal, b"\n")
        assert "Traceback" not in read_until(None)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
