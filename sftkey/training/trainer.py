"""TRL's SFTTrainer with weights a token, and batches grouped by length."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils.generic import is_flash_attention_requested
from trl import SFTConfig

from sftkey.data.collator import KeyCollator, row_lengths
from sftkey.data.labels import PADDING, weights_at, weights_by_segment
from sftkey.data.response import Segment
from sftkey.errors import SMALLER_STEPS, DivergedError
from sftkey.models.adapters import without_adapters
from sftkey.models.device import sharded
from sftkey.recipe.loss_on import annealed
from sftkey.recipe.schema import KEY_BATCH_TOKENS, LossOn
from sftkey.training.losses import (
    Beside,
    Context,
    Logits,
    StageStart,
    add_token_losses,
    find_weighting,
    in_tiles,
    joint_losses,
    likeliest_entropy,
    takes_entropies,
    thinking_targets,
    token_losses,
)
from sftkey.training.validating import (
    KeyBatch,
    ValidatingTrainer,
    pass_ends,
    row_sums,
    segment_means,
)


class GroupedByLength(LengthGroupedSampler):
    """Transformers' sampler of rows that are alike in length, in an order of the epoch's own.

    Upstream's draws from the generator that dropout draws from: a resumed stage would meet
    another order, and so would a process whose rows were longer. A batch is all that an optimizer
    step reads, over all processes and micro-batches.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order: Iterator[int] = super().__iter__()
        return order


class KeyTrainer(ValidatingTrainer):
    """Trains one stage: the loss of a step is Σ wₜ·NLLₜ / Σ wₜ over its whole batch.

    `token_weights` is the one method to override for other weights.

    The sums go over all micro-batches of an accumulated step and all processes, so that the way
    in which a batch is cut never changes the loss (Eq. 1 and Eq. 4 of arXiv 2512.21017, with a
    weight for each token).

    Args:
        model: The model with what is to be trained set to require gradients.
        args: Built by `sftkey.training.stage`; preparation of the data set is switched off.
        loss_on: What the stage trains.
        tokenizer: Gives the id that fills up short rows.
        train_dataset: Rows with `input_ids` and `segment_ids`, or packs (`sftkey.data.collator`).
        eval_dataset: The validation rows, of the same form.
        callbacks: As in transformers.
        context: What gradient flows through prompt and thinking. `exact`: all that there is;
            `detached`: none (`sftkey.training.detached`), and `loss_on` trains neither.
        loss: `dft` weighs each token's loss with the token's probability, through which no
            gradient flows (arXiv 2508.05629), `eaft` with the entropy there (arXiv 2601.02151);
            `module:function` with what that returns.
        anneal: Weights that those of `loss_on` move to, linearly from the first step to the last.
        key_batch_tokens: Unless `exact`, so many tokens of keys at most, filled up ones too, of
            a step's micro-batches go through the model in one pass: the same gradients.
        kl: Adds so many times KL(the stage's start ‖ now) to the loss, the mean over the step's
            tokens of the thinking, in nats; with `exact` alone.

    Raises:
        ModelError: The model can't do `detached`.
        RecipeError: There is no such function.

    >>> class OnHardTokens(KeyTrainer):
    ...     def token_weights(self, segment_ids, losses):
    ...         weights = super().token_weights(segment_ids, losses)
    ...         return weights * (losses > 0.1)
    >>> args = SFTConfig("out", max_steps=1, report_to="none", use_cpu=True, bf16=False,
    ...     remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
    >>> trainer = OnHardTokens(model, args, "completion", tokenizer, rows, rows)
    >>> segment_ids, losses = torch.tensor([[1, 1, 4, -1]]), torch.tensor([[[0.05, 3, 0.2, 0]]])
    >>> trainer.token_weights(segment_ids, losses)
    tensor([[[0., 1., 1., 0.]]])
    """

    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # TRL types it as None
    _waiting: Sequence[dict[str, Any]] = ()  # micro-batches whose keys go with a later one
    _pass_ends: Sequence[bool] = ()  # whether those to come, the last one first, wait for none
    _worst_norm: torch.Tensor | None = None  # of the gradients since the last log line
    wants_entropies = False  # True in a subclass: `token_weights` gets the entropies

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        loss_on: LossOn,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        callbacks: list[Any] | None = None,
        context: Context = "exact",
        loss: str = "nll",
        anneal: Mapping[str, float] | None = None,
        key_batch_tokens: int = KEY_BATCH_TOKENS,
        kl: float = 0.0,
    ) -> None:
        # SFTTrainer rounds the trainable weights of a 4-bit model to bfloat16: keep the exact ones.
        exact = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        self.segment_weights = weights_by_segment(annealed(loss_on, anneal))  # at the end
        self._first_weights = self._step_weights = weights_by_segment(loss_on)
        self.context, self.loss, self._weighting = context, loss, find_weighting(loss)
        self.wants_entropies |= takes_entropies(self._weighting)
        self.key_batch_tokens, self._window = key_batch_tokens, torch.zeros(0)
        self.row_losses: list[float] = []  # the stage's own, of each validation row
        # The factor of a step; the sum and the number of its tokens, as `_window` has the losses'.
        self.kl, self._kl_factor, self._kl_window = kl, torch.ones(()), torch.zeros(2)
        multiple: Any = args.pad_to_multiple_of  # text only until the arguments are made
        flash = is_flash_attention_requested(model.config)
        collator = KeyCollator(tokenizer, loss_on, multiple, for_key_trainer=True, one_line=flash)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        add_token_losses(without_adapters(model), context)
        self.remove_callback(PrinterCallback)  # stdout is for results
        if isinstance(model, PeftModel):  # no checkpoint asks the hub about the base's vocabulary
            quiet = partial(model.save_pretrained, save_embedding_layers=False)
            model.save_pretrained = quiet  # type: ignore[method-assign]
        _restore(model, exact)
        self._start = StageStart(model, self.num_logits) if kl else None

    def compute_loss(  # type: ignore[override]  # the count is always the tensor made below
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return a micro-batch's part of the step's loss, with those that waited for it.

        `num_items_in_batch` is the step's Σ wₜ.
        """
        batches = [*map(self._prepare_inputs, self._waiting), inputs]
        self._waiting = ()
        segments = [batch.pop("segment_ids") for batch in batches]
        weights = [batch.pop("loss_weights")[:, 1:] for batch in batches]
        beside = self._beside(batches[0], segments[0])  # the only ones, where places matter
        given = [self._model_inputs(model, *each) for each in zip(batches, segments, strict=True)]
        if beside:
            given[0]["beside"] = tuple(beside.values())
        if len(given) > 1:
            found = joint_losses(model, given, self.context)
        else:
            found = [token_losses(model, given[0], self.context)]
        total = num_items_in_batch
        if total is None:
            total = torch.stack([each.sum() for each in weights]).sum()
        parts = map(partial(self._weighted_loss, list(beside)), found, segments, weights)
        # The processes' gradients are averaged, but their losses are parts of one sum.
        return torch.stack(list(parts)).sum() / total * self.accelerator.num_processes

    def _weighted_loss(
        self,
        beside: Sequence[str],
        found: torch.Tensor,
        segment_ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return Σ wₜ·NLLₜ of a micro-batch with its penalty; count it for the next log line.

        `found` has the losses, and the values of each thing that was computed beside them.
        """
        # The leading dimension of each: several copies of the batch.
        losses, *values = found.view(1 + len(beside), -1, *weights.shape)
        trained = _trained(segment_ids, weights)
        self._count(losses.detach(), trained, (segment_ids != PADDING).sum())
        named = dict(zip(beside, values, strict=True))
        moved = named.pop("kl", losses.new_zeros(())).sum()
        if self._start is not None:
            self._kl_window[0] += moved.detach().cpu()
        sums = losses * self.token_weights(trained, losses.detach(), **named)
        # A micro-batch's part of the step's mean divergence, times Σ wₜ as the losses are.
        return sums.sum() + self.kl * moved * self._kl_factor.to(moved.device)

    def _beside(
        self, inputs: dict[str, torch.Tensor], segment_ids: torch.Tensor
    ) -> dict[str, Beside]:
        """Return what is computed beside the losses, by the name that it has afterwards."""
        beside = {"entropies": Beside(self._entropies)} if self.wants_entropies else {}
        if self._start is not None:
            beside["kl"] = self._start.divergence(inputs, segment_ids)
        return beside

    @torch.no_grad()
    def _entropies(self, states: torch.Tensor, logits: Logits) -> torch.Tensor:
        return in_tiles(lambda tile: likeliest_entropy(logits(tile)), self.num_logits, states)

    @property
    def num_logits(self) -> int:
        """The size of the vocabulary."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return int(model.config.get_text_config().vocab_size)

    def token_weights(
        self,
        segment_ids: torch.Tensor,
        losses: torch.Tensor,
        entropies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weight of each token's loss; override it to try a weighting of your own.

        The weighted losses are summed over the step, and divided by the sum of the weights that
        `loss_on` gives to its tokens, whatever this method returns: as with `loss: dft`.

        Args:
            segment_ids: (B, T - 1) the `Segment` of each trained token, -1 where none is trained.
            losses: (N, B, T - 1) nats, without gradient; N is 1 but for several key adapters.
            entropies: As the losses, of the 20 likeliest tokens; given only where
                `wants_entropies` is true or the function of `loss` has such a parameter.

        Returns:
            (B, T - 1), or (N, B, T - 1); 0 where no token is trained.
        """
        weights = weights_at(segment_ids, self._step_weights)
        if self._weighting is None:
            return weights
        more = {"entropies": entropies} if takes_entropies(self._weighting) else {}
        return weights * self._weighting(segment_ids, losses, **more)

    def _model_inputs(
        self, model: torch.nn.Module, inputs: dict[str, Any], segment_ids: torch.Tensor
    ) -> dict[str, Any]:
        """Return what the model takes of a micro-batch, whose segments are `(B, T)`."""
        return inputs

    @property
    def _copies(self) -> int:
        """Of each row in a pass over keys."""
        return 1

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return a step's micro-batches, as transformers does; decide whose keys go together."""
        batches, total = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Sharded layers need as many passes in all processes, DeepSpeed counts the backward ones,
        # and DataParallel cuts up batches.
        several = self.accelerator.num_processes > 1 or self.args.n_gpu > 1
        alone = self.context == "exact" or several or sharded()
        sizes = [] if alone else [KeyBatch.of(b["segment_ids"], self._copies) for b in batches]
        self._pass_ends = pass_ends(sizes, self.key_batch_tokens)[::-1]
        self._waiting = ()
        return batches, total

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Take a micro-batch; where its key goes with later ones, their last takes it, too."""
        *self._pass_ends, ends = self._pass_ends or [True]
        if not ends:
            self._waiting = [*self._waiting, inputs]
            return torch.zeros((), device=self.args.device)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor:
        """Sum the weights of a step's trained tokens, over its micro-batches and all processes.

        It is called once a step, before the first micro-batch: annealed weights are set here.
        """
        sums = [batch["loss_weights"][:, 1:].sum() for batch in batch_samples]
        if self._first_weights != self.segment_weights:
            done = min(self.state.global_step / max(self.state.max_steps - 1, 1), 1.0)
            ends = zip(self._first_weights, self.segment_weights, strict=True)
            self._step_weights = tuple(first + done * (last - first) for first, last in ends)
            both = [(each["segment_ids"], each["loss_weights"][:, 1:]) for each in batch_samples]
            sums = [weights_at(_trained(*each), self._step_weights).sum() for each in both]
        total = torch.stack(sums).sum()
        whole: torch.Tensor = self.accelerator.reduce(total.to(device), reduction="sum")
        if self._start is not None:
            places = [thinking_targets(batch, batch["segment_ids"]) for batch in batch_samples]
            count = torch.stack([each.sum() for each in places]).sum()
            self._kl_window[1] += count.cpu()
            everywhere = self.accelerator.reduce(count.to(device), reduction="sum")
            self._kl_factor = whole / everywhere.clamp(min=1)
        return whole

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """Group rows by length, if so set, in an order that a resumed stage repeats."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = row_lengths(self.train_dataset)
        return GroupedByLength(lengths, self._rows_a_step, self.args.seed, self._whole_epochs)

    def _whole_epochs(self) -> int:
        return int(self.state.epoch or 0)

    @property
    def _rows_a_step(self) -> int:
        rows: int = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return rows * int(self.accelerator.num_processes)

    def _count(self, losses: torch.Tensor, trained: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Add a micro-batch to the window that the next log line reports.

        Its losses are `(N, B, T - 1)`, as in `token_weights`, and `_trained` tells their segments.
        """
        sums = row_sums(losses[0], trained).sum(0)
        row = torch.cat([sums.flatten(), num_tokens.float().view(1)])
        self._window = row if self._window.numel() == 0 else self._window + row

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training line the loss of each trained segment and the tokens of the window.

        Raises:
            DivergedError: A gradient's norm wasn't finite since the line before.
        """
        if "loss" in logs and self._window.numel():
            window = self.accelerator.reduce(self._window, reduction="sum").cpu()
            self._window = torch.zeros(0)
            sums = window[:-1].view(2, len(Segment))
            logs |= {f"loss_{name}": value for name, value in segment_means(sums).items()}
            logs |= {"trained_tokens": int(sums[1].sum()), "tokens": int(window[-1])}
            if self._start is not None:
                row = self._kl_window.to(self.args.device)
                moved, count = self.accelerator.reduce(row, reduction="sum").tolist()
                self._kl_window = torch.zeros(2)
                logs["kl"] = moved / max(count, 1.0)
        super().log(logs, start_time)
        if "loss" in logs and self._worst_norm is not None:
            worst, self._worst_norm = self._worst_norm.item(), None
            if not math.isfinite(worst):
                raise DivergedError(
                    f"step {self.state.global_step}",
                    f"expected finite gradient norms up to it; got {worst}",
                    SMALLER_STEPS,
                )

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Keep the worst norm of all steps on the device; a log line reads it.

        Under float16 the loss's scaling makes infinite norms, and skips these steps.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and self.accelerator.scaler is None:
            found = torch.as_tensor(norm).detach().float()
            if hasattr(found, "full_tensor"):  # a sharded model's
                found = found.full_tensor()
            worst = found if self._worst_norm is None else self._worst_norm
            self._worst_norm = torch.maximum(worst, found)  # NaN stays
        return norm

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: a checkpoint is no publication, and TRL's card asks the hub."""

    def _send_telemetry(self) -> None:
        """Send none."""


def _restore(model: torch.nn.Module, exact: Mapping[str, torch.Tensor]) -> None:
    """Put weights back that were rounded to another type."""
    for name, parameter in model.named_parameters():
        if name in exact and parameter.dtype != exact[name].dtype:
            parameter.data = exact[name].to(parameter.device)


def _trained(segment_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the segments `(B, T - 1)` of trained tokens; -1 elsewhere, at a pack's first too."""
    return segment_ids[:, 1:].masked_fill(weights == 0, PADDING)
