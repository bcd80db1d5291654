"""Weights by key tokens, against the formula written out with plain loops."""

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from pretrain.tokens.tokenizer import load_encoding
from pretrain.train.keytokens import KeyTokenError, key_token_weights, load_key_tokens


def test_a_sequence_weighs_alpha_for_itself_and_alpha_for_each_key_token():
    inputs = torch.tensor([[7, 8, 9, 7], [1, 2, 3, 4], [9, 9, 9, 9]])
    weights = key_token_weights(inputs, torch.tensor([7, 9]), alpha=0.5)
    assert weights.tolist() == [2.0, 0.5, 2.5]
    assert weights.dtype == torch.float32


def test_the_weighted_loss_and_its_gradient_are_those_of_the_formula():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=1, n_head=2, n_embd=8))
    x, y = torch.randint(40, (2, 3, 8)).unbind()
    key_tokens, alpha = torch.tensor([3, 5, 11, 17, 20]), 0.7

    logits = model(x)[0]
    expected = torch.tensor(0.0)
    for b in range(3):
        count = sum(token in {3, 5, 11, 17, 20} for token in x[b].tolist())
        expected = expected + alpha * (1 + count) * F.cross_entropy(logits[b], y[b]) / 3
    expected.backward()
    gradient = model.transformer.wpe.weight.grad.clone()

    model.zero_grad()
    _, loss = model(x, y, weights=key_token_weights(x, key_tokens, alpha))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.transformer.wpe.weight.grad, gradient)


def test_a_file_of_key_tokens_is_read_with_its_spaces_and_without_repeats(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text(" river\nimport\n\n def\nimport\n", encoding="utf-8")
    texts = {load_encoding().decode([token]) for token in load_key_tokens(path).tolist()}
    assert texts == {" river", "import", " def"}
    assert len(load_key_tokens(path)) == 3


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"import\nantidisestablishmentarianism\n", "line 2 'antidisestablishmentarianism' is"),
        (b"\n\n", "holds no token"),
        (b"\xff\xfe", "it is not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_line(content, complaint, tmp_path):
    path = tmp_path / "keys.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KeyTokenError) as error:
        load_key_tokens(path)
    assert (
        complaint in str(error.value)
        and str(path) in str(error.value)
        and "\n" not in str(error.value)
    )
