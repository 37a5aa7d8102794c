"""Where stage 1 runs. The schedule, which target an update reads, is decided in `train`.

With peers, an iteration has two exchanges, in one order:

    LLM      from the first rank to the peers, with its version: trained weights, never merged
    target   from the first peer to the others: rollouts, R and what q* is built again from

The peers answer with what `Inline` would have learned from the same LLM, to the last bit.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from constrained_ft.config import Config
from constrained_ft.distributed import World, pack, unpack
from constrained_ft.errors import ConfigError
from constrained_ft.fused import Head
from constrained_ft.llm import FrozenLLM
from constrained_ft.parts import Parts
from constrained_ft.rollouts import labeled_facts, labeled_from, labeled_tensors
from constrained_ft.target import Facts, Reference, Target, build_target, learn_target


@runtime_checkable
class Pending(Protocol):
    """A target being learned."""

    def wait(self) -> Target:
        """The target, once it is there; the same one however often it is asked for."""
        ...


class Done:
    """A target that is already learned."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def wait(self) -> Target:
        """The target."""
        return self._target


class Inline:
    """This process learns the target at once, before `start` returns.

    The reference is a frozen copy, so learning before the LLM update gives what learning meanwhile
    would give: the overlapped algorithm, run serially.
    """

    def start(self, parts: Parts, config: Config, reference: FrozenLLM, iteration: int) -> Pending:
        """Learn the target now."""
        return Done(learn_target(parts, config, reference, iteration))


class Peers:
    """The last ranks learn the target while the others update the LLM."""

    def __init__(self, everyone: World, peers: int) -> None:
        """Divide the ranks; every rank has to do this.

        Raises:
            ConfigError: when no rank would be left to update the LLM.
        """
        first = everyone.size - peers
        if first < 1:
            raise ConfigError(
                f"placement.peers={peers} of {everyone.size} processes leaves none to update the "
                f"LLM; start {peers + 1} or more with --nproc-per-node"
            )
        updaters, learners = list(range(first)), list(range(first, everyone.size))
        groups = everyone.among(
            {
                "updaters": updaters,
                "peers": learners,
                "llm": [0, *learners],
                "target": [first, *updaters],
            }
        )
        self.learns = everyone.rank >= first
        """Whether this rank is one of the peers."""
        self.side = groups["peers" if self.learns else "updaters"]
        """The ranks that do the same as this one."""
        self._llm, self._target = groups.get("llm"), groups.get("target")
        self._sizes = len(updaters), len(learners)
        self._waited = [0.0, 0.0]  # for targets, for the LLM
        self._worked = [0.0, 0.0]
        self._since = time.monotonic()

    def start(self, parts: Parts, config: Config, reference: FrozenLLM, iteration: int) -> Pending:
        """Give the peers the LLM; they learn meanwhile."""
        whole = parts.llm.whole_trained()
        if self._llm is not None:
            self._llm.tell(pack({}, {"iteration": iteration, "llm": iteration - 1}))
            self._llm.copy(whole.values())
        return _FromPeers(self, parts, config, reference.head, iteration)

    def receive(self, parts: Parts, config: Config, head: Head, iteration: int) -> Target:
        """What the peers learned, put where it would be if this rank had."""
        assert self._target is not None
        self._worked[0] += self._lap()
        with parts.phases.during("waiting"):
            tensors, facts = unpack(self._target.tell(b""))
        waited = self._lap()
        self._waited[0] += waited
        assert isinstance(facts, dict)
        assert (facts["iteration"], facts["llm"]) == (iteration, iteration - 1)
        self._waited[1] += facts["waited"]
        self._worked[1] += facts["worked"]
        target = _target_from(tensors, facts, parts, config, head)
        waits = {"time/wait_target": waited, "time/wait_llm": facts["waited"]}
        target.metrics.update(waits)
        return target

    def serve(self, parts: Parts, config: Config, last: int) -> None:
        """Learn targets of the LLMs that come, until that of an iteration after the last one."""
        assert self._llm is not None
        iteration = 0
        while iteration <= last:
            worked = self._lap()
            parts.display.phase("waiting for the LLM", 1)
            with parts.phases.during("waiting"):
                _, order = unpack(self._llm.tell(b""))
                assert isinstance(order, dict)
                self._llm.copy(parts.llm.trained_parameters().values())
            waited = self._lap()
            iteration = order["iteration"]
            target = learn_target(parts, config, parts.llm.frozen(), iteration)
            if self._target is not None:
                facts = order | {"waited": waited, "worked": worked}
                self._target.tell(_packed(target, parts, config, facts))

    def advice(self) -> str:
        """How long each side waited, and which split would have suited better."""
        updaters, learners = self._sizes
        size = updaters + learners
        learning, updating = self._worked[1] * learners, self._worked[0] * updaters
        best = min(max(round(size * learning / max(learning + updating, 1e-9)), 1), size - 1)
        words = (
            f"peers: {self._waited[0]:.1f} s waiting for targets, {self._waited[1]:.1f} s for the "
            "LLM"
        )
        if best == learners:
            return f"{words}; placement.peers={learners} suits {size} processes"
        return f"{words}; placement.peers={best} would suit better"

    def _lap(self) -> float:
        """Seconds since it was last asked."""
        before, self._since = self._since, time.monotonic()
        return self._since - before


def divide(parts: Parts, config: Config) -> Peers:
    """Give this rank its side of the work."""
    peers = Peers(parts.everyone, config.placement.peers)
    parts.world = peers.side
    if config.trainer.schedule == "alternating":
        parts.display.note(
            "placement=peers with trainer=alternating: each side waits while the other works; "
            "trainer=overlapped lets both work at once"
        )
    return peers


class _FromPeers:
    """A target that peers are learning."""

    def __init__(
        self,
        peers: Peers,
        parts: Parts,
        config: Config,
        head: Head,
        iteration: int,
    ) -> None:
        self._peers = peers
        self._asked = parts, config, head, iteration
        self._target: Target | None = None

    def wait(self) -> Target:
        """The target, once it has come."""
        if self._target is None:
            self._target = self._peers.receive(*self._asked)
        return self._target


def _packed(target: Target, parts: Parts, config: Config, facts: Mapping[str, Any]) -> bytes:
    """A target, the rollouts behind it and R."""
    labeled = parts.replay[0]
    tensors: dict[str, Tensor] = {
        **{f"labeled.{name}": part for name, part in labeled_tensors(labeled).items()},
        **{f"auxiliary.{name}": part for name, part in parts.auxiliary.state_dict().items()},
        "log_satisfied": target.facts.log_satisfied_S,
        "log_violated": target.facts.log_violated_S,
        "kl": target.facts.kl_N,
    }
    if config.trainer.reference == "matched":
        tensors["reference"] = target.reference.hidden_NTD
    return pack(
        tensors,
        {
            **facts,
            "rollouts": labeled_facts(labeled),
            "entropy": target.facts.entropy,
            "usable": target.usable,
            "metrics": target.metrics,
        },
    )


def _target_from(
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    parts: Parts,
    config: Config,
    head: Head,
) -> Target:
    """What `_packed` was given, R and replay in their places."""
    device = parts.llm.device
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in moved.items() if n.startswith(prefix)}

    labeled = labeled_from(under("labeled."), facts["rollouts"])
    parts.auxiliary.load_state_dict(under("auxiliary."))
    parts.remember(labeled, config.auxiliary.replay_iterations)
    found = Facts(
        log_satisfied_S=moved["log_satisfied"],
        log_violated_S=moved["log_violated"],
        kl_N=moved["kl"],
        entropy=facts["entropy"],
    )
    target = build_target(labeled, parts.auxiliary.frozen(), head, config, facts=found)
    if "reference" in moved:
        own = Reference(hidden_NTD=moved["reference"], head=head)
        target = replace(target, reference=own)
    return replace(target, usable=facts["usable"], metrics=facts["metrics"])
