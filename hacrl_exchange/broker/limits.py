"""Every size and time the broker bounds, in one place. GetServerInfo tells them to clients."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a broker. Sizes in bytes, times in seconds."""

    max_message_size: int = 8 * MIB
    """Largest message in either direction."""
    delivery_message_size: int = MIB // 2
    """A delivery stream starts a new message at this size."""
    lease_message_size: int = 4 * MIB
    """A lease carries no further group from this size on; the others wait for the next one."""
    max_groups_per_publish: int = 64
    max_group_stored_size: int = 4 * MIB
    max_part_decoded_size: int = 32 * MIB
    max_meta_size: int = 64 << 10
    max_tokens: int = 131_072
    """Response tokens of one rollout."""
    max_wait_seconds: float = 20.0
    lease_timeout_seconds: float = 10.0
    max_groups_per_lease: int = 64
    max_prompt_set_size: int = 256 * MIB
    max_prompts_per_set: int = 1_000_000
    max_prompt_size: int = 1 * MIB
    max_detail_size: int = 2048
    max_components: int = 32
    """Named parts of a score."""
    max_component_name_size: int = 64
    max_name_size: int = 128
    """A worker's identity, and a verifier's name and version, in UTF-8."""
    max_workers: int = 1024
    max_offers_per_worker: int = 64
    max_lease_seconds: float = 600.0
    """A lease cannot be renewed for longer, unless a single group of it may take longer by itself."""
    lease_margin_seconds: float = 60.0
    """What a lease gets on top of the time that its longest group may take."""
    max_call_decoded_size: int = 128 * MIB
    """What all groups of a PublishGroups call may decode to."""
    max_publishing_size: int = 256 * MIB
    """What PublishGroups calls under way may decode to; more is answered OVERLOADED."""
