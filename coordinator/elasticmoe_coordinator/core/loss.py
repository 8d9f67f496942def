"""When is a rank lost, and when does the group hang?

When a rank dies its peers hang silently with `/health` 200 (measured on vLLM 0.33), so nothing an
engine says about itself decides. A rank is lost when its launcher says that the engine ended. The
group is lost when requests run and no rank makes progress: ranks of one expert-parallel group step
together, so while any rank moves all are alive, however silent one of them is.
"""

from __future__ import annotations

from elasticmoe_protocol.messages import Member

from elasticmoe_coordinator.core.view import View


def gone(view: View, member: Member) -> str:
    """Why this member's engine is certainly gone, "" when it is not."""
    who = f"{member.instance} (rank {member.rank})"
    found = view.fresh(member.instance)
    known = view.roster.get(member.instance)
    engine = found.engine if found else (known.told_directly if known else None)
    if engine is None:
        return ""
    if engine.launch == member.launch:
        if engine.phase == "exited":
            return f"{who}: {engine.exit.reason if engine.exit else 'its engine ended'}"
        if engine.phase in ("starting", "running"):
            return ""
    return f"{who}: its engine is gone"


class Stall:
    """Notices that requests run and nothing moves."""

    def __init__(self, now: float) -> None:
        self._moved_at = now
        self._progress: dict[str, int] = {}
        self._layout: tuple[Member, ...] = ()
        self._moved_once = False

    def shift(self, seconds: float, now: float) -> None:
        """The coordinator itself stood still for so long."""
        self._moved_at = min(self._moved_at + seconds, now)

    def judge(self, view: View, expected_still: bool) -> str:
        """Why the group hangs, "" when it does not. Call it each turn."""
        members = view.book.record.members
        if members != self._layout:
            self._layout, self._moved_once = members, False
            self._moved_at = view.now
        gates = [(member, view.gate(member)) for member in members]
        moved = False
        for member, gate in gates:
            if gate is not None and self._progress.get(member.launch, -1) != gate.progress:
                moved = moved or member.launch in self._progress
                self._progress[member.launch] = gate.progress
        wanted = any(gate.in_flight + gate.held > 0 for _, gate in gates if gate is not None)
        # A gate that is shut for a commit opens again, unless the resize is over for us.
        scaling = _resizes(view) and any(gate.scaling for _, gate in gates if gate is not None)
        mute = [m.instance for m, gate in gates if gate is None and self._is_mute(view, m)]
        heard = sum(1 for _, gate in gates if gate is not None)
        others_trouble = 2 * (heard + len(mute)) < len(members)
        self._moved_once = self._moved_once or moved
        if moved or expected_still or scaling or others_trouble or not (wanted or mute):
            self._moved_at = view.now
            return ""
        limit = view.config.stall if self._moved_once else view.config.compile_limit
        if view.now - self._moved_at < limit:
            return ""
        silent = [m.instance for m in members if view.roster.silent(m.instance, view.now)]
        who = f", nothing is heard from {', '.join(silent)}" if silent else ""
        return f"requests run and no rank made progress for {limit:g} s{who}"

    def _is_mute(self, view: View, member: Member) -> bool:
        """Its launcher answers but its API server has not for long."""
        found = view.fresh(member.instance)
        return found is not None and view.now - found.gate_seen > view.config.stall


def _resizes(view: View) -> bool:
    running = view.book.operation
    return running is not None and running.kind in ("scale_up", "scale_down")
