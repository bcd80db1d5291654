"""Files of others and hostile files: what they hold is read or refused, at a cost of their size."""

import errno
import io
import json
import os
import pickle
import resource
import struct
import sys
import time
import types
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st

from model import GPT, CheckpointError, GPTConfig, load_checkpoint
from pretrain import layouts, models, weights
from pretrain.errors import UserError
from pretrain.models.source import source_of

SIZES = {"block_size": 8, "vocab_size": 20, "n_layer": 2, "n_head": 1, "n_embd": 64}
OTHERS = {"n_positions": 8, "vocab_size": 20, "n_layer": 2, "n_head": 1, "n_embd": 64}


def gpt(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES | changes)).eval()
    for name, parameter in model.named_parameters():
        rows = slice(model.config.vocab_size) if "wte" in name else slice(None)
        parameter.data[rows] += 0.15 * torch.randn_like(parameter.data[rows])
    return model


def unpadded(model):
    """Its state dict as others have it: no padding, the head under its own name."""
    state = dict(model.state_dict())
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:20].clone()
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def assert_same(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert asdict(model.config) == asdict(expected.config)


def checkpoint(model, /, **changes):
    return {"model": model.state_dict(), "model_config": asdict(model.config), "step": 3} | changes


def refusal(source, load=load_checkpoint):
    """The one line with which a source is refused, in bounded time and memory."""
    before, t0 = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        load(source)
    assert time.perf_counter() - t0 < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB
    message = str(error.value)
    assert str(source) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


# --- Others' checkpoints


def their_config_class(module):
    """A dataclass GPTConfig in a module of that name, as a script's pickle refers to it."""
    there = types.ModuleType(module)
    config = dataclass(type("GPTConfig", (), {"__annotations__": dict.fromkeys(SIZES, int)}))
    config.__module__, config.__qualname__, there.GPTConfig = module, "GPTConfig", config
    return there, config


@pytest.mark.parametrize("module", ["__main__", "train_gpt2"])
def test_a_checkpoint_of_build_nanogpt_loads_though_its_configuration_is_pickled(
    module, tmp_path, monkeypatch
):
    model = gpt()
    there, config = their_config_class(module)
    monkeypatch.setitem(sys.modules, module, there)
    saved = {"model": unpadded(model), "config": config(**SIZES), "step": 19072, "val_loss": 3.07}
    torch.save(saved, tmp_path / "model_19072.pt")
    monkeypatch.undo()
    loaded, content = load_checkpoint(tmp_path / "model_19072.pt")
    assert_same(loaded, model)
    assert content["config"] == SIZES
    assert content["step"] == 19072


def test_a_pickled_class_of_another_name_is_refused_and_named(tmp_path, monkeypatch):
    there, config = their_config_class("__main__")
    config.__qualname__ = config.__name__ = "Settings"
    there.Settings = config
    monkeypatch.setitem(sys.modules, "__main__", there)
    torch.save({"model": {}, "config": config(**SIZES)}, tmp_path / "a.pt")
    monkeypatch.undo()
    assert "__main__.Settings" in refusal(tmp_path / "a.pt")


def test_numbers_of_numpy_in_a_checkpoint_become_numbers(tmp_path):
    model = gpt()
    numbers = {
        "val_loss": np.float64(3.25),
        "lr": np.float32(0.5),
        "half": np.float16(0.25),
        "step": np.int64(-7),
        "count": np.uint8(200),
        "big": np.array(6.5, dtype=">f8")[()],
        "flag": np.bool_(True),
    }
    torch.save(checkpoint(model, **numbers), tmp_path / "a.pt")
    loaded, content = load_checkpoint(tmp_path / "a.pt")
    assert_same(loaded, model)
    for name, number in numbers.items():
        assert content[name] == number.item()
        assert type(content[name]) is type(number.item())


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_bare_state_dict_loads_and_what_is_assumed_is_said(
    old_format, has_bias, tmp_path, capsys
):
    model = gpt(bias=has_bias, n_embd=128, n_head=2)
    torch.save(unpadded(model), tmp_path / "a.pt", _use_new_zipfile_serialization=not old_format)
    loaded, content = load_checkpoint(tmp_path / "a.pt")
    assert_same(loaded, model)
    assert content == {}
    assert "2 heads of 64" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_bare_state_dict_of_transformers_is_turned(prefix, tmp_path):
    model = gpt()
    state = {
        prefix + key.removeprefix("transformer."): value
        for key, value in model.huggingface_state_dict().items()
        if not key.startswith("lm_head")
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(load_checkpoint(tmp_path / "pytorch_model.bin")[0], model)


def test_a_state_dict_whose_heads_cannot_be_known_is_refused_with_the_way_out(tmp_path):
    torch.save(unpadded(gpt(n_embd=48)), tmp_path / "a.pt")
    assert "'n_head'" in refusal(tmp_path / "a.pt")


def huggingface_folder(folder, model, **changes):
    config = OTHERS | {"model_type": "gpt2"} | changes
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.huggingface_state_dict(), folder / "pytorch_model.bin")
    return folder


def sharded(folder, model):
    huggingface_folder(folder, model)
    (folder / "pytorch_model.bin").unlink()
    state = list(model.huggingface_state_dict().items())
    parts = {"pytorch_model-00001-of-00002.bin": dict(state[:9])}
    parts["pytorch_model-00002-of-00002.bin"] = dict(state[9:])
    for name, part in parts.items():
        torch.save(part, folder / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_pytorch_model_bin_in_several_files_loads(tmp_path):
    assert_same(GPT.from_pretrained(sharded(tmp_path, gpt())), gpt())
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    assert "00002-of-00002.bin is missing" in refusal(tmp_path, GPT.from_pretrained)


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", 3, None, "a/b.bin", ".."])
def test_an_index_lists_files_of_its_folder_only(name, tmp_path):
    sharded(tmp_path, gpt())
    index = {"weight_map": {"wte.weight": name}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "no file of this folder" in refusal(tmp_path, GPT.from_pretrained)


def llmc_bytes(model, version):
    """As train_gpt2.py of llm.c writes a model (write_tensors), parameter by parameter."""
    c = model.config
    header = np.zeros(256, dtype=np.int32)
    header[:8] = [20240326, version, c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, 128]
    state = model.state_dict()
    names = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"]
    names += ["attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias"]
    names += ["mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"]
    keys = ["wte.weight", "wpe.weight"]
    keys += [f"h.{layer}.{name}" for name in names for layer in range(c.n_layer)]
    keys += ["ln_f.weight", "ln_f.bias"]
    out = header.tobytes()
    for key in keys:
        tensor = state[f"transformer.{key}"]
        if version == 5:
            tensor = tensor.bfloat16().view(torch.int16)
        out += tensor.numpy().tobytes()
    return out


@pytest.mark.parametrize("version", [3, 5])
def test_a_model_of_llm_c_loads(version, tmp_path):
    model = gpt()
    if version == 5:
        model = model.bfloat16().float()
    (tmp_path / "model.bin").write_bytes(llmc_bytes(model, version))
    assert_same(load_checkpoint(tmp_path / "model.bin")[0], model)
    assert_same(GPT.from_pretrained(tmp_path / "model.bin"), model)


def test_a_model_of_llm_c_that_is_not_whole_or_of_another_format_is_refused(tmp_path):
    whole, path = llmc_bytes(gpt(), 3), tmp_path / "model.bin"
    for content, words in (
        (whole[:-1], "cut short"),
        (whole + b"\0", "damaged"),
        (whole[:100], "cut short"),
        (whole[:4] + struct.pack("<i", 1) + whole[8:], "format 1"),
        (whole[:16] + struct.pack("<i", 10**9) + whole[20:], "damaged"),
        (whole[:24] + struct.pack("<i", -64) + whole[28:], "damaged"),
    ):
        path.write_bytes(content)
        assert words in refusal(path)


# --- A run's folder


def test_a_folder_of_a_run_is_taken_wherever_a_file_is_its_best_before_its_last(tmp_path):
    best, last = gpt(1), gpt(2)
    (tmp_path / "config.json").write_text("{}")  # the run's
    torch.save(checkpoint(last), tmp_path / "final_model.pt")
    assert_same(load_checkpoint(tmp_path)[0], last)
    assert_same(GPT.from_pretrained(tmp_path), last)
    torch.save(checkpoint(best), tmp_path / "best_val_loss.pt")
    assert_same(load_checkpoint(tmp_path)[0], best)
    assert GPT.from_pretrained(tmp_path, dropout=0.25).config.dropout == 0.25


def test_a_folder_of_hugging_face_is_taken_where_a_checkpoint_is(tmp_path):
    assert_same(load_checkpoint(huggingface_folder(tmp_path, gpt()))[0], gpt())


# --- Architectures


def test_a_checkpoint_says_its_architecture_and_without_a_word_it_is_gpt2(tmp_path):
    model = gpt()
    assert models.architecture_of(model) == "gpt2"
    torch.save(checkpoint(model, architecture="gpt2"), tmp_path / "a.pt")
    assert_same(load_checkpoint(tmp_path / "a.pt")[0], model)
    for unknown in ("gpt3", 3, None, ["gpt2"]):
        torch.save(checkpoint(model, architecture=unknown), tmp_path / "a.pt")
        assert "architecture" in refusal(tmp_path / "a.pt")


def test_the_hash_of_a_models_source_is_that_of_the_file_of_its_class():
    import hashlib

    source = Path(sys.modules["model"].__file__).read_bytes()
    assert source_of(gpt())["model.py"] == hashlib.sha256(source).hexdigest()


@pytest.mark.parametrize("read", [load_checkpoint, models.from_pretrained])
def test_whoever_reads_a_checkpoint_hears_that_other_source_trained_it(
    read, tmp_path, capsys, monkeypatch
):
    path, model = tmp_path / "a.pt", gpt()
    for source, is_told in ((source_of(model), False), ({"model.py": "0" * 64}, True), (7, False)):
        torch.save(checkpoint(model, model_source=source), path)
        read(path)
        said = capsys.readouterr().err
        assert ("model.py is not as it was when this checkpoint was trained" in said) is is_told
        assert (str(path) in said and "000000000000 then" in said) is is_told
    torch.save(checkpoint(model, model_source={"model.py": "0" * 64}), path)
    monkeypatch.setenv("RANK", "1")  # one of several says it
    read(path)
    assert capsys.readouterr().err == ""


# --- Small files that would cost much


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """torch.save's archive with `change` applied to its pickle."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_an_archive_that_inflates_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": {}, "text": "x"}, path)
    rewritten(path, lambda data: data + b"\0" * 100_000_000, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 300_000
    assert "compressed" in refusal(path)


@pytest.mark.parametrize(
    "call, argument",
    [
        ("builtins\nbytearray", 3_000_000_000),
        ("torch\nTensor", 1_000_000_000),
        ("torch\nUntypedStorage", 3_000_000_000),
        ("builtins\nrange", 3_000_000_000),
        ("__builtin__\nbytearray", 3_000_000_000),
    ],
)
@pytest.mark.parametrize("as_zip", [True, False])
def test_thirty_bytes_that_ask_for_gigabytes_are_refused(call, argument, as_zip, tmp_path):
    bomb = b"\x80\x02c" + call.encode() + b"\n"
    bomb += b"\x8a\x05" + argument.to_bytes(5, "little") + b"\x85R."
    path = tmp_path / "a.pt"
    torch.save({"x": 1}, path)
    if as_zip:
        rewritten(path, lambda data: bomb)
    else:
        path.write_bytes(bomb)
    refusal(path)


def test_a_pickle_of_unreasonable_size_is_refused_before_it_is_read(tmp_path):
    torch.save({"model": {}, "text": "x" * 9_000_000}, tmp_path / "a.pt")
    assert "9 MB beside its tensors" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layer": 10**9},
        {"n_embd": 10**9},
        {"block_size": 2**31 - 1},
        {"vocab_size": 2**31 - 1},
        {"vocab_size": 2**31 - 1, "n_embd": 2**31 - 1, "block_size": 2**31 - 1},
        {"n_layer": 10**5000},
        {"n_head": True},
        {"n_embd": 64.0},
        {"n_layer": None},
        {"n_layer": "2"},
        {"n_layer": [2]},
    ],
    ids=lambda sizes: "-".join(
        f"{k} {str(v)[:12]}" if v != 10**5000 else k for k, v in sizes.items()
    ),
)
def test_sizes_that_no_file_can_hold_are_refused_at_once(sizes, tmp_path):
    model = gpt()
    torch.save(checkpoint(model, model_config=SIZES | sizes), tmp_path / "a.pt")
    refusal(tmp_path / "a.pt")
    theirs = {"n_positions" if key == "block_size" else key: v for key, v in sizes.items()}
    if sizes != {"n_layer": 10**5000}:
        refusal(huggingface_folder(tmp_path, model, **theirs), GPT.from_pretrained)


def test_views_that_repeat_a_few_numbers_do_not_become_a_large_model(tmp_path):
    one = torch.zeros(1)
    with torch.device("meta"):
        big = GPT(GPTConfig(**SIZES | {"n_embd": 8192, "block_size": 8192}))
    state = {key: one.expand(value.shape) for key, value in big.state_dict().items()}
    torch.save(checkpoint(big, model=state), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 20_000
    assert "repeat" in refusal(tmp_path / "a.pt")


def test_tensors_that_are_no_weights_are_refused(tmp_path):
    model = gpt()
    for key, value in (
        ("transformer.wpe.weight", torch.zeros(8, 64, dtype=torch.int64)),
        ("transformer.wpe.weight", torch.zeros(8, 64, dtype=torch.complex64)),
        ("transformer.wpe.weight", torch.zeros(())),
        ("transformer.wte.weight", torch.zeros(())),
        ("transformer.extra", torch.zeros(3)),
    ):
        state = model.state_dict() | {key: value}
        torch.save(checkpoint(model, model=state), tmp_path / "a.pt")
        assert "do not fit" in refusal(tmp_path / "a.pt")


def test_text_in_an_encoding_of_quadratic_time_is_refused(tmp_path):
    path, text = tmp_path / "a.pt", "\u4e00\u00e9" * 300_000
    torch.save({"x": 1}, path)
    data = text.encode()
    slow = b"\x80\x02c_codecs\nencode\nX" + struct.pack("<I", len(data)) + data
    slow += b"X" + struct.pack("<I", 8) + b"punycode\x86R."
    rewritten(path, lambda _: slow)
    refusal(path)


def test_a_safetensors_header_that_claims_much_is_refused(tmp_path):
    folder = huggingface_folder(tmp_path, gpt())
    whole = {"wte.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    deep = b'{"a":' * 100_000
    for header, length in (
        (json.dumps(whole).encode(), None),
        (b"{}", 2**63),
        (b"{}", 10**9),
        (deep, None),
        (json.dumps({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).encode(), None),
        (b"[]", None),
        (b"", None),
    ):
        content = struct.pack("<Q", length or len(header)) + header + b"\0" * 64
        (folder / "model.safetensors").write_bytes(content)
        refusal(folder, GPT.from_pretrained)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'{"n_layer": ',
        b"[" * 200_000,
        b"\xff\xfe",
        b'{"n_layer": 1' + b"0" * 5000 + b"}",
        b'{"x": "' + b"y" * 5_000_000 + b'"}',
        b'{"model_type": ["gpt2"]}',
        b'{"activation_function": {"a": 1}}',
        b'{"n_embd": "768"}',
        b'{"n_inner": "x", "n_embd": [1]}',
        b'{"n_embd": 0}',
    ],
    ids=range(14),
)
def test_an_odd_config_json_is_one_line(content, tmp_path):
    folder = huggingface_folder(tmp_path, gpt())
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder, GPT.from_pretrained).removeprefix(str(folder))


# --- What the system says is no damage


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_the_system_does_not_hand_out_is_not_called_damaged(
    number, verify, tmp_path, monkeypatch
):
    path = tmp_path / "a.pt"
    torch.save(checkpoint(gpt()), path)

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        weights.read(path, verify=verify)
    assert error.value.errno == number


class FailingDisk(io.FileIO):
    """A file whose bytes from a place on cannot be read."""

    def __init__(self, path, good):
        super().__init__(path)
        self.good = good

    def read(self, size=-1):
        if self.tell() + (size if size >= 0 else 1 << 40) > self.good:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_disk_that_fails_while_it_is_read_is_not_called_damage(share, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save(checkpoint(gpt()), path)
    good = int(share * path.stat().st_size)
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: FailingDisk(path, good))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        weights.read(path)


def test_no_more_open_files_while_torch_opens_it_is_not_called_damage(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save(checkpoint(gpt()), path)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened, plain_load = [], torch.load

    def load(*args, **kwargs):
        lowest_free = os.dup(0)  # what the next file would get: numbers below it are all taken
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limit[1]))
        opened.append(1)
        return plain_load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            weights.read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert opened


def test_a_pipe_and_a_foreign_archive_are_called_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    handle = os.open(tmp_path / "pipe", os.O_RDWR)  # else opening it would wait for a writer
    try:
        assert "not a regular file" in refusal(tmp_path / "pipe")
    finally:
        os.close(handle)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("holiday.jpg", b"x" * 1000)
    assert "none of torch.save" in refusal(tmp_path / "a.zip")


# --- Any bytes at all


def mutations(data):
    """Bytes like these, with some of them changed, left out, repeated or cut."""
    place = st.integers(0, len(data))
    change = st.tuples(place, st.integers(0, 12), st.binary(max_size=12))

    def apply(changes):
        out = bytearray(data)
        for start, length, new in changes:
            out[start : start + length] = new
        return bytes(out)

    return st.lists(change, min_size=1, max_size=4).map(apply)


def only_user_errors(load, source):
    try:
        with bounded():
            load(source)
    except UserError as error:
        assert "\n" not in str(error)


TINY = gpt(n_layer=1, vocab_size=4, block_size=2)


def saved_bytes(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@fuzz(50)
@given(data=st.data(), old_format=st.booleans())
def test_any_bytes_of_a_checkpoint_are_read_or_refused(data, old_format, tmp_path_factory):
    content = {"model": {"transformer.wte.weight": torch.ones(2, 2)}, "model_config": SIZES}
    whole = saved_bytes(content, _use_new_zipfile_serialization=not old_format)
    path = tmp_path_factory.mktemp("fuzz") / "a.pt"
    path.write_bytes(data.draw(mutations(whole)))
    only_user_errors(load_checkpoint, path)


@fuzz(50)
@given(data=st.data())
def test_any_pickle_of_a_checkpoint_is_read_or_refused(data, tmp_path_factory):
    """The archive is whole and its checksums are right: what is odd is the pickle inside."""
    path = tmp_path_factory.mktemp("fuzz") / "a.pt"
    path.write_bytes(saved_bytes(checkpoint(TINY, loss=np.float64(3.0))))
    rewritten(path, lambda pickled: data.draw(mutations(pickled)))
    only_user_errors(load_checkpoint, path)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, 1, 2, 64, 10**9, "gpt2", "gelu_new"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@fuzz(50)
@given(
    config=st.dictionaries(
        st.sampled_from([*OTHERS, *layouts.IMPLEMENTED, "n_inner", "other"]), values
    ),
    sizes=st.dictionaries(st.sampled_from([*SIZES, "bias", "dropout", "other", "n_head"]), values),
)
def test_any_configuration_is_taken_or_refused(config, sizes, tmp_path_factory):
    folder = huggingface_folder(tmp_path_factory.mktemp("fuzz"), TINY)
    (folder / "config.json").write_text(json.dumps(config))
    only_user_errors(GPT.from_pretrained, folder)
    torch.save(checkpoint(TINY, model_config=asdict(TINY.config) | sizes), folder / "a.pt")
    only_user_errors(load_checkpoint, folder / "a.pt")


@fuzz(50)
@given(data=st.data())
def test_any_safetensors_file_is_read_or_refused(data, tmp_path_factory):
    from safetensors.torch import save

    folder = huggingface_folder(tmp_path_factory.mktemp("fuzz"), TINY)
    state = {"wte.weight": torch.ones(4, 2), "wpe.weight": torch.ones(2, 2)}
    (folder / "model.safetensors").write_bytes(data.draw(mutations(save(state))))
    only_user_errors(GPT.from_pretrained, folder)


@fuzz(50)
@given(data=st.data())
def test_any_model_file_of_llm_c_is_read_or_refused(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.bin"
    path.write_bytes(data.draw(mutations(llmc_bytes(TINY, 3)[:1200])))
    only_user_errors(load_checkpoint, path)


def test_a_pickle_that_runs_code_is_refused_by_its_name(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    for name, data in (
        ("plain", pickle.dumps({"model": Hostile()}, protocol=2)),
        ("zip", saved_bytes({"model": Hostile()})),
        ("old", saved_bytes({"model": Hostile()}, _use_new_zipfile_serialization=False)),
    ):
        (tmp_path / name).write_bytes(data)
        assert "mkdir" in refusal(tmp_path / name)
    assert not (tmp_path / "made").exists()
