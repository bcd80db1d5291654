"""Train GPT-2, or any causal language model of transformers, with Lightning.

    $ python -m adapters.lightning_module --data_dir data/input --max_iters 2000 --warmup_iters 100
    $ python -m adapters.lightning_module --text input.txt --model my-gpt2 --max_iters 500

    module = BabyGPT(GPT(GPTConfig()), learning_rate=6e-4)    # or BabyGPT("gpt2"), or a folder
    data = LLMDataModule("data/input", batch_size=8, block_size=1024, accumulation_steps=5)
    Trainer(max_steps=2000, max_epochs=-1, accumulate_grad_batches=5).fit(module, data)

On shards and with train_gpt2.py's flags the losses are train_gpt2.py's. In --out_dir: best.ckpt (of
the lowest val_loss), last.ckpt, from which the same command continues, metrics.jsonl for
`python -m pretrain.report`, and export, the best model for transformers and `hellaswag.py --model`.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from adapters.arguments import answer_at_once, lightning_flags

if __name__ == "__main__":  # before the frameworks are loaded
    answer_at_once("lightning_module", __doc__, "out-lightning", lightning_flags)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from adapters import common, huggingface, states
from adapters.hf_tokenizer import save_tokenizer
from model import GPT
from pretrain import weights
from pretrain.distributed import pick_dtype
from pretrain.errors import reason
from pretrain.report.runlog import RunLog
from pretrain.tokens.tokenizer import VOCAB_SIZE
from pretrain.train.optim import learning_rate as rate_at
from pretrain.train.optim import parameter_groups

common.require_for(__name__, "lightning", "transformers", "datasets")
from lightning.pytorch import LightningModule, Trainer  # noqa: E402  (it is there)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402
from lightning.pytorch.utilities import rank_zero_only  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from torchmetrics import MeanMetric  # noqa: E402  (it comes with Lightning)

from adapters.lightning_data import LLMDataModule  # noqa: E402

__all__ = ["BabyGPT", "LLMDataModule"]

BEST, LAST = "best.ckpt", "last.ckpt"

PRECISION: dict[torch.dtype, Any] = {
    torch.float32: "32-true",
    torch.bfloat16: "bf16-mixed",
    torch.float16: "16-mixed",
}


class BabyGPT(LightningModule):
    """A causal language model, AdamW that decays matrices only, and a cosine over the steps there
    really are.

    model: a GPT, or what AutoModelForCausalLM.from_pretrained takes (a name of the hub, a local
    folder). decay_steps: updates of warmup and cosine together; None for as many as the Trainer
    will make.
    """

    def __init__(
        self,
        model: GPT | nn.Module | str,
        *,
        learning_rate: float = 6e-4,
        min_lr: float | None = None,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        if isinstance(model, str):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model)
            model.train()  # from_pretrained leaves it in eval mode, without dropout
        self.model = cast(Any, model)
        if isinstance(model, GPT):
            model.gradient_checkpointing = gradient_checkpointing
        elif gradient_checkpointing:
            self.model.config.use_cache = False
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.step_loss = 0.0
        self.val_loss = MeanMetric()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """int64 (B, T) each, labels one token later -> mean loss, a scalar."""
        if isinstance(self.model, GPT):
            return self.model(input_ids, labels)[1]
        logits = self.model(input_ids=input_ids).logits  # (B, T, vocabulary)
        return F.cross_entropy(logits.float().transpose(1, 2), labels)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch)
        self.step_loss += loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the mean loss of all micro-batches of an update, not that of the last one alone."""
        self.log("train_loss", self.step_loss, prog_bar=True, sync_dist=True)
        self.log("learning_rate", optimizer.param_groups[0]["lr"])
        self.step_loss = 0.0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if isinstance(self.model, GPT):
            loss_sum, _, count = self.model.score(batch["input_ids"], batch["labels"])
            self.val_loss.update(loss_sum / count, count)
        else:
            self.val_loss.update(self(**batch), batch["labels"].numel())

    def on_validation_epoch_end(self) -> None:
        """Log val_loss and val_perplexity: of the mean over all tokens of all processes. What
        self.log() does with a loss in validation_step is right on one process; with several it
        divides by rounded counts."""
        loss = self.val_loss.compute()
        self.val_loss.reset()
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_perplexity", loss.exp(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        # Not fused: with mixed precision Lightning refuses to clip the gradients of a fused
        # optimizer.
        groups = parameter_groups(self.model, h.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=h.learning_rate, betas=h.betas)
        rate = partial(
            rate_at,
            max_lr=1.0,
            min_lr=(0.1 if h.min_lr is None else h.min_lr / h.learning_rate),
            warmup_iters=h.warmup_steps,
            lr_decay_iters=h.decay_steps or int(self.trainer.estimated_stepping_batches),
        )
        schedule = {
            "scheduler": LambdaLR(optimizer, rate),
            "interval": "step",
        }  # the default is "epoch"
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class SaveAtEnd(Callback):
    """A checkpoint of the last update, from which a longer run can go on. It is saved while fit()
    runs: one saved afterwards would count the update twice when it is resumed."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.path, weights_only=False)


class RunLogger(Logger):
    """Metrics as lines of the metrics.jsonl that train_gpt2.py writes, appended when a run is
    resumed."""

    name = version = ""

    def __init__(self, log: RunLog, tokens_per_step: int = 0):
        super().__init__()
        self.log, self.tokens_per_step = log, tokens_per_step

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The start event has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = (step or 0) + 1  # Lightning counts updates from 0
        common.log_metrics(
            self.log,
            step,
            step * self.tokens_per_step,
            {
                "loss": metrics.get("train_loss"),
                "learning_rate": metrics.get("learning_rate"),
                "val_loss": metrics.get("val_loss"),
            },
        )


def build_module(args: argparse.Namespace, given: set[str]) -> tuple[BabyGPT, int]:
    """The module, and the length of the windows to train it on. Raises AdapterError,
    CheckpointError."""
    if args.model:
        torch.manual_seed(args.seed)
        model: GPT | str = args.model
        block_size = args.block_size
    else:
        model, block_size = common.build_model(args, given)
    try:
        module = BabyGPT(
            model,
            learning_rate=args.learning_rate,
            min_lr=args.min_lr,
            warmup_steps=args.warmup_iters,
            decay_steps=args.lr_decay_iters,
            weight_decay=args.weight_decay,
            betas=(args.beta1, args.beta2),
            gradient_checkpointing=args.gradient_checkpointing,
        )
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if not args.model:
            raise
        raise common.AdapterError(f"{args.model}: {reason(error)}") from None
    config = module.model.config
    if args.model and (
        config.vocab_size < VOCAB_SIZE or config.max_position_embeddings < block_size
    ):
        raise common.AdapterError(
            f"{args.model} has {config.vocab_size} tokens and {config.max_position_embeddings}"
            f" positions; needed are GPT-2's {VOCAB_SIZE} tokens and --block_size {block_size}"
        )
    return module, block_size


def export(module: BabyGPT, folder: Path) -> None:
    """Write the module's model with a tokenizer, as transformers keeps them."""
    if isinstance(module.model, GPT):
        huggingface.export(module.model, folder, overwrite=True)
        return
    with huggingface.new_export(folder, overwrite=True) as temporary:
        module.model.save_pretrained(temporary)
        save_tokenizer(temporary, module.model.config.max_position_embeddings)


def make_trainer(args: argparse.Namespace, logger: RunLogger) -> tuple[Trainer, ModelCheckpoint]:
    """Lightning's Trainer for these flags, and its record of the best checkpoint."""
    device, out_dir = common.device(args), Path(args.out_dir)
    accumulation, interval = args.gradient_accumulation_steps, args.eval_interval or args.max_iters
    best = ModelCheckpoint(
        out_dir,
        "best",
        monitor="val_loss",
        mode="min",
        save_top_k=1,
        save_last=True,
        enable_version_counter=False,
    )
    trainer = Trainer(
        accelerator="cpu" if device.type == "cpu" else "auto",
        precision=PRECISION[pick_dtype(args.dtype, device)],
        max_steps=args.max_iters,
        max_epochs=-1,  # max_steps decides
        accumulate_grad_batches=accumulation,
        gradient_clip_val=args.grad_clip or None,
        val_check_interval=interval * accumulation,  # in batches, through all epochs
        check_val_every_n_epoch=None,
        limit_val_batches=None if args.eval_interval else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=args.log_interval,
        logger=logger,
        callbacks=[SaveAtEnd(out_dir / LAST), *[best] * (args.eval_interval > 0)],
        enable_checkpointing=args.eval_interval > 0,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    return trainer, best


def newest_checkpoint(out_dir: Path, run: dict[str, Any]) -> Path | None:
    """last.ckpt, or best.ckpt where that is damaged; None where there is neither. Raises
    StateError for checkpoints that are all damaged or of another run."""
    found = states.newest([p for p in (out_dir / LAST, out_dir / BEST) if p.exists()])
    if found:
        saved = weights.read(found)
        data = saved.get("LLMDataModule") if isinstance(saved, dict) else None
        states.refuse_other_run(found, data.get("run") if isinstance(data, dict) else None, run)
    return found


def train(args: argparse.Namespace, given: set[str]) -> None:
    """The run that the flags describe."""
    out_dir = Path(args.out_dir)
    module, block_size = build_module(args, given)
    data = LLMDataModule(
        None if args.text else args.data_dir,
        text=args.text or (),
        text_column=args.text_column,
        batch_size=args.batch_size,
        block_size=block_size,
        accumulation_steps=args.gradient_accumulation_steps,
        eval_batches=args.eval_iters,
        shuffle=args.shuffle,
        seed=args.seed,
    )
    log = RunLog(out_dir, enabled=getattr(rank_zero_only, "rank", 0) == 0)
    logger = RunLogger(log)
    trainer, best = make_trainer(args, logger)
    described = common.describe_run(args, module.model, block_size, trainer.world_size)
    logger.tokens_per_step = described["sequences_per_update"] * block_size
    # Lightning restores its place in batches of one process: they must be what they were.
    data.run = {
        **{name: getattr(args, name) for name in ("batch_size", "gradient_accumulation_steps")},
        **{"processes": trainer.world_size, **described},
    }
    last = newest_checkpoint(out_dir, data.run)
    log.write("start", resumed_from=last, flags=vars(args))
    trainer.fit(module, data, ckpt_path=last, weights_only=True)
    if trainer.is_global_zero:
        if best.best_model_path:
            load_best(module, Path(best.best_model_path))
        export(module, out_dir / "export")
    log.write("stop", step=trainer.global_step, reason="finished")


def load_best(module: BabyGPT, path: Path) -> None:
    """Give the module the weights of the best checkpoint; where that is damaged it keeps the
    last."""
    if states.newest([path, *path.parent.glob(LAST)]) == path:
        module.load_state_dict(weights.read(path)["state_dict"])


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(
        "lightning_module",
        argv,
        train,
        description=__doc__,
        out_dir="out-lightning",
        add_flags=lightning_flags,
    )


if __name__ == "__main__":
    sys.exit(main())
