"""pretrain/models/modern.py against the same architecture from plain formulas, its optimizer
against the papers', and all that training, scoring and generation expect of a model."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.eval.choices import Item, computing, make_batches, make_rows, score, take_apart
from pretrain.hardware import compiler_problem
from pretrain.models.modern import Modern, ModernConfig
from pretrain.train.optim import make_optimizer

SIZES = {"block_size": 24, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_embd": 32}


def modern(seed=0, **changes):
    """A small model in eval mode, in which nothing is zero: projections, head, biases."""
    torch.manual_seed(seed)
    model = Modern(ModernConfig(**SIZES | changes)).eval()
    for name, parameter in model.named_parameters():
        rows = slice(model.config.vocab_size) if name.startswith("head") else slice(None)
        parameter.data[rows] += 0.15 * torch.randn_like(parameter.data[rows])
    return model


def tokens(*shape, seed=0, vocab_size=100):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- The architecture by another hand: formulas over a dict of weights


def plain_norm(x, gains=1.0):
    return gains * x / (x.pow(2).mean(-1, keepdim=True) + 2**-23).sqrt()


def plain_turned(x):
    """x (heads, T, D): dimension j and j + D/2 are the two parts of a complex number, which turns
    with the position for j below D/4 and stays for others."""
    _, T, D = x.shape
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    speed = torch.zeros(D // 2)
    for j in range(D // 4):
        speed[j] = 1024 ** (-j / (D // 4 - 1))
    angle = torch.arange(T)[:, None] * speed
    z = z * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat((z.real, z.imag), -1)


def plain_logits(w, sequence, config):
    """Logits (T, vocabulary) of one sequence (T,)."""
    T, D = len(sequence), config.n_embd // config.n_head
    future = torch.ones(T, T).triu(1).bool()
    x = plain_norm(w["embed.weight"][sequence], w["norm_in.weight"])

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    for i in range(config.n_layer):
        h = plain_norm(x, w[f"blocks.{i}.norm_1.weight"])
        q, k, v = (
            linear(f"blocks.{i}.attn.{name}", h).view(T, -1, D).transpose(0, 1) for name in "qkv"
        )
        if f"values.{i}.weight" in w:
            v = v + w[f"values.{i}.weight"][sequence].view(T, -1, D).transpose(0, 1)
        q, k = plain_turned(plain_norm(q)), plain_turned(plain_norm(k))
        scores = (0.12 * q @ k.transpose(1, 2)).masked_fill(future, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
        x = x + linear(f"blocks.{i}.attn.proj", y)
        h = linear(f"blocks.{i}.mlp.fc", plain_norm(x, w[f"blocks.{i}.norm_2.weight"]))
        x = x + linear(f"blocks.{i}.mlp.proj", torch.where(h > 0, h * h, 0.0))
    logits = linear("head", plain_norm(x, w["norm_out.weight"]))[:, : config.vocab_size]
    return 15 * logits / (logits**2 + 225).sqrt()


def plain_loss(w, x, y, config):
    losses = [
        -plain_logits(w, x[b], config).log_softmax(-1)[torch.arange(len(y[b])), y[b]]
        for b in range(len(x))
    ]
    return torch.cat(losses).mean()


def plain_weights(model):
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


VALUES = {"value_embeddings": True}
with_and_without_values = pytest.mark.parametrize("changes", [{}, VALUES], ids=["", "values"])


@pytest.mark.parametrize(
    "changes", [{}, {"bias": False}, {"n_head": 1, "n_layer": 3}, {"n_layer": 3} | VALUES]
)
def test_logits_loss_and_gradients_are_those_of_plain_formulas(changes):
    model = modern(**changes).train()
    w, (x, y) = plain_weights(model), tokens(2, 3, 24)
    logits = torch.stack([plain_logits(w, sequence, model.config) for sequence in x])
    assert logits.std() > 0.5
    torch.testing.assert_close(model(x)[0], logits, atol=1e-5, rtol=1e-5)

    expected, loss = plain_loss(w, x, y, model.config), model(x, y)[1]
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    expected.backward()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad, atol=1e-5, rtol=1e-5, msg=name)


def paper_newton_schulz(g):
    """Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"."""
    x = g / (g.norm() + 1e-7)
    if g.size(0) > g.size(1):
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.size(0) > g.size(1) else x


def plain_step(w, state, step, learning_rate):
    """One update of a dict of weights: Muon by the paper's formula for the matrices of the blocks,
    AdamW by Loshchilov and Hutter's for the rest; rates are the record's, scaled to the width."""
    width = w["embed.weight"].size(1)
    for name, p in w.items():
        m, v = state.setdefault(name, [torch.zeros_like(p), torch.zeros_like(p)])
        g = p.grad
        if name.startswith("blocks") and p.dim() == 2:
            m += 0.05 * (g - m)
            update = paper_newton_schulz(0.05 * g + 0.95 * m)
            p.data *= 1 - learning_rate * 0.05
            p.data -= learning_rate * max(1, p.size(0) / p.size(1)) ** 0.5 * update
            continue
        rate = {"embed.weight": 0.7, "head.weight": 0.004}.get(name, 0.015)
        rate = 0.35 if name.startswith("values") else rate
        rate *= learning_rate / 0.025 * (768 / width) ** 0.5
        m += 0.2 * (g - m)
        v += 0.05 * (g * g - v)
        p.data *= 1 - rate * 0.001
        m_hat, v_hat = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
        p.data -= rate * m_hat / (v_hat.sqrt() + 1e-10)


def five_steps(model, learning_rate, each_step):
    optimizer = make_optimizer(
        model, name="muon", learning_rate=learning_rate, weight_decay=0.05, betas=(0.8, 0.95)
    )
    for step in range(5):
        x, y = tokens(2, 3, 24, seed=step)
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        each_step(step, x, y, loss)


@pytest.mark.parametrize(("learning_rate", "changes"), [(0.025, {}), (0.01, {}), (0.025, VALUES)])
def test_five_steps_of_muon_and_adamw_are_those_of_the_papers(learning_rate, changes, monkeypatch):
    # In float32 on every processor: a rounding to bfloat16 turns the last bit of a sum, in which
    # two orders of adding differ, into a hundredth of a number.
    monkeypatch.setattr("pretrain.train.optim._computes_in_bfloat16", lambda device: False)
    model = modern(**changes).train()
    w, state = plain_weights(model), {}

    def compare(step, x, y, loss):
        expected = plain_loss(w, x, y, model.config)
        torch.testing.assert_close(loss, expected, atol=1e-3 if changes else 1e-5, rtol=0)
        expected.backward()
        plain_step(w, state, step, learning_rate)
        for name, parameter in model.named_parameters():
            w[name].grad = None
            # Adam makes a full step of a gradient of 1e-9 too, whose rounding is a hundredth of it:
            # tables of values have such.
            bound = 1e-3 if changes else 1e-5
            assert (parameter - w[name]).norm() < bound * parameter.norm(), (step, name)

    five_steps(model, learning_rate, compare)


def test_muon_in_bfloat16_and_in_float32_update_alike_but_for_rounding(monkeypatch):
    ends, losses = [], []
    for in_bfloat16 in (True, False):
        monkeypatch.setattr(
            "pretrain.train.optim._computes_in_bfloat16", lambda device, is_so=in_bfloat16: is_so
        )
        model = modern().train()
        begin = model.blocks[0].mlp.fc.weight.detach().clone()
        five_steps(model, 0.025, lambda step, x, y, loss: losses.append(loss.item()))
        ends.append(model.blocks[0].mlp.fc.weight.detach() - begin)
    assert (ends[0] - ends[1]).norm() < 0.1 * ends[1].norm()
    assert losses[:5] == pytest.approx(losses[5:], rel=0.01)
    assert losses[:5] != losses[5:]


# ---- The start


def test_at_the_start_the_loss_is_that_of_a_uniform_guess_and_branches_add_nothing():
    torch.manual_seed(0)
    model = Modern(ModernConfig(**SIZES))
    x, y = tokens(2, 4, 24)
    torch.testing.assert_close(model(x, y)[1].item(), math.log(100), atol=1e-6, rtol=0)
    embedded = plain_norm(plain_norm(model.embed.weight[x]))
    torch.testing.assert_close(model.hidden_states(x), embedded, atol=1e-5, rtol=1e-5)


def test_weights_begin_as_the_record_says():
    torch.manual_seed(0)
    model = Modern(ModernConfig(block_size=8, vocab_size=1000, n_layer=1, n_head=2, n_embd=256))
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "bias")) or name == "head.weight":
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 1.0 if name == "embed.weight" else (0.33 / parameter.size(1)) ** 0.5
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(parameter.mean().item()) < 0.02 * std, name


def test_a_seed_gives_the_same_weights_whatever_torch_would_have_drawn():
    first, second = modern(seed=3), modern(seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not torch.equal(first.embed.weight, modern(seed=4).embed.weight)


def test_parameters_and_flops_by_hand():
    model = Modern(ModernConfig(**SIZES))
    C, V = 32, 100
    matrices, biases, gains = 2 * 12 * C * C, 2 * 9 * C, (2 * 2 + 2) * C
    head = V * C + V
    assert model.num_parameters() == V * C + matrices + biases + gains + head
    expected = 6 * (matrices + biases + gains + head) + 12 * 2 * C * 24
    assert model.flops_per_token() == expected
    assert model.flops_per_token(10) == expected - 12 * 2 * C * 14


def test_tables_of_values_count_as_parameters_and_cost_no_products():
    plain, model = (Modern(ModernConfig(**SIZES | {"n_layer": 3} | c)) for c in ({}, VALUES))
    assert list(model.values) == ["0", "2"]
    assert model.num_parameters() == plain.num_parameters() + 2 * 100 * 32
    assert model.flops_per_token() == plain.flops_per_token()


def test_at_gpt2s_size_it_has_heads_of_128():
    config = ModernConfig()
    assert (config.n_layer, config.n_embd, config.head_dim) == (12, 768, 128)
    with torch.device("meta"):
        model = Modern(config)
    assert model.num_parameters() == 162_282_577


@pytest.mark.parametrize("sizes", [{"n_embd": 36, "n_head": 2}, {"n_embd": 32, "n_head": 3}])
def test_heads_that_cannot_turn_are_refused(sizes):
    with pytest.raises(ValueError, match="multiple"):
        ModernConfig(**SIZES | sizes)


def test_every_parameter_has_its_rate_and_all_follow_the_learning_rate():
    model = Modern(ModernConfig(**SIZES | {"n_embd": 192}))
    names = {id(p): name for name, p in model.named_parameters()}
    for learning_rate in (0.025, 0.05):
        optimizer = make_optimizer(
            model, name="muon", learning_rate=learning_rate, weight_decay=0.05, betas=(0.8, 0.95)
        )
        rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert rates.keys() == set(names.values())
        for name, rate in rates.items():
            by_name = {"embed.weight": 1.4, "head.weight": 0.008}  # half as wide twice: x 2
            is_matrix = name.startswith("blocks") and name.endswith("weight") and "norm" not in name
            expected = 0.025 if is_matrix else by_name.get(name, 0.03)
            assert rate == pytest.approx(expected * learning_rate / 0.025), name
        for group in optimizer.param_groups:
            is_muon = "ns_steps" in group
            assert group["weight_decay"] == (0.05 if is_muon else 0.001)
            assert is_muon or (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-10)


# ---- What training, scoring and generation expect


def test_negative_targets_and_weights_count_as_in_the_classic_model():
    model = modern()
    x, y = tokens(2, 3, 24)
    y[0, :5], y[2, 7] = -1, -100
    losses = F.cross_entropy(
        model(x)[0].transpose(1, 2), y.clamp(min=-1), ignore_index=-1, reduction="none"
    )
    count = (y >= 0).sum()
    torch.testing.assert_close(model(x, y)[1], losses.sum() / count)
    of_sequences, of_tokens = torch.tensor([0.5, 2.0, 3.0]), torch.rand(3, 24)
    for weights in (of_sequences, of_tokens):
        expected = (losses * weights.view(3, -1)).sum() / count
        torch.testing.assert_close(model(x, y, weights)[1], expected)


def test_score_adds_up_the_plain_losses_and_counts_the_right_and_the_counted():
    model = modern()
    x, y = tokens(2, 3, 24)
    logits = model(x)[0]
    y[1], y[2, :3] = logits[1].argmax(-1), -1
    total, right, count = model.score(x, y)
    expected = F.cross_entropy(logits.transpose(1, 2), y, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(total, expected)
    assert right == (logits.argmax(-1) == y).sum() and right >= 24
    assert count == 3 * 24 - 3


def test_rows_that_pad_the_head_take_no_part_and_stay_zero():
    model = modern().train()
    assert len(model.head.weight) == 128
    padding = slice(100, None)
    x, y = tokens(2, 3, 24)
    clean = model(x, y)[1]
    model.head.weight.data[padding], model.head.bias.data[padding] = 7.0, 50.0
    assert torch.equal(model(x, y)[1], clean)
    assert int(model.eval().generate(x[0, :4], 8, temperature=0).max()) < 100
    model.head.weight.data[padding] = model.head.bias.data[padding] = 0.0
    five_steps(model.train(), 0.025, lambda *_: None)
    assert not model.head.weight[padding].any() and not model.head.bias[padding].any()


def test_a_position_sees_nothing_of_what_follows_and_all_of_what_precedes():
    model = modern()
    x = tokens(1, 24)
    changed = x.clone()
    changed[0, 10] = (x[0, 10] + 1) % 100
    differs = (model(x)[0] != model(changed)[0]).any(-1)[0]
    assert not differs[:10].any() and differs[10:].all()


def test_only_distances_between_positions_count():
    model = modern()
    x = tokens(1, 12)
    shifted = model.hidden_states(x, torch.arange(12) + 9)
    torch.testing.assert_close(model.hidden_states(x), shifted, atol=1e-4, rtol=1e-4)
    stretched = model.hidden_states(x, torch.arange(12) * 2)
    assert (model.hidden_states(x) - stretched).abs().max() > 0.01


def test_longer_sequences_than_block_size_are_refused():
    with pytest.raises(ValueError, match="25 tokens do not fit into block_size 24"):
        modern()(tokens(1, 25))


def test_greedy_tokens_with_the_cache_are_those_of_recomputing_everything():
    model = modern()
    prompts = tokens(3, 5)
    rows = prompts
    for _ in range(15):
        rows = torch.cat((rows, model(rows)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert len(set(rows[0].tolist())) > 6
    assert torch.equal(model.generate(prompts, 15, temperature=0), rows)


@with_and_without_values
@torch.no_grad()
def test_logits_with_the_cache_are_those_without_token_by_token(changes):
    model, x = modern(**changes), tokens(2, 24)
    cache = model.new_cache(2)
    pieces = [model.hidden_states(x[:, :6], cache=cache)]
    pieces += [model.hidden_states(x[:, i : i + 1], cache=cache) for i in range(6, 24)]
    torch.testing.assert_close(torch.cat(pieces, 1), model.hidden_states(x), atol=1e-5, rtol=1e-5)


@with_and_without_values
def test_prompts_of_different_lengths_past_block_size_are_continued_as_if_each_were_alone(changes):
    model = modern(**changes)
    prompts = [tokens(n, seed=n) for n in (3, 17, 24, 40)]
    together = model.generate(prompts, 12, temperature=0, slide=4)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(model.generate(prompt, 12, temperature=0), row) or len(prompt) > 12
    assert [len(row) for row in together] == [15, 29, 36, 52]


@with_and_without_values
def test_endings_packed_in_one_row_have_the_losses_of_one_sequence_each(changes):
    model = modern(block_size=64, **changes)
    lengths = [(5, 3, 4), (20, 1, 7), (1, 6, 2)]
    items = [
        Item(tokens(c, seed=c).tolist(), [tokens(e, seed=c + e).tolist() for e in endings])
        for c, *endings in lengths
    ]
    parts = take_apart(model)
    assert parts.packs
    found = torch.full((len(items), 2), torch.nan)
    cpu = torch.device("cpu")
    with computing(cpu, None):
        for batch in score(parts, make_batches(make_rows(items, 64, share=True), 256), cpu):
            found[batch.items, batch.choices] = torch.from_numpy(batch.sums).float()
    for i, item in enumerate(items):
        for j, ending in enumerate(item.endings):
            sequence = torch.tensor(item.context + ending)
            logits = model(sequence[None, :-1])[0][0]
            losses = F.cross_entropy(logits, sequence[1:], reduction="none")[-len(ending) :]
            assert found[i, j].item() == pytest.approx(losses.sum().item(), abs=1e-4)


@with_and_without_values
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(dropout, changes):
    x, y = tokens(2, 3, 24)
    found = []
    for checkpointing in (False, True):
        model = modern(dropout=dropout, **changes).train()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        loss = model(x, y)[1]
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_loss_under_autocast_is_that_in_float32_within_the_rounding_of_bfloat16():
    model = modern().train()
    x, y = tokens(2, 3, 24)
    exact = model(x, y)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, y)[1]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01) and loss != exact


@pytest.mark.skipif(
    compiler_problem(torch.device("cpu")) is not None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_it_computes_the_same():
    model = modern(n_layer=1, **VALUES).train()
    x, y = tokens(2, 3, 24)
    expected = model(x, y)[1]
    expected.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss = torch.compile(model)(x, y)[1]
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_a_small_model_learns_by_heart_with_its_optimizer_and_no_warmup():
    torch.manual_seed(0)
    model = Modern(ModernConfig(**SIZES | {"n_layer": 1}))
    optimizer = make_optimizer(
        model, name="muon", learning_rate=0.025, weight_decay=0.05, betas=(0.8, 0.95)
    )
    x, y = tokens(2, 4, 24)
    for _ in range(30):
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5
