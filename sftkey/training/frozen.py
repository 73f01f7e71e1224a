"""The trainer of a stage that can't hurt the thinking: its adapters act on the key alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from sftkey.data.labels import IGNORED
from sftkey.data.response import Segment
from sftkey.models.key_adapter import act, context_adapters
from sftkey.recipe.stages import KeyAdapterSpec
from sftkey.training.losses import token_losses
from sftkey.training.trainer import KeyTrainer, segment_sums

WEIGHTS_FILE = "key_adapters.safetensors"  # of a checkpoint; the context's weights don't change


def key_starts(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return the place of the token that predicts a row's first key token: T of the paper's Eq. 4.

    Args:
        segment_ids: `(B, T)`, filled up with -1 on the right.

    >>> key_starts(torch.tensor([[0, 0, 1, 1, 2, 3, 4], [0, 1, 3, 4, -1, -1, -1]]))
    tensor([3, 1])
    """
    return (segment_ids >= Segment.ANSWER_TAG).int().argmax(1) - 1


class FrozenTrainer(KeyTrainer):
    """Trains one key adapter, or those of a grid side by side, on a context that doesn't move.

    What a step of a grid costs is one reading of the context and one larger pass over keys. Each
    adapter has a learning rate, a clipped gradient and optimizer states of its own, so that it
    becomes what it would become alone.

    Args:
        members: The stage's adapters; the model has them already.
        settings: `KeyTrainer`'s.
    """

    def __init__(self, members: list[KeyAdapterSpec], **settings: Any) -> None:
        self.members = members
        self.member_losses: list[float] = []  # on validation rows, at the last evaluation
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

    def _losses(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], segment_ids: torch.Tensor
    ) -> torch.Tensor:
        return token_losses(model, inputs | {"key_starts": key_starts(segment_ids)}, "frozen")

    def _count(
        self, losses: torch.Tensor, segment_ids: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Count a grid's mean, without the adapters that have diverged."""
        of_members = losses.view(len(self.members), *weights.shape)
        sound = of_members.isfinite().all(-1).all(-1)
        mean = of_members[sound].mean(0) if sound.any() else of_members[0]
        super()._count(mean, segment_ids, weights)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a grid's mean loss: the trainer's own is a sum, which one diverged adapter spoils."""
        if "loss" in logs and len(self.members) > 1:
            sums = self.accelerator.reduce(self._window, reduction="sum")[:-1]
            logs["loss"] = self._weighted(sums.view(2, len(Segment)).cpu()).item()
        super().log(logs, start_time)

    def _validation_sums(
        self, inputs: dict[str, torch.Tensor], segment_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return each adapter's sums, `(N, 2, 5)`: the context's losses are the same for all."""
        targets = segment_ids[:, 1:]
        of_key = targets >= Segment.ANSWER_TAG
        context = token_losses(self.model_wrapped, inputs)
        labels = inputs["labels"].masked_fill(~pad(of_key, (1, 0)), IGNORED)
        keys = self._losses(self.model_wrapped, inputs | {"labels": labels}, segment_ids)
        return torch.stack(
            [
                segment_sums(torch.where(of_key, losses, context), targets)
                for losses in keys.view(len(self.members), *context.shape)
            ]
        )

    def _reported(self, sums: torch.Tensor) -> torch.Tensor:
        """Report the best adapter's sums."""
        self.member_losses = self._weighted(sums).tolist()
        return sums[self.best]

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
        limit = self.args.max_grad_norm
        norms = [
            torch.nn.utils.clip_grad_norm_(self._parameters(member), limit)
            for member in self.members
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _parameters(self, member: KeyAdapterSpec) -> list[torch.nn.Parameter]:
        model: Any = self.model
        named = model.named_parameters()
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
