"""README.md and docs/ say what is so: examples run, commands exist, nothing is stale."""

import ast
import json
import operator
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from sftkey.adapt.data import choose_data
from sftkey.cli import app, main
from sftkey.data.examples import RowOptions
from sftkey.data.response import Example
from sftkey.data.sources import with_defaults
from sftkey.data.splits import Splits, load_splits
from sftkey.recipe import Recipe, load_recipe
from tests.support.tiny import made_rows

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass
class Layout:
    """One example of the gallery: files, the recipe's lines, and what is read from them."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    recipe: str = ""
    shown: dict[str, str] = field(default_factory=dict)


def layouts() -> Iterator[Layout]:
    """Read the gallery; a section may have several examples one after another."""
    text = (DOCS / "data-formats.md").read_text(encoding="utf-8")
    for section in re.split(r"^#{2,3} ", text, flags=re.MULTILINE)[1:]:
        layout = Layout(section.partition("\n")[0])
        for kind, title, body in FENCE.findall(section):
            if layout.recipe and not (kind == "text" and title in ("read as", "rows")):
                yield layout
                layout = Layout(layout.title)
            if kind == "yaml":
                layout.recipe = body
            elif title in ("read as", "rows"):
                layout.shown[title] = body
            else:
                layout.files[title] = body
        if layout.recipe:
            yield layout


ALL = list(layouts())
HUB = [layout for layout in ALL if layout.title == "A data set of the hub"]
GALLERY = [layout for layout in ALL if layout not in HUB]


def recipe_with(lines: str) -> Recipe:
    """Load a recipe that has these lines of an example."""
    recipe: dict[str, Any] = {
        "name": "gallery",
        "model": {"name_or_path": "model"},
        "lora": {},
        "data": {"source": "my.jsonl"},
        "stages": [{"name": "key", "loss_on": "key"}],
        **yaml.safe_load(lines),
    }
    Path("gallery.yaml").write_text(yaml.safe_dump(recipe))
    return load_recipe("gallery.yaml")


def read(layout: Layout) -> Splits:
    """Write an example's files into this folder, and read its rows."""
    for name, body in layout.files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(body, encoding="utf-8")
    recipe = recipe_with(layout.recipe)
    return load_splits(recipe.data, recipe.seed, RowOptions.of(recipe))


def written(example: Example) -> str:
    """Write an example as the gallery does."""
    prompt = example.prompt
    messages = [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt
    lines = [f"{each['role']}: {each['content']}" for each in messages]
    thinking = f"thinking: {example.thinking}".rstrip()
    return "\n".join([*lines, thinking, f"answer: {example.answer}\n"])


TITLE = operator.attrgetter("title")


@pytest.mark.parametrize("layout", GALLERY, ids=TITLE)
def test_every_layout_of_the_gallery_is_read_as_it_says(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and recipe lines give the very examples, or counts, that stand below them."""
    monkeypatch.chdir(tmp_path)
    if "reasoning_gym" in layout.recipe:
        pytest.importorskip("reasoning_gym")
    splits = read(layout)
    if "rows" in layout.shown:
        names = ("train", "validation", "test")
        counts = ", ".join(f"{name} {len(getattr(splits, name))}" for name in names)
        assert counts + "\n" == layout.shown["rows"]
    else:
        assert "\n".join(map(written, splits.train)) == layout.shown["read as"]


def test_the_gallery_is_whole() -> None:
    """Every example is found, and shows what is read from it."""
    assert (len(GALLERY), len(HUB)) == (32, 2)
    assert all(layout.shown for layout in GALLERY)


# Layouts of which adapt can't tell the lines, and asks.
ASKED = {
    "Several columns in one text",
    "Options, and the place of an answer",
    "Options of any number",
    "A regular expression of your own",
    "Messages as the prompt alone",
    "Rows without an answer",
}
# Their lines are a wish that no row shows.
WISHED = {"A system message", "Every assistant turn"}


@pytest.mark.parametrize(
    "layout",
    [
        each
        for each in GALLERY
        if each.files and "read as" in each.shown and each.title not in WISHED
    ],
    ids=TITLE,
)
def test_adapt_finds_the_lines_of_a_layout_or_asks(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes reads the very examples that stand below them, and nothing is guessed."""
    monkeypatch.chdir(tmp_path)
    for name, body in layout.files.items():
        Path(name).write_text(body, encoding="utf-8")
    choice = choose_data(next(iter(layout.files)), seed=0, plain=False)
    assert bool(choice.undecided) == (layout.title in ASKED)
    if not choice.undecided:
        assert choice.own == (layout.title == "Answers alone")
        assert "\n".join(map(written, choice.examples)) == layout.shown["read as"]


def test_the_short_name_of_a_hub_data_set_is_the_long_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`source: gsm8k` stands for the lines beside it, the number of rows left out."""
    monkeypatch.chdir(tmp_path)
    long, short = (recipe_with(layout.recipe).data for layout in HUB)
    assert with_defaults(short) == long.model_copy(update={"num_rows": None})


# What the walk runs, in this order and once each, with a tiny model in the place of these names.
MODELS = ("Qwen/Qwen2.5-1.5B-Instruct", "my-sft-model")
# Commands that another test runs, or of which it runs what they do.
RUN_BY = {
    'python -m pip install -e ".[test]" && python -m pytest': (
        "test_the_script_reads_the_readmes_test_command"  # and .ci/run runs what it reads
    ),
    "python -m pip install -e .": "test_an_editable_install_finds_the_checkouts_recipes",
    "sftkey show recipes/smollm2-135m/demo.yaml --rows 1": "test_the_readmes_row_is_the_demos",
    "sftkey ls": "test_the_counts",
}
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, wanted: str) -> list[str]:
    """Read the fenced blocks of a kind on a page."""
    text = page.read_text(encoding="utf-8")
    return [body for kind, _, body in FENCE.findall(text) if kind == wanted]


def lines(page: Path) -> list[str]:
    """Read the commands on a page, comments left out."""
    found = [
        line.partition(" #")[0].strip()
        for body in blocks(page, "bash")
        for line in body.splitlines()
    ]
    return [line for line in found if line]


NOT_RUN = DOCS / "not-run.md"
SHOWN = list(dict.fromkeys(line for page in PAGES if page != NOT_RUN for line in lines(page)))
WALK = [line for line in SHOWN if line not in RUN_BY and line not in lines(NOT_RUN)]


def arguments(command: str) -> list[str]:
    """Return the words behind `sftkey` that a command comes down to; none if it isn't ours."""
    words = shlex.split(command)
    if words[0] == "sftkey":
        return words[1:]
    if "sftkey.train" in words:
        return ["train", *words[words.index("sftkey.train") + 1 :]]
    return []


@pytest.mark.parametrize("line", [*SHOWN, *lines(NOT_RUN)])
def test_every_command_is_one_that_exists(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, options, recipe and changes of a command in a bash block are accepted."""
    monkeypatch.chdir(ROOT)
    for command in line.split(" && "):
        words = shlex.split(command)
        files = [word for word in words if word.startswith(("recipes/", "accelerate_", "tests/"))]
        assert [file for file in files if not Path(file).exists()] == []
        asked = arguments(command)
        if asked:
            context = COMMANDS[asked[0]].make_context(asked[0], asked[1:])
            recipe = context.params.get("recipe")
            if recipe is not None and recipe.exists():
                load_recipe(recipe, context.params["overrides"] or ())
        elif words[:4] == ["python", "-m", "pip", "install"]:
            (extra,) = re.findall(r"^\.(?:\[(\w+)\])?$", words[-1])
            assert not extra or f"\n{extra} = [" in Path("pyproject.toml").read_text()
        else:
            assert words[:3] == ["python", "-m", "pytest"] or words[0] == "python"


def test_every_command_inside_a_sentence_has_its_options() -> None:
    """A command in running text, `RECIPE` and `…` and all, names no option that isn't there."""
    found = 0
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for name, rest in re.findall(r"`sftkey ([a-z]+)([^`]*)`", text):
            options = {option for each in COMMANDS[name].params for option in each.opts}
            asked = set(re.findall(r"(?<=\s)--?[a-z][\w-]*", rest)) - {"--help"}
            assert asked <= options, (page.name, name, rest)
            found += 1
    assert found > 30


def test_every_command_is_run_by_a_test_or_listed_as_not_run() -> None:
    """The tests that are named exist; what is listed as not run isn't run by the walk."""
    files = ROOT.glob("tests/**/test_*.py")
    tests = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert set(RUN_BY.values()) <= tests
    assert set(RUN_BY) <= set(SHOWN)
    assert [line for line in WALK if not line.startswith("sftkey ")] == []
    assert all("recipes/" not in line for line in WALK)


def test_the_commands_run_one_after_another(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file of rows to a merged model, as the pages say it, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sftkey.adapt.adapt.NUM_PROOF_ROWS", 100)
    rows = "".join(json.dumps(row) + "\n" for row in made_rows(24))
    Path("my.jsonl").write_text(rows)
    for line in WALK:
        for name in MODELS:
            line = line.replace(name, str(tiny_folder))
        with pytest.raises(SystemExit) as end:
            main(arguments(line))
        assert end.value.code in (0, None), line
    assert Path("mine-merged", "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_piece_of_a_recipe_loads(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The YAML of every page is a recipe's, or a section of one."""
    monkeypatch.chdir(tmp_path)
    for body in blocks(page, "yaml"):
        recipe_with(body)


def test_the_examples_have_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key of recipe and study has its type in words, a sentence, and an example that loads."""
    monkeypatch.syspath_prepend(str(DOCS))
    import hooks

    from sftkey.study.schema import Study, load_study
    from sftkey.study.tasks import arm_recipe, tasks_of

    for file in sorted((DOCS / "examples").glob("[0-9]*.yaml")):
        load_recipe(file)
    study = load_study(DOCS / "examples" / "study.yaml")
    for task in tasks_of(study, DOCS / "examples"):
        for arm in study.arms:
            arm_recipe(study, task, arm, seed=1)
    keys = [
        (place + name, *hooks.described(section)[name])
        for model in (Recipe, Study)
        for place, section in hooks.sections(model)
        for name in section.model_fields
    ]
    assert len(keys) > 60
    assert [key for key, kind, sentence in keys if not kind or not sentence.endswith(".")] == []
    assert [key for key, *_ in keys if not hooks.example_of(key)] == []
    (reference, *_) = blocks(DOCS / "recipe-reference.md", "yaml")
    assert reference == (DOCS / "examples" / "1-gsm8k.yaml").read_text()


def sentences(file: Path) -> Iterator[str]:
    """Read the texts in a module that aren't docstrings; what is put in is `…`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", "") for part in node.values]
            yield "".join(part if isinstance(part, str) else "…" for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_of_the_faq_is_one_of_ours() -> None:
    """What the page quotes stands in the package's source, with `…` for what is put in."""
    ours = [text for file in (ROOT / "sftkey").rglob("*.py") for text in sentences(file)]
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    quoted = [message for _, message in re.findall(r"^\| (``?)(.+?)\1 \|", text, re.MULTILINE)]
    assert len(quoted) > 60
    for message in quoted:
        parts = [re.escape(part) for part in message.strip().split("…") if part.strip()]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(each) for each in ours), message


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning: every link and anchor leads somewhere, and all that is made can be."""
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "name_or_path" in (tmp_path / "recipe-reference" / "index.html").read_text()
    for page in tmp_path.rglob("*.html"):  # nothing is fetched from elsewhere
        assert re.findall(r"<(?:script|img)[^>]*src=\"https?:", page.read_text()) == []
