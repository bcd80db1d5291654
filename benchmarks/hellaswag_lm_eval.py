"""hellaswag.py --style lm-eval, and adapters/lm_eval.py, beside EleutherAI's
lm-evaluation-harness with its own model, example by example.

That model needs an environment of its own, so that its versions of other packages leave this one
alone:

    $ python -m venv lm_eval_env && lm_eval_env/bin/pip install 'lm_eval[hf]'
    $ python benchmarks/hellaswag_lm_eval.py --harness lm_eval_env/bin/python
    218 examples, lm_eval 0.4.13
    acc       0.2339 and 0.2339
    acc_norm  0.2339 and 0.2339
    summed log-likelihoods differ by at most 8.9e-05 nats
    equal
    then the same for adapters/lm_eval.py, and the seconds of both

A model (random with large weights, or --checkpoint) is exported to a Hugging Face folder. The
harness runs its own task hellaswag on it, with a local file in the place of the data set. The
network is used to download that file at most, if --data names none. Exit status 1 if any pick or
accuracy differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

BUNDLED = ROOT / "tests" / "data" / "hellaswag_items.jsonl"  # which has WikiHow's marks
TASK = """include: {task}
task: hellaswag_here
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
training_split: null
"""


def write_examples(source: Path, limit: int, path: Path) -> None:
    """`limit` examples of the source and the bundled ones, all with ctx_a and ctx_b, which the
    harness needs. Where the source has only the whole context, its last sentence is ctx_b."""
    from hellaswag import load_examples

    with open(path, "w", encoding="utf-8") as file:
        for example in [*load_examples(source, limit), *load_examples(BUNDLED)]:
            a, b = example.ctx_a, example.ctx_b
            if a is None or b is None:
                before, dot, b = example.ctx.rpartition(". ")
                a = before + dot.rstrip()
            texts = {"ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}", "label": str(example.label)}
            file.write(json.dumps(asdict(example) | texts) + "\n")


def random_checkpoint(path: Path) -> None:
    import torch

    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=64))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 8  # so that endings differ by whole nats
    torch.save({"model": model.state_dict(), "model_config": asdict(model.config)}, path)


def run_adapter(checkpoint: Path, work: Path) -> tuple[dict, list[dict], float]:
    """The same of the harness with adapters/harness_model.py as its model, in this process; its
    accuracies, samples, and seconds."""
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    from adapters.harness_model import CheckpointModel
    from model import load_checkpoint

    start = time.perf_counter()
    model, _ = load_checkpoint(checkpoint)
    report = lm_eval.simple_evaluate(
        CheckpointModel(model, device=torch.device("cpu"), dtype=torch.float32),
        tasks=["hellaswag_here"],
        task_manager=TaskManager(include_path=str(work / "tasks")),
        log_samples=True,
    )
    seconds = time.perf_counter() - start
    samples = sorted(report["samples"]["hellaswag_here"], key=lambda sample: sample["doc_id"])
    return report["results"]["hellaswag_here"], samples, seconds


def sums_of(samples: list[dict]) -> np.ndarray:
    """float64 (examples, endings), the summed log-likelihoods."""
    responses = [[float(one[0]) for one in sample["filtered_resps"]] for sample in samples]
    return np.array(responses)


def run_harness(python: str, folder: Path, data: Path, work: Path) -> tuple[str, dict, list[dict]]:
    """Its version, its accuracies, and its samples in the order of the file; the accuracies have
    the "seconds" that it says it took."""
    import_it = (
        "import lm_eval, importlib.metadata as m; print(m.version('lm_eval'), lm_eval.__path__[0])"
    )
    version, package = subprocess.run(
        [python, "-c", import_it], capture_output=True, text=True, check=True
    ).stdout.split(maxsplit=1)
    task = Path(package.strip()) / "tasks" / "hellaswag" / "hellaswag.yaml"
    (work / "tasks").mkdir()
    (work / "tasks" / "hellaswag_here.yaml").write_text(TASK.format(task=task, data=data))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    subprocess.run(
        [
            python,
            "-m",
            "lm_eval",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={folder},dtype=float32",
            "--tasks",
            "hellaswag_here",
            "--include_path",
            work / "tasks",
            "--device",
            "cpu",
            "--batch_size",
            "16",
            "--output_path",
            work / "out",
            "--log_samples",
        ],
        env={**os.environ, **offline, "HF_HOME": str(work / "cache")},
        check=True,
        cwd=work,
    )
    (results,) = (work / "out").rglob("results_*.json")
    (samples,) = (work / "out").rglob("samples_*.jsonl")
    report = json.loads(results.read_text())
    accuracies = report["results"]["hellaswag_here"]
    accuracies["seconds"] = float(report["total_evaluation_time_seconds"])
    lines = map(json.loads, samples.read_text().splitlines())
    return version, accuracies, sorted(lines, key=lambda sample: sample["doc_id"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--harness",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter of the environment with lm_eval (default: this one)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="model to compare with (default: a small random one)"
    )
    parser.add_argument(
        "--data", type=Path, help="file of examples (default: val, downloaded if need be)"
    )
    parser.add_argument("--limit", type=int, default=200, help="examples of it (default: 200)")
    args = parser.parse_args(argv)

    from hellaswag import ensure_data, evaluate, load_examples
    from model import load_checkpoint
    from pretrain.eval.hellaswag import DataUnavailable

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        try:
            data = args.data or ensure_data()
        except DataUnavailable as error:
            print(f"{error}; or name a copy of it with --data", file=sys.stderr)
            return 1
        write_examples(data, args.limit, work / "examples.jsonl")
        checkpoint = args.checkpoint or work / "random.pt"
        if not args.checkpoint:
            random_checkpoint(checkpoint)
        export = [sys.executable, "-m", "adapters.huggingface", "export", checkpoint.resolve()]
        subprocess.run([*export, work / "model"], cwd=ROOT, check=True)
        version, theirs, samples = run_harness(
            os.path.abspath(args.harness), work / "model", work / "examples.jsonl", work
        )
        model, _ = load_checkpoint(checkpoint)
        ours = evaluate(model, load_examples(work / "examples.jsonl"), style="lm-eval")
        adapter, asked, seconds = run_adapter(checkpoint, work)

    print(f"{ours.n} examples, lm_eval {version}")
    equal = True
    for key in ("acc", "acc_norm"):
        print(f"{key:9} {getattr(ours, key):.4f} and {theirs[f'{key},none']:.4f}")
        hits = np.array([sample[key] for sample in samples])
        picks = ours.picks if key == "acc" else ours.picks_norm
        equal &= getattr(ours, key) == theirs[f"{key},none"] and bool(
            ((picks == ours.labels) == hits).all()
        )
    sums = sums_of(samples)
    print(f"summed log-likelihoods differ by at most {np.abs(sums + ours.losses).max():.1e} nats")
    for key in ("acc,none", "acc_norm,none"):
        equal &= adapter[key] == theirs[key]
    difference = np.abs(sums_of(asked) - sums).max()
    equal &= bool(difference < 1e-3)
    print(
        f"adapters/lm_eval.py: differ by at most {difference:.1e} nats; {seconds:.1f} s, the"
        f" harness's own model {theirs['seconds']:.1f} s, loading included"
    )
    print("equal" if equal else "NOT EQUAL")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
