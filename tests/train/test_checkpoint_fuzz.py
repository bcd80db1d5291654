"""Checkpoints with bytes flipped, cut off or put in, and with parts of another kind: what is read
is as it was, or there is one line that says what is wrong."""

import io
from functools import cache

import pytest
import torch
from fuzzing import bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.train.best import reconcile
from pretrain.train.checkpoint import load, newest, save
from pretrain.train.schema import KEYS, problem_in, problem_in_continued

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=9)
    | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def checkpoint():
    weights = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3)}
    numbers = {"step": 8, "last_eval_step": 8, "val_loss": 3.0, "best_val_loss": 3.0}
    numbers |= {"best_step": 8, "evals_since_best": 0, "loss": 3.1, "learning_rate": 1e-3}
    rest = {"model": weights, "optimizer": {"state": {}, "param_groups": []}, "scaler": {}}
    rest |= {"run": {"n_layer": 1}, "config": {"seed": 1}, "model_config": {"n_layer": 1}}
    return {"format": 1, **numbers, **rest}


@cache
def whole():
    file = io.BytesIO()
    torch.save(checkpoint(), file)
    return file.getvalue()


@fuzz(60)
@given(st.data())
def test_bytes_that_differ_change_nothing_or_are_named(tmp_path, data):
    content = bytearray(whole())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
        if kind == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            del content[at : at + data.draw(st.integers(1, 200))]
    path = tmp_path / "iter-8-loss-3.0000.pt"
    path.write_bytes(bytes(content))
    try:
        with bounded():
            found = load(path)
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error)
        with pytest.raises(UserError, match="no checkpoint can be read"):
            newest(tmp_path)
    else:
        assert found["step"] == 8
        assert torch.equal(found["model"]["weight"], checkpoint()["model"]["weight"])


@fuzz(60)
@given(st.sampled_from([*KEYS, "optimizer", "format", "else"]), VALUES)
def test_a_part_of_another_kind_is_taken_or_named(tmp_path, key, value):
    path = tmp_path / "iter-8-loss-3.0000.pt"
    save(path, checkpoint() | {key: value})
    try:
        with bounded():
            found = load(path)
            if problem_in_continued(found) is None:
                reconcile(tmp_path, path, found)
    except UserError as error:
        assert path.name in str(error) and len(str(error)) < 1000
    assert problem_in(value, 1) is not None
