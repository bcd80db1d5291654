"""Does the hardware compute what the tests on a CPU promise? Each check returns what it measured
and raises AssertionError with both numbers where they are too far apart, Skipped where the machine
lacks something.

    CHECKS["resume"](place, folder)      # "12 updates in one go and in two: weights within 0.0e+00"
"""

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from model import GPT, GPTConfig
from pretrain import distributed
from pretrain.distributed import Ranks
from pretrain.errors import UserError
from pretrain.eval.hellaswag import STYLES, Example, load_examples, prompt
from pretrain.eval.scoring import score_examples
from pretrain.hardware import compiler_problem
from pretrain.tokens.shards import find_shards
from pretrain.tokens.tokenizer import load_encoding
from pretrain.train.loader import ShardLoader
from pretrain.train.optim import make_optimizer
from pretrain.train.speed import KERNELS, attention
from pretrain.train.stopping import FiniteGuard, NotFinite

from .variants import Place


class Skipped(Exception):
    """What a machine lacks, by name."""


def tiny(place: Place, **changes: Any) -> GPT:
    """A model that any GPU holds, always with the same weights, on the device."""
    sizes = {"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}
    if place.small:
        sizes = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
    torch.manual_seed(7)
    return GPT(GPTConfig(**sizes | changes)).train().to(place.device)


def batches(place: Place, block_size: int) -> ShardLoader:
    return ShardLoader(
        find_shards(place.pack.shards, "train"),
        batch_size=4 if place.small else 16,
        block_size=block_size,
        accumulation_steps=1,
    )


def first_batch(place: Place, model: GPT) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = batches(place, model.config.block_size).batch(0)
    return x[0].to(place.device), y[0].to(place.device)


def losses_of(
    place: Place,
    dtype: torch.dtype,
    steps: int,
    compiler: Callable | None = None,
    attributes: dict[str, Any] | None = None,
) -> list[float]:
    """Losses of so many updates of the tiny model."""
    model = tiny(place)
    for name, value in (attributes or {}).items():
        setattr(model, name, value)
    optimizer = make_optimizer(model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(place.device.type, enabled=dtype == torch.float16)
    loader = batches(place, model.config.block_size)
    forward = compiler(model) if compiler else model
    found = []
    for number in range(steps):
        x, y = (part[0].to(place.device) for part in loader.batch(number))
        with torch.autocast(place.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = forward(x, y)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def apart(a: list[float], b: list[float]) -> float:
    """The largest distance of two curves; infinite where one is not finite."""
    distances = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return max(distances) if all(map(math.isfinite, distances)) else math.inf


def agree(what: str, distance: float, limit: float) -> str:
    assert distance <= limit, f"{what}: {distance:.2e} apart, at most {limit:.0e} expected"
    return f"{what}: {distance:.1e} apart (limit {limit:.0e})"


# ---- the checks


def check_formats(place: Place, folder: Path) -> str:
    """Losses in bfloat16 and float16 against float32."""
    steps = 3 if place.small else 20
    exact = losses_of(place, torch.float32, steps)
    assert exact[-1] < exact[0], f"the loss does not fall: {exact[0]:.4f} to {exact[-1]:.4f}"
    found = [f"{steps} updates in float32: {exact[0]:.4f} to {exact[-1]:.4f}"]
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        found.append(agree(name, apart(losses_of(place, dtype, steps), exact), 0.05))
    return "; ".join(found)


def check_compile(place: Place, folder: Path) -> str:
    """Compiled losses against those that are not."""
    backend = "eager" if place.small else "inductor"
    if not place.small and (problem := compiler_problem(place.device)):
        raise Skipped(problem)
    steps = 2 if place.small else 6
    found = []
    for dtype, limit in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
        usual = losses_of(place, dtype, steps)
        torch._dynamo.reset()
        compiled = losses_of(
            place, dtype, steps, compiler=lambda what: torch.compile(what, backend=backend)
        )
        found.append(agree(str(dtype).removeprefix("torch."), apart(usual, compiled), limit))
        if place.small:
            break
    return "; ".join(found)


def check_switches(place: Place, folder: Path) -> str:
    """--bfloat16_residual and --head_rows against neither."""
    steps = 2 if place.small else 10
    usual = losses_of(place, torch.bfloat16, steps)
    found = []
    for attributes in ({"residual_dtype": torch.bfloat16}, {"head_rows": 1024}):
        name = next(iter(attributes))
        changed = losses_of(place, torch.bfloat16, steps, attributes=attributes)
        found.append(agree(name, apart(usual, changed), 0.03))
    return "; ".join(found)


def check_attention(place: Place, folder: Path) -> str:
    """Each --attention against the exact formula, outputs and gradients, in bfloat16."""
    torch.manual_seed(0)
    shape = (3, 2, 2, 32, 16) if place.small else (3, 4, 12, 1024, 64)
    q, k, v = torch.randn(shape, device=place.device, dtype=torch.bfloat16)

    def run(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        query = q.clone().requires_grad_()
        with attention(name, place.device):
            kernel[name] = SDPBackend(torch._fused_sdp_choice(query, k, v, is_causal=True)).name
            y = F.scaled_dot_product_attention(query, k, v, is_causal=True)
            y.float().square().sum().backward()
        return y.detach().float(), query.grad.float()

    kernel: dict[str, str] = {}  # the one that torch takes then
    exact, found = run("math"), []
    for name in ("auto", *KERNELS, "flash3", "flash4"):
        try:
            ours = run(name)
        except UserError as error:
            found.append(f"skipped: {error}")
            continue
        for a, b in zip(ours, exact, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            assert error < 0.02, f"{name}: relative error {error:.2e}"
        found.append(f"{name}: {kernel[name]}, relative error of the gradient {error:.1e}")
    return "; ".join(found)


def check_resume(place: Place, folder: Path) -> str:
    """A run of train_gpt2.py in two parts against one in one."""
    import train_gpt2

    sizes = (1, 2, 16, 32) if place.small else (2, 4, 128, 128)
    names = ("n_layer", "n_head", "n_embd", "block_size")
    numbers = dict(zip(names, sizes, strict=True)) | {"batch_size": 2, "log_interval": 1}
    last = 4 if place.small else 8
    numbers |= {"eval_interval": 0, "lr_decay_iters": last, "warmup_iters": 2}
    numbers |= {"gradient_accumulation_steps": 2}
    words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    words += ["--data_dir", str(place.pack.shards), "--device", place.device.type]
    words += ["--no-compile", "--no-hellaswag", "--dropout", "0.1", "--verify_data", "False"]
    whole, parts = folder / "whole", folder / "parts"
    for out_dir in (whole, parts):
        shutil.rmtree(out_dir, ignore_errors=True)
    for out_dir, until in ((whole, last), (parts, last // 2), (parts, last)):
        status = train_gpt2.main([*words, "--out_dir", str(out_dir), "--max_iters", str(until)])
        assert status == 0, f"train_gpt2.py ended with status {status}"
    models = [
        torch.load(out_dir / "final_model.pt", weights_only=True)["model"]
        for out_dir in (whole, parts)
    ]
    # Of the blocks alone: most rows of the embedding have not moved. The root of the mean square,
    # since AdamW makes a whole step of a gradient that is nothing but rounding.
    both = zip(*(m.items() for m in models), strict=True)
    errors = [a - b for (name, a), (_, b) in both if ".h." in name]
    distance = torch.cat([error.flatten() for error in errors]).square().mean().sqrt().item()
    # Exact on a CPU. Some kernels of a GPU add in an order that changes from run to run; with other
    # batches, or other dropout, in the second half it would be 2e-3.
    limit = 0.0 if place.device.type == "cpu" else 3e-4
    return agree(f"weights after {last} updates in one go, and in two", distance, limit)


def check_guard(place: Place, folder: Path) -> str:
    """A nan put into the loss, and one into a gradient: no weight learns of it."""
    ranks, found = Ranks(0, 1, place.device), []
    for where in ("loss", "gradient"):
        model = tiny(place)
        before = copy.deepcopy(model.state_dict())
        optimizer = make_optimizer(model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
        scaler = torch.amp.GradScaler(place.device.type, enabled=False)
        guard = FiniteGuard(ranks, scaler)
        x, y = (
            part[0].to(place.device) for part in batches(place, model.config.block_size).batch(0)
        )
        loss = model(x, y)[1] * (math.nan if where == "loss" else 1.0)
        (loss * guard.loss_weight(loss, 1)).backward()
        if where == "gradient":
            model.transformer.wpe.weight.grad[3, 1] = math.nan
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        try:
            guard.check(0, loss.detach(), norm)
            optimizer.step()
        except NotFinite:
            found.append(f"a nan in the {where} is refused before the update")
        else:
            raise AssertionError(f"a nan in the {where} went into the weights")
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
    return "; ".join(found)


def check_hellaswag(place: Place, folder: Path) -> str:
    """Both styles against a loop over one ending at a time, in float32."""
    if place.pack.items is None:
        raise Skipped("no HellaSwag items in the folder of --data")
    examples = load_examples(place.pack.items, 3 if place.small else 60)
    # Contexts of a hundred tokens have to fit.
    model = tiny(place, block_size=512).eval()
    found = []
    for style in STYLES:
        result = score_examples(model, examples, style=style, dtype=torch.float32)
        assert result is not None
        plain = torch.tensor([one_at_a_time(model, example, style) for example in examples])
        distance = (torch.from_numpy(result.losses) - plain).abs().max().item()
        found.append(agree(f"{style}, summed losses of {len(examples)}", distance, 0.05))
    return "; ".join(found)


@torch.no_grad()
def one_at_a_time(model: GPT, example: Example, style: str) -> list[float]:
    """Summed losses of the four endings, by the shortest code there is."""
    encoding, found = load_encoding(), []
    text, endings = prompt(example, style)
    for ending in endings:
        if style == "completion":
            context = encoding.encode_ordinary(text)
            tokens = encoding.encode_ordinary(" " + ending)
        else:  # tokenized together, and cut behind the context without its last spaces
            context = encoding.encode_ordinary(text.rstrip())
            tokens = encoding.encode_ordinary(f"{text} {ending}")[len(context) :]
        ids = torch.tensor([context + tokens], device=model.device)
        logits = model(ids[:, :-1])[0][0].float()
        losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        found.append(losses[-len(tokens) :].sum().item())
    return found


def check_generate(place: Place, folder: Path) -> str:
    """Greedy text with the cache of keys and values against recomputing everything."""
    model = tiny(place).eval()
    count = 8 if place.small else 64
    torch.manual_seed(1)
    prompt = torch.randint(50257, (2, 8), device=place.device)
    ours = model.generate(prompt, count, temperature=0)
    tokens = prompt
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat((tokens, model(tokens)[0][:, -1].argmax(1)[:, None]), dim=1)
    same = (ours == tokens).float().mean().item()
    assert same == 1.0, f"{same:.1%} of the tokens agree"
    return f"{count} tokens after each of 2 prompts: all the same"


def check_compiled_evaluation(place: Place, folder: Path) -> str:
    """--compile_eval against the usual evaluation."""
    if not place.small and (problem := compiler_problem(place.device)):
        raise Skipped(problem)
    model = tiny(place).eval()
    backend = "eager" if place.small else "inductor"
    score = torch.compile(model.score, backend=backend)
    x, y = first_batch(place, model)
    with torch.autocast(place.device.type, dtype=torch.bfloat16):
        usual, compiled = model.score(x, y), score(x, y)
    distributed.synchronize(place.device)
    distance = abs(usual[0].item() - compiled[0].item()) / usual[2].item()
    return agree("loss per token", distance, 5e-3)


CHECKS: dict[str, Callable[[Place, Path], str]] = {
    "bfloat16 and float16": check_formats,
    "compiled": check_compile,
    "resume": check_resume,
    "FiniteGuard": check_guard,
    "HellaSwag": check_hellaswag,
    "generate": check_generate,
    "attention": check_attention,
    "residual and head_rows": check_switches,
    "compiled evaluation": check_compiled_evaluation,
}
