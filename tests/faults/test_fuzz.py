"""Whatever a recipe, a row, a chat template or a run folder holds: an error of ours, or none.

The default run tries a few of each; `pytest -m fuzz -n 0` tries 10,000.
"""

import copy
import json
import os
import resource
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftkey.bounds import bounded
from sftkey.data.prepare import prepare
from sftkey.data.renderer import Renderer
from sftkey.data.response import QuestionKey
from sftkey.diagnosis.run import choose_subject
from sftkey.errors import RunError, SFTKeyError, as_told
from sftkey.evaluation.answers import read_generations
from sftkey.evaluation.results import read_results
from sftkey.models.loading import check_template
from sftkey.models.source import find_source
from sftkey.pipeline import open_run
from sftkey.recipe.load import load_recipe
from sftkey.recipe.schema import Recipe, ResponseSection
from sftkey.training import run_folder
from sftkey.training.log import read_log
from sftkey.training.soundness import kept_losses
from tests.support.tiny import CHATML, made_rows, made_tokenizer, write_recipe

Hold = Callable[[st.SearchStrategy[Any], Callable[[Any], object]], None]
SECONDS = 10.0  # for one input: more is a hang
MOST_BYTES = 2 << 30  # of the process, torch included


def runs(few: int, many: int) -> Any:
    """Parametrize a test by the number of its inputs: a few, and under the marker many."""
    marked = pytest.param(many, marks=pytest.mark.fuzz)
    return pytest.mark.parametrize("num", [few, marked])


@pytest.fixture
def hold(num: int, record_property: Callable[[str, object], None]) -> Hold:
    """Try so many inputs, always the same ones: no error but ours, no hang, no endless memory."""
    record_property("tries", num)
    return partial(_hold, num)


def _hold(num: int, inputs: st.SearchStrategy[Any], use: Callable[[Any], object]) -> None:

    def tried(value: Any) -> None:
        with bounded(SECONDS, MOST_BYTES), suppress(SFTKeyError):
            use(value)

    always = settings(
        max_examples=num,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    always(given(inputs)(tried))()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MOST_BYTES


ODD = ["", " ", "null", "~", "-1", "1e999", ".nan", ".inf", "0x1f", "1_000", "2001-01-01", "\x00"]
ODD += ["9" * 5000, "[" * 300, "{a: &b [*b]}", "<<", "!!python/object:os.system x", "\ud7ff", "‮"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from(ODD),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, keys: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to all that a value holds."""
    found = [keys] if keys else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            found += places(inner, (*keys, key))
    return found


@st.composite
def changed(draw: Any, value: Any) -> Any:
    """Change a few of the values that something holds, or their keys."""
    made = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *keys, last = draw(st.sampled_from(places(made)))
        inside = made
        for key in keys:
            inside = inside[key]
        kind = draw(st.sampled_from(["set", "drop", "more"]))
        if kind == "drop" and len(inside) > 1:
            del inside[last]
        elif kind == "more" and isinstance(inside, dict):
            inside[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            inside[last] = draw(VALUES)
        if not places(made):
            break
    return made


@st.composite
def torn(draw: Any, text: bytes) -> bytes:
    """Cut a file, repeat or drop a part of it, or put other bytes into it."""
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, min(len(text), start + 40)))
    put = [b"", text[start:stop] * 2, b"\x00\xff\xfe", b"{[\"'", b"\n- &a [*a", b"9" * 5000]
    middle = draw(st.sampled_from(put))
    kept = draw(st.sampled_from([text[stop:], b""]))
    return text[:start] + middle + kept


@runs(40, 4000)
@pytest.mark.fault("changed or torn input, by the thousand")
def test_recipes(hold: Hold, tmp_path: Path) -> None:
    """Other values and keys, and YAML that is torn."""
    file = write_recipe(tmp_path, tmp_path / "model", rows=2)
    written = file.read_bytes()
    recipe = yaml.safe_load(written)
    recipe["stages"][1] |= {"thinking": "own", "own": {"keep": "right", "samples": 2}}
    told = changed(recipe).map(lambda made: json.dumps(made).encode())

    def use(text: bytes) -> None:
        file.write_bytes(text)
        load_recipe(file)

    hold(st.one_of(told, torn(written)), use)


@runs(12, 1500)
@pytest.mark.fault("changed or torn input, by the thousand")
def test_rows(hold: Hold, tmp_path: Path, tiny_folder: Path) -> None:
    """Rows with other columns and values, and files that are torn, up to their tokens."""
    recipe = load_recipe(write_recipe(tmp_path, tiny_folder), ["data.validation=1", "data.test=1"])
    tokenizer, file = made_tokenizer(), Path(recipe.data.source)
    rows = made_rows(6)
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def lines(made: Any) -> bytes:
        each = made if isinstance(made, list) else [made]
        return "".join(json.dumps(row) + "\n" for row in each).encode("utf-8", "surrogatepass")

    def use(content: bytes) -> None:
        file.write_bytes(content)
        prepare(recipe, tokenizer)

    hold(st.one_of(changed(rows).map(lines), torn(whole)), use)


PIECES = ["{% for m in messages %}", "{% endfor %}", "{{ m }}", "{{ messages[-1].content }}", "{{"]
PIECES += ["{% if add_generation_prompt %}", "{% endif %}", "<|im_start|>", "{{ m['role'] }}", "}}"]
PIECES += ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages | tojson }}", "{# #}", "{%"]
PIECES += ["{{ m.content | trim }}", "{% set x = x + x %}", "{{ x }}", "{{ ''.__class__ }}", "\n"]
PIECES += ["{{ 'x' * 10**9 }}", "{% generation %}", "{% endgeneration %}", "{{ [1][5] }}", "</s>"]
PIECES += ["{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "<|im_end|>", "{{ strftime_now(3) }}"]


@runs(20, 3000)
@pytest.mark.fault("changed or torn input, by the thousand")
def test_templates(hold: Hold) -> None:
    """Templates in pieces, and a right one that is torn."""
    tokenizer = made_tokenizer()
    built = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
    cut = torn(CHATML.encode()).map(lambda made: made.decode(errors="replace"))

    def use(text: str) -> None:
        tokenizer.chat_template = text
        check_template(tokenizer, "template")
        Renderer.read(tokenizer, ResponseSection())

    hold(st.one_of(built, cut), use)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run folder: one stage is trained, and the base model has answered."""
    recipe = load_recipe(write_recipe(tmp_path, tmp_path / "model", rows=2))
    folder = tmp_path / "whole"
    ledger = run_folder.open_run(recipe, folder)
    ledger.adapter(0).mkdir(parents=True)
    (ledger.adapter(0) / "adapter_config.json").write_text('{"r": 4}')
    ledger.log(0).write_text('{"step": 1, "loss": 1.5}\n')
    (ledger.stage_folder(0) / "validation.json").write_text('{"start": [1.0, null]}')
    row = {"index": 0, "turn": 0, "text": "<Answer>\n1\n</Answer>", "num_tokens": 3}
    ledger.generations("base").write_text(json.dumps({**row, "stopped": True}) + "\n")
    (folder / "evaluation" / "base.json").write_text('{"stage": "base", "position": 0}')
    ledger.stages[0].status = "trained"
    ledger.finish(ledger.adapter(0), ledger.log(0), ledger.generations("base"))
    assert ledger.lock is not None
    ledger.lock.release()
    return folder


def look_at(place: Path, recipe: Recipe) -> None:
    """Read a run folder as commands do, which turn what the system refuses into one error."""
    for look in (
        lambda: open_run(place).stages,
        lambda: read_results(place),
        lambda: read_generations(place / "evaluation/base.jsonl", [QuestionKey(0, 0)]),
        lambda: kept_losses(place / "stages/1-completion"),
        lambda: read_log(place / "stages/1-completion/log.jsonl"),
        lambda: run_folder.open_run(recipe, place).lock.release(),  # type: ignore[union-attr]
    ):
        try:
            look()
        except (SFTKeyError, OSError) as error:
            as_told(error)


def looped(path: Path) -> None:
    """Make a link to itself."""
    path.symlink_to(path.name)


@pytest.mark.fault("a folder or file that the system refuses")
@pytest.mark.parametrize("put", [Path.mkdir, looped])
def test_what_is_no_file_in_a_run_folder_ends_with_an_error(
    put: Callable[[Path], object],
    run: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A folder, or a loop of links, in the place of each file."""
    recipe, place = load_recipe(run / "recipe.yaml"), tmp_path / "broken"
    names = [file.relative_to(run) for file in run.rglob("*") if file.is_file()]
    for name in names:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(run, place)
        (place / name).unlink()
        put(place / name)
        look_at(place, recipe)
    record_property("tries", len(names))


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_a_pipe_in_a_run_folder_is_not_waited_for(run: Path) -> None:
    """Whichever file it stands for; commands ask for the recipe first."""
    recipe = load_recipe(run / "recipe.yaml")
    pipe = run / "stages" / "1-completion" / "log.jsonl"
    pipe.unlink()
    os.mkfifo(pipe)
    for look in (
        lambda: open_run(run),
        lambda: read_results(run),
        lambda: choose_subject(str(run), (), None, None, 9),
        lambda: run_folder.open_run(recipe, run),
        lambda: read_generations(pipe, []),  # as another engine would have written them
        lambda: find_source(str(pipe.parent), config_file="validation.json"),  # a model's folder
    ):
        with bounded(SECONDS), pytest.raises(RunError, match="expected a file; got a pipe"):
            look()


@runs(20, 1500)
@pytest.mark.fault("changed or torn input, by the thousand")
def test_run_folders(hold: Hold, run: Path, tmp_path: Path) -> None:
    """A file of it is torn, emptied or gone, or its JSON holds other values."""
    recipe = load_recipe(run / "recipe.yaml")
    files = {
        file.relative_to(run): file.read_bytes()
        for file in run.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    place = tmp_path / "broken"

    @st.composite
    def broken(draw: Any) -> tuple[Path, bytes | None]:
        name = draw(st.sampled_from(sorted(files)))
        kinds = [torn(files[name]), st.just(b""), st.none()]
        if name.suffix == ".json":
            kinds.append(changed(json.loads(files[name])).map(lambda x: json.dumps(x).encode()))
        return name, draw(st.one_of(kinds))

    def use(given: tuple[Path, bytes | None]) -> None:
        name, content = given
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(run, place)
        if content is None:
            (place / name).unlink()
        else:
            (place / name).write_bytes(content)
        look_at(place, recipe)

    hold(broken(), use)
