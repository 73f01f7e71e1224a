"""A run: its stages one after another, with memory given back between them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftkey.activity import activity
from sftkey.data.collator import pack_counts, pack_line
from sftkey.data.prepare import (
    NO_VALIDATION,
    NUM_WITHOUT_VALIDATION,
    Prepared,
    prepare,
    refuse_evaluation_without_rows,
)
from sftkey.files import explained_disk, write_json
from sftkey.models.device import Device, choose_device
from sftkey.models.loading import load_tokenizer
from sftkey.recipe.schema import Recipe
from sftkey.recipe.stages import BASE, num_stage_steps
from sftkey.training import callbacks, soundness
from sftkey.training.answers import Answers
from sftkey.training.frozen import FrozenTrainer
from sftkey.training.log import RunProgress, StageLog, Trackers, TrackStage, read_log
from sftkey.training.machine import explained_faults, join, require_disk
from sftkey.training.made_from import ALL, changed_facts, require_same_rows, surroundings
from sftkey.training.own_thinking import Grader, Writer, make_own_rows, own_validation
from sftkey.training.run_folder import Ledger, open_run
from sftkey.training.stage import (
    gradient_norms,
    make_trainer,
    refuse_unfit,
    save_stage,
    stage_arguments,
)
from sftkey.training.stage_model import load_stage, stands_on
from sftkey.training.trainer import KeyTrainer


class StageReport(Protocol):
    """Writes something of each stage's model, once: its answers are one such thing."""

    def missing(self, name: str) -> bool:
        """Tell whether a stage's is still to be written."""

    def write(self, name: str, model: PreTrainedModel | PeftModel) -> None:
        """Write it, on all processes."""


@dataclass
class Run:
    """A recipe on its way through its stages."""

    recipe: Recipe
    ledger: Ledger
    device: Device
    prepared: Prepared
    progress: RunProgress
    grade: Grader  # tells whether an answer is right, for stages over the model's own thinking
    # Each makes what writes something more of each stage's model than its answers.
    reports: Sequence[Callable[[Run], StageReport]]
    measures_gradients: bool  # whether the ledger gets the gradient norm of each segment's loss

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's, with the recipe's chat template."""
        return self.prepared.renderer.tokenizer

    @cached_property
    def validation(self) -> Dataset:
        """The rows on which every stage is measured before and after it.

        Where no row has a reasoning, a stage's model puts its own there when it begins.
        """
        if self.prepared.validation is not None:
            return self.prepared.validation
        num_rows = min(NUM_WITHOUT_VALIDATION, len(self.prepared.train))
        return self.prepared.train.select(range(num_rows))

    @cached_property
    def answers(self) -> Answers:
        """Return what writes the answers to the test questions."""
        return Answers(self.ledger, self.prepared, self.progress)

    @cached_property
    def trackers(self) -> Trackers:
        """The experiment trackers, which are opened when something is logged."""
        return Trackers(self.ledger)

    def stages(self, train: bool = True) -> Iterator[str]:
        """Do what isn't done yet; yield `base` and each stage's name when its answers lie there.

        Without `train` only the trained stages answer.

        Raises:
            DeviceError: The device has too little memory.
            DiskError: The disk is full.
            RunStopped: A signal has ended the run.
        """
        folder = self.ledger.folder
        with (
            callbacks.stopping_on_signals(folder, self.progress.note) as request,
            explained_faults(folder),
            explained_disk(folder),
        ):
            try:
                yield from self._stages(train, request)
            finally:
                self.trackers.finish()

    def _stages(self, train: bool, request: callbacks.StopRequest) -> Iterator[str]:
        if train and (line := require_disk(self.ledger, self.progress.planned)):
            self.progress.note(line)
        model = None
        if self.answers.missing(BASE):
            model = self._load(0)
            self.answers.write(BASE, model)
        yield BASE
        for number, record in enumerate(self.ledger.stages):
            trained = record.status == "trained"
            if not trained:
                if not train:
                    return
                self._train(number, model if model is not None else self._load(number), request)
            model = None
            gc.collect()  # TRL's patched forward makes a cycle, which keeps a dropped trainer
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            wanted = [self.answers, *(make(self) for make in self.reports if train)]
            missing = [report for report in wanted if report.missing(record.name)]
            if missing:
                model = self._load(number + 1)
                for report in missing:
                    report.write(record.name, model)
            elif trained:  # by an earlier command; loading its adapter would have looked at it
                self.ledger.require(self.ledger.adapter(number))
            yield record.name

    def _load(self, number: int) -> PreTrainedModel | PeftModel:
        """Load the model as the stage at `number` starts from it."""
        model = load_stage(self.recipe, self.ledger, self.device, self.prepared.renderer, number)
        refuse_unfit(model, self.recipe, packed=self.prepared.packs(self.recipe) is not None)
        return model

    def _train(
        self, number: int, model: PreTrainedModel | PeftModel, request: callbacks.StopRequest
    ) -> None:
        """Train one stage from its start, or from its newest whole checkpoint, to its adapter."""
        stage, record = self.recipe.stages[number], self.ledger.stages[number]
        checkpoints = self.ledger.stage_folder(number) / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint = callbacks.newest_whole(checkpoints)
        rows = self._rows(number, model)
        trainer = make_trainer(
            self.recipe,
            stage,
            model=model,
            args=stage_arguments(self.recipe, stage, self.device, checkpoints, not checkpoint),
            tokenizer=self.tokenizer,
            train_dataset=rows,
            eval_dataset=self.validation,
            callbacks=[callbacks.SealCheckpoints(), callbacks.StopAfterStep(request)],
        )
        more = self.prepared.loss_name, lambda: trainer.row_losses
        log = StageLog(self.ledger, number, self.progress, *more)
        early = callbacks.stop_by_answers(self.recipe, self.prepared, log, trainer, self.grade)
        track = TrackStage(self.trackers, number + 1)
        for callback in filter(None, (early, log, track)):  # answers are no time of training
            trainer.add_callback(callback)
        if checkpoint:
            self.progress.note(f"{stage.name}: going on from {checkpoint.name}")
        elif self.measures_gradients and stage.context != "frozen":
            record.gradient_norm = gradient_norms(trainer)
            self.ledger.save()
        with activity(f"training {stage.name}"), callbacks.no_half_checkpoint(checkpoints):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            kept = callbacks.kept_checkpoint(trainer.state, trainer.args.load_best_model_at_end)
            if kept:
                self.progress.note(f"{stage.name}: {kept}")
            if early:
                early.load_best(trainer)
            trainer.evaluate()
            self._compare_ends(trainer, number)
            self._save(trainer, number)
        record.seconds = round(sum(line["seconds"] for line in read_log(log.path)), 3)
        record.status = "trained"
        self.ledger.finish(self.ledger.adapter(number), log.path)

    def _compare_ends(self, trainer: KeyTrainer, number: int) -> None:
        """Note a validation loss that ended above its start; refuse a model that is destroyed."""
        record, folder = self.ledger.stages[number], self.ledger.stage_folder(number)
        soundness.refuse_unsound_end(record.validation["end"], str(folder))
        start, end = soundness.kept_losses(folder).get("start", []), trainer.row_losses
        soundness.refuse_destroyed(start, end, trainer.num_logits, str(folder))
        change, record.worse = soundness.change_of(start, end), None
        if change and change.is_worse:
            record.worse = change.said(self.prepared.loss_name)
            self.progress.note(f"WARNING: {record.name}: {record.worse}\nhint: {soundness.HINT}")

    def _rows(self, number: int, model: PreTrainedModel | PeftModel) -> Dataset:
        """Return a stage's rows; the model writes thinkings, where its own are trained behind.

        In that case it writes those of the validation rows without any, too.
        """
        stage, renderer = self.recipe.stages[number], self.prepared.renderer
        if stage.thinking != "own":
            return self.prepared.stage_rows(self.recipe, stage)
        folders = self.ledger.stage_folder(0), self.ledger.stage_folder(number)
        first, writer = (
            Writer(self.recipe, renderer, model, folder, self.progress, stage.name)
            for folder in folders
        )
        if self.prepared.answers_only:
            self.validation = own_validation(stage, self.prepared, first)
        return make_own_rows(stage, self.prepared, writer, self.grade)

    def _save(self, trainer: KeyTrainer, number: int) -> None:
        """Write what the stage has trained, and what the run's end stands on."""
        folder, context = self.ledger.adapter(number), {}
        written = {"adapter": str(folder.relative_to(self.ledger.folder))}
        if isinstance(trainer, FrozenTrainer):
            context = stands_on(self.recipe, self.ledger, number)
            self.ledger.stages[number].grid = trainer.choice()
            written["context"] = str(context["context"])
        save_stage(trainer, folder, self.ledger.facts["base"] | context, write=self.ledger.main)
        self.ledger.facts["end"] = written


def read_rows(recipe: Recipe) -> Prepared:
    """Load the tokenizer and the rows."""
    prepared = prepare(recipe, load_tokenizer(recipe.model))
    refuse_evaluation_without_rows(recipe, prepared)
    return prepared


def start(
    recipe: Recipe,
    folder: Path,
    fresh: bool = False,
    read: Callable[[Recipe], Prepared] = read_rows,
    *,
    grade: Grader,
    reports: Sequence[Callable[[Run], StageReport]] = (),
    measures_gradients: bool = False,
    uses: Collection[str] = ALL,
) -> Run:
    """Read the data and open the run folder; no weights are loaded yet.

    The data come first: a recipe that is refused for them leaves no run folder behind, in which
    the mended one would be another recipe.

    Args:
        recipe: What is asked.
        folder: The run folder.
        fresh: Move a run that lies there aside, under a new name.
        read: Gives the rows; `require_trainable` reads them and may refuse the run.
        grade: As in `Run`, like the next two.
        reports: What is written of each stage's model beside its answers.
        measures_gradients: Whether the gradient of each segment is measured before each stage.
        uses: The splits whose rows must be those that the run began with.

    Raises:
        SFTKeyError: Whatever of the recipe's model, data, device or run folder can't be used.
    """
    device = choose_device(recipe.model, use_cpu=bool(recipe.trainer.get("use_cpu")))
    processes = join(recipe, device, folder)
    with explained_faults(folder):
        with processes.main_process_first():
            prepared = read(recipe)
            packs = prepared.packs(recipe)
        ledger = open_run(recipe, folder, fresh) if processes.is_main_process else None
        if ledger is not None:
            require_same_rows(ledger, prepared, uses)
        processes.wait_for_everyone()
    ledger = ledger or Ledger(folder, recipe, main=False)
    facts = surroundings(recipe, device)
    ledger.notes += changed_facts(ledger.facts, facts)
    ledger.facts |= facts
    ledger.save()
    if packs is not None:
        prepared.counts["packing"] = pack_counts(packs, recipe.data.max_length)
    if ledger.main:
        write_json(ledger.folder / "data.json", prepared.counts)
    progress = make_progress(ledger, device, prepared)
    for line in ledger.notes:
        progress.note(line)
    return Run(recipe, ledger, device, prepared, progress, grade, reports, measures_gradients)


def make_progress(ledger: Ledger, device: Device, prepared: Prepared) -> RunProgress:
    """Count the steps of all stages, and say what is going to be trained where."""
    world = PartialState().num_processes
    steps = {}
    for number, stage in enumerate(ledger.recipe.stages):
        folder = ledger.stage_folder(number) / "checkpoints"
        stage_arguments(ledger.recipe, stage, device, folder, on_start=True)  # upstream's checks
        trainer = ledger.recipe.stage_trainer(stage)
        num_rows = prepared.num_rows(ledger.recipe, stage)
        steps[stage.name] = num_stage_steps(trainer, num_rows, world)
    left = {each.name: steps[each.name] for each in ledger.stages if each.status == "open"}
    progress = RunProgress(left, quiet=not ledger.main)
    counts = ", ".join(f"{name} {count} steps" for name, count in steps.items())
    progress.note(
        f"{ledger.recipe.name}: {device.kind}, world size {world}, "
        f"{len(prepared.train)} training rows; {counts}"
    )
    if prepared.validation is None:
        progress.note(NO_VALIDATION)
    if "packing" in prepared.counts:
        progress.note(pack_line(prepared.counts["packing"]))
    return progress
