"""Policies: what the published code and the pure definition of a path disagree on."""

from __future__ import annotations

from dataclasses import dataclass, replace

SHARES = {"half": 1 / 2, "budget": 2 / 3, "values": 0.0}
"""By choice of ``Policy.attention``: what part of the flow goes to the attention weights, half of it to queries."""


@dataclass(frozen=True)
class Policy:
    """What the published code and the pure definition of a path disagree on.

    Attributes:
        biases: ``flow`` (paths that begin at a constant unit, ``|b|^p``) or ``drop``; also positional embeddings.
        batch_norm: ``affine`` (frozen, ``(|gamma| / sqrt(var + eps))^p``, its shift a bias) or ``identity``.
        max_pool: ``winner`` (first index on ties) or ``sum`` over the window.
        norm: norms without running statistics: ``flow`` (divide by the RMS of the flow, held fixed), ``unit`` or
            ``recorded``: what each sample is divided by, in methods that take data.
        attention: how the flow through ``softmax(q k') v`` is shared among values, queries and keys: ``half`` (the
            product of two flows, twice: 1/2, 1/4, 1/4), ``budget`` (queries and keys as much as values: 1/3 each) or
            ``values`` (1, 0, 0: queries and keys score nothing and are the first to go; ``exclude`` keeps them).
    """

    biases: str = "flow"
    batch_norm: str = "affine"
    max_pool: str = "winner"
    norm: str = "flow"
    attention: str = "half"

    def __post_init__(self) -> None:
        allowed = {
            "biases": ("flow", "drop"),
            "batch_norm": ("affine", "identity"),
            "max_pool": ("winner", "sum"),
            "norm": ("flow", "unit", "recorded"),
            "attention": tuple(SHARES),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"Policy: {name}: wanted one of {values}, got {getattr(self, name)!r}")


POLICIES = {
    "published": Policy(),
    "paths": Policy(biases="drop", max_pool="sum"),
    "recorded": Policy(biases="drop", max_pool="sum", norm="recorded"),
}


def policy_of(policy: str | Policy, **overrides: str) -> Policy:
    """A policy by name, single choices overridden: ``published``, ``paths``, or ``recorded`` (paths, norms by data)."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"policy: wanted one of {sorted(POLICIES)} or a Policy, got {policy!r}")
        policy = POLICIES[policy]
    if not isinstance(policy, Policy):
        raise TypeError(f"policy: wanted one of {sorted(POLICIES)} or a Policy, got {policy!r}")
    return replace(policy, **overrides) if overrides else policy
