"""Generation: what batching, stopping, seeds and kills may not change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sftkey.errors import RunError
from sftkey.generation.generate import Generation, generate, generate_to_file
from tests.support.models import FAMILIES, float64, made_family
from tests.support.tiny import made_model

WORDS = "How many legs do 3 cats and 2 birds have together"


@pytest.fixture
def prompts(tiny_tokenizer: Any) -> list[list[int]]:
    """Return seven prompts of one to many tokens, longest neither first nor last."""
    texts = [WORDS[:1], WORDS[:9], WORDS * 2, WORDS[5:30], "<|im_start|>user\n" + WORDS, "7", "a b"]
    return [tiny_tokenizer(text)["input_ids"] for text in texts]


def settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a greedy generation that never stops, with changes."""
    return {"stop_ids": [2], "max_new_tokens": 12, "batch_size": 3, **changes}


def by_hand(model: Any, prompt: list[int], stop_ids: list[int], max_new_tokens: int) -> list[int]:
    """Generate greedily without cache, padding or transformers' loop."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token in stop_ids:
            break
    return ids[len(prompt) :]


def count_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of rows of each call of `model.generate`."""
    calls: list[int] = []
    upstream = model.generate

    def counted(**inputs: Any) -> Any:
        calls.append(len(inputs["input_ids"]))
        return upstream(**inputs)

    monkeypatch.setattr(model, "generate", counted)
    return calls


def test_a_batch_is_generated_as_its_rows_alone(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    """Padding on the left changes nothing: each row equals greedy decoding by hand."""
    free = [by_hand(tiny_model.eval(), prompt, [], 12) for prompt in prompts]
    stop_ids = [2, free[0][5], free[3][0]]  # 2 is the padding too: no mask follows from the ids
    expected = {}
    for position, prompt in enumerate(prompts):
        ids = by_hand(tiny_model, prompt, stop_ids, 12)
        stopped = ids[-1] in stop_ids
        text = ids[:-1] if stopped else ids
        expected[position] = Generation(tiny_tokenizer.decode(text), len(text), stopped)
    for size in (1, 2, 7, 20):
        changed = settings(stop_ids=stop_ids, batch_size=size)
        assert dict(generate(tiny_model, tiny_tokenizer, prompts, **changed)) == expected, size
    assert {generation.stopped for generation in expected.values()} == {True, False}
    assert expected[3].num_tokens == 0


def test_longest_prompts_come_first(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    """A batch that doesn't fit in memory is met at once, and the order is always the same."""
    positions = [
        position for position, _ in generate(tiny_model, tiny_tokenizer, prompts, **settings())
    ]
    lengths = [len(prompts[position]) for position in positions]
    assert sorted(positions) == list(range(7))
    assert lengths == sorted(lengths, reverse=True)


def test_special_tokens_stay_in_the_text_and_the_stop_does_not(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tags may be special tokens; the stop is cut off, also where it equals the padding."""
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id == 2
    written = tiny_tokenizer("<|im_start|>7", return_tensors="pt")["input_ids"]
    rows = [torch.cat([written[0], torch.tensor([2, 2])]), torch.tensor([2, 2, 2, 2])]
    monkeypatch.setattr(
        tiny_model,
        "generate",
        lambda input_ids, **_: torch.cat([input_ids, torch.stack(rows)], dim=1),
    )
    generations = dict(generate(tiny_model, tiny_tokenizer, prompts[:2], **settings()))
    assert generations == {1: Generation("<|im_start|>7", 2, True), 0: Generation("", 0, True)}


def test_training_state_is_as_before_and_the_cache_is_used(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    """Gradient checkpointing and a switched-off cache are the trainer's business alone."""
    tiny_model.gradient_checkpointing_enable()
    tiny_model.config.use_cache = False
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    modes = [module.training for module in tiny_model.modules()]
    lengths: list[int] = []
    tiny_model.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    generations = generate(tiny_model, tiny_tokenizer, prompts, **settings())
    next(generations)
    assert lengths[1:] == [1] * (len(lengths) - 1)
    assert [module.training for module in tiny_model.modules()] == modes
    assert torch.is_grad_enabled()
    assert tiny_model.config.use_cache is False
    assert tiny_model.is_gradient_checkpointing


@pytest.fixture(scope="module")
def by_argmax(tiny_tokenizer: Any) -> tuple[list[int], list[tuple[list[int], bool]]]:
    """Return ends, one of which comes, and three answers of the tiny model, computed by hand."""
    model = made_model(tiny_tokenizer).eval()
    prompts = [tiny_tokenizer(text)["input_ids"] for text in (WORDS[:1], WORDS[:9], WORDS * 2)]
    stop_ids = [2, by_hand(model, prompts[0], [], 3)[-1]]
    written = [by_hand(model, prompt, stop_ids, 6) for prompt in prompts]
    return stop_ids, [(ids[:-1], True) if ids[-1] in stop_ids else (ids, False) for ids in written]


PUBLISHED: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9},
    "beams": {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
    "repetition": {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    "lengths": {"min_length": 400, "min_new_tokens": 10, "max_length": 5},
    "suppress_tokens": {"suppress_tokens": list(range(380))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(380))},
    "bad_words_ids": {"bad_words_ids": [[number] for number in range(380)]},
    "sequence_bias": {"sequence_bias": [[[5], 100.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "length_penalty": {"exponential_decay_length_penalty": [2, 5.0]},
    "guidance_scale": {"guidance_scale": 5.0},
    "max_time": {"max_time": 1e-6},
    "watermarking": {"watermarking_config": {"greenlist_ratio": 0.2, "bias": 20.0}},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 9.0},
    "encoder_no_repeat": {"encoder_no_repeat_ngram_size": 1},
    "stop_strings": {"stop_strings": ["a", "e"]},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "high"},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "token_healing": {"token_healing": True},
    "quantized cache": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "several answers": {"num_return_sequences": 3},
    "remove_invalid_values": {"remove_invalid_values": True, "renormalize_logits": True},
    "unheard of": {"a_setting_of_tomorrow": 1, "custom_generate": "somebody/decoding"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_greedy_is_the_argmax_whatever_is_published(
    name: str,
    tiny_model: Any,
    tiny_tokenizer: Any,
    prompts: list[list[int]],
    by_argmax: tuple[list[int], list[tuple[list[int], bool]]],
) -> None:
    """No published setting changes a greedy token, stops an answer, or reaches transformers."""
    for key, value in PUBLISHED[name].items():
        setattr(tiny_model.generation_config, key, value)
    published = tiny_model.generation_config
    stop_ids, expected = by_argmax
    changed = settings(stop_ids=stop_ids, batch_size=2, max_new_tokens=6)
    found = dict(generate(tiny_model, tiny_tokenizer, prompts[:3], **changed))
    assert [(list(found[place].ids), found[place].stopped) for place in range(3)] == expected
    assert tiny_model.generation_config is published


def test_sampling_is_by_the_probabilities_whatever_is_published(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    """The same draws come with a published config and without."""
    chosen = settings(temperature=1.5)
    expected = list(generate(tiny_model, tiny_tokenizer, prompts, **chosen))
    for published in PUBLISHED.values():
        for key, value in published.items():
            setattr(tiny_model.generation_config, key, value)
    assert list(generate(tiny_model, tiny_tokenizer, prompts, **chosen)) == expected


ROPES: list[dict[str, Any]] = [
    {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    {
        "rope_type": "longrope",
        "factor": 8.0,
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 32,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=["dynamic", "longrope"])
def test_positions_scaled_by_the_longest_row_change_no_other_answer(
    rope: dict[str, Any], tiny_tokenizer: Any
) -> None:
    """Rows that may grow so long are alone, and leave nothing behind for the next."""
    reach = 32 if rope["rope_type"] == "dynamic" else 256
    with float64():
        model = made_family("llama", max_position_embeddings=reach, rope_parameters=rope).eval()
        dice = torch.Generator().manual_seed(1)
        prompts = [
            torch.randint(2, 97, (length,), generator=dice).tolist()
            for length in (60, 5, 45, 28, 9, 90, 27, 12)
        ]
        chosen = {"stop_ids": [1], "max_new_tokens": 6}
        alone = []
        for prompt in prompts:
            fresh = made_family("llama", max_position_embeddings=reach, rope_parameters=rope).eval()
            settled: dict[str, Any] = {**chosen, "batch_size": 1}
            [(_, generation)] = generate(fresh, tiny_tokenizer, [prompt], **settled)
            alone.append(generation.ids)
        for size in (1, 2, 8):
            settled = {**chosen, "batch_size": size}
            found = dict(generate(model, tiny_tokenizer, prompts, **settled))
            assert [found[place].ids for place in range(len(prompts))] == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_its_argmax(family: str, tiny_tokenizer: Any) -> None:
    """In each family that the tests build, beside a config that would keep it from stopping."""
    with float64():
        model = made_family(family).eval()
        model.generation_config.suppress_tokens = [3, 4, 5]
        prompts = [[5, 9, 11, 40, 8, 77], [60], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]
        written = [by_hand(model, prompt, [1], 8) for prompt in prompts]
        expected = [ids[:-1] if ids[-1] == 1 else ids for ids in written]
        for size in (2, 8):
            chosen = {"stop_ids": [1], "max_new_tokens": 8, "batch_size": size}
            found = dict(generate(model, tiny_tokenizer, prompts, **chosen))
            assert [list(found[place].ids) for place in range(3)] == expected


def test_an_adapter_writes_what_the_merged_model_writes(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    """A PeftModel generates with its adapter."""
    from peft import LoraConfig, get_peft_model

    before = dict(generate(tiny_model, tiny_tokenizer, prompts, **settings()))
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model, config)
    adapted = dict(generate(model, tiny_tokenizer, prompts, **settings()))
    assert adapted != before
    merged = model.merge_and_unload()
    assert dict(generate(merged, tiny_tokenizer, prompts, **settings())) == adapted


def test_a_quantized_model_generates(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    """NF4 goes through the same call."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model.config.update({"hidden_size": 64, "head_dim": 16})  # NF4's blocks hold 64 weights
    type(tiny_model)(tiny_model.config).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4)
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in quantized:
        module.support_avx512bf16_for_cpu = False  # as sftkey loads it
    generations = dict(generate(model, tiny_tokenizer, prompts, **settings()))
    assert len(quantized) == 14
    assert {generation.num_tokens for generation in generations.values()} == {12}


def test_sampling_depends_on_the_seed_alone(
    tiny_model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    """The same seed gives the same texts, whatever is skipped; training's random state is kept."""
    warm = settings(temperature=1.5, seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = dict(generate(tiny_model, tiny_tokenizer, prompts, **warm))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert dict(generate(tiny_model, tiny_tokenizer, prompts, **warm)) == first
    rest = dict(generate(tiny_model, tiny_tokenizer, prompts, **warm, skip={0, 2, 5}))
    assert rest == {position: first[position] for position in (1, 3, 4, 6)}
    assert dict(generate(tiny_model, tiny_tokenizer, prompts, **{**warm, "seed": 4})) != first
    assert first != dict(generate(tiny_model, tiny_tokenizer, prompts, **settings()))
    again = dict(generate(tiny_model, tiny_tokenizer, [prompts[0]] * 6, **warm))
    assert len({generation.text for generation in again.values()}) == 6


def test_generations_are_written_as_they_come_and_not_made_twice(
    tmp_path: Path,
    tiny_model: Any,
    tiny_tokenizer: Any,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that is killed after a batch and within a line goes on with what is missing."""
    by_index = {10 + position: prompt for position, prompt in enumerate(prompts)}
    whole = generate_to_file(tiny_model, tiny_tokenizer, by_index, tmp_path / "whole", **settings())
    assert list(whole) == list(by_index)
    file = tmp_path / "torn"

    def kill(num_done: int, num_all: int) -> None:
        assert num_all == 7
        assert num_done == 0 or len(file.read_text().splitlines()) == num_done
        if num_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_to_file(tiny_model, tiny_tokenizer, by_index, file, report=kill, **settings())
    with file.open("a") as rows:
        rows.write('{"index": 11, "prompt_tok')

    calls = count_calls(tiny_model, monkeypatch)
    reports: list[tuple[int, int]] = []
    resumed = generate_to_file(
        tiny_model, tiny_tokenizer, by_index, file, report=lambda *counts: reports.append(counts),
        **settings(),
    )  # fmt: skip
    assert resumed == whole
    assert calls == [3, 1]
    assert reports == [(3, 7), (4, 7), (5, 7), (6, 7), (7, 7)]
    assert file.read_text() == (tmp_path / "whole").read_text()
    row = json.loads(file.read_text().splitlines()[0])
    written = {name: value for name, value in vars(whole[12]).items() if name != "ids"}
    assert row == {"index": 12, "prompt_tokens": len(prompts[2]), **written}
    assert tiny_tokenizer.decode(whole[12].ids) == whole[12].text
    assert len(whole[12].ids) == whole[12].num_tokens

    generate_to_file(tiny_model, tiny_tokenizer, by_index, file, **settings())
    assert calls == [3, 1]


@pytest.mark.fault("a file emptied, halved, garbled or deleted")
def test_a_batch_that_was_torn_is_made_again_without_writing_a_row_twice(
    tmp_path: Path,
    tiny_model: Any,
    tiny_tokenizer: Any,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the missing rows are, also in low precision and sampled, those of an unbroken run."""
    file = tmp_path / "rows.jsonl"
    warm = settings(temperature=1.5)
    by_index = dict(enumerate(prompts))
    whole = generate_to_file(tiny_model, tiny_tokenizer, by_index, file, **warm)
    lines = file.read_text().splitlines(keepends=True)
    other = '{"index": 99, "prompt_tokens": 1, "text": "", "num_tokens": 0, "stopped": true}\n'
    file.write_text(other + "".join(reversed(lines[:5])))
    calls = count_calls(tiny_model, monkeypatch)
    assert generate_to_file(tiny_model, tiny_tokenizer, by_index, file, **warm) == whole
    assert calls == [3, 1]
    assert sorted(file.read_text().splitlines()) == sorted((other + "".join(lines)).splitlines())


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("never JSON", "line 1: expected a JSON object; got 'never JSON'"),
        ("[3]", "line 1: expected a JSON object; got '[3]'"),
        ("[" * 100_000, f"line 1: expected a JSON object; got '{'[' * 60}'"),
        ('{"index": 0}', "line 1: text: expected a text; got None"),
        (
            '{"index": 0, "prompt_tokens": 5, "text": "", "num_tokens": 0, "stopped": true}',
            "line 1: row 0: expected a generation after a prompt of 1 tokens; got 5",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(
    line: str, what: str, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Generations after other prompts are neither used nor overwritten."""
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(RunError) as caught:
        generate_to_file(tiny_model, tiny_tokenizer, {0: [5]}, file, **settings())
    hint = "hint: move the file aside; then all of it is generated again"
    assert str(caught.value) == f"{file}: {what}\n{hint}"
    assert file.read_text() == line + "\n"


def test_nothing_to_stop_at_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Without the trained end of turn every generation would run to its limit."""
    with pytest.raises(
        ValueError, match=r"^stop_ids: expected at least the trained end of turn; got none$"
    ):
        next(generate(tiny_model, tiny_tokenizer, [[5]], **settings(stop_ids=[])))


def test_an_empty_prompt_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """There is nothing to go on from."""
    with pytest.raises(
        ValueError, match=r"^prompts: expected at least one token each; got none at \[1\]$"
    ):
        next(generate(tiny_model, tiny_tokenizer, [[5], []], **settings()))
