"""Train a recipe, evaluate a run, or ask it: all that the commands of these names compute.

Nothing heavy is imported with this module, so that the form of what is asked is checked at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftkey.activity import activity
from sftkey.data.response import require_text
from sftkey.errors import JudgeError, RunError, SFTKeyError
from sftkey.recipe.schema import Recipe
from sftkey.training.run_folder import (
    Ledger,
    known_stages,
    require_whole,
    run_recipe,
    trained_stage,
)

if TYPE_CHECKING:
    from sftkey.data.prepare import Prepared
    from sftkey.evaluation.results import StageResult
    from sftkey.training.run import Run

LOGGER = logging.getLogger("sftkey")


@dataclass(frozen=True)
class TrainedStage:
    """What a stage has trained.

    Args:
        name: The stage's.
        adapter: The folder of its adapter, or of its whole model under full fine-tuning.
        seconds: What its steps took.
        validation: Under `start` and `end` the loss of every segment, in nats a token.
        worse: That its validation loss ended above its start by more than chance; else None.
    """

    name: str
    adapter: Path
    seconds: float
    validation: dict[str, dict[str, float]]
    worse: str | None = None


@dataclass(frozen=True)
class Reply:
    """What a model wrote to a question.

    Args:
        thinking: Text between the thinking's tags; None where no closing tag stands.
        answer: Text of the answer; None where no answer was found.
        text: All of it.
        stopped: Whether the model ended it by itself, before `max_new_tokens`.
    """

    thinking: str | None
    answer: str | None
    text: str
    stopped: bool


class TrainedRun:
    """A run folder: what its stages have trained, how their answers were graded, and their model.

    Args:
        folder: The run folder.
        keeps_models: Hold the model of each stage that was asked, where there is room for all.

    Raises:
        RunError: The folder is no run.

    >>> run = sftkey.open_run("runs/gsm8k")
    >>> run.stages["key"].adapter.as_posix()
    'runs/gsm8k/stages/2-key/adapter'
    >>> list(run.results)
    ['base', 'completion', 'key']
    >>> run.ask("2 + 2?", stage="key", max_new_tokens=4).stopped
    False
    """

    def __init__(self, folder: str | Path, keeps_models: bool = False) -> None:
        self.folder = Path(folder)
        self.recipe: Recipe = run_recipe(self.folder)
        self.keeps_models = keeps_models
        self._loaded: dict[int, tuple[Any, Any]] = {}

    @property
    def stages(self) -> dict[str, TrainedStage]:
        """The stages that are trained, by name, in their order."""
        ledger = Ledger(self.folder, self.recipe, main=False)
        return {
            each.name: TrainedStage(
                each.name, ledger.adapter(number), each.seconds, each.validation, each.worse
            )
            for number, each in enumerate(ledger.stages)
            if each.status == "trained"
        }

    @property
    def results(self) -> dict[str, StageResult]:
        """The graded answers of `base` and each stage, by name; empty where nothing is graded."""
        from sftkey.evaluation.results import read_graded

        return {each.stage: each for each in read_graded(self.folder)}

    def ask(
        self,
        question: str,
        stage: str | None = None,
        max_new_tokens: int | None = None,
        *,
        turns: Sequence[tuple[str, str]] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Let a stage's model answer a question, put as the recipe's data puts it.

        The model is loaded for the first question and kept for the next ones to the same stage;
        with `keeps_models` beside those of other stages.

        Args:
            question: What stands in the data's question column.
            stage: A trained stage, or `base`; default the last one that is trained.
            max_new_tokens: Default the recipe's.
            turns: Earlier questions of the conversation, each with its answer.
            on_text: Gets all of the text so far, whenever some has come. Of a frozen stage the
                thinking comes at once.

        Raises:
            SFTKeyError: The stage isn't trained, or its model can't be loaded.
        """
        from sftkey.data.renderer import stop_ids
        from sftkey.data.sources import chat_prompt, num_columns
        from sftkey.generation.generate import generate
        from sftkey.generation.key_switch import find_switch

        number = trained_stage(self.folder, self.recipe, stage)
        try:
            require_text(question)
        except ValueError as error:
            raise RunError("question", str(error)) from None
        if (count := num_columns(self.recipe.data)) != 1:
            what = f"data.prompt puts {count} columns together"
            LOGGER.warning("%s; the question is taken as all of it", what)
        model, renderer = self._model(number)
        prompt = renderer.prompt_ids(chat_prompt(self.recipe.data, turns, question))
        most = max_new_tokens or self.recipe.eval.max_new_tokens
        _refuse_too_many(model, len(prompt), most)
        # Before a frozen stage stand key adapters that aren't trained yet.
        frozen = number > 0 and self.recipe.stages[number - 1].context == "frozen"
        written = generate(
            model,
            renderer.tokenizer,
            [prompt],
            stop_ids=stop_ids(renderer, model.generation_config.eos_token_id),
            max_new_tokens=most,
            batch_size=1,
            temperature=self.recipe.eval.temperature,
            seed=self.recipe.seed,
            switch=find_switch(model, renderer) if frozen else None,
            on_text=on_text and _without(renderer.assistant_prefix, on_text),
        )
        with activity("answering"):
            _, generation = next(written)
        parsed = renderer.parse(generation.text)
        return Reply(parsed.thinking, parsed.answer, generation.text, bool(generation.stopped))

    def _model(self, number: int) -> tuple[Any, Any]:
        """Load the model after so many stages, and its renderer."""
        from sftkey.models.loading import load_renderer
        from sftkey.training.stage_model import load_left

        if number not in self._loaded:
            if not self.keeps_models:  # two at once may be too much for the device
                self._loaded.clear()
            renderer = load_renderer(self.recipe)
            model = load_left(self.recipe, self.folder, renderer, number)
            self._loaded[number] = model, renderer
        return self._loaded[number]


def _refuse_too_many(model: Any, num_prompt: int, max_new_tokens: int) -> None:
    """Refuse more tokens than a model has positions; behind a prompt where those are learned."""
    from sftkey.checks.rows import has_learned_positions

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return
    behind = num_prompt if has_learned_positions(model, most) else 0
    if behind + max_new_tokens > most:
        what = f"expected at most the model's {most:,} positions; got {max_new_tokens:,}"
        hint = f"take {most - behind:,} or fewer" if most > behind else "ask a shorter question"
        if not behind:
            raise RunError("max_new_tokens", what)
        raise RunError("max_new_tokens", f"{what} behind a prompt of {behind:,}", hint)


def _without(prefix: str, on_text: Callable[[str], None]) -> Callable[[str], None]:
    """Keep what the chat template writes before the tags from who reads a text as it comes."""

    def passing(text: str) -> None:
        if not prefix.startswith(text):
            on_text(text.removeprefix(prefix))

    return passing


def open_run(folder: str | Path) -> TrainedRun:
    """Open a run folder.

    Raises:
        RunError: The folder is no run.

    >>> open_run("runs/gsm8k").recipe.name
    'tiny'
    """
    return TrainedRun(folder)


def train_recipe(
    recipe: Recipe, folder: str | Path | None = None, fresh: bool = False, yes: bool = False
) -> TrainedRun:
    """Pass the gate, train the stages that are still to be trained, and grade their answers.

    A judge that can't be asked stops no training: the rule grades, a line in the log says so, and
    `evaluate_run`, or the same call again, asks for the judge's flags that are missing.

    Args:
        recipe: What is asked.
        folder: The run folder; default `runs/<name of the recipe>`. A run in it goes on.
        fresh: Move a run that lies there aside, under a new name.
        yes: Go on to a stage over own thinking that shows no use.

    Returns:
        The run folder, all of whose stages are trained.

    Raises:
        SFTKeyError: The recipe, its rows, the device or the folder can't be used.

    >>> run = train_recipe(sftkey.load_recipe("gsm8k.yaml"), "runs/gsm8k")
    >>> sorted(run.stages["key"].validation["end"])
    ['answer', 'answer_tag', 'end', 'prompt', 'thinking']
    """
    from sftkey.checks.gate import require_trainable
    from sftkey.diagnosis.run import StageDiagnosis, refuse_empty_thinking
    from sftkey.evaluation.grading import grade
    from sftkey.evaluation.results import result_file
    from sftkey.evaluation.stage import grade_stage, note_thinking, track_grades
    from sftkey.training.run import start

    place = Path("runs") / recipe.name if folder is None else Path(folder)
    run = start(
        recipe, place, fresh, read=require_trainable, grade=grade, reports=(StageDiagnosis,)
    )
    with run.progress:
        for stage in run.stages():
            graded = result_file(place, stage).exists()
            try:
                grade_stage(run, stage)
            except JudgeError as error:
                run.progress.note(f"{stage}: graded by the rule; {error}")
            if not graded:  # else the trackers have it from the call before
                track_grades(run, stage)
            note_thinking(run, stage)
            if not yes:
                refuse_empty_thinking(run, stage)
    _write_page(run)
    return TrainedRun(place)


def _write_page(run: Run) -> None:
    """Write a run's report, and say where it is (main process only)."""
    from sftkey.evaluation.page import write_page

    if run.ledger.main:
        page, *_ = write_page(run.ledger.folder, run.recipe, run.prepared)
        run.progress.note(f"report: {page}")


def report_run(folder: str | Path) -> list[Path]:
    """Write `report.html` and `losses.png` of a run from its files; no weights are loaded.

    Args:
        folder: A run folder, finished or not. Where its rows or tokenizer can't be read here, the
            report says so instead of showing which tokens were trained.

    Returns:
        What was written.

    Raises:
        RunError: The folder is no run, or a file of it holds something else than it should.

    >>> [file.name for file in report_run("runs/gsm8k")]
    ['report.html', 'losses.png']
    """
    recipe = run_recipe(Path(folder))
    require_whole(Path(folder), "evaluation/*", "stages/*/log.jsonl")
    from sftkey.evaluation.page import write_page
    from sftkey.training.run import read_rows

    try:
        prepared: Prepared | str = read_rows(recipe)
    except SFTKeyError as error:
        prepared = str(error)
    return write_page(Path(folder), recipe, prepared)


def evaluated_recipe(folder: Path, generations: Path | None, stage: str | None) -> Recipe:
    """Read the recipe of a run that is to be evaluated."""
    recipe = run_recipe(folder)
    names = known_stages(folder, recipe, stage)
    if (generations is None) != (stage is None):
        raise RunError(
            str(folder),
            "expected --generations and --stage together; got one without the other",
            f"the stages are {', '.join(names)}",
        )
    return recipe


def evaluate_run(
    folder: str | Path, generations: Path | None = None, stage: str | None = None
) -> tuple[TrainedRun, list[JudgeError]]:
    """Write and grade the answers that are missing, or grade a file of another engine's.

    Args:
        folder: A run folder.
        generations: JSONL with `index` and `text`, one row a question.
        stage: The stage that these generations are of, or `base`; the two go together.

    Returns:
        The run, and why the judge couldn't be asked, for each such stage: the rule has graded it.

    Raises:
        SFTKeyError: The folder is no run, or the file doesn't hold one answer a question.

    >>> run, failures = evaluate_run("runs/gsm8k")
    >>> failures
    []
    """
    from sftkey.evaluation.stage import grade_stage, refuse_unready_judge

    recipe = evaluated_recipe(Path(folder), generations, stage)
    refuse_unready_judge(recipe)
    from sftkey.evaluation.grading import grade
    from sftkey.training.made_from import ASKS
    from sftkey.training.run import start

    run = start(recipe, Path(folder), grade=grade, uses=ASKS)
    failures = []
    with run.progress:
        for name in run.stages(train=False) if stage is None else [stage]:
            try:
                grade_stage(run, name, generations)
            except JudgeError as error:
                failures.append(error)
    _write_page(run)
    return TrainedRun(folder), failures
