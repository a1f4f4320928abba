"""Two tiny strangers, a Qwen3 and a Llama with random weights and different tokenizers; a pool of fakes."""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hacrl_agents.policy import Policy, make_policy
from hacrl_exchange.types import (
    Group,
    Lockstep,
    Message,
    ModelSpec,
    PoolSpec,
    Prompt,
    Rollout,
    RosterEntry,
    RosterState,
    Scored,
    StepOutcome,
    Unscored,
    UnscoredKind,
    Verdict,
    VerificationPlan,
    VerifiedGroup,
)

CHARACTERS = "".join(sorted(set(string.printable) - set("\t\r\x0b\x0c")))
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|im_end|>", "<|unk|>", "<|user|>", "<|assistant|>"]
    vocabulary = {piece: index for index, piece in enumerate([*special, *pieces])}
    pattern = "|".join([*sorted((p for p in pieces if len(p) > 1), key=len, reverse=True), r"[\s\S]"])
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_policy(kind: str, *, seed: int = 0) -> Policy:
    pieces = [*CHARACTERS] if kind == "qwen" else ["the", "an", "1 ", *reversed(CHARACTERS)]
    tokenizer = build_tokenizer(pieces)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": 0.25,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "qwen":
            return make_policy(Qwen3ForCausalLM(Qwen3Config(head_dim=8, **shape)), tokenizer)
        return make_policy(LlamaForCausalLM(LlamaConfig(**shape)), tokenizer)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def new_policy() -> Callable[..., Policy]:
    """Builds "qwen" or "llama" with random weights of a seed."""
    return build_policy


@pytest.fixture
def qwen() -> Policy:
    return build_policy("qwen")


@pytest.fixture
def llama() -> Policy:
    return build_policy("llama")


def verdict(text: str) -> Verdict:
    """A pool's judge for tests: texts with a digit succeed, very long ones cannot be judged."""
    if len(text) > 40:
        return Unscored(UnscoredKind.TIMEOUT)
    return Scored(float(any(character in string.digits for character in text)))


@dataclass(frozen=True)
class FakeBatch:
    """A joint batch made by hand."""

    step: int
    prompts: tuple[Prompt, ...]
    roster: tuple[RosterEntry, ...]
    groups: tuple[VerifiedGroup, ...]
    capabilities: Mapping[str, float] = field(default_factory=dict)
    outcome: StepOutcome = StepOutcome.COMPLETE
    quorum_met: bool = True
    models: tuple[ModelSpec, ...] = ()
    unrevealed_count: int = 0
    withheld_count: int = 0


def make_prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"p{i}", (Message("user", f"say {i} " + "x" * (i % 3)),)) for i in range(count))


def make_batch(
    groups: Sequence[VerifiedGroup],
    *,
    prompts: Sequence[Prompt],
    agents: Sequence[str],
    step: int = 1,
    capabilities: Mapping[str, float] | None = None,
    quorum_met: bool = True,
) -> FakeBatch:
    order = {prompt.prompt_id: index for index, prompt in enumerate(prompts)}
    ranked = sorted(groups, key=lambda group: (order[group.group.prompt_id], agents.index(group.agent)))
    return FakeBatch(
        step=step,
        prompts=tuple(prompts),
        roster=tuple(RosterEntry(agent, "local", RosterState.COMPLETE, ()) for agent in agents),
        groups=tuple(ranked),
        capabilities=capabilities if capabilities is not None else dict.fromkeys(agents, 0.5),
        outcome=StepOutcome.COMPLETE if quorum_met else StepOutcome.DEGRADED,
        quorum_met=quorum_met,
    )


def verified(agent: str, group: Group, judge: Callable[[str], Verdict] = verdict) -> VerifiedGroup:
    return VerifiedGroup(agent, group, b"", 1, None, tuple(judge(each.text) for each in group.rollouts))


@dataclass(frozen=True)
class FakePublished:
    late: tuple[str, ...] = ()


@dataclass
class FakeStep:
    """A step of a FakePool."""

    number: int
    prompts: tuple[Prompt, ...]
    committed: dict[str, Group]
    pool: FakePool
    closed: bool = False

    def joint_batch(self, *, parts: Collection[str]) -> FakeBatch:
        return self.pool.close(self)


@dataclass
class FakePool:
    """One agent's view of a pool: what it publishes is kept, peers' groups come from `peers`."""

    name: str
    spec: PoolSpec
    prompts: tuple[Prompt, ...]
    steps_left: int
    peers: Callable[[int, Sequence[Prompt]], list[VerifiedGroup]] = lambda step, prompts: []
    session: int = 1
    resume_after: int = 0
    stored: dict[tuple[int, str], Group] = field(default_factory=dict)
    published: list[Group] = field(default_factory=list)
    crash_before_batch: int | None = None
    quorum_met: bool = True
    agents: tuple[str, ...] = ("a", "b")
    closed: frozenset[int] = frozenset()
    current: FakeStep | None = None

    def steps(self) -> Iterator[FakeStep]:
        per_step = self.spec.lockstep.prompts_per_step
        for number in range(self.resume_after + 1, self.steps_left + 1):
            start = (number - 1) * per_step % len(self.prompts)
            chosen = self.prompts[start : start + per_step]
            committed = {prompt: group for (step, prompt), group in self.stored.items() if step == number}
            self.current = FakeStep(number, chosen, committed, self, closed=number in self.closed)
            yield self.current

    def publish(self, groups: Sequence[Group]) -> FakePublished:
        assert self.current is not None
        for group in groups:
            self.published.append(group)
            self.current.committed[group.prompt_id] = group
            self.stored[self.current.number, group.prompt_id] = group
        return FakePublished()

    def close(self, step: FakeStep) -> FakeBatch:
        if step.number == self.crash_before_batch:
            raise ConnectionAbortedError("killed between publishing and the joint batch")
        own = [verified(self.name, group) for group in step.committed.values()]
        groups = [*own, *self.peers(step.number, step.prompts)]
        return make_batch(
            groups, prompts=step.prompts, agents=self.agents, step=step.number, quorum_met=self.quorum_met
        )


def make_spec(*, prompts_per_step: int = 4, group_size: int = 3) -> PoolSpec:
    return PoolSpec("set", group_size, VerificationPlan(()), Lockstep(prompts_per_step))


@pytest.fixture
def prompts() -> tuple[Prompt, ...]:
    return make_prompts(8)


@pytest.fixture
def spec() -> PoolSpec:
    return make_spec()


@pytest.fixture
def new_pool() -> type[FakePool]:
    return FakePool


@pytest.fixture
def new_batch() -> Callable[..., FakeBatch]:
    return make_batch


@pytest.fixture
def judge() -> Callable[..., VerifiedGroup]:
    """Gives a group the verdicts of the tests' judge, or of another."""
    return verified


@pytest.fixture
def foreign_group() -> Callable[..., Group]:
    """Builds a peer's group from texts, with made-up log-probs."""
    from hacrl_exchange.types import PolicyVersion

    def build(prompt_id: str, texts: Sequence[str], *, mean: float = -1.0, **changes: object) -> Group:
        return Group(
            prompt_id=prompt_id,
            rollouts=tuple(Rollout(text, len(text), mean * len(text)) for text in texts),
            tokenizer_fingerprint="f" * 64,
            policy_start=PolicyVersion(1, 0),
            policy_end=PolicyVersion(1, 0),
            **changes,  # type: ignore[arg-type]  # any field of Group
        )

    return build
