"""What a study is going to cost: cells, steps, tokens and time, before anything is trained."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from sftkey.files import read_json, value_hash
from sftkey.memory_plan.plan import RESERVED_BYTES, gib, peak_bytes
from sftkey.recipe.schema import StageSection
from sftkey.recipe.stages import num_stage_epochs, num_stage_steps, prefix_key
from sftkey.study.results import FinishedCell
from sftkey.study.run import StudyRun
from sftkey.study.seeds import MOST_SEEDS, seeds_needed
from sftkey.study.summary import stated, supposed_of
from sftkey.study.tasks import Cell
from sftkey.tables import FittedTable
from sftkey.training.log import clock


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a cell; a shared one is trained in an earlier cell and costs nothing here."""

    name: str
    num_steps: int
    num_tokens: int
    shared: bool
    paced_as: str = ""  # another stage, where this one ends by that one's time


@dataclass(frozen=True)
class PlannedCell:
    """One cell; `seconds` is None where no finished cell tells how fast this machine is."""

    cell: Cell
    finished: bool
    stages: tuple[PlannedStage, ...]
    seconds: float | None
    num_questions: int
    questions_sha256: str

    def left(self, count: str) -> int:
        """Count `num_steps` that are still to be trained, or `num_tokens` that they read."""
        stages = () if self.finished else self.stages
        return sum(getattr(each, count) for each in stages if not each.shared)


def plan(run: StudyRun) -> list[PlannedCell]:
    """Plan all cells; nothing is trained, and what isn't chosen yet is as in the recipes."""
    cells = list(run.cells(choose=False))
    finished = [cell for cell in cells if run.folder.record(cell).exists()]
    pace = Pace([read_json(run.folder.record(cell)) for cell in finished])
    seen: set[str] = set()
    planned = []
    for cell in cells:
        prepared, stages = run.rows(cell.recipe), list[PlannedStage]()
        num_rows, tokens = len(prepared.train), sum(prepared.counts["tokens"]["train"].values())
        for number, stage in enumerate(cell.recipe.stages, start=1):
            trainer, key = cell.recipe.stage_trainer(stage), prefix_key(cell.recipe, number)
            steps = num_stage_steps(trainer, num_rows, 1)
            read = round(num_stage_epochs(trainer, num_rows, 1) * tokens)
            planned_stage = PlannedStage(stage.name, steps, read, key in seen)
            stages.append(_by_time(stage, planned_stage, stages))
            seen.add(key)
        done = cell in finished
        seconds = 0.0 if done else pace.seconds(cell, stages)
        asked = prepared.questions(cell.recipe)
        questions = value_hash([(each.index, each.prompt, each.answer) for each in asked])
        planned.append(PlannedCell(cell, done, tuple(stages), seconds, len(asked), questions))
    return planned


def _by_time(
    stage: StageSection, planned: PlannedStage, before: Sequence[PlannedStage]
) -> PlannedStage:
    """Return a stage that ends by another's time as if it were that one, so many times as long."""
    stop = stage.early_stop
    for each in before:
        if stop is not None and each.name == stop.as_long_as:
            steps, read = (round(stop.times * n) for n in (each.num_steps, each.num_tokens))
            return replace(planned, num_steps=steps, num_tokens=read, paced_as=each.name)
    return planned


class Pace:
    """How fast the finished cells were, by their files' contents."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records
        around = 0.0  # what a cell took beside the stages that it trained itself
        for record in records:
            shared = record["shared_from"]
            own = sum(each for name, each in record["seconds"].items() if not shared[name])
            around += max(record["wall_seconds"] - own, 0.0)
        self.overhead = around / max(len(records), 1)

    def seconds(self, cell: Cell, stages: Iterable[PlannedStage]) -> float | None:
        """Guess the seconds of a cell: its training, and what loading and answers took before."""
        total = self.overhead
        for stage in stages:
            rate = self._rate(cell.task, stage.paced_as or stage.name)
            if rate is None:
                return None
            total += 0.0 if stage.shared else stage.num_tokens / rate
        return total

    def _rate(self, task: str, stage: str) -> float | None:
        """Return the tokens a second of such a stage on this task, else of whatever was trained."""
        timed = [
            (record["task"] == task and name == stage, record["tokens"][name], seconds)
            for record in self.records
            for name, seconds in record["seconds"].items()
            if seconds
        ]
        rows = [row for row in timed if row[0]] or timed
        return float(sum(row[1] for row in rows) / sum(row[2] for row in rows)) if rows else None


def to_choose(run: StudyRun) -> list[str]:
    """Say by task how many runs choose before the cells are trained."""
    choice = run.study.choose
    if choice is None:
        return []
    more = f"; where a value at the grid's edge is best, up to {choice.max_rounds} more rounds"
    left = {task.name: run.choices(task).num_left() for task in run.tasks}
    return [
        f"{task}: {count} more runs, on up to {choice.num_rows} rows each, choose on the "
        f"validation rows first{more if choice.max_rounds else ''}"
        for task, count in left.items()
        if count
    ]


def rendered(planned: list[PlannedCell], notes: Sequence[str] = ()) -> RenderableType:
    """Return the plan as a table and sentences, with notes on choices, memory and promises."""
    table = FittedTable("task, arm, seed", ("stages and their steps", "tokens", "time"))
    for each in planned:
        cell, stages = each.cell, ", ".join(map(_stage, each.stages))
        time = "finished" if each.finished else clock(each.seconds)
        name = f"{cell.task} {cell.arm} {cell.seed}"
        table.add([name, stages, str(each.left("num_tokens")), time])
    times = [each.seconds for each in planned]  # 0 of a finished one
    known = None if None in times else sum(time for time in times if time is not None)
    counts = ("num_steps", "num_tokens")
    steps, tokens = (sum(each.left(count) for each in planned) for count in counts)
    sentence = (
        f"{len(planned)} cells, {sum(each.finished for each in planned)} of them finished; "
        f"{steps} steps and {tokens} tokens to train; time: {clock(known)}"
    )
    return Group(table, *map(Text, (sentence, *notes)))


def memory(planned: list[PlannedCell]) -> list[str]:
    """Say how much memory the largest stage of the unfinished cells needs, where that is planned.

    What isn't known of a model, because its config would have to be fetched, is left out.
    """
    arms = {(each.cell.task, each.cell.arm): each.cell for each in planned if not each.finished}
    peaks = {key: peak for key, cell in arms.items() if (peak := peak_bytes(cell.recipe))}
    if not peaks:
        return []
    task, arm = max(peaks, key=lambda key: peaks[key])
    return [
        f"memory on a GPU: {gib(peaks[task, arm])} GiB at the peak of {task} {arm}, the largest of "
        f"those planned ({len(peaks)} of {len(arms)} arms), and {gib(RESERVED_BYTES)} GiB set aside"
    ]


def promised(run: StudyRun, planned: list[PlannedCell]) -> list[str]:
    """State by task which difference the study can show, and how many seeds its wish needs.

    What is supposed comes from the study's finished cells, as soon as an arm has two seeds.
    """
    return [
        _promised(run, task, [each for each in planned if each.cell.task == task])
        for task in dict.fromkeys(each.cell.task for each in planned)
    ]


def _promised(run: StudyRun, task: str, planned: list[PlannedCell]) -> str:
    study, num_seeds = run.study, len(run.study.seeds)
    records = [run.folder.record(each.cell) for each in planned if each.finished]
    cells = [FinishedCell.model_validate_json(file.read_bytes()) for file in records]
    supposed = supposed_of(cells, study.control)
    num_questions = min(each.num_questions for each in planned)
    same = len({each.questions_sha256 for each in planned}) == 1
    num_arms = 1 if study.primary else max(len(study.arms) - 1, 1)
    found = stated(task, num_questions, num_seeds, num_arms, supposed, same)
    shown = "one seed shows nothing of the ways of training"
    if found.difference is not None:
        points = f"{100 * found.difference:.1f} points"
        shown = f"a difference of {points} would be shown by four of five such studies"
    needed = seeds_needed(
        study.wish / 100, num_questions, supposed, num_arms=num_arms, same_questions=same
    )
    return (
        f"{task}: {num_questions} questions, seeds: {num_seeds}, comparisons: {num_arms}; {shown}; "
        f"for a difference of {study.wish:g} points it takes "
        f"{needed or f'more than {MOST_SEEDS}'} seeds (supposing that the difference varies by "
        f"{100 * found.between_seeds:.1f} points from seed to seed: "
        f"{'estimated from finished cells' if supposed else 'a guess'})"
    )


def _stage(stage: PlannedStage) -> str:
    if stage.paced_as and not stage.shared:
        return f"{stage.name} as long as {stage.num_steps} of {stage.paced_as}"
    return f"{stage.name} {'shared' if stage.shared else stage.num_steps}"
