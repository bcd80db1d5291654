"""What is known of how a model was trained, as a record beside its weights and as a model card for
the hub.

Paths of this machine stay here: of the flags, the record keeps numbers, switches and plain words.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pretrain.report.known import dataset_of, title
from pretrain.report.runs import Run, RunError, task_results
from pretrain.tokens.shards import Manifest, ShardError
from pretrain.train.mixture import read_mixture

if TYPE_CHECKING:
    from model import GPT

RECORD = "training.json"
EVALUATION = (
    "step",
    "tokens",
    "train_loss",
    "val_loss",
    "perplexity",
    "bits_per_byte",
    "accuracy",
)
SETUP = (
    "tokens_per_step",
    "processes",
    "device",
    "dtype",
    "compiled",
    "versions.python",
    "versions.torch",
)
SOURCE = ("dataset", "config", "split", "commit")
SHOWN_EVALUATIONS = 8
# Flags that are left out: the model's sizes, which config.json has, and what does not bear on the
# weights.
LEFT_OUT = (
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "total_batch_tokens",
    "device",
    "dtype",
    "compile",
    "init_from",
    "resume",
    "eval_only",
    "log_interval",
    "keep_checkpoints",
    "checkpoint_interval",
    "checkpoint_minutes",
)


def training_record(model: "GPT", checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the checkpoint at `path`, the log beside it and the manifest of its shards tell, ready
    for JSON.

    Log and manifest are optional; evaluations after the checkpoint's step are left out.
    """
    flags = checkpoint.get("config") or {}
    step = checkpoint.get("step")
    try:
        run = Run.load(path.parent)
    except RunError:
        run = None
    evaluations: list[dict[str, int | float]] = []
    tasks: dict[str, dict[str, dict[str, int | float]]] = {}  # by task and style
    if run and step is not None:
        evaluations = [_only(record, EVALUATION) for record in run.evals if record["step"] <= step]
        for (task, style), results in task_results(run).items():
            for at, result in results:
                if at <= step:
                    numbers = _only(result, ("acc", "acc_norm", "n"))
                    tasks.setdefault(task, {})[style] = {"step": at, **numbers}
    return {
        "format": 1,
        "parameters": model.num_parameters(),
        **_only(checkpoint, ("step", "tokens", "loss", "val_loss", "learning_rate")),
        **_origin(flags.get("data_dir")),
        "from_scratch": flags.get("init_from", "scratch") == "scratch",
        "flags": {key: value for key, value in flags.items() if _is_plain(key, value)},
        "setup": {key: run.config[key] for key in SETUP if run and key in run.config},
        "evaluations": evaluations,
        "tasks": tasks,
    }


def _only(record: dict[str, Any], keys: tuple[str, ...]) -> dict[str, int | float]:
    """The finite numbers among these fields."""
    found = {key: record.get(key) for key in keys}
    return {k: v for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def _is_plain(key: str, value: Any) -> bool:
    """A number, a switch or a word that bears on the weights, and tells nothing of this machine's
    folders."""
    if key in LEFT_OUT:
        return False
    if isinstance(value, str):
        return (
            bool(value)
            and not set(value) & set("/\\")
            and not key.endswith(("_dir", "_data", "_file"))
        )
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))


def _origin(data_dir: str | list[str] | None) -> dict[str, Any]:
    """ "data" of a run on one folder; of a mixture "sources", with the data of each and its weight
    from given steps on."""
    if not isinstance(data_dir, list):
        return {"data": _data(data_dir)}
    sources, _ = read_mixture(data_dir)
    return {
        "sources": {
            source.name: {
                "weights": {str(step): float(weight) for step, weight in source.weights},
                "data": _data(source.folder),
            }
            for source in sources
        }
    }


def _data(folder: str | None) -> dict[str, Any] | None:
    """Where the tokens in a folder of shards came from; None where there is no manifest to tell."""
    try:
        manifest = Manifest.load(folder) if folder else None
    except ShardError:
        return None
    if manifest is None:
        return None
    source = {key: manifest.source[key] for key in SOURCE if key in manifest.source}
    if not source:
        source = {"files": [Path(file["path"]).name for file in manifest.source.get("files", [])]}
    return {
        "name": manifest.name,
        **source,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
    }


def model_card(folder: Path, repo_id: str) -> str:
    """README.md for the hub, from config.json and, where the folder has it, the training record."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    record = {}
    if (folder / RECORD).is_file():
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    parts = [
        f"---\n{_metadata(record, repo_id)}\n---",
        f"# {PurePosixPath(repo_id).name}",
        _summary(config, record),
        f"## Use\n\n{_usage(repo_id)}",
    ]
    if data := record.get("data"):
        parts.append(f"## Data\n\n{_table(['', ''], _data_rows(data))}")
    if sources := record.get("sources"):
        header = ["source", "weight", "documents from", "tokens there"]
        parts.append(f"## Data\n\n{_table(header, _source_rows(sources))}")
    if record.get("evaluations") or _tasks(record):
        parts.append(f"## Evaluation\n\n{_evaluation(record)}")
    parts.append(
        f"## Configuration\n\n{_table(['setting', 'value'], _configuration_rows(config, record))}"
    )
    return "\n\n".join(parts) + "\n"


def _tasks(record: dict[str, Any]) -> dict[str, dict[str, dict[str, int | float]]]:
    """{task: {style: numbers}}; the records of version 0.1 know HellaSwag alone."""
    earlier = record.get("hellaswag")
    return record.get("tasks") or ({"hellaswag": earlier} if earlier else {})


def _metadata(record: dict[str, Any], repo_id: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    origins = [record, *record.get("sources", {}).values()]
    datasets = [(origin.get("data") or {}).get("dataset") for origin in origins]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_of(task),
            dataset_name=title(task),
            dataset_split="validation",
            metric_type=metric,
            metric_name=f"{metric} ({style} style, {result.get('n', '?')} examples)",
            metric_value=result[metric],
        )
        for task, styles in _tasks(record).items()
        for style, result in styles.items()
        for metric in ("acc", "acc_norm")
        if metric in result
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2"],
        datasets=sorted(filter(None, {*datasets})) or None,
        model_name=PurePosixPath(repo_id).name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _summary(config: dict[str, Any], record: dict[str, Any]) -> str:
    size = (
        f" with {record['parameters'] / 1e6:,.1f} million parameters"
        if "parameters" in record
        else ""
    )
    sizes = f"{config['n_layer']} layers, {config['n_head']} heads, width {config['n_embd']}"
    text = [
        f"A language model of the GPT-2 architecture{size}: {sizes}, context"
        f" {config['n_positions']}, with GPT-2's tokenizer."
    ]
    if record.get("tokens") and "step" in record:
        reached = (
            f" and reached a validation loss of {record['val_loss']:.4f}"
            if "val_loss" in record
            else ""
        )
        text.append(
            f"It was trained on {record['tokens']:,} tokens in {record['step']:,} steps{reached}."
        )
        if not record.get("from_scratch", True):
            text.append(
                "Training did not begin from scratch but with the weights of another model."
            )
    text.append(
        "It continues texts; it was not tuned to follow instructions, and can be wrong or"
        " offensive."
    )
    return " ".join(text)


def _usage(repo_id: str) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50, do_sample=True, top_k=50)[0]))
```

`<|endoftext|>` in a text is read as these characters; the token that begins and ends documents is
`tokenizer.eos_token_id`."""


def _data_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(key, str(data[key])) for key in SOURCE if data.get(key)]
    if files := data.get("files"):
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        rows.append(("files", ", ".join(files[:5]) + more))
    return [*rows, ("documents", f"{data['documents']:,}"), ("tokens", f"{data['tokens']:,}")]


def _source_rows(sources: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, source in sources.items():
        (_, first), *later = source["weights"].items()
        weight = f"{first:g}" + "".join(f", {w:g} from step {int(s):,}" for s, w in later)
        found = dict(_data_rows(source["data"])) if source["data"] else {}
        tokens = found.pop("tokens", "")
        found.pop("documents", None)
        rows.append((name, weight, " ".join(found.values()), tokens))
    return rows


def _evaluation(record: dict[str, Any]) -> str:
    tables = []
    shown = record.get("evaluations", [])
    if len(shown) > SHOWN_EVALUATIONS:  # spread over the run, the last one among them
        last = len(shown) - 1
        shown = [shown[round(i * last / (SHOWN_EVALUATIONS - 1))] for i in range(SHOWN_EVALUATIONS)]
    if shown:
        columns = [key for key in EVALUATION if any(key in row for row in shown)]
        rows = [_cells(row, columns) for row in shown]
        tables.append(_table([column.replace("_", " ") for column in columns], rows))
    for task, results in _tasks(record).items():
        shown_of = ("step", "n", "acc", "acc_norm")
        rows = [[style, *_cells(result, shown_of)] for style, result in results.items()]
        tables.append(
            _table([f"{title(task)}, style", "step", "examples", "acc", "acc norm"], rows)
        )
    return "\n\n".join(tables)


def _configuration_rows(config: dict[str, Any], record: dict[str, Any]) -> list[tuple[str, str]]:
    sizes = {
        key: config[key] for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    }
    settings = {**record.get("flags", {}), **record.get("setup", {})}
    return [(f"`{key}`", str(value)) for key, value in {**sizes, **settings}.items()]


def _cells(row: dict[str, int | float], columns: Sequence[str]) -> list[str]:
    values = [row.get(column, "") for column in columns]
    return [
        f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if value != "" else ""
        for value in values
    ]


def _table(header: list[str], rows: list) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
