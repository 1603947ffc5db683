"""What a sweep looks at: which models need a decision by which policy, and which aliases are guarded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from components._runtime.registered_names import require_usable
from defense_core.errors import ConfigError
from defense_core.policy import Policy, parse_policy
from pipelines.triggers.watch import Watch

SECONDS_A_DAY = 86400.0


@dataclass(frozen=True)
class Demand:
    """What the versions of a model need.

    Attributes:
        policy: digest of the policy that must have decided.
        max_age_s: oldest decision that still counts, seconds; ``None``: any.
        registers: whether its decisions come to the registry; those of a policy that only observes do not.
    """

    policy: str
    max_age_s: float | None
    registers: bool = True


@dataclass(frozen=True)
class Scope:
    """Either the rules of a watch file, or one policy for every model.

    Attributes:
        watch: the watch file; its rules say which models, and which aliases of the models that runs write to.
        policy: without a watch file: the policy for every model.
        aliases: without a watch file: the aliases that are guarded on every model.
        accepted: digests of further policies whose allow decisions still cover an alias; versions
            that they decided need a decision by the current policy all the same.
    """

    watch: Watch | None = None
    policy: Policy | None = None
    aliases: tuple[str, ...] = ()
    accepted: frozenset[str] = frozenset()

    @cached_property
    def _by_policy(self) -> dict[str, Demand]:
        """What each policy demands, by its digest; digests cost, and models are many."""
        if self.watch is None:
            demands = [] if self.policy is None else [demand_of(self.policy)]
        else:
            demands = [demand_of(parse_policy(rule.plan.policy)) for rule in self.watch.rules]
        return {demand.policy: demand for demand in demands}

    @cached_property
    def observing(self) -> frozenset[str]:
        """Digests of the policies that only observe: the registry never says that they decided."""
        return frozenset(digest for digest, demand in self._by_policy.items() if not demand.registers)

    def demand(self, model: str) -> Demand | None:
        """What versions of ``model`` need; ``None``: nothing, it is not looked at."""
        if self.watch is None:
            return next(iter(self._by_policy.values()), None)
        rule = self.watch.rule(model)
        return None if rule is None else self._by_policy[rule.policy_digest]

    def is_output(self, model: str) -> bool:
        """Whether runs write to ``model``: elsewhere, tags of a decision mean nothing."""
        return self.watch is None or any(rule.register == model for rule in self.watch.rules)

    def guarded(self, model: str) -> dict[str, frozenset[str]]:
        """The guarded aliases of ``model``; for each, digests of the policies whose allow decision covers it.

        A policy that only observes allows nothing, so a rule with one guards no alias.
        """
        if self.watch is None:
            return dict.fromkeys(self.aliases, self.accepted.union(self._by_policy))
        found: dict[str, frozenset[str]] = {}
        for rule in self.watch.rules:
            if rule.register == model and rule.policy_digest not in self.observing:
                found[rule.alias] = found.get(rule.alias, self.accepted) | {rule.policy_digest}
        return found

    def output_demands(self, model: str) -> tuple[Demand, ...]:
        """What versions in the output ``model`` that came from outside the registry need, any one of these."""
        if self.watch is None:
            return tuple(self._by_policy.values())
        digests = dict.fromkeys(rule.policy_digest for rule in self.watch.rules if rule.register == model)
        return tuple(self._by_policy[each] for each in digests)

    def check(self) -> None:
        """Refuse aliases that MLflow cannot have, or that nothing could cover. Raises ConfigError."""
        for alias in self.aliases:
            require_usable("model", alias, {})
        if self.aliases and self.observing and not self.accepted:
            raise ConfigError(
                "--alias is for a policy that promotes",
                expected="a policy with promote: true, or --accept-policy with the one that promoted",
                got="a policy that only observes, by which nothing covers an alias",
            )


def demand_of(policy: Policy) -> Demand:
    """What a policy demands of time."""
    days = policy.require.max_evidence_age_days
    return Demand(policy.digest, None if days is None else days * SECONDS_A_DAY, policy.promote)
