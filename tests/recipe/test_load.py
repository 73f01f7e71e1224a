"""Recipes: what is taken, what is refused and in which words, and how fast."""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sftkey.errors import RecipeError
from sftkey.recipe.load import changed_keys, load_recipe, recipe_files
from sftkey.recipe.schema import Recipe
from sftkey.recipe.upstream_rules import REFUSED_LORA_KEYS, REFUSED_TRAINER_KEYS

ROOT = Path(__file__).parents[2]
TEXT = """\
name: tiny
model: {name_or_path: some/model}
lora: {r: 4}
data:
  source: gsm8k
trainer:
  learning_rate: 1e-4
stages:
  - {name: completion, loss_on: completion}
  - {name: key, loss_on: key, trainer: {max_steps: 3}}
"""
PACKAGED = "model={name_or_path: 'pypi:a==1', file: a.gguf, sha256: '" + "0a" * 32 + "'}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write the smallest recipe with both stages."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """Return the text of the error, the recipe's own path left out."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(path), "FILE")


# What is taken


def test_defaults_are_filled_in(file: Path) -> None:
    """A recipe that says little is whole after loading."""
    recipe = load_recipe(file)
    assert recipe.model_dump() == {
        "name": "tiny",
        "seed": 42,
        "model": {
            "name_or_path": "some/model",
            "file": None,
            "sha256": None,
            "revision": None,
            "quantization": "nf4",
            "unpack": "auto",
            "dtype": None,
            "attn_implementation": "sdpa",
            "chat_template": None,
            "chat_template_kwargs": {},
            "adapter": None,
        },
        "lora": {"r": 4},
        "data": {
            "source": "gsm8k",
            "config": None,
            "task": None,
            "task_options": {},
            "num_rows": None,
            "prompt": None,
            "thinking": None,
            "answer": None,
            "response": None,
            "split_rule": None,
            "system": None,
            "system_column": None,
            "train": "train",
            "validation": None,
            "test": None,
            "unsplit_rows": "error",
            "overlap": "error",
            "max_length": 1024,
            "too_long": "drop",
            "packing": False,
        },
        "response": {
            "frame": "chat",
            "thinking": ("<Thinking>\n", "\n</Thinking>"),
            "answer": ("\n<Answer>\n", "\n</Answer>"),
            "turns": "last",
            "end": None,
        },
        "trainer": {"learning_rate": 1e-4},
        "stages": (
            {
                "name": "completion",
                "loss_on": "completion",
                "context": "exact",
                "lora": None,
                "grid": None,
                "context_cache": "auto",
                "thinking": "reference",
                "own": None,
                "loss": "nll",
                "trainer": {},
            },
            {
                "name": "key",
                "loss_on": "key",
                "context": "exact",
                "lora": None,
                "grid": None,
                "context_cache": "auto",
                "thinking": "reference",
                "own": None,
                "loss": "nll",
                "trainer": {"max_steps": 3},
            },
        ),
        "eval": {
            "num_questions": 200,
            "max_new_tokens": 512,
            "grader": "exact",
            "batch_size": 16,
            "temperature": 0.0,
            "alpha": 0.7,
        },
    }


@pytest.mark.parametrize(
    "loss_on", ["key", "answer", "{key: 1, end: 2}", "{completion: 1, thinking: 0}"]
)
def test_a_context_may_be_detached_where_it_is_not_trained(file: Path, loss_on: str) -> None:
    """Everything after the thinking can be trained without gradient through it."""
    recipe = load_recipe(file, ["stages.key.context=detached", f"stages.key.loss_on={loss_on}"])
    assert [stage.context for stage in recipe.stages] == ["exact", "detached"]


def test_a_stages_trainer_is_laid_over_the_shared_one(file: Path) -> None:
    """What a stage says wins; what it doesn't say is shared."""
    recipe = load_recipe(
        file, ["stages.key.trainer.learning_rate=2e-5", "trainer.optim=adamw_torch"]
    )
    completion, key = recipe.stages
    assert recipe.stage_trainer(completion) == {"learning_rate": 1e-4, "optim": "adamw_torch"}
    assert recipe.stage_trainer(key) == {
        "learning_rate": 2e-5,
        "optim": "adamw_torch",
        "max_steps": 3,
    }


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("trainer.learning_rate=5e-5", 5e-5),
        ("trainer.learning_rate=1", 1),
        ("trainer.lr_scheduler_kwargs={min_lr: 1e-6}", {"min_lr": 1e-6}),
        ("trainer.report_to=[wandb, tensorboard]", ["wandb", "tensorboard"]),
        ("trainer.max_steps=-1", -1),
        ("trainer.warmup_steps=0.1667", 0.1667),
        ("trainer.save_strategy=no", "no"),
        ("data.max_length=1_024", 1024),
        ("data.system='1. Think. # 2. Answer.'", "1. Think. # 2. Answer."),
        ("trainer.lr_scheduler_type=cosine", "cosine"),
        ("trainer.torch_empty_cache_steps=null", None),
        ("lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("lora.target_modules=all-linear", "all-linear"),
        ("lora.init_lora_weights=pissa_niter_4", "pissa_niter_4"),
        ("lora.init_lora_weights=false", False),
        ("lora.layer_replication=[[0, 4], [2, 5]]", [[0, 4], [2, 5]]),
        ("lora.trainable_token_indices={embed_tokens: [1, 2]}", {"embed_tokens": [1, 2]}),
        ("lora.rank_pattern={q_proj: 8}", {"q_proj": 8}),
        ("stages.key.loss_on=answer", "answer"),
        ("stages.key.loss_on={thinking: 1e-1, key: 1}", {"thinking": 0.1, "key": 1.0}),
        ("data.validation=0.1", 0.1),
        ("data.validation=1e-1", 0.1),
        ("data.test=test.jsonl", "test.jsonl"),
        ("data.split_rule=(?P<thinking>.*)#(?P<answer>.*)", "(?P<thinking>.*)#(?P<answer>.*)"),
        ("data.prompt='{{{question}}}'", "{{{question}}}"),
        ("response.thinking=['', '</think>']", ("", "</think>")),
        ("eval.temperature=1", 1.0),
        ("model.revision=2024-08-06", "2024-08-06"),
        ("model.chat_template_kwargs={enable_thinking: false}", {"enable_thinking": False}),
        ("model.chat_template_kwargs.a.b=1", 1),
    ],
)
def test_values_come_out_as_meant(file: Path, override: str, value: Any) -> None:
    """A number is a number however it is written, a list a list, and text is left as it is."""
    recipe = load_recipe(file, [override]).model_dump()
    found: Any = {**recipe, "stages": {stage["name"]: stage for stage in recipe["stages"]}}
    for key in override.partition("=")[0].split("."):
        found = found[key]
    assert (found, type(found)) == (value, type(value))


def test_a_stage_may_leave_aside_what_other_stages_read(file: Path) -> None:
    """A schedule of its own reads no warm-up that all stages are told; one of its own is idle."""
    overrides = ["trainer.warmup_steps=0.1", "stages.key.trainer.lr_scheduler_type=constant"]
    load_recipe(file, overrides)
    with pytest.raises(RecipeError, match=r"=0\.2: does nothing where lr_scheduler_type is"):
        load_recipe(file, [*overrides, "stages.key.trainer.warmup_steps=0.2"])


def test_a_packaged_model_is_taken(file: Path) -> None:
    """A model inside a package has a file and its hash."""
    model = load_recipe(file, [PACKAGED]).model
    assert (model.name_or_path, model.file, model.sha256) == ("pypi:a==1", "a.gguf", "0a" * 32)


def test_made_rows_are_taken(file: Path) -> None:
    """A task of reasoning-gym has options of its own and a number of rows."""
    made = "data={source: reasoning_gym, task: a, num_rows: 5, task_options: {b: 1}}"
    data = load_recipe(file, [made]).data
    assert (data.task, data.num_rows, data.task_options) == ("a", 5, {"b": 1})


def test_a_mapping_replaces_its_section_and_defaults_fill_it(file: Path) -> None:
    """`data={…}` leaves nothing of the old section behind; a dotted path leaves all else."""
    merged = load_recipe(file, ["data.max_length=9", "data.overlap=drop"]).data
    assert (merged.source, merged.max_length, merged.overlap) == ("gsm8k", 9, "drop")
    replaced = load_recipe(file, ["data.max_length=9", "data={source: my.jsonl}"]).data
    assert (replaced.source, replaced.max_length) == ("my.jsonl", 1024)


def test_a_stage_is_addressed_by_name_else_by_number(file: Path) -> None:
    """`stages.key` and `stages.1` are the same stage; a renamed one has its new name at once."""
    by_name = load_recipe(file, ["stages.key.loss_on=answer"])
    assert by_name == load_recipe(file, ["stages.1.loss_on=answer"])
    renamed = load_recipe(file, ["stages.key.name=last", "stages.last.loss_on=answer"])
    assert [stage.name for stage in renamed.stages] == ["completion", "last"]
    one = load_recipe(file, ["stages=[{name: only, loss_on: key}]"])
    assert [stage.name for stage in one.stages] == ["only"]


def test_a_stage_is_addressed_as_errors_name_it(file: Path) -> None:
    """What an error says of `stages[1]` can be mended under that name."""
    recipe = load_recipe(file, ["stages[1].loss_on=answer"])
    assert [stage.loss_on for stage in recipe.stages] == ["completion", "answer"]
    assert "no stage `2`; the stages are" in refusal(file, "stages[2].loss_on=answer")


def test_an_override_of_null_opens_a_mapping(file: Path) -> None:
    """`lora.r=8` is meant as LoRA even where the recipe had none."""
    overrides = ["lora=null", "model.quantization=none"]
    assert load_recipe(file, overrides).lora is None
    assert load_recipe(file, [*overrides, "lora.r=8"]).lora == {"r": 8}


def test_the_only_stage_being_wrong_is_one_problem(file: Path) -> None:
    """A list whose only item is wrong isn't called too short."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["stages=[{name: key}]"])
    what = "override stages=[{name: key}]: stages[0].loss_on: missing"
    assert str(caught.value) == f"{file}: 1 problem\n  {what}"


def test_recipes_do_not_change(file: Path) -> None:
    """A loaded recipe is frozen."""
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(file).seed = 1


@pytest.mark.parametrize("path", [*recipe_files(ROOT / "recipes")], ids=str)
def test_every_recipe_of_the_project_is_valid(path: Path) -> None:
    """No recipe that comes with sftkey is refused, and its head says how to run it."""
    assert load_recipe(path).stages
    assert f"-m sftkey.train {path.relative_to(ROOT)}\n" in path.read_text()


# The resolved recipe

TEXTS = st.text(max_size=20)
FILLED = st.text(min_size=1, max_size=20)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: name.lower() != "base"
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
WEIGHTS = st.dictionaries(
    st.sampled_from(["prompt", "thinking", "answer_tag", "answer", "end", "completion", "key"]),
    st.floats(0.001, 1e6) | st.integers(1, 9),
    min_size=1,
)
STAGES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"name": NAMES, "loss_on": st.sampled_from(["completion", "key", "answer"]) | WEIGHTS},
    optional={"trainer": st.fixed_dictionaries({"learning_rate": st.floats(0, 1)})},
)
RECIPES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "name": NAMES,
        "model": st.fixed_dictionaries(
            {"name_or_path": FILLED.filter(lambda text: not text.startswith("pypi:"))},
            optional={
                "revision": FILLED,
                "chat_template_kwargs": st.dictionaries(TEXTS, VALUES, max_size=3),
            },
        ),
        "lora": st.fixed_dictionaries(
            {}, optional={"r": st.integers(1, 99), "bias": st.just("all")}
        ),
        "data": st.fixed_dictionaries(
            {"source": FILLED.filter(lambda text: text not in ("reasoning_gym", "made"))},
            optional={
                "system": TEXTS,
                "validation": st.none() | st.integers(1) | st.floats(0.01, 0.4),
                "test": st.none() | st.integers(1) | st.floats(0.01, 0.4) | st.just("held out"),
            },
        ),
        "stages": st.lists(STAGES, min_size=1, unique_by=lambda stage: stage["name"].lower()),
    },
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "response": st.fixed_dictionaries({"thinking": st.tuples(TEXTS, TEXTS).map(list)}),
        "trainer": st.fixed_dictionaries(
            {"max_steps": st.integers(1)},
            optional={"lr_scheduler_kwargs": st.dictionaries(TEXTS, FLOATS, max_size=2)},
        ),
        "eval": st.fixed_dictionaries({"alpha": st.floats(0, 1)}),
    },
)


def loaded(text: str) -> Recipe:
    """Load a recipe from its text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)


@settings(max_examples=60)
@given(RECIPES)
def test_a_resolved_recipe_is_the_same_recipe(plain: dict[str, Any]) -> None:
    """Whatever a recipe holds, what a run folder gets of it loads to an equal one."""
    recipe = loaded(yaml.safe_dump(plain))
    again = loaded(recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert changed_keys(recipe, again) == []


HUB = ROOT / "recipes/smollm2-135m/gsm8k.yaml"
RESOLVED = load_recipe(HUB).model_dump()
PLACES = [
    *RESOLVED,
    *(f"{name}.{key}" for name, part in RESOLVED.items() if isinstance(part, dict) for key in part),
    *("stages.key", "stages.key.name", "stages.key.loss_on", "stages.0.trainer", "stages.0.x"),
]


@settings(max_examples=150)
@given(st.sampled_from(PLACES), VALUES)
def test_no_value_escapes_the_check(place: str, value: Any) -> None:
    """Whatever stands at whichever key, the answer is a recipe or a RecipeError."""
    override = f"{place}={yaml.safe_dump(value, default_flow_style=True)}"
    with contextlib.suppress(RecipeError):
        recipe = load_recipe(HUB, [override])
        assert loaded(recipe.to_yaml()) == recipe


def test_changed_keys_are_named_as_overrides_name_them(file: Path) -> None:
    """A stage goes by its name, a value that is a mapping on one side only is one change."""
    changes = {
        "seed=1": ["seed"],
        "trainer.optim=sgd": ["trainer.optim"],
        "stages.key.loss_on={key: 1}": ["stages.key.loss_on"],
        "stages.key.trainer={}": ["stages.key.trainer.max_steps"],
        "trainer.torch_empty_cache_steps=null": ["trainer.torch_empty_cache_steps"],
        "stages.key.name=last": ["stages"],
        "response.answer=['', '']": ["response.answer"],
    }
    old = load_recipe(file)
    for override, keys in changes.items():
        assert changed_keys(old, load_recipe(file, [override])) == keys
    full = load_recipe(file, ["lora=null", "model.quantization=none"])
    assert changed_keys(old, full) == ["model.quantization", "lora"]


def test_a_grid_reads_its_rates_as_numbers(file: Path) -> None:
    """YAML has text where it says 5e-5."""
    grid = "{learning_rate: [5e-5, 1.0e-4], r: [2, 4]}"
    (_, stage) = load_recipe(file, [f"{FROZEN}, grid: {grid}}}"]).stages
    assert stage.grid == {"learning_rate": [5e-5, 1e-4], "r": [2, 4]}


# What is refused

WORDS = "expected completion, key, answer or weights"
DETACHED = "detached gives no gradient to what `loss_on` trains here"
EXACT = "write exact, or loss_on: key"
OF_FROZEN = "only with `context: frozen`, which trains an adapter of its own"
FROZEN = "stages.key={name: key, context: frozen, loss_on: key"
ROWS = "expected a number of rows, a share below 1, a split or a file"
RULE = (
    "expected think_tags, boxed, hash_marks or a regular expression with groups thinking and answer"
)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        # unknown and missing keys
        ("stages.key.trainer.learning_rte=1", "unknown key; did you mean `learning_rate`?"),
        ("trainer.zzz=1", "unknown key; it is no field of trl.SFTConfig"),
        ("lora.lora_alfa=1", "unknown key; did you mean `lora_alpha`?"),
        ("lora.zzz=1", "unknown key; it is no field of peft.LoraConfig"),
        ("eval.num_question=1", "unknown key; did you mean `num_questions`?"),
        (
            "stages.key.loss=dtf",
            "expected nll, dft, eaft or module:function; got 'dtf'; did you mean `dft`?",
        ),
        (
            "stages.key.zzz=1",
            "unknown key; the keys here are name, loss_on, context, lora, grid, context_cache, "
            "key_batch_tokens, thinking, own, anneal, loss, kl, early_stop, trainer",
        ),
        (
            "trainr.max_steps=1",
            "unknown key; did you mean `trainer`?",
        ),
        (
            "grid={}",
            "unknown key; the keys here are name, seed, model, lora, data, response, trainer, "
            "stages, eval",
        ),
        ("model={}", "model.name_or_path: missing"),
        ("stages.key={name: key}", "stages[1].loss_on: missing"),
        # types
        ("name=3", "expected text; got 3 (text is written in quotes)"),
        ("name=", "expected text; got nothing"),
        ("model=3", "expected a mapping; got 3"),
        ("lora=all", "expected a mapping; got 'all'"),
        ("stages=key", "expected a list; got 'key'"),
        ("stages=[]", "expected at least one item; got []"),
        ("seed=1.5", "expected a whole number; got 1.5"),
        ("seed='1'", "expected a whole number; got '1'"),
        ("seed=true", "expected a whole number; got true"),
        ("seed=-1", "expected 0 or more; got -1"),
        ("seed=4294967296", "expected a number below 4294967296; got 4294967296"),
        ("eval.alpha=much", "expected a number; got 'much'"),
        ("eval.alpha=1e400", "expected a number; got '1e400'"),
        ("eval.alpha=2", "expected 1 or less; got 2"),
        ("data.packing=maybe", "expected true or false; got 'maybe'"),
        ("data.system=[]", "expected text; got []"),
        ("data.source=''", "expected text that isn't empty; got ''"),
        ("data.too_long=trim", "expected drop, trim_thinking or error; got 'trim'"),
        (
            "eval.grader=numbr",
            "expected number, choice, exact or math; got 'numbr'; did you mean `number`?",
        ),
        ("response.answer=[a]", "expected two items; got ['a']"),
        ("response.answer=[a, b, c]", "expected two items; got ['a', 'b', 'c']"),
        (
            "response.answer=[a, 3]",
            "response.answer[1]: expected text; got 3 (text is written in quotes)",
        ),
        # upstream's types
        ("trainer.max_steps=many", "expected a whole number; got 'many'"),
        ("trainer.max_steps=1.5", "expected a whole number; got 1.5"),
        ("trainer.learning_rate=true", "expected a number; got true"),
        ("trainer.learning_rate=null", "expected a number; got nothing"),
        ("trainer.gradient_checkpointing=1", "expected true or false; got 1"),
        ("trainer.report_to=[1]", "expected null, text or a list (each: text); got [1]"),
        ("trainer.parallelism_config={}", "expected null; got {}"),
        (
            "trainer.optim=adamw_torhc",
            "expected one of 41 names; got 'adamw_torhc'; did you mean `adamw_torch`?",
        ),
        ("trainer.eval_strategy=never", "expected no, steps or epoch; got 'never'"),
        ("lora.bias=some", "expected none, all or lora_only; got 'some'"),
        ("lora.runtime_config={}", "expected nothing that YAML can hold; got {}"),
        (
            "lora.layer_replication=[[1]]",
            "expected a list (each: a list of a whole number and a whole number) or null; "
            "got [[1]]",
        ),
        # limits
        ("trainer.num_train_epochs=0", "expected a number above 0; got 0"),
        ("trainer.max_steps=0", "expected a whole number above 0, or -1 for none; got 0"),
        ("trainer.per_device_train_batch_size=0", "expected a whole number above 0; got 0"),
        ("trainer.learning_rate=-1e-3", "expected 0 or a number above; got '-1e-3'"),
        ("lora.lora_dropout=1", "expected a number from 0 to below 1; got 1"),
        (
            "trainer.per_device_train_batch_size=1" + "0" * 20,
            "expected a whole number above 0; got 1" + "0" * 20,
        ),
        ("trainer.adam_beta1=1.5", "expected a number from 0 to below 1; got 1.5"),
        ("trainer.dataloader_num_workers=-1", "expected 0 or a number above; got -1"),
        ("trainer.neftune_noise_alpha=0", "expected a number above 0; got 0"),
        ("trainer.pad_to_multiple_of=-8", "expected a whole number above 0, or auto; got -8"),
        (
            "trainer.log_level=foo",
            "expected one of detail, debug, info, warning, error, critical, passive; got 'foo'",
        ),
        (
            "lora.rank_pattern={q_proj: 0}",
            "expected a whole number above 0 for each name; got {'q_proj': 0}",
        ),
        (
            "lora.alpha_pattern={q_proj: b}",
            "expected a number above 0 for each name; got {'q_proj': 'b'}",
        ),
        ("lora.trainable_token_indices=[]", "expected ids of the vocabulary, or null; got []"),
        ("data.max_length=0", "expected 1 or more; got 0"),
        # our own fields
        (
            "name=a/b",
            "expected letters, digits, `.`, `-` and `_`, since a folder gets this name; got 'a/b'",
        ),
        ("stages.key.name='7'", "expected a name that isn't a number; got '7'"),
        ("stages.key.name=base", "`base` is the model before all stages; write another name"),
        (
            "stages.key.name=a.b",
            "expected letters, digits, `-` and `_`, since files get this name; got 'a.b'",
        ),
        *(
            (f"{key}={'a' * 101}", f"expected text of at most 100 characters; got '{'a' * 56}...")
            for key in ("name", "stages.key.name")
        ),
        ("stages.key.name=Completion", "stages[0] has this name, too; write another"),
        ("stages.key.loss_on=answers", f"{WORDS}; got 'answers'; did you mean `answer`?"),
        ("stages.key.loss_on=3", f"{WORDS}; got 3"),
        (
            "stages.key.loss_on={anser: 1}",
            "no segment or group has the name `anser`; did you mean `answer`?",
        ),
        (
            "stages.key.loss_on={zzz: 1}",
            "no segment or group has the name `zzz`; there are prompt, thinking, answer_tag, "
            "answer, end, completion, key",
        ),
        ("stages.key.loss_on={key: -1}", "expected 0 or a number above as weight of `key`; got -1"),
        (
            "stages.key.loss_on={key: true}",
            "expected 0 or a number above as weight of `key`; got true",
        ),
        (
            "stages.key.loss_on={key: 0}",
            "expected a weight above 0, else nothing is trained; got {'key': 0}",
        ),
        ("stages.key.loss_on={}", "expected a weight above 0, else nothing is trained; got {}"),
        (
            "stages.key.context=detach",
            "expected exact, detached or frozen; got 'detach'; did you mean `detached`?",
        ),
        ("stages.completion.context=detached", f"{DETACHED}: thinking; {EXACT}"),
        (
            "stages.key={name: key, context: detached, loss_on: {completion: '1e-1', key: 1}}",
            f"stages[1].context: {DETACHED}: thinking; {EXACT}",
        ),
        (
            "stages.key={name: key, context: detached, loss_on: {prompt: 1, thinking: 0.5}}",
            f"stages[1].context: {DETACHED}: prompt and thinking; {EXACT}",
        ),
        (
            "stages.completion={name: completion, context: frozen, loss_on: key}",
            "stages[0].context: frozen, whose adapter acts on the key alone, leaves nothing for a "
            "stage after it; make it the last one",
        ),
        (
            "stages.key={name: key, context: frozen, loss_on: completion}",
            "stages[1].context: frozen gives no gradient to what `loss_on` trains here: thinking; "
            f"{EXACT}",
        ),
        ("stages.key.lora={r: 2}", OF_FROZEN),
        ("stages.key.grid={r: [2]}", OF_FROZEN),
        (
            "stages.key.context_cache=20GB",
            "only with `context: frozen`: elsewhere the context changes",
        ),
        (
            "stages.key.key_batch_tokens=64",
            "only with `context: detached` or `frozen`: exact reads context and key in one pass",
        ),
        (
            f"{FROZEN}, context_cache: 20}}",
            "stages[1].context_cache: expected auto, off or a size, 20GB say; got 20",
        ),
        (
            f"{FROZEN}, lora: {{modules_to_save: [lm_head]}}}}",
            "stages[1].lora.modules_to_save: refused: it acts on all tokens, and a frozen stage "
            "trains what acts on the key alone",
        ),
        (
            f"{FROZEN}, lora: {{use_dora: true}}}}",
            "stages[1].lora.use_dora: refused: a frozen stage's adapter adds to the previous "
            "one's, and DoRA's norm would not",
        ),
        (f"{FROZEN}, lora: {{rr: 2}}}}", "stages[1].lora.rr: unknown key; did you mean `r`?"),
        (
            f"{FROZEN}, grid: {{}}}}",
            "stages[1].grid: expected lists of values for learning_rate, r, seed; got {}",
        ),
        (
            f"{FROZEN}, grid: {{rate: [1]}}}}",
            "stages[1].grid: a grid has no `rate`; there are learning_rate, r, seed",
        ),
        (
            f"{FROZEN}, grid: {{learning_rate: [1e-4, -1]}}}}",
            "stages[1].grid: expected a list of numbers above 0 as learning_rate; got ['1e-4', -1]",
        ),
        (
            f"{FROZEN}, grid: {{seed: [4294967296]}}}}",
            "stages[1].grid: expected a list of whole numbers from 0 as seed; got [4294967296]",
        ),
        (
            "stages.key={name: key, loss_on: key, thinking: own, own: {samples: 4, temperature: 0, "
            "keep: mixed}}",
            "stages[1].own.temperature: 0 is greedy, and all samples of a question would be the "
            "same; write 0.7, or own.samples of 1",
        ),
        (
            "stages.key.early_stop={times: 2}",
            "stages[1].early_stop.times: does nothing without as_long_as, an earlier stage's name",
        ),
        (
            "stages.key.anneal={key: 1}",
            "does nothing: these are the weights that `loss_on` begins with",
        ),
        (
            "stages.key.anneal={key: 0}",
            "expected a weight above 0, else nothing is trained; got {'key': 0}",
        ),
        (
            f"{FROZEN}, grid: {{seed: [1, 1]}}}}",
            "stages[1].grid: expected each seed once; got [1, 1]",
        ),
        ("data.validation=0", f"{ROWS}; got 0"),
        ("data.validation=1.0", f"{ROWS}; got 1.0"),
        ("data.test=true", f"{ROWS}; got true"),
        ("data.validation=train", "expected other rows than train's; got 'train'"),
        (
            "data={source: a, validation: x, test: x}",
            "data.test: expected other rows than validation's; got 'x'",
        ),
        (
            "data={source: a, validation: 0.5, test: 0.5}",
            "data.test: validation and test together leave no rows to train on",
        ),
        (
            "data.prompt='{question'",
            "expected a template; got '{question': expected '}' before end of string (a "
            "brace of the text itself is written twice)",
        ),
        ("data.prompt='{}'", "expected a column's name in each pair of braces; got '{}'"),
        ("data.split_rule=think_tag", f"{RULE}; got 'think_tag'; did you mean `think_tags`?"),
        ("data.split_rule=(", f"{RULE}; got '(': missing ), unterminated subpattern at position 0"),
        (
            "data={source: a, response: b, answer: c}",
            "data.answer: not beside `response`: the rule finds thinking and answer",
        ),
        (
            "data={source: a, split_rule: boxed, thinking: c}",
            "data.thinking: not beside `split_rule`: the rule finds thinking and answer",
        ),
        (
            'response={thinking: ["<think>", ""], answer: ["", ""]}',
            "response.answer: expected a text before the answer, since the one behind the thinking "
            'is empty: ["\\n\\n", ""], or tags; got none',
        ),
        (
            "model={name_or_path: a, chat_template: '{% for m in messages %}{% endfor %}'}",
            "model.chat_template: expected a file's name, and not the template itself; got "
            "'{% for m in messages %}{% endfor %}'",
        ),
        (
            "trainer.warmup_ratio=0.03",
            "no field any more: write `warmup_steps`, of which a number below 1 is a share",
        ),
        ("trainer.max_seq_length=512", "no field any more: write `data.max_length`"),
        ("data.task=sums", "only with `source: reasoning_gym or made`; got 'gsm8k'"),
        (
            "data={source: reasoning_gym, num_rows: 5}",
            "data.task: missing; `source: reasoning_gym` needs `task` and `num_rows`",
        ),
        ("response.end=x", "only with `frame: plain`; the chat template ends a turn itself"),
        (
            PACKAGED.replace("==1", ""),
            "model.name_or_path: expected pypi:PACKAGE==VERSION; got 'pypi:a'",
        ),
        (f"model.sha256={'0a' * 32}", "is that of `file`, a GGUF file; got no `file`"),
        (
            "model={name_or_path: f, file: a, revision: b}",
            "model.revision: a GGUF file of a folder has none",
        ),
        (
            PACKAGED.replace("0a", "0A"),
            "model.sha256: expected 64 hexadecimal digits; got '" + "0A" * 28 + "...",
        ),
        (
            PACKAGED.replace("file: a.gguf, ", ""),
            "model.file: missing; a model inside a package needs `file` and `sha256`",
        ),
        (
            PACKAGED.replace("}", ", revision: a}"),
            "model.revision: a model inside a package has its version in `name_or_path`",
        ),
        # overrides themselves
        ("seed", "expected key=value, such as trainer.max_steps=10"),
        ("=1", "expected key=value, such as trainer.max_steps=10"),
        ("seed=[1", "expected YAML after `=`; got expected ',' or ']', but got '<stream end>'"),
        ("seed.x=1", "expected a whole number; got {'x': 1}"),
        ("name.x=1", "expected a mapping at name; got 'tiny'"),
        (
            "data.thinking={why}",
            "expected text; got {'why': None} (text is written in quotes)",
        ),
        (
            "data.system=Think: always",
            "expected text; got {'Think': 'always'} (text is written in quotes)",
        ),
        (
            "data.prompt=Problem #1: {question}",
            "expected YAML after `=`; got a comment; text with ` #` is written in quotes",
        ),
        (
            "data.max_length=0512",
            "expected YAML after `=`; got 0512, which YAML takes for a number in base 8 or 60; "
            "write a number without the zero, and text in quotes",
        ),
        (
            "data.system=1:30.5",
            "expected YAML after `=`; got 1:30.5, which YAML takes for a number in base 8 or 60; "
            "write a number without the zero, and text in quotes",
        ),
        ("stages.ky.loss_on=key", "no stage `ky`; did you mean `key`?"),
        ("stages.2.loss_on=key", "no stage `2`; the stages are completion, key"),
        ("trainer={max_steps: 1, max_steps: 2}", "trainer.max_steps: this key stands twice"),
    ],
)
def test_a_wrong_value_gets_one_clear_error(file: Path, override: str, what: str) -> None:
    """Where, what was expected, what came: one line, whose place is the override that says it."""
    assert refusal(file, override) == f"FILE: 1 problem\n  override {override}: {what}"


@pytest.mark.parametrize("key", sorted(REFUSED_TRAINER_KEYS))
def test_trainer_keys_that_sftkey_owns_are_refused(file: Path, key: str) -> None:
    """What would fight with sftkey, or do nothing, is refused with the reason, in each trainer."""
    for place in ("trainer", "stages.key.trainer"):
        reason = f"refused: {REFUSED_TRAINER_KEYS[key]}"
        expected = f"FILE: 1 problem\n  override {place}.{key}=1: {reason}"
        assert refusal(file, f"{place}.{key}=1") == expected


@pytest.mark.parametrize("key", sorted(REFUSED_LORA_KEYS))
def test_lora_keys_that_sftkey_sets_are_refused(file: Path, key: str) -> None:
    """What an adapter records about its base is no setting."""
    expected = f"FILE: 1 problem\n  override lora.{key}=1: refused: sftkey sets it itself"
    assert refusal(file, f"lora.{key}=1") == expected


def test_full_fine_tuning_refuses_what_it_can_not_train(file: Path) -> None:
    """`lora: null` trains the weights themselves: not in nf4, and not from an adapter."""
    assert refusal(file, "model.quantization=nf4", "model.adapter=a", "lora=null") == (
        "FILE: 2 problems\n"
        "  override model.quantization=nf4: expected none, since full fine-tuning (`lora: null`) "
        "can't train nf4; got nf4\n"
        "  override model.adapter=a: not with `lora: null`, which trains the model's own weights"
    )


def test_all_problems_of_a_file_come_at_once_with_their_lines(file: Path) -> None:
    """Problems of form, of upstream's settings, across fields and of overrides: sorted by line."""
    file.write_text(
        "name: tiny\n"
        "sed: 1\n"
        "model:\n"
        "  quantization: nf8\n"
        "lora: {r: 4}\n"
        "data:\n"
        "  source: gsm8k\n"
        "  task: sums\n"
        "  source: other\n"
        "  1: 2\n"
        "2: 3\n"
        "stages:\n"
        "  - name: key\n"
        "    loss_on: answers\n"
        "    trainer:\n"
        "      learning_rte: 1.0e-4\n"
        "  - {name: key, loss_on: key}\n"
    )
    assert refusal(file, "eval.alpha=2", "nix") == (
        "FILE: 12 problems\n"
        "  line 2, sed: unknown key; did you mean `seed`?\n"
        "  line 3, model.name_or_path: missing\n"
        "  line 4, model.quantization: expected nf4 or none; got 'nf8'; did you mean `nf4`?\n"
        "  line 8, data.task: only with `source: reasoning_gym or made`; got 'other'\n"
        "  line 9, data.source: this key stands twice\n"
        "  line 10, data: expected a name as key; got 1\n"
        "  line 11: expected a name as key; got 2\n"
        "  line 14, stages[0].loss_on: expected completion, key, answer or weights; got 'answers'; "
        "did you mean `answer`?\n"
        "  line 16, stages[0].trainer.learning_rte: unknown key; did you mean `learning_rate`?\n"
        "  line 17, stages[1].name: stages[0] has this name, too; write another\n"
        "  override nix: expected key=value, such as trainer.max_steps=10\n"
        "  override eval.alpha=2: expected 1 or less; got 2"
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "expected a mapping with the recipe's sections; got an empty file"),
        (b"# nothing\n", "expected a mapping with the recipe's sections; got an empty file"),
        (b"- a\n", "expected a mapping with the recipe's sections; got ['a']"),
        (b"just text", "expected a mapping with the recipe's sections; got 'just text'"),
        (b"\xff\xfe\xff", "expected text in UTF-8; got other bytes"),
        (
            b"a: b\nc: [1\n",
            "line 3: expected YAML; got expected ',' or ']', but got '<stream end>'",
        ),
        (b"a: b\n c: d\n", "line 2: expected YAML; got mapping values are not allowed here"),
        (b"a: 1\n---\nb: 2\n", "line 2: expected YAML; got but found another document"),
        (b"a: \0", "expected YAML; got special characters are not allowed"),
        (b"a: &b [*b]", "line 1: expected YAML; got an alias inside of what it stands for"),
        (b"a: !!set {b}", "line 1: expected YAML; got a value of the kind tag:yaml.org,2002:set"),
        (
            b"a: !!binary YQ==",
            "line 1: expected YAML; got a value of the kind tag:yaml.org,2002:binary",
        ),
        (b"a: !!int b", "line 1: expected YAML; got 'b' as tag:yaml.org,2002:int"),
        (
            b"a: !b c",
            "line 1: expected YAML; got could not determine a constructor for the tag '!b'",
        ),
        (b"a: .nan", "line 1: expected YAML; got .nan, which is no finite number"),
    ],
)
@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_a_file_that_holds_no_recipe_gets_one_error(file: Path, content: bytes, what: str) -> None:
    """Empty, no YAML, no mapping: one line that says so."""
    file.write_bytes(content)
    assert refusal(file) == f"FILE: {what}"


@pytest.mark.parametrize(
    ("content", "got", "hint"),
    [
        (
            "base_model: Qwen/Qwen3-0.6B\nlora_r: 16\nnum_epochs: 1\nbf16: auto\n",
            "base_model, lora_r, num_epochs, …",
            "`sftkey adapt MODEL --data FILE` writes a recipe for your model and rows",
        ),
        (
            "name: ours\nrecipes: [a.yaml]\narms: [sftkey]\n",
            "name, recipes, arms",
            "`sftkey study FILE` runs it",
        ),
    ],
)
def test_a_config_of_another_kind_gets_one_line(
    file: Path, content: str, got: str, hint: str
) -> None:
    """Nobody wants to hear of each of its keys that it is unknown."""
    file.write_text(content)
    what = f"expected a recipe, with model, data and stages; got {got}"
    assert refusal(file) == f"FILE: {what}\nhint: {hint}"


def test_merge_keys_are_refused(file: Path) -> None:
    """A recipe reads alone, from top to bottom: `<<` would hide what a section holds."""
    file.write_text(TEXT + "eval: {<<: {alpha: 1}}\n")
    assert refusal(file) == ("FILE: 1 problem\n  line 11, eval: expected a name as key; got '<<'")


@pytest.mark.fault("recipes, templates, rows and weights of strangers")
def test_yaml_that_is_nested_without_end_gets_one_error(file: Path) -> None:
    """The reader's recursion limit is no traceback of ours."""
    file.write_text("a: " + "[" * 5000)
    assert refusal(file).startswith("FILE: expected YAML; got values nested more than 50 deep")


def test_a_file_that_is_not_there_gets_one_error(tmp_path: Path, monkeypatch: Any) -> None:
    """A missing file, a folder, and a file without permission."""
    path = tmp_path / "none.yaml"
    assert refusal(path) == (
        "FILE: expected a recipe file; there is none\n"
        "hint: `sftkey ls` shows the recipes that there are"
    )
    assert refusal(tmp_path) == "FILE: expected a file; got a folder"
    (tmp_path / "recipe.yaml").write_text(TEXT)
    assert refusal(tmp_path).endswith("\nhint: a run's recipe is FILE/recipe.yaml")

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    path.write_text("")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert refusal(path) == "FILE: can't be read: Permission denied"


# Speed


def test_the_check_is_fast_and_imports_nothing_heavy(file: Path) -> None:
    """A check takes less than what its libraries take to be imported, and loads no torch."""
    code = (
        "import sys, time; import pydantic, typer, rich, yaml\n"
        "class Row(pydantic.BaseModel): a: int\n"
        "imports = time.process_time(); from sftkey.recipe import load_recipe\n"
        f"load_recipe({str(file)!r}, ['trainer.optim=sgd', 'lora.r=2'])\n"
        "print(time.process_time() / imports, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ratio, *names = done.stdout.split()
    assert not {"torch", "transformers", "trl", "peft", "datasets", "accelerate"} & set(names)
    assert float(ratio) < 2
