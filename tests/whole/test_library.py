"""What `import sftkey` gives: lazy names, each there and documented."""

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from trl import SFTConfig

import sftkey
from tests.support.tiny import made_model, write_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sftkey.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    """A name of the face leads to an object that says what it is."""
    assert getattr(sftkey, name).__doc__
    assert name in dir(sftkey)


def test_an_unknown_name_is_none_of_ours() -> None:
    """A name that isn't there raises what Python's own modules raise."""
    with pytest.raises(AttributeError, match=r"^module 'sftkey' has no attribute 'load_recipes'$"):
        _ = sftkey.load_recipes


def test_examples_become_rows_that_train_on_the_key(tiny_folder: Path) -> None:
    """Renderer, rows and collator need no recipe; the rows have what any `Dataset` has."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    renderer = sftkey.Renderer.read(tokenizer)
    rows = sftkey.tokenize([sftkey.Example("2 + 2?", "2 and 2 make 4.", "4")], renderer)
    assert rows.column_names == ["input_ids", "segment_ids", "index"]
    labels = sftkey.KeyCollator(tokenizer, loss_on="key")(list(rows))["labels"][0]
    by_id = sftkey.KeyCollator(tokenizer.pad_token_id, loss_on="key")(list(rows))["labels"][0]
    assert labels.tolist() == by_id.tolist()
    assert tokenizer.decode(labels[labels != -100]) == "\n<Answer>\n4\n</Answer><|im_end|>"


def test_examples_that_give_no_row_are_all_named(tiny_folder: Path) -> None:
    """No example is dropped without a word: each has its place and its reason."""
    renderer = sftkey.Renderer.read(AutoTokenizer.from_pretrained(tiny_folder))
    examples = [sftkey.Example("2 + 2?", "so", text) for text in ("<|im_end|>", "4", "<|im_end|>")]
    with pytest.raises(sftkey.DataError, match="special token") as refused:
        sftkey.tokenize(examples, renderer)
    assert [each.where for each in refused.value.problems] == ["examples[0]", "examples[2]"]


def test_a_tokenizer_without_padding_is_refused(tiny_folder: Path) -> None:
    """The collator says what to set before any batch is made."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.pad_token = None
    with pytest.raises(sftkey.ModelError, match="expected a tokenizer with a padding token") as it:
        sftkey.KeyCollator(tokenizer)
    assert it.value.hint == "set tokenizer.pad_token = tokenizer.eos_token"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """Be in a folder with a recipe, its rows, its trained run, and a model of somebody's."""
    home = tmp_path_factory.mktemp("home")
    write_recipe(home, tiny_folder).rename(home / "gsm8k.yaml")
    (home / "my-sft").symlink_to(tiny_folder, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        sftkey.train_recipe(sftkey.load_recipe("gsm8k.yaml"), "runs/gsm8k")
        yield home


def test_a_recipe_is_checked_trained_evaluated_and_its_model_asked(home: Path, capfd: Any) -> None:
    """What the commands compute is returned, and stdout stays empty."""
    recipe = sftkey.load_recipe("gsm8k.yaml")
    assert sftkey.check_recipe(recipe).refusals == []
    run, failures = sftkey.evaluate_run(home / "runs" / "gsm8k")
    assert (run.folder, failures) == (home / "runs" / "gsm8k", [])
    assert list(run.stages) == ["completion", "key"]
    assert all((each.adapter / "adapter_config.json").is_file() for each in run.stages.values())
    assert run.results["key"].num_questions == len(run.results["key"].questions)
    reply = run.ask("2 + 2?", max_new_tokens=5)
    assert (reply.text, reply.stopped) == (run.ask("2 + 2?", "key", 5).text, False)
    with pytest.raises(sftkey.RunError, match="expected one of base, completion, key"):
        run.ask("2 + 2?", stage="keys")
    assert capfd.readouterr().out == ""


def test_a_model_is_diagnosed(home: Path) -> None:
    """From its name and rows alone."""
    figures, verdict = sftkey.diagnose_model("my-sft", "rows.jsonl", 3)
    assert figures.num_rows == 3
    assert verdict.sentence


def examples_of(name: str) -> list[doctest.DocTest]:
    """Return the examples in a name's docstring; an error's stand in its base class."""
    thing = getattr(sftkey, name)
    if isinstance(thing, type) and issubclass(thing, sftkey.SFTKeyError):
        thing = sftkey.SFTKeyError
    found = doctest.DocTestFinder(recurse=False).find(thing, name)
    return [each for each in found if each.examples]


@pytest.mark.parametrize("name", sftkey.__all__)
def test_the_example_of_every_name_holds(name: str, home: Path, tiny_tokenizer: Any) -> None:
    """Each has one, which runs in a folder with a recipe, a model and a tokenizer."""
    renderer = sftkey.Renderer.read(tiny_tokenizer)
    examples = [sftkey.Example("2 + 2?", "2 and 2 make 4.", "4")]
    found = examples_of(name)
    assert found
    for each in found:
        each.globs |= {
            "sftkey": sftkey,
            "SFTConfig": SFTConfig,
            "tokenizer": tiny_tokenizer,
            "model": made_model(tiny_tokenizer),
            "rows": sftkey.tokenize(examples, renderer),
        }
        assert doctest.DocTestRunner().run(each).failed == 0


def test_the_doctest_holds() -> None:
    """The example in the package's docstring is true."""
    assert doctest.testmod(sftkey) == (0, 3)


def test_types_are_shipped() -> None:
    """A type checker reads our annotations."""
    assert (ROOT / "sftkey" / "py.typed").is_file()
    assert '"sftkey" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()
