"""A study's results as people read them: a table for each task, and what was shown and what not."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from sftkey.evaluation.stage import MOST_LOSS
from sftkey.evaluation.statistics import CHANCE, gain_text, p_text, score_of
from sftkey.evaluation.thinking import PASSED
from sftkey.study.results import ArmFigures, Detectable, DifferenceToControl, StudyResults

SAME_TIME = 0.1  # of it: what two runs of one length differ by on a machine that others use


def report(
    results: StudyResults,
    pictures: Sequence[str] | None = (),
    title: str = "Results",
    alpha: float | None = None,
) -> str:
    """Return `report.md`.

    `pictures` are files beside it; of none it says how to get them, and with None nothing is said.
    `alpha` adds Score to the tables, alpha * Acc + (1 - alpha) * Fmt.
    """
    lines = [f"# {title}", ""]
    for task in results.tasks:
        for part in (f"## {task}", table(results, task, alpha), " ".join(said(results, task))):
            lines += [part, ""]
        lines += equals(results, task)
        for head, found in LISTS.items():
            if items := found(results, task):
                lines += [f"### {head}", "", *(f"- {item}" for item in items), ""]
    for file in pictures or ():
        lines += [f"![{file.removesuffix('.png')}]({file})", ""]
    if pictures is not None and not pictures:
        how = 'python -m pip install "sftkey[plots]"'
        lines += [f"No pictures: matplotlib isn't installed (`{how}`, then the same command).", ""]
    lines += ["## Where it was measured", "", f"`{results.command}`, {where(results)}"]
    return "\n".join([*lines, "", NOTES, ""])


def where(results: StudyResults) -> str:
    """Say of which commit, hardware and versions the cells are."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    measured = f"commit {results.commit}, {results.hardware}"
    return f"{measured}; {versions}." if versions else f"{measured}."


NOTES = (
    "Intervals are 95% ones over seeds and questions; n is questions x seeds. p is the smallest "
    "alpha whose interval excludes 0, Holm-corrected over the arms; a primary comparison is tested "
    "first, and alone. A difference counts as shown if p is below 0.05 and there are two seeds or "
    "more. Tokens are the trained ones and time that of training, of all stages, the mean over "
    "seeds; the time of those on the first one's hardware."
)


def equals(results: StudyResults, task: str) -> list[str]:
    """Return in Markdown what `equal_arms` finds."""
    lines = []
    for head, found in equal_arms(results, task).items():
        what = table(results, task, arms=found) if len(found) > 1 else ALONE
        lines += [f"### {head}", "", what, ""]
    return lines


ALONE = "No other arm."


def equal_arms(results: StudyResults, task: str) -> dict[str, list[ArmFigures]]:
    """Return what the control's cost bought: the arms with as many steps, and those of its time.

    An arm may stand in both, in one or in none. The time is that of the steps on one kind of
    hardware, and equal within a tenth.
    """
    arms = [arm for arm in results.of(task) if arm.stages]
    control = next((arm for arm in arms if arm.name == results.control), None)
    if control is None:
        return {}
    steps, seconds = control.steps, control.seconds
    at = {}
    if steps:
        head = f"With as many steps as {control.name}: {steps}"
        at[head] = [arm for arm in arms if arm.steps == steps]
    if seconds:
        head = f"In the time of {control.name}: {seconds / 60:.1f} min, give or take a tenth"
        apart = SAME_TIME * seconds
        at[head] = [arm for arm in arms if arm.seconds and abs(arm.seconds - seconds) <= apart]
    return at


PAPERS_ARM, NUM_BEST = "sftkey", 3


def to_confirm(results: StudyResults) -> list[str]:
    """Return the arms that a screening lets through: the paper's, and the three best beside it.

    By the mean accuracy over the tasks; the control goes on anyway.
    """
    arms = [arm for arm in results.arms if arm.stages and arm.name != results.control]
    means = {
        name: fmean(arm.acc for arm in arms if arm.name == name)
        for name in dict.fromkeys(arm.name for arm in arms)
    }
    ranked = sorted(means, key=lambda name: -means[name])
    best = [name for name in ranked if name != PAPERS_ARM][:NUM_BEST]
    return [name for name in ranked if name in (PAPERS_ARM, *best)]


def table(
    results: StudyResults,
    task: str,
    alpha: float | None = None,
    arms: Sequence[ArmFigures] | None = None,
) -> str:
    """Return a task's table in Markdown; `alpha` adds Score; `arms`: those alone."""
    head, *found = rows(results, task, alpha, arms)
    rules = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rules, *found))


def rows(
    results: StudyResults,
    task: str,
    alpha: float | None = None,
    arms: Sequence[ArmFigures] | None = None,
) -> list[list[str]]:
    """Return the rows of a task's table, its head first; the arguments are those of `table`."""
    arms = results.of(task) if arms is None else arms
    columns = dict(COLUMNS)
    if alpha is not None:
        columns[f"Score, alpha {alpha:g}"] = lambda arm: f"{score_of(arm.acc, arm.fmt, alpha):.3f}"
    if any(arm.rates for arm in arms):
        columns |= RATE_COLUMNS
    if any(arm.judge for arm in arms):
        columns["judge: Acc, agreement, kappa"] = _judged
    head = [each.format(control=results.control) for each in columns]
    return [head, *([cell(arm) for cell in columns.values()] for arm in arms)]


def _asked(arm: ArmFigures) -> str:
    of = "" if arm.num_conversations is None else f" in {arm.num_conversations} conversations"
    times = f" x {arm.num_seeds}" if arm.stages or arm.num_seeds > 1 else ""
    return f"{arm.num_questions}{of}{times}"


def _gain(arm: ArmFigures) -> str:
    found = arm.difference_to_control
    return gain_text(found.difference, found.interval).replace(" points", "") if found else ""


def _p(found: DifferenceToControl) -> str:
    return p_text(found.p_holm).removeprefix("p").strip()


def _judged(arm: ArmFigures) -> str:
    if (judge := arm.judge) is None:
        return ""
    kappa = "" if judge.kappa is None else f", {judge.kappa:.2f}"
    return f"{judge.acc:.3f}, {judge.num_agreeing}/{judge.num_judged}{kappa}"


COLUMNS: dict[str, Callable[[ArmFigures], str]] = {
    "arm": lambda arm: arm.name,
    "n": _asked,
    "Acc [95%]": lambda arm: "{:.3f} [{:.3f}, {:.3f}]".format(arm.acc, *arm.acc_interval),
    "Fmt": lambda arm: f"{arm.fmt:.3f}",
    "points more than {control} [95%]": _gain,
    "p": lambda arm: _p(arm.difference_to_control) if arm.difference_to_control else "",
    "tokens": lambda arm: "" if arm.trained_tokens is None else f"{arm.trained_tokens:,}",
    "time": lambda arm: "" if arm.seconds is None else f"{arm.seconds / 60:.1f} min",
}
RATE_COLUMNS: dict[str, Callable[[ArmFigures], str]] = {
    "valid thinkings [95%]": lambda arm: arm.rates["valid"].text() if arm.rates else "",
    "Rpass@1 [95%]": lambda arm: arm.rates[PASSED].text() if arm.rates else "",
}


def said(results: StudyResults, task: str) -> list[str]:
    """Say of one task what was shown and what wasn't, against which control."""
    sentences = [_stated(each) for each in results.detectable_difference if each.task == task]
    if results.primary:
        sentences.append(f"The primary comparison, tested first, is that of {results.primary}.")
    arms = [(arm, arm.difference_to_control) for arm in results.of(task)]
    compared = [(arm, found) for arm, found in arms if found]
    shown, unshown, runs = [], [], []
    for arm, found in compared:
        figures = f"({gain_text(found.difference, found.interval)}, {p_text(found.p_holm)})"
        if found.shown:
            word = "better" if found.difference > 0 else "worse"
            shown.append(f"{arm.name} answers {word} than {results.control} {figures}")
        elif found.num_seeds == 1:
            runs.append(f"{arm.name} against {results.control} {figures}")
        else:
            unshown.append(f"{arm.name} {figures}")
    if shown:
        sentences.append(f"Shown: {'; '.join(shown)}.")
    if unshown:
        sentences.append(
            f"Not shown to be better or worse than {results.control}: {'; '.join(unshown)}. That "
            "is no proof that they are alike."
        )
    if not compared:
        sentences.append(f"Nothing is compared: {results.control} has no cell beside another arm.")
    if runs:
        sentences.append(
            f"Of one seed, so of these two runs and not of two ways of training: {'; '.join(runs)}."
            " Interval and p say nothing of what another seed would give."
        )
    return sentences


def _stated(stated: Detectable) -> str:
    seeds = f"{stated.num_seeds} seed{'s' * (stated.num_seeds != 1)}"
    comparisons = f"{stated.num_arms} comparison{'s' * (stated.num_arms != 1)}"
    if stated.difference is None:
        return (
            f"{stated.num_questions} questions and one seed show nothing of the ways of training."
        )
    source = "estimated from these cells" if stated.estimated else "supposed"
    return (
        f"{stated.num_questions} questions, {seeds} and {comparisons} show a difference of "
        f"{100 * stated.difference:.1f} points in four of five studies ({source}: two runs differ "
        f"on {stated.differing:.0%} of the questions, {stated.by_question:.0%} of it alike in all "
        f"seeds, and their difference by {100 * stated.between_seeds:.1f} points from seed to "
        "seed); smaller ones are likely missed."
    )


def warnings(results: StudyResults, task: str) -> list[str]:
    """Say what is to be minded before anything is believed."""
    found = []
    arms = [arm for arm in results.of(task) if arm.stages]
    most = max((arm.num_seeds for arm in arms), default=0)
    for arm in arms:
        if arm.num_seeds < most:
            found.append(f"{arm.name}: {arm.num_seeds} of {most} seeds are finished.")
        told = arm.thinking
        if told and told.loss and (rise := told.loss[1] - told.loss[0]) > MOST_LOSS:
            found.append(
                f"{arm.name}: the last stage raised the thinking's validation loss by {rise:.4f} "
                "nats a token."
            )
        if told and told.num_made_wrong > told.num_made_right:
            found.append(
                f"{arm.name}: {told.num_made_wrong} right thinkings turned wrong against "
                f"{told.before}, {told.num_made_right} wrong ones right."
            )
        if told and told.valid and told.valid.p < CHANCE:
            found.append(f"{arm.name}: against {told.before}, {told.valid.text()}.")
    if not all(arm.same_questions for arm in arms):
        found.append("Each seed answered other questions, so a question has one flag an arm.")
    if "," in results.commit:
        found.append(f"The cells are of several commits: {results.commit}.")
    return found


def chosen(results: StudyResults, task: str) -> list[str]:
    """List what was chosen on the validation rows, by arm and stage."""
    return [
        f"{arm.name}, {stage}: {', '.join(f'{key} {value:g}' for key, value in values.items())}"
        for arm in results.of(task)
        for stage, values in arm.chosen.items()
    ]


def thinking(results: StudyResults, task: str) -> list[str]:
    """Say of each arm what its last stage did to the thinking, as far as it is known."""
    return [
        f"{arm.name}: {'; '.join(figures)}"
        for arm in results.of(task)
        if (figures := list(_thinking(arm)))
    ]


def _thinking(arm: ArmFigures) -> Iterable[str]:
    if rates := arm.rates:
        forms = ("valid", "empty", "truncated", "missing")
        yield ", ".join(f"{form} {rates[form].rate:.1%}" for form in forms)
    told = arm.thinking
    if told is None:
        return
    if told.num_judged:
        yield f"right {told.num_right} of {told.num_judged}"
    if told.num_compared:
        yield f"identical to {told.before}'s {told.num_identical} of {told.num_compared}"
    if told.mean_length is not None:
        yield f"mean length {told.mean_length:.1f} tokens over {told.num_questions}"
    if told.loss:
        yield "validation loss {:.4f} -> {:.4f} nats a token".format(*told.loss)
    if told.num_judged_following:
        yield f"the answer follows from it {told.num_following} of {told.num_judged_following}"


LISTS = {
    "Warnings": warnings,
    "Chosen on the validation rows": chosen,
    "The thinking": thinking,
}
