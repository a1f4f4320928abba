"""What the demo promises about its task, tokenizers, agents and warm starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hacrl_agents.demo.warm_start as module
from hacrl_agents.demo.models import AGENT_A, AGENT_B, DESIGNS, AgentDesign, build_agent
from hacrl_agents.demo.task import (
    World,
    draw_warm_start_pair,
    extract_answer,
    make_split,
    question,
    score,
    worked_answer,
    world,
    write_prompts,
)
from hacrl_agents.demo.vocabularies import CHARACTERS, MERGES, build_tokenizer
from hacrl_agents.demo.warm_start import ANNEALED_TO, learning_rate_factor, warm_start
from hacrl_agents.policy import Policy

LONGEST = worked_answer(999, 999)


@pytest.fixture(scope="module", params=[CHARACTERS, MERGES], ids=["characters", "merges"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    """As a user gets it: saved, then loaded by AutoTokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(request.param).save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def test_a_worked_answer_adds_columns_from_the_right_and_carries() -> None:
    assert worked_answer(404, 666) == "4+6=10;0+6+1=7;4+6=10;<answer>1070</answer>"
    assert worked_answer(123, 456) == "3+6=9;2+5=7;1+4=5;<answer>579</answer>"


def test_every_sum_is_of_one_world_in_whatever_order() -> None:
    counts = dict.fromkeys(World, 0)
    for first in range(100, 1000, 9):
        for second in range(100, 1000, 9):
            counts[world(first, second)] += 1
            assert world(first, second) is world(second, first)

    total = sum(counts.values())
    assert counts[World.HELD_OUT] / total == pytest.approx(0.10, abs=0.02)
    assert counts[World.WARM_START] / total == pytest.approx(0.50, abs=0.02)


@pytest.mark.slow
def test_held_out_sums_are_disjoint_from_training_and_the_same_for_every_seed() -> None:
    one, two = (make_split(seed, training=60, held_out=60) for seed in (0, 1))

    assert one.held_out == two.held_out
    assert one.training != two.training
    assert one == make_split(0, training=60, held_out=60)
    for split in (one, two):
        assert {world(each.first, each.second) for each in split.training} == {World.TRAINING}
        assert {world(each.first, each.second) for each in split.held_out} == {World.HELD_OUT}
        pairs = {frozenset((each.first, each.second)) for each in (*split.training, *split.held_out)}
        assert len(pairs) == 120
        assert all(100 <= number <= 999 for pair in pairs for number in pair)


def test_the_familys_scorer_accepts_the_worked_answer_and_nothing_less() -> None:
    problem = make_split(0, training=1, held_out=0).training[0]
    entry = json.loads(problem.entry_json)
    text = worked_answer(problem.first, problem.second)

    assert entry["question"] == problem.question == question(problem.first, problem.second)
    assert score(text, entry) == 1.0
    assert score(text.replace("</answer>", ""), entry) == 0.0
    assert score(f"<answer>{entry['answer']}0</answer>", entry) < 1.0
    assert score(str(entry["answer"]), entry) == 0.0


def test_the_last_complete_pair_of_tags_is_the_answer() -> None:
    assert extract_answer("<answer>1</answer><answer>2</answer>") == "2"
    assert extract_answer("<answer>1</answer><answer>2") is None
    assert extract_answer("3") is None


def test_prompts_are_written_as_json_lines_with_their_reference(tmp_path: Path) -> None:
    problems = make_split(0, training=2, held_out=0).training

    lines = write_prompts(problems, tmp_path / "prompts.jsonl").read_text().splitlines()

    first = json.loads(lines[0])
    assert len(lines) == 2
    assert first == {
        "id": f"sum-{problems[0].first}-{problems[0].second}",
        "prompt": problems[0].question,
        "reference": json.loads(problems[0].entry_json),
        "source": "reasoning-gym/basic_arithmetic",
    }
    assert first["reference"]["metadata"]["source_dataset"] == "basic_arithmetic"


@pytest.mark.parametrize("parity", [0, 1])
def test_warm_start_examples_come_mostly_from_the_agents_half(parity: int) -> None:
    rng = Random(1)
    pairs = [draw_warm_start_pair(rng, parity=parity, own_share=0.9) for _ in range(500)]

    own = sum(all(number // 100 % 2 == parity for number in pair) for pair in pairs)
    assert 0.88 <= own / 500 <= 0.97  # 0.9, and a quarter of the rest by chance
    assert {world(*pair) for pair in pairs} == {World.WARM_START}


def test_a_tokenizer_cuts_texts_into_its_pieces_and_puts_them_together_again(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for first, second in ((404, 666), (100, 101), (999, 999)):
        for text in (question(first, second), worked_answer(first, second)):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_the_two_tokenizers_cut_the_same_text_differently() -> None:
    characters, merges = build_tokenizer(CHARACTERS), build_tokenizer(MERGES)
    text = worked_answer(404, 666)

    assert len(characters) != len(merges)
    assert len(characters.tokenize(text)) == 28
    assert merges.tokenize(text) == [
        *("4", "+", "6", "=1", "0", ";", "0", "+", "6", "+1=", "7", ";", "4", "+", "6", "=1", "0"),
        *(";<answer>", "1", "0", "7", "0", "</answer>"),
    ]


def test_a_literal_end_token_is_text_and_unknown_characters_are_marked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer("4<|end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]

    assert tokenizer.eos_token_id not in ids
    assert ids[1:] == [tokenizer.unk_token_id] * len("<|end|>")


def test_prompts_go_through_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": question(404, 666)}]

    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text == "Calculate 404 + 666. "


def test_the_agents_differ_in_architecture_size_tokenizer_and_childhood() -> None:
    models = [build_agent(design)[0] for design in DESIGNS]

    assert [type(model).__name__ for model in models] == ["Qwen3ForCausalLM", "LlamaForCausalLM"]
    assert [model.num_parameters() for model in models] == [149_344, 112_640]
    assert AGENT_A.pieces != AGENT_B.pieces
    assert AGENT_A.parity != AGENT_B.parity


def test_building_an_agent_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, two = build_agent(AGENT_B)[0], build_agent(AGENT_B)[0]

    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_warm_start_rises_stays_and_is_annealed_to_a_tenth() -> None:
    factors = [learning_rate_factor(step, cooling_from=100, cooldown=50) for step in range(150)]

    assert factors[:30] == sorted(factors[:30])
    assert set(factors[30:100]) == {1.0}
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert factors[-1] == pytest.approx(ANNEALED_TO)


def plan_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: Callable[[float, int], float]
) -> list[int]:
    """Runs a warm start of empty updates and returns the steps at which sampled answers were probed."""
    probed: list[int] = []
    steps = 0

    def count_update(*_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal steps
        steps += 1
        return torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)

    def solved_share(policy: Policy, *, temperature: float) -> float:
        if temperature:
            probed.append(steps)
        return share(temperature, steps)

    monkeypatch.setattr(module, "_examples", count_update)
    monkeypatch.setattr(module, "_imitation_loss", lambda model, *_: next(model.parameters()).sum() * 0)
    monkeypatch.setattr(module, "solved_share", solved_share)
    warm_start(dataclasses.replace(AGENT_B, iterations=240, cooldown=40), tmp_path)
    return probed


@pytest.mark.slow
def test_a_warm_start_that_learns_as_planned_ends_as_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert plan_of(monkeypatch, tmp_path, lambda temperature, _: 0.5 if temperature else 0.0) == [240]


@pytest.mark.slow
def test_a_warm_start_that_learns_fast_cools_down_earlier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert plan_of(monkeypatch, tmp_path, lambda *_: 0.5) == [160 + 40]


@pytest.mark.slow
def test_a_warm_start_that_learned_too_little_heats_up_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    able_later = plan_of(monkeypatch, tmp_path, lambda _, step: 0.5 if step > 300 else 0.0)
    never = plan_of(monkeypatch, tmp_path, lambda *_: 0.0)

    assert able_later == [240, 340]
    assert never == [240, 340]  # the third cooldown ends it, whatever it can do


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_a_warm_start_is_saved_as_anybody_saves_and_is_the_same_every_time(
    design: AgentDesign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = dataclasses.replace(design, iterations=2, cooldown=1)
    monkeypatch.setattr(module, "MOST_COOLDOWNS", 1)
    folders = [warm_start(short, tmp_path / name) for name in ("one", "two")]
    one, two = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)

    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    longest = tokenizer.tokenize(question(999, 999) + LONGEST)
    assert len(longest) + 2 < one.config.max_position_embeddings


@pytest.mark.slow
def test_a_warm_start_tells_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_COOLDOWNS", 1)
    told: list[int] = []
    short = dataclasses.replace(AGENT_B, iterations=40, cooldown=1)

    warm_start(short, tmp_path, on_progress=lambda iteration, loss: told.append(iteration))

    assert told == [20, 40]
