"""The trainer of a stage that can't hurt the thinking: its adapters act on the key alone."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_utils import EvalLoopOutput

from sftkey.data.collator import row_lengths
from sftkey.data.labels import IGNORED
from sftkey.data.response import Segment
from sftkey.files import GIB, free_bytes
from sftkey.models.key_pass import act, context_adapters
from sftkey.recipe.stages import KeyAdapterSpec
from sftkey.recipe.upstream import size_bytes
from sftkey.training.context_cache import ContextCache, bytes_a_token
from sftkey.training.losses import token_losses
from sftkey.training.trainer import GroupedByLength, KeyTrainer
from sftkey.training.validating import key_starts, row_sums, segment_means

LOGGER = logging.getLogger("sftkey")
CONTEXTS_FOLDER = "contexts"  # beside the stage's checkpoints
FREE_SHARE = 0.2  # of the disk's free space, for `context_cache: auto`
WEIGHTS_FILE = "key_adapters.safetensors"  # of a checkpoint; the context's weights don't change


class SameBatches(Sampler[int]):
    """The rows of the same batches in each epoch, the batches in an order of the epoch's own.

    The rows come in the first epoch's order; what doesn't fill a batch stays last.

    >>> list(SameBatches([5, 3, 0, 1, 2], 2, seed=0, epoch=lambda: 1))
    [0, 1, 5, 3, 2]
    """

    def __init__(
        self, rows: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        epoch, size = self.epoch(), self.batch_size
        num_whole = len(self.rows) // size
        order = torch.arange(num_whole)
        if epoch:
            mixed = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(num_whole, generator=mixed)
        for number in order.tolist():
            yield from self.rows[number * size : (number + 1) * size]
        yield from self.rows[num_whole * size :]


def behind_cache(
    full: torch.Tensor,
    squares: torch.Tensor,
    distances: torch.Tensor,
    misplaced: torch.Tensor,
    behind: torch.Tensor,
) -> dict[str, float]:
    """Compare a frozen stage's first key losses, behind the cache, with those of a full pass.

    The two add up in another order, which in 16 bits moves each token by a few hundredths of a
    nat, up and down. The mean over n tokens may move by six standard errors of that noise. And
    the noise itself must be small beside the spread of the tokens' losses: a key that is read at
    another place has other losses, and noise as large as their spread.

    Args:
        full: `(2, 5)` sums and tokens by segment of a full pass without the key adapters: what the
            stage before was measured by. The others have the same form.
        squares: Of these losses' squares.
        distances: Of their squared distances to the losses behind the cache.
        misplaced: Of 1 for each token on whose wrong side the key begins: one of the key that isn't
            read behind the cache, or another one that is.
        behind: Of the losses behind the cache, with a key adapter that changes nothing yet.

    Returns:
        `loss`, `full_pass`, `bound`, `noise` and `spread` in nats a token, and the counts `tokens`
        and `misplaced`.
    """
    key = slice(Segment.ANSWER_TAG, None)
    whole, tokens = (each.double() for each in full[:, key].sum(1))
    whole, loss = whole / tokens, behind[0, key].double().sum() / tokens
    noise = (distances[0, key].double().sum() / tokens).sqrt()
    spread = (squares[0, key].double().sum() / tokens - whole**2).clamp(min=0).sqrt()
    found = {
        "loss": loss,
        "full_pass": whole,
        "bound": 6 * noise / tokens.sqrt(),
        "noise": noise,
        "spread": spread,
        "tokens": tokens,
        "misplaced": misplaced[0].sum(),
    }
    return {name: float(value) for name, value in found.items()}


class FrozenTrainer(KeyTrainer):
    """Trains one key adapter, or those of a grid side by side, on a context that doesn't move.

    What a step of a grid costs is one reading of the context and one larger pass over keys. Each
    adapter has a learning rate, a clipped gradient and optimizer states of its own, so that it
    becomes what it would become alone. The model has all of these members already; `context_cache`
    is `auto`, `off` or a size.
    """

    def __init__(
        self, members: list[KeyAdapterSpec], context_cache: str = "auto", **settings: Any
    ) -> None:
        self.members, self._cache_setting = members, context_cache
        self._contexts: ContextCache | None = None  # made when training begins
        self.member_losses: list[float] = []  # on validation rows, at the last evaluation
        self.start_metrics: dict[str, float] = {}  # how the two ways of reading compare
        super().__init__(context="frozen", **settings)
        model: Any = self.model
        model.save_pretrained = self._save_members
        act(model, context_adapters(model))

    @property
    def best(self) -> int:
        """Return the number of the adapter with the lowest validation loss so far."""
        losses = torch.tensor(self.member_losses or [0.0] * len(self.members))
        return int(losses.nan_to_num(nan=torch.inf).argmin())

    def choice(self) -> dict[str, Any] | None:
        """Say what a grid chose, and from what; None where there was nothing to choose."""
        if len(self.members) == 1:
            return None
        tried = [
            {**member.chosen, "loss": loss if loss == loss else None}  # JSON has no NaN
            for member, loss in zip(self.members, self.member_losses, strict=True)
        ]
        return {"tried": tried, "kept": self.members[self.best].chosen}

    @property
    def _copies(self) -> int:
        return len(self.members)

    def _model_inputs(
        self, model: torch.nn.Module, inputs: dict[str, Any], segment_ids: torch.Tensor
    ) -> dict[str, Any]:
        more: dict[str, Any] = {"key_starts": key_starts(segment_ids)}
        if self._contexts and model.training:
            more["context_cache"] = self._contexts.read
        return inputs | more

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; contexts that several epochs read are kept until the end."""
        self._contexts = self._make_cache()
        result = super().train(*args, **kwargs)
        if self._contexts:
            self.accelerator.wait_for_everyone()
            self._contexts.remove()
        self._contexts = None
        return result

    def _make_cache(self) -> ContextCache | None:
        """Say how large the files become, and make what keeps them; None where they don't pay."""
        rows: Any = self.train_dataset
        trained = self.args.num_train_epochs * len(rows)
        if self.args.max_steps > 0:
            trained = self.args.max_steps * self._rows_a_step
        if self._cache_setting == "off" or trained <= len(rows):
            return None
        folder = Path(str(self.args.output_dir)).parent / CONTEXTS_FOLDER
        with self.compute_loss_context_manager():
            a_token = bytes_a_token(self._peft_model)
        size = a_token * sum(row_lengths(rows))
        auto = self._cache_setting == "auto"
        limit = size_bytes(self._cache_setting) or int(free_bytes(folder) * FREE_SHARE)
        what = f"{a_token / 1024:.0f} KiB a token, {size / GIB:.2f} GiB of contexts"
        if auto and size > limit:
            LOGGER.info("contexts are read anew in each epoch: %s are too much for the disk", what)
            return None
        LOGGER.info("contexts are read once: %s, kept in %s until the stage ends", what, folder)
        return ContextCache(folder, self._peft_model, limit, must_pay=auto)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """Cut all epochs into the first one's batches, so that each context is read once."""
        first: Any = super()._get_train_sampler(train_dataset)
        if isinstance(first, GroupedByLength):
            first.epoch = lambda: 0
        elif isinstance(first, RandomSampler):
            mixed = torch.Generator().manual_seed(self.args.seed)
            first = torch.randperm(len(row_lengths(self.train_dataset)), generator=mixed).tolist()
        else:
            return first
        size, seed = self.args.train_batch_size, self.args.seed
        return SameBatches(list(first), size, seed, self._whole_epochs)

    def _count(self, losses: torch.Tensor, trained: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Count a grid's mean, without the adapters that have diverged."""
        sound = losses.isfinite().all(-1).all(-1)
        mean = losses[sound].mean(0) if sound.any() else losses[0]
        super()._count(mean[None], trained, num_tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a grid's mean loss: the trainer's own is a sum, which one diverged adapter spoils."""
        if "loss" in logs and len(self.members) > 1:
            sums = self.accelerator.reduce(self._window, reduction="sum")[:-1]
            logs["loss"] = self._weighted(sums.view(2, len(Segment)).cpu()).item()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Add to the losses before the first step how the two ways of reading compare."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.state.global_step == 0:
            metrics: Any = output.metrics
            metrics |= self.start_metrics
        return output

    def _validation_sums(
        self, inputs: dict[str, torch.Tensor], segment_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return each adapter's sums, and what the start is compared by: `(N + 4, B, 2, 5)`.

        The context's losses are the same for all adapters. The last four: of a full pass without
        the key adapters; of the squares of its losses; of their squared distance from those of
        the first adapter, which are read behind a cache; of tokens on the wrong side of it.
        """
        targets = segment_ids[:, 1:]
        of_key = targets >= Segment.ANSWER_TAG
        context = token_losses(self.model_wrapped, inputs)
        labels = inputs["labels"].masked_fill(~pad(of_key, (1, 0)), IGNORED)
        model, of_keys = self.model_wrapped, inputs | {"labels": labels}
        passed = self._model_inputs(model, of_keys, segment_ids)
        keys = token_losses(model, passed, "frozen")
        read = [
            torch.where(of_key, losses, context)
            for losses in keys.view(len(self.members), *context.shape)
        ]
        columns = torch.arange(targets.shape[1], device=targets.device)
        behind = (columns >= passed["key_starts"][:, None]) & (targets >= 0)
        misplaced = (behind != of_key).to(context.dtype)
        beside = [context, context.square(), (read[0] - context).square(), misplaced]
        return torch.stack([row_sums(losses, targets) for losses in (*read, *beside)])

    def _reported(self, sums: torch.Tensor) -> torch.Tensor:
        """Report the best adapter's sums; compare the two ways of reading before the first step."""
        members, (full, squares, distances, misplaced) = sums[:-4], sums[-4:]
        self.member_losses = self._weighted(members).tolist()
        if self.state.global_step == 0:
            found = {f"eval_full_{name}": loss for name, loss in segment_means(full).items()}
            # Else the adapter changes the key from the start, and there is nothing to compare.
            if self.members[0].lora.get("init_lora_weights") is not False:
                behind = behind_cache(full, squares, distances, misplaced, members[0])
                found |= {f"eval_behind_{name}": value for name, value in behind.items()}
            self.start_metrics = found
        return members[self.best]

    def _kept_of_rows(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[:, self.best]

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Watch no norm of a grid: it goes on without the adapters that have diverged."""
        norm = super()._get_grad_norm(model, grad_norm)
        if len(self.members) > 1:
            self._worst_norm = None
        return norm

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return each adapter of a grid a group, and so a learning rate, of its own."""
        if len(self.members) == 1 and self.members[0].learning_rate is None:
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
            return optimizer
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            groups = [
                {
                    "params": self._parameters(member),
                    "lr": member.learning_rate or self.args.learning_rate,
                    "weight_decay": self.args.weight_decay,
                }
                for member in self.members
            ]
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip each adapter's gradient by its own norm; give the norm of all."""
        if len(self.members) == 1:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        clip, limit = torch.nn.utils.clip_grad_norm_, self.args.max_grad_norm
        norms = [clip(self._parameters(member), limit) for member in self.members]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _parameters(self, member: KeyAdapterSpec) -> list[torch.nn.Parameter]:
        named = self._peft_model.named_parameters()
        return [parameter for name, parameter in named if f".{member.name}." in name]

    def _save_members(self, folder: str, **settings: Any) -> None:
        """Write the adapters into a checkpoint; the context's are another stage's."""
        tensors = {
            f"{member.name}/{name}": tensor.detach().cpu().clone()
            for member in self.members
            for name, tensor in get_peft_model_state_dict(
                self._peft_model, adapter_name=member.name, save_embedding_layers=False
            ).items()
        }
        save_file(tensors, Path(folder) / WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE)
        for member in self.members:
            prefix = f"{member.name}/"
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            set_peft_model_state_dict(self._peft_model, own, adapter_name=member.name)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    @property
    def _peft_model(self) -> PeftModel:
        model: Any = self.accelerator.unwrap_model(self.model)
        peft: PeftModel = model
        return peft
