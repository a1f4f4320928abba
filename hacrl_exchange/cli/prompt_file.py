"""Prompt sets as JSON lines. Every refusal names the line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from hacrl_exchange.errors import InvalidPromptSetError
from hacrl_exchange.types import Message, Prompt, PromptEntry

_KEYS = frozenset({"id", "prompt", "messages", "reference", "source"})


def read_prompts(lines: Iterable[bytes], *, where: str) -> Iterator[PromptEntry]:
    """Prompts of a file, in order; empty lines are skipped. `where` names the file in errors.

    Raises:
        InvalidPromptSetError: a line is not a prompt, an id comes twice, or there is no prompt at all.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if b"\\u" in line:  # only an escape can spell half a pair
                json.dumps(value, ensure_ascii=False).encode()
            entry = _entry(value)
        except UnicodeDecodeError:
            raise _refusal(where, number, "the line is not UTF-8") from None
        except UnicodeEncodeError:
            raise _refusal(
                where, number, "a text has half of a surrogate pair, which is no character"
            ) from None
        except RecursionError:
            raise _refusal(where, number, "the line is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise _refusal(
                where, number, f"the line is not JSON: {error.msg} at column {error.colno}"
            ) from None
        except ValueError as error:
            raise _refusal(where, number, str(error)) from None
        prompt_id = entry.prompt.prompt_id
        if prompt_id in seen:
            raise _refusal(where, number, f"the id {prompt_id!r} is taken by line {seen[prompt_id]}")
        seen[prompt_id] = number
        yield entry
    if not seen:
        raise InvalidPromptSetError(f"{where} holds no prompt; nothing was stored.")


def _refusal(where: str, number: int, problem: str) -> InvalidPromptSetError:
    return InvalidPromptSetError(f"{where}, line {number}: {problem}; nothing was stored.", line=number)


def _entry(value: Any) -> PromptEntry:
    if not isinstance(value, dict):
        raise ValueError("a prompt is a JSON object")
    unknown = sorted(value.keys() - _KEYS)
    if unknown:
        raise ValueError(f"the key {unknown[0]!r} is unknown; the keys are {', '.join(sorted(_KEYS))}")
    prompt_id = value.get("id")
    if isinstance(prompt_id, int) and not isinstance(prompt_id, bool):
        prompt_id = str(prompt_id)
    if not isinstance(prompt_id, str) or not 1 <= len(prompt_id.encode()) <= 128:
        raise ValueError('"id" must be a text of 1 to 128 bytes')
    source = value.get("source", "")
    if not isinstance(source, str):
        raise ValueError('"source" must be a text')
    return PromptEntry(
        prompt=Prompt(prompt_id, _messages(value), source),
        reference_json=json.dumps(value.get("reference"), ensure_ascii=False),
    )


def _messages(value: dict[str, Any]) -> tuple[Message, ...]:
    if ("prompt" in value) == ("messages" in value):
        raise ValueError('give either "prompt" or "messages"')
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise ValueError('"prompt" must be a text')
        return (Message("user", value["prompt"]),)
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list of at least one {"role", "content"}')
    return tuple(_message(message) for message in messages)


def _message(value: Any) -> Message:
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        raise ValueError('a message has exactly "role" and "content"')
    role, content = value["role"], value["content"]
    if not isinstance(role, str) or not isinstance(content, str) or not role:
        raise ValueError('"role" and "content" of a message must be texts, the role not empty')
    return Message(role, content)
