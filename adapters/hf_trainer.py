"""Train GPT-2 with transformers.Trainer, on shards or on raw text.

    $ python -m adapters.hf_trainer --data_dir data/input --max_iters 2000 --warmup_iters 100
    $ python -m adapters.hf_trainer --text input.txt --block_size 128 --max_iters 500
    $ torchrun --nproc_per_node=8 -m adapters.hf_trainer ...

On shards: the windows, order, schedule and first weights of train_gpt2.py, so the losses are the
same. On raw text: the Hugging Face course's way, chunks of --block_size tokens cut from each
document, in random order. In --out_dir: checkpoint-N at each evaluation, metrics.jsonl for `python
-m pretrain.report`, and the trained model with its tokenizer, which transformers, `hellaswag.py
--model` and `python -m adapters.huggingface` read. The same command again continues the run.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapters.arguments import answer_at_once, hf_trainer_flags

if __name__ == "__main__":  # before the frameworks are loaded
    answer_at_once("hf_trainer", __doc__, "out-trainer", hf_trainer_flags)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import default_collate

from adapters import common, states
from adapters.hf_tokenizer import build_tokenizer
from model import GPT
from pretrain import files
from pretrain.distributed import environment, pick_dtype
from pretrain.report.runlog import RunLog
from pretrain.tokens.tokenizer import END_OF_TEXT
from pretrain.train.keytokens import key_token_weights, load_key_tokens

common.require_for(__name__, "transformers", "accelerate", "datasets")
from transformers import (  # noqa: E402  (after the check that they are there)
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

# What Trainer saves of a run, its own state last.
NEEDED = (
    *("config.json", "model*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth"),
    "trainer_state.json",
)


class GPT2Trainer(Trainer):
    """Trainer with train_gpt2.py's schedule, perplexity in evaluations, and losses weighted by key
    tokens.

    schedule: share of the learning rate at each update; None for
    TrainingArguments.lr_scheduler_type. key_tokens: int64 ids as for pretrain.train.keytokens; None
    for the plain loss.
    """

    def __init__(
        self,
        *args,
        schedule: Callable[[int], float] | None = None,
        key_tokens: Tensor | None = None,
        key_token_alpha: float = 1.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.schedule, self.key_tokens, self.key_token_alpha = schedule, key_tokens, key_token_alpha
        self.described: dict[str, Any] = {}  # of what run its checkpoints are
        # So the logged loss is the mean of the micro-batches' means, whoever computes it. Otherwise
        # releases of Trainer divide by a count of labels that includes the first (a factor of (T -
        # 1) / T), and the loss of a compute_loss like ours is not divided by the number of
        # micro-batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The model's loss; in training with key tokens, that of pretrain.train.keytokens.
        Evaluations are never weighted, so that eval_loss stays in nats per token."""
        if self.key_tokens is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, targets = inputs["labels"], inputs.get("shift_labels")
        if targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
        losses = F.cross_entropy(
            outputs.logits.float().transpose(1, 2), targets, reduction="none"
        )  # (B, T)
        means = losses.sum(dim=1) / (targets != -100).sum(dim=1)
        loss = (
            key_token_weights(inputs["input_ids"], self.key_tokens, self.key_token_alpha) * means
        ).mean()
        return (loss, outputs) if return_outputs else loss

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ):
        if self.schedule is not None and self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None  # it is created before its scheduler
            self.lr_scheduler = LambdaLR(optimizer, self.schedule)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer does; but what lies in the run's own folder is replaced file by file once all
        of it is written, so that a full disk or a kill leaves the files of before."""
        if output_dir is not None and Path(output_dir) != Path(str(self.args.output_dir)):
            super().save_model(output_dir, _internal_call)
            return
        temporary = Path(str(self.args.output_dir)) / ".saving"
        try:
            super().save_model(str(temporary), _internal_call=True)
            if self.args.should_save:
                files.sync_tree(temporary)
                for file in sorted(temporary.iterdir()):
                    files.publish(file, Path(str(self.args.output_dir)) / file.name)
        finally:
            if self.args.should_save:
                shutil.rmtree(temporary, ignore_errors=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700))
        super().log(logs, *args, **kwargs)


class RunCallback(TrainerCallback):
    """Metrics as lines of the metrics.jsonl that train_gpt2.py writes; in each checkpoint, what run
    it is of."""

    def __init__(self, log: RunLog, tokens_per_step: int, described: dict[str, Any]):
        self.log, self.tokens_per_step, self.described = log, tokens_per_step, described

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        values = {name: logs.get(name) for name in ("loss", "learning_rate", "grad_norm")}
        values["val_loss"] = logs.get("eval_loss")
        if state.is_world_process_zero and {"loss", "eval_loss"} & set(logs):
            common.log_metrics(
                self.log, state.global_step, state.global_step * self.tokens_per_step, values
            )

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            files.write_json(folder / states.RUN, self.described)
            files.sync_tree(folder)


class ChunkCollator(DataCollatorForLanguageModeling):
    """Labels are the inputs wherever there is a token.

    GPT-2 has no pad token, so end-of-text serves; the collator of transformers then ignores every
    end-of-text as if it were padding, and the model never learns to end. The attention mask tells
    the two apart.
    """

    def torch_call(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        batch = super().torch_call(list(examples))
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = -100
        return {**batch, "labels": labels}


def collate_windows(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch for GPT2LMHeadModel, which would shift `labels` once more if `shift_labels` were not
    there."""
    batch = default_collate(samples)
    return {**batch, "shift_labels": batch["labels"]}


def to_transformers(model: GPT) -> GPT2LMHeadModel:
    """The same function with the same weights."""
    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        embd_pdrop=c.dropout,
        attn_pdrop=c.dropout,
        resid_pdrop=c.dropout,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
    )
    theirs = GPT2LMHeadModel(config)
    theirs.loss_type = "ForCausalLM"
    theirs.load_state_dict(model.huggingface_state_dict())
    return theirs


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    device = common.device(args)
    dtype = pick_dtype(args.dtype, device)
    interval = args.eval_interval or args.max_iters
    return TrainingArguments(
        output_dir=args.out_dir,
        max_steps=args.max_iters,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine" if args.lr_scheduler == "train_gpt2" else args.lr_scheduler,
        warmup_steps=args.warmup_iters,
        weight_decay=args.weight_decay,  # of matrices: Trainer leaves out biases and norms
        adam_beta1=args.beta1,
        adam_beta2=args.beta2,
        max_grad_norm=args.grad_clip,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        activation_checkpointing=args.gradient_checkpointing,
        eval_strategy="steps" if args.eval_interval else "no",
        eval_steps=interval,
        prediction_loss_only=True,  # otherwise it keeps the logits of the whole validation set
        save_steps=interval,
        save_total_limit=3,
        metric_for_best_model="eval_loss" if args.eval_interval else None,  # its checkpoint is kept
        greater_is_better=False,
        logging_steps=args.log_interval,
        logging_nan_inf_filter=False,  # a loss that is not a number should be seen
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        # Windows come in training order already.
        train_sampling_strategy="random" if args.text and args.shuffle else "sequential",
        remove_unused_columns=False,  # it does not know shift_labels
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        seed=args.seed,
        push_to_hub=bool(args.push_to_hub),
        hub_model_id=args.push_to_hub,
        hub_strategy="end",
    )


def build_trainer(args: argparse.Namespace, given: set[str]) -> GPT2Trainer:
    """A Trainer for these flags, not yet started. Raises AdapterError and what rooms raise."""
    key_tokens = load_key_tokens(args.key_tokens) if args.key_tokens else None
    arguments = training_arguments(args)
    refuse_data_parallel(arguments.n_gpu)
    ours, block_size = common.build_model(args, given)
    if not ours.config.bias:
        raise common.AdapterError("--no-bias: transformers' GPT-2 has biases, and would train them")
    tokenizer = build_tokenizer(ours.config.block_size)
    if args.text:
        train, val = text_data(args, tokenizer, block_size)
        tokenizer.pad_token = tokenizer.eos_token
        collate: Callable[..., Any] = ChunkCollator(tokenizer, mlm=False)
    else:
        train, val = shard_data(args, block_size, ours.config.vocab_size)
        collate = collate_windows
    described = common.describe_run(args, ours, block_size, environment("WORLD_SIZE", 1))
    tokens_per_step = described["sequences_per_update"] * block_size
    trainer = GPT2Trainer(
        to_transformers(ours),
        arguments,
        train_dataset=train,
        eval_dataset=val,
        data_collator=collate,
        processing_class=tokenizer,
        key_tokens=key_tokens,
        key_token_alpha=args.key_token_alpha,
        schedule=common.schedule(args) if args.lr_scheduler == "train_gpt2" else None,
        callbacks=[RunCallback(RunLog(args.out_dir), tokens_per_step, described)],
    )
    trainer.described = described
    return trainer


def refuse_data_parallel(gpus: int) -> None:
    """Trainer in one process with several GPUs wraps the model in DataParallel: each update would
    have the batch of each GPU, and the data be over that many times sooner. Raises AdapterError."""
    if gpus > 1:
        raise common.AdapterError(
            f"{gpus} GPUs and one process would multiply the batch by {gpus}: start `torchrun"
            f" --nproc_per_node={gpus} -m adapters.hf_trainer ...`, or choose one GPU with"
            " CUDA_VISIBLE_DEVICES=0"
        )


def text_data(args: argparse.Namespace, tokenizer: Any, block_size: int) -> tuple[Any, Any]:
    """Chunks of --text to train on, and those of an evaluation."""
    texts = common.load_text(args.text, args.text_column)
    train, val = common.split_chunks(common.text_chunks(texts, tokenizer, block_size))
    return train, val.select(range(min(len(val), args.eval_iters * args.batch_size)))


def shard_data(args: argparse.Namespace, block_size: int, vocab_size: int) -> tuple[Any, Any]:
    """Windows of --data_dir for the whole run, and those of an evaluation (None without one)."""
    processes = environment("WORLD_SIZE", 1)
    train = common.shard_windows(
        args.data_dir,
        "train",
        block_size=block_size,
        seed=args.seed,
        shuffle=args.shuffle,
        length=args.max_iters * args.batch_size * args.gradient_accumulation_steps * processes,
        vocab_size=vocab_size,
    )
    if not args.eval_interval:
        return train, None
    length = args.eval_iters * args.batch_size
    return train, common.shard_windows(args.data_dir, "val", block_size=block_size, length=length)


def saved_checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoint-N folders, highest N first."""
    found = [path for path in out_dir.glob("*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def train(args: argparse.Namespace, given: set[str]) -> None:
    """The run that the flags describe."""
    trainer, out_dir = build_trainer(args, given), Path(args.out_dir)
    state = states.newest_in(out_dir, saved_checkpoints(out_dir), NEEDED)
    if state:
        config = json.loads((state / "config.json").read_text(encoding="utf-8"))
        states.refuse_other_run(state, states.saved_run(state) or config, trainer.described)
    trainer.train(resume_from_checkpoint=str(state) if state else None)
    trainer.save_model()
    trainer.save_state()


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(
        "hf_trainer",
        argv,
        train,
        description=__doc__,
        out_dir="out-trainer",
        add_flags=hf_trainer_flags,
    )


if __name__ == "__main__":
    sys.exit(main())
