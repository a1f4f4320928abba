"""What an author may declare, and what identifies a verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import pytest

from hacrl_verifiers.api import ConfigError, Item, Json, Result, Verifier, config_digest, verifier


@verifier(name="near", version="2", config={"within": 0.5, "unit": "m", "strict": False, "extra": None})
def near(response: str, reference: Json, *, config: Mapping[str, Json]) -> float:
    return float(abs(float(response) - reference) <= config["within"])


def test_a_decorated_function_can_be_called_with_settings() -> None:
    assert isinstance(near, Verifier)
    assert near("1.4", 1.0) == 1.0
    assert near("1.4", 1.0, within=0.1) == 0.0


def test_a_function_gets_the_keywords_it_names() -> None:
    @verifier(name="all", version="1")
    def everything(response: str, reference: Json, *, item: Item, prompt: object, more: int = 3) -> Result:
        assert item.response == response
        assert item.prompt is prompt
        return float(more)

    assert everything("a", None) == 3.0


def test_a_batch_class_is_set_up_with_its_settings() -> None:
    @verifier(name="scaled", version="1", config={"factor": 2.0})
    class Scaled:
        def setup(self, config: Mapping[str, Json]) -> None:
            self.factor = config["factor"]

        def verify(self, items: Sequence[Item]) -> Sequence[Result]:
            return [len(item.response) * self.factor for item in items]

    assert isinstance(scaled := Scaled, Verifier)
    assert scaled("abc") == 6.0
    assert scaled("abc", factor=3) == 9


def test_what_cannot_be_a_verifier_is_refused_when_declared() -> None:
    declare = verifier(name="bad", version="1")

    async def late(response: str, reference: Json) -> float:
        return 0.0

    def narrow(response: str) -> float:
        return 0.0

    def demanding(response: str, reference: Json, *, weather: str) -> float:
        return 0.0

    class Idle:
        pass

    with pytest.raises(TypeError, match=r"is async\. Write a plain function"):
        declare(late)
    with pytest.raises(TypeError, match=r"must be check\(response, reference\), with any of the keywords "):
        declare(narrow)
    with pytest.raises(TypeError, match=r"it also requires weather\."):
        declare(demanding)
    with pytest.raises(TypeError, match=r"needs a method verify\(self, items\)\."):
        declare(Idle)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"wthin": 1}', "near has no setting 'wthin'. It has: extra, strict, unit, within."),
        ('{"within": "1"}', 'near wants within as float, not "1".'),
        ('{"within": true}', "near wants within as float, not true."),
        ('{"strict": 1}', "near wants strict as bool, not 1."),
        ('{"unit": 1}', "near wants unit as str, not 1."),
        ("[1]", "The configuration for near must be a JSON object, not list."),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_with_the_key(config: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        near.settings(config)

    assert str(caught.value) == message


def test_settings_overlay_defaults_and_whole_numbers_are_floats_too() -> None:
    assert near.settings('{"within": 1, "extra": [1]}') == {
        "within": 1,
        "unit": "m",
        "strict": False,
        "extra": [1],
    }
    assert near.settings("") == dict(near.config)


def test_the_config_digest_is_that_of_the_canonical_json() -> None:
    expected = hashlib.sha256('{"a":1,"b":"é"}'.encode()).digest()

    assert config_digest('{"b": "\\u00e9", "a": 1}') == expected
    assert config_digest("") == config_digest("{}") == hashlib.sha256(b"{}").digest()
    assert config_digest("{oops") == hashlib.sha256(b"{oops").digest()
