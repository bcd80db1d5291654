"""model.py against transformers.GPT2LMHeadModel, plain formulas on all logits, and loops without a
cache."""

import json
import math
import pickle
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import GPT, CheckpointError, GPTConfig, load_checkpoint
from pretrain.train.optim import make_optimizer

SIZES = {"block_size": 16, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_embd": 32}
SMALLEST = {"block_size": 4, "vocab_size": 10, "n_layer": 1, "n_head": 1, "n_embd": 8}


def gpt(seed=0, **changes):
    """A small GPT in eval mode, all of its parameters random: biases, norms, no matrix
    symmetric."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES | changes)).eval()
    for name, parameter in model.named_parameters():
        rows = slice(model.config.vocab_size) if "wte" in name else slice(None)
        parameter.data[rows] += 0.15 * torch.randn_like(parameter.data[rows])
    return model


def tokens(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def random_sizes(seed):
    choose = random.Random(seed)
    n_head = choose.choice([1, 2, 4])
    return {
        "block_size": choose.randint(16, 32),
        "vocab_size": choose.randint(100, 300),
        "n_layer": choose.randint(1, 3),
        "n_head": n_head,
        "n_embd": n_head * choose.choice([8, 12, 16]),
    }


def huggingface_config(config):
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def huggingface(config, state=None, seed=0):
    """GPT2LMHeadModel with this state, by default with random parameters of its own."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(huggingface_config(config)).eval()
    if state is None:
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    else:
        model.load_state_dict(state)
    return model


def plain_loss(hidden, weight, targets, weights=None):
    """The formula, on all logits at once."""
    logits = (hidden @ weight.t()).float()
    losses = F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")
    return (losses if weights is None else losses * weights).sum() / (targets >= 0).sum()


def test_gelu_is_computed_again_in_the_backward_pass_and_only_in_training(monkeypatch):
    model = gpt(0, n_layer=3)
    x, y = tokens(model, 2, 2, 16)
    calls, gelu = [], F.gelu
    monkeypatch.setattr(F, "gelu", lambda *args, **kwargs: calls.append(1) or gelu(*args, **kwargs))
    _, loss = model.train()(x, y)
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 6
    model.eval()(x, y)
    assert len(calls) == 9


# --- Agreement with transformers


@pytest.mark.parametrize("seed", range(5))
def test_logits_and_loss_are_those_of_transformers_with_our_weights(seed):
    ours = gpt(seed, **random_sizes(seed))
    theirs = huggingface(ours.config, ours.huggingface_state_dict())
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("seed", range(5))
def test_logits_and_loss_are_those_of_transformers_with_its_weights(seed, tmp_path):
    theirs = huggingface(GPTConfig(**random_sizes(100 + seed)), seed=seed)
    theirs.save_pretrained(tmp_path)
    assert_same_outputs(GPT.from_pretrained(tmp_path), theirs)


@torch.no_grad()
def assert_same_outputs(ours, theirs):
    x = tokens(ours, 3, ours.config.block_size)
    logits, loss = ours(x)
    assert loss is None
    expected = theirs(x, labels=x)
    assert expected.logits.std() > 0.1  # they have something to agree on
    assert logits.shape == expected.logits.shape
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(x[:, :-1], x[:, 1:])[1], expected.loss, atol=1e-5, rtol=0)


def test_a_model_without_biases_exports_zeros_for_them():
    ours = gpt(bias=False)
    assert_same_outputs(ours, huggingface(ours.config, ours.huggingface_state_dict()))


def test_all_four_matrices_of_a_block_are_transposed_the_square_one_too(tmp_path):
    theirs = huggingface(GPTConfig(**SIZES))
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    ours_exported = ours.huggingface_state_dict()
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        key = f"transformer.h.1.{name}.weight"
        assert torch.equal(ours.state_dict()[key], theirs.state_dict()[key].t())
        assert torch.equal(ours_exported[key], theirs.state_dict()[key])
    # This would be seen in the logits: the square matrix is not symmetric.
    x = tokens(ours, 2, 16)
    before = ours(x)[0]
    square = ours.transformer.h[1].attn.c_proj.weight
    square.data = square.data.t().contiguous()
    assert (ours(x)[0] - before).abs().max() > 0.01


def test_an_export_loads_into_transformers_from_a_folder_and_comes_back_the_same(tmp_path):
    ours = gpt()
    huggingface(ours.config, ours.huggingface_state_dict()).save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert back.config == ours.config
    assert not back.training
    assert_same_state(back, ours)


def test_a_folder_with_pytorch_model_bin_loads_with_and_without_the_prefix(tmp_path):
    ours = gpt()
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(ours.config).to_dict()))
    state = ours.huggingface_state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_state(GPT.from_pretrained(tmp_path), ours)
    state.pop("lm_head.weight")
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    state["h.0.attn.bias"] = torch.ones(
        1, 1, 16, 16
    ).tril()  # the causal mask, as old files carry it
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_state(GPT.from_pretrained(tmp_path), ours)


def assert_same_state(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_twenty_adamw_steps_are_those_of_transformers_weight_for_weight_and_loss_for_loss():
    torch.manual_seed(0)
    ours = GPT(GPTConfig(**SIZES))
    theirs = huggingface(ours.config, ours.huggingface_state_dict()).train()
    start = {key: value.clone() for key, value in ours.huggingface_state_dict().items()}
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0}
    our_optimizer = make_optimizer(ours, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    their_optimizer = torch.optim.AdamW([{"params": matrices}, vectors], **settings)
    losses, expected = [], []
    for step in range(20):
        x = tokens(ours, 4, 16, seed=step) % 20  # few tokens are used, which can be learned
        loss = ours(x[:, :-1], x[:, 1:])[1]
        their_loss = theirs(x, labels=x).loss
        for each, optimizer in ((loss, our_optimizer), (their_loss, their_optimizer)):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
        losses.append(loss.item())
        expected.append(their_loss.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.5
    after, theirs_after = ours.huggingface_state_dict(), theirs.state_dict()
    for key, value in after.items():
        value, other = value.clone(), theirs_after[key].clone()
        if key.endswith("c_attn.bias"):
            # The softmax does not see a bias of the keys: its gradient is 0 but for rounding, and
            # Adam divides that by itself.
            value[32:64] = other[32:64] = 0
        assert (value - other).abs().max() < 2e-5, key
        assert (value - start[key]).abs().max() > 1e-3, key


@pytest.mark.parametrize(
    "key, value",
    [
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 48),
        ("tie_word_embeddings", False),
        ("model_type", "llama"),
    ],
)
def test_a_pretrained_configuration_that_is_not_implemented_is_refused(key, value, tmp_path):
    ours = gpt()
    huggingface(ours.config, ours.huggingface_state_dict()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=key) as error:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_folder_or_name_without_a_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no config"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        GPT.from_pretrained("nobody/nothing")


def test_pretrained_weights_of_another_size_than_their_configuration_are_refused(tmp_path):
    ours = gpt()
    huggingface(ours.config, ours.huggingface_state_dict()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"n_layer": 3}))
    with pytest.raises(CheckpointError, match="do not fit"):
        GPT.from_pretrained(tmp_path)


def test_weights_in_several_files_load(tmp_path):
    theirs = huggingface(GPTConfig(**SIZES))
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_outputs(GPT.from_pretrained(tmp_path), theirs)


def test_pretrained_files_cut_short_are_named(tmp_path):
    ours = gpt()
    huggingface(ours.config, ours.huggingface_state_dict()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=tmp_path.name):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"n_layer": ')
    with pytest.raises(CheckpointError, match=tmp_path.name):
        GPT.from_pretrained(tmp_path)


# --- The padded vocabulary


def test_the_embedding_has_a_multiple_of_128_rows_and_the_rest_of_the_world_sees_vocab_size():
    assert GPTConfig().padded_vocab_size == 50304
    assert GPTConfig(vocab_size=256).padded_vocab_size == 256
    model = gpt(vocab_size=130)
    assert model.transformer.wte.weight.shape == (256, 32)
    assert not model.transformer.wte.weight[130:].any()
    assert model(tokens(model, 2, 5))[0].shape == (2, 5, 130)
    exported = model.huggingface_state_dict()
    assert exported["transformer.wte.weight"].shape == exported["lm_head.weight"].shape == (130, 32)
    assert exported["transformer.wte.weight"].data_ptr() == exported["lm_head.weight"].data_ptr()


def test_padded_rows_take_no_part_in_the_loss_and_get_no_gradient_whatever_is_in_them():
    model = gpt()
    model.transformer.wte.weight.data[100:] = 3.0
    x = tokens(model, 4, 16)
    hidden = model.hidden_states(x[:, :-1]).flatten(0, 1)
    expected = plain_loss(hidden, model.transformer.wte.weight[:100], x[:, 1:].flatten())
    loss = model(x[:, :-1], x[:, 1:])[1]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    gradient = model.transformer.wte.weight.grad
    assert not gradient[100:].any()
    assert gradient[:100].any(dim=1).all()


def test_padded_rows_stay_zero_in_training():
    model = GPT(GPTConfig(**SIZES))
    optimizer = make_optimizer(model, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(3):
        x = tokens(model, 4, 16, seed=step)
        optimizer.zero_grad()
        model(x, x)[1].backward()
        optimizer.step()
    assert not model.transformer.wte.weight[100:].any()


def test_padded_tokens_are_never_sampled_even_if_they_would_win():
    model = gpt(vocab_size=20)
    direction = model.transformer.ln_f.bias.data
    direction[:] = 1.0
    model.transformer.wte.weight.data[20:] = 100.0
    prompts = tokens(model, 50, 3)
    for sampling in ({"temperature": 0}, {"temperature": 100.0}, {"top_k": 50}, {"top_p": 0.99}):
        new = model.generate(prompts, 8, seed=0, **sampling)[:, 3:]
        assert new.max() < 20


# --- The loss


@pytest.mark.parametrize("shape", [(4,), (4, 16)])
def test_weights_of_sequences_or_tokens_multiply_their_losses(shape):
    model = gpt()
    x, y = tokens(model, 4, 16), tokens(model, 4, 16, seed=1)
    y[1, 3:] = -1
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    each = F.cross_entropy(model(x)[0].transpose(1, 2), y, ignore_index=-1, reduction="none")
    expected = (each * (weights[:, None] if len(shape) == 1 else weights)).sum() / (y >= 0).sum()
    loss = model(x, y, weights)[1]
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad(each, list(model.parameters())) for each in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_weights_of_sequences_give_the_mean_of_weighted_losses_of_sequences():
    model = gpt()
    x, y, weights = (
        tokens(model, 3, 16),
        tokens(model, 3, 16, seed=1),
        torch.tensor([0.0, 1.5, 4.0]),
    )
    alone = [model(x[i : i + 1], y[i : i + 1])[1] for i in range(3)]
    expected = sum(w * loss for w, loss in zip(weights, alone, strict=True)) / 3
    torch.testing.assert_close(model(x, y, weights)[1], expected)


def test_the_loss_is_nan_when_every_target_is_left_out():
    model = gpt()
    x = tokens(model, 2, 16)
    assert model(x, torch.full_like(x, -1))[1].isnan()
    assert model(x, torch.full_like(x, -100), torch.ones(2))[1].isnan()


def test_score_adds_up_the_plain_losses_and_counts_the_right_and_the_counted():
    model = gpt(block_size=32)
    x = tokens(model, 40, 32)
    logits = model(x)[0]
    y = torch.where(
        tokens(model, 40, 32, seed=1) < 30, logits.argmax(-1), tokens(model, 40, 32, seed=2)
    )
    y[:, ::5] = -1
    y[0] = -100
    loss, right, counted = model.score(x, y)
    each = F.cross_entropy(
        logits.transpose(1, 2), y.clamp(min=-1), ignore_index=-1, reduction="none"
    )
    assert loss.item() == pytest.approx(each.double().sum().item(), rel=1e-5)
    assert right == (logits.argmax(-1) == y).sum() > 100
    assert counted == (y >= 0).sum() < y.numel()


def test_a_position_sees_nothing_of_what_follows():
    model = gpt()
    x = tokens(model, 1, 16)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 100
    a, b = model(x)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :9], b[:, :9], atol=1e-6, rtol=0)
    assert (a[:, 9:] - b[:, 9:]).abs().amax(dim=-1).min() > 1e-3


def test_sequences_longer_than_block_size_and_impossible_sizes_are_refused():
    model = gpt()
    with pytest.raises(ValueError, match=r"17 tokens .* block_size .*16"):
        model(tokens(model, 1, 17))
    for wrong in ({"n_embd": 33}, {"n_layer": 0}, {"vocab_size": -1}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            GPTConfig(**SIZES | wrong)


# --- Generation


def recomputed(model, prompt, n, block_size=16):
    """Greedy tokens after a 1-D prompt, everything computed anew for each."""
    row = prompt
    for _ in range(n):
        logits = model(row[None, -block_size:])[0][0, -1]
        row = torch.cat((row, logits.argmax()[None]))
    return row


def test_greedy_tokens_with_the_cache_are_those_of_recomputing_everything():
    model = gpt()
    prompt = tokens(model, 3)
    expected = recomputed(model, prompt, 13)
    assert len(expected[3:].unique()) > 2  # no repetition of one token
    assert torch.equal(model.generate(prompt, 13, temperature=0), expected)
    assert torch.equal(model.generate(prompt[None], 13, temperature=0), expected[None])


def test_with_the_cache_every_position_is_computed_once(monkeypatch):
    model = gpt()
    computed = []
    plain = model.hidden_states

    def recorded(idx, *args, **options):
        computed.append(idx.shape)
        return plain(idx, *args, **options)

    monkeypatch.setattr(model, "hidden_states", recorded)
    model.generate(tokens(model, 2, 5), 10)
    assert computed == [(2, 5)] + [(2, 1)] * 9


def test_prompts_of_different_lengths_are_continued_as_if_each_were_alone():
    model = gpt()
    prompts = [tokens(model, n, seed=n) for n in (7, 1, 4, 7)]
    rows = model.generate(prompts, 9, temperature=0)
    for prompt, row in zip(prompts, rows, strict=True):
        assert torch.equal(row, recomputed(model, prompt, 9))


def test_past_block_size_the_context_is_the_last_block_size_tokens():
    model = gpt()
    prompts = [
        tokens(model, n, seed=n) for n in (12, 3, 30)
    ]  # 30 is more than block_size from the start
    for prompt in prompts:
        assert torch.equal(model.generate(prompt, 20, temperature=0), recomputed(model, prompt, 20))
    for prompt, row in zip(prompts, model.generate(prompts, 20, temperature=0), strict=True):
        assert torch.equal(row, recomputed(model, prompt, 20))


def test_slide_drops_k_tokens_at_a_time():
    model = gpt()
    prompt = tokens(model, 10)
    row, start = prompt, 0
    for _ in range(20):
        if len(row) - start > 16:
            start = len(row) - 16 + 4
        row = torch.cat((row, model(row[None, start:])[0][0, -1].argmax()[None]))
    generated = model.generate(prompt, 20, temperature=0, slide=5)
    assert len(generated) == 30
    assert torch.equal(generated, row)


def test_top_k_restricts_sampling_to_the_k_most_likely_tokens():
    model = gpt()
    prompt = tokens(model, 4)
    likeliest = model(prompt[None])[0][0, -1].topk(5).indices
    drawn = model.generate(prompt.expand(2000, 4), 1, top_k=5, temperature=2.0, seed=0)[:, -1]
    assert set(drawn.tolist()) == set(likeliest.tolist())
    drawn = model.generate(prompt.expand(2000, 4), 1, top_k=1000, temperature=2.0, seed=0)[:, -1]
    assert len(set(drawn.tolist())) > 50


def test_top_p_restricts_sampling_to_the_smallest_set_that_reaches_p():
    model = gpt()
    prompt = tokens(model, 4)
    probabilities, order = (model(prompt[None])[0][0, -1] / 1.5).softmax(-1).sort(descending=True)
    for p in (0.3, 0.6):
        nucleus, total = set(), 0.0
        for token, probability in zip(order.tolist(), probabilities.tolist(), strict=True):
            if total >= p:
                break
            nucleus.add(token)
            total += probability
        assert 1 < len(nucleus) < 50
        drawn = model.generate(prompt.expand(3000, 4), 1, top_p=p, temperature=1.5, seed=0)[:, -1]
        assert set(drawn.tolist()) == nucleus
    greedy = model.generate(prompt.expand(20, 4), 1, top_p=1e-9, seed=0)[:, -1]
    assert (greedy == order[0]).all()


def test_tokens_are_drawn_as_often_as_the_model_says_at_a_temperature():
    model = gpt()
    prompt = tokens(model, 4)
    expected = (model(prompt[None])[0][0, -1] / 0.7).softmax(-1)
    drawn = model.generate(prompt.expand(4000, 4), 1, temperature=0.7, seed=0)[:, -1]
    frequencies = drawn.bincount(minlength=100) / 4000
    assert (frequencies - expected).abs().max() < 0.03
    assert expected.max() > 0.06


def test_a_seed_gives_the_same_tokens_again_and_the_global_generator_is_left_alone():
    model = gpt()
    prompts = tokens(model, 1, 4).expand(3, 4)
    before = torch.get_rng_state()
    first = model.generate(prompts, 10, seed=1)
    torch.rand(3)
    again, other, unseeded = (model.generate(prompts, 10, seed=seed) for seed in (1, 2, None))
    torch.set_rng_state(before)
    model.generate(prompts, 10, seed=1)
    model.generate(prompts, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, unseeded)
    assert not torch.equal(first[0], first[1])  # rows do not share their draws


def test_a_row_ends_with_its_stop_token_and_the_stream_when_every_row_has_one():
    model = gpt()
    prompts = [tokens(model, n, seed=n) for n in (4, 6)]
    free = model.generate(prompts, 12, temperature=0)
    stop = int(free[0][4 + 3])
    expected = []
    for prompt, row in zip(prompts, free, strict=True):
        hits = (row[len(prompt) :] == stop).nonzero()
        expected.append(row[: len(prompt) + int(hits[0]) + 1] if len(hits) else row)
    rows = model.generate(prompts, 12, temperature=0, stop_token=stop)
    assert [row.tolist() for row in rows] == [row.tolist() for row in expected]
    assert len(expected[0]) < len(free[0])
    assert (
        len(list(model.stream(prompts[:1], 12, temperature=0, stop_token=stop)))
        == len(expected[0]) - 4
    )

    batch = torch.stack((prompts[0], tokens(model, 4, seed=9)))
    filled = model.generate(batch, 12, temperature=0, stop_token=stop)
    assert (filled[0, len(expected[0]) :] == stop).all()
    # A stop token in the prompt ends nothing.
    assert len(model.generate([torch.tensor([stop, 1])], 1, temperature=0, stop_token=stop)[0]) == 3


def test_generating_in_training_is_without_dropout_and_training_goes_on():
    model = gpt(dropout=0.5)
    prompt = tokens(model, 4)
    expected = model.generate(prompt, 8, temperature=0)
    assert torch.equal(model.train().generate(prompt, 8, temperature=0), expected)
    assert model.training
    assert all(module.training for module in model.modules())


def test_settings_of_sampling_that_make_no_sense_are_refused():
    model = gpt(**SMALLEST)
    prompt = torch.tensor([1])
    wrong = (
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"slide": 0},
        {"slide": 5},
    )
    for sampling in wrong:
        with pytest.raises(ValueError, match=next(iter(sampling))):
            model.generate(prompt, 1, **sampling)
    with pytest.raises(ValueError, match="prompt needs"):
        model.generate([prompt, prompt[:0]], 1)
    assert torch.equal(model.generate(prompt, 0), prompt)


# --- Gradient checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients_and_keeps_less(dropout):
    model = gpt(n_layer=4, dropout=dropout).train()
    x, y = tokens(model, 4, 16), tokens(model, 4, 16, seed=1)
    results = []
    for model.gradient_checkpointing in (False, True):
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x, y)[1]
        model.zero_grad()
        loss.backward()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held = sum(size for pointer, size in saved.items() if pointer not in parameters)
        results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters()}, held))
    (loss, gradients, held), (loss_again, gradients_again, held_again) = results
    torch.testing.assert_close(loss_again, loss, atol=1e-6, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, atol=1e-6, rtol=1e-5)
    assert held_again < 0.3 * held
    if dropout:
        model.eval()
        assert (model(x, y)[1] - loss).abs() > 1e-4  # dropout was at work


# --- Initialisation


def test_weights_begin_as_the_paper_says():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=8, n_head=2, n_embd=64))
    seen = set()
    for name, parameter in model.named_parameters():
        kind = name.split(".", 3)[-1] if ".h." in name else name
        seen.add(kind)
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            values = parameter[:300] if "wte" in name else parameter
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert values.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(values.mean().item()) < 5 * expected / math.sqrt(values.numel()), name
            assert values.abs().max() > 2.5 * expected, name  # normal, not uniform
    assert {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_proj.weight",
        "transformer.wpe.weight",
    } <= seen
    assert not model.transformer.wte.weight[300:].any()
    assert model(tokens(model, 4, 32), tokens(model, 4, 32, seed=1))[1].item() == pytest.approx(
        math.log(300), abs=0.1
    )


def test_a_seed_gives_the_same_weights_however_the_vocabulary_is_padded(monkeypatch):
    models = []
    for multiple in (128, 1, 64):
        padded = property(lambda self, m=multiple: -(-self.vocab_size // m) * m)
        monkeypatch.setattr(GPTConfig, "padded_vocab_size", padded)
        torch.manual_seed(7)
        models.append(GPT(GPTConfig(**SIZES)))
    assert len({len(model.transformer.wte.weight) for model in models}) == 2 + (100 % 64 == 0)
    for model in models[1:]:
        for (name, a), b in zip(models[0].named_parameters(), model.parameters(), strict=True):
            rows = slice(100) if "wte" in name else slice(None)
            assert torch.equal(a[rows], b[rows]), name


# --- Sizes


def test_flops_per_token_by_hand():
    # Token table 100 * 32 = 3200, two blocks of 12 * 32 ** 2 + 13 * 32 = 12704, last norm 64:
    # 28672.
    model = gpt()
    assert model.num_parameters() == 28672 + 16 * 32
    assert model.flops_per_token() == 6 * 28672 + 12 * 2 * 32 * 16 == 184320
    assert model.flops_per_token(8) == 6 * 28672 + 12 * 2 * 32 * 8
    assert sum(p.numel() for p in huggingface(model.config).parameters()) == model.num_parameters()


def test_gpt2_has_124_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_parameters() == 124_439_808
    assert model.flops_per_token() == 855_166_464


# --- Checkpoints


def save(model, path, /, **changes):
    checkpoint = {
        "format": 1,
        "model": model.state_dict(),
        "model_config": asdict(model.config),
        "step": 20,
    }
    torch.save(checkpoint | changes, path)
    return path


def test_a_checkpoint_comes_back_as_the_model_and_the_dict(tmp_path):
    model = gpt(dropout=0.1, bias=False)
    path = save(model, tmp_path / "a.pt", val_loss=3.5)
    random_state = torch.get_rng_state()
    loaded, checkpoint = load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert loaded.config == model.config
    assert not loaded.training
    assert (checkpoint["step"], checkpoint["val_loss"]) == (20, 3.5)
    assert_same_state(loaded, model)
    x = tokens(model, 2, 16)
    assert torch.equal(loaded(x)[0], model(x)[0])
    loaded.transformer.wte.weight.data.zero_()  # does not change the file
    assert_same_state(load_checkpoint(str(path))[0], model)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_dropped(prefix, tmp_path):
    model = gpt()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    assert_same_state(load_checkpoint(save(model, tmp_path / "a.pt", model=state))[0], model)


def test_a_checkpoint_of_nanogpt_loads(tmp_path):
    model = gpt()
    state = {"_orig_mod." + key: value for key, value in model.state_dict().items()}
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"][:100]
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    torch.save(
        {"model": state, "model_args": asdict(model.config), "iter_num": 5}, tmp_path / "ckpt.pt"
    )
    assert_same_state(load_checkpoint(tmp_path / "ckpt.pt")[0], model)


class Hostile:
    """Creates a file where it is unpickled by the usual means."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "writer", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))]
)
def test_a_hostile_pickle_is_refused_and_does_nothing(writer, tmp_path):
    created, path = tmp_path / "created", tmp_path / "hostile.pt"
    model = gpt(**SMALLEST)
    writer(
        {"model": model.state_dict(), "model_config": asdict(model.config), "x": Hostile(created)},
        path,
    )
    with pytest.raises(CheckpointError, match="hostile"):
        load_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(model.config).to_dict()))
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=tmp_path.name):
        GPT.from_pretrained(tmp_path)
    assert not created.exists()
    if writer is torch.save:  # it is hostile
        torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
        assert created.exists()


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(CheckpointError, match="no such file") as error:
            load_checkpoint(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("kept", [0, 1, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_named(kept, tmp_path):
    path = save(gpt(), tmp_path / "cut.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    assert_refused(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = save(gpt(), tmp_path / "flipped.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    assert_refused(path)


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "other.pt"
    for content in (b"<html>404: Not Found</html>", b"\x00" * 5000, b"PK\x03\x04" + b"x" * 500):
        path.write_bytes(content)
        assert_refused(path)


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 3, "state_dict": {"w": torch.ones(2)}},
        [1, 2],
        torch.ones(3),
        {"model": {}, "model_config": SMALLEST},
        {"model": {"fc.weight": torch.ones(2, 2)}, "model_config": {"hidden": 3}},
        {"model": {"fc.weight": torch.ones(2, 2)}, "model_config": SMALLEST | {"n_head": 3}},
        {"model": {3: torch.ones(2, 2)}, "model_config": SMALLEST},
        {"model": {"transformer.wte.weight": "x"}, "model_config": SMALLEST},
        {"model": {"transformer.wte.weight": torch.ones(3)}, "model_config": SMALLEST},
        {
            "model": {"transformer.wte.weight": torch.ones(10, 8)},
            "model_config": SMALLEST | {"n_layer": "1"},
        },
    ],
    ids=[
        "foreign",
        "list",
        "tensor",
        "empty",
        "config",
        "heads",
        "number",
        "text",
        "vector",
        "text size",
    ],
)
def test_a_dict_that_is_no_checkpoint_is_named(content, tmp_path):
    torch.save(content, tmp_path / "foreign.pt")
    assert_refused(tmp_path / "foreign.pt")


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path):
    model = gpt()
    for changes in ({"n_layer": 3}, {"n_embd": 64}, {"block_size": 8}, {"vocab_size": 200}):
        path = save(model, tmp_path / "a.pt", model_config=asdict(model.config) | changes)
        assert_refused(path)
    untied = model.state_dict() | {"lm_head.weight": model.transformer.wte.weight + 1}
    assert_refused(save(model, tmp_path / "untied.pt", model=untied))


def assert_refused(path):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
