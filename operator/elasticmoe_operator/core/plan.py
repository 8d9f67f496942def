"""One pure function: what to do next, given what is, what is wanted and the operation under way.

It is asked again and again; an action that was lost is planned again.
"""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe_operator.core import upkeep
from elasticmoe_operator.core.actions import Action, ApplyRanks
from elasticmoe_operator.core.due import due
from elasticmoe_operator.core.observed import Observed
from elasticmoe_operator.core.operation import Ended, Operation
from elasticmoe_operator.core.progress import Progress
from elasticmoe_operator.core.spec import Spec
from elasticmoe_operator.core.view import View


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do, in this order, after `operation` was written to the status.

    operation: the one under way now. ended: those that ended just now, oldest first. held: why the
    size that is asked for is not tried now, "" when it is or when nothing is to be done.
    """

    actions: tuple[Action, ...] = ()
    operation: Operation | None = None
    ended: tuple[Ended, ...] = ()
    held: str = ""


def plan(
    spec: Spec, observed: Observed, operation: Operation | None, history: tuple[Ended, ...] = ()
) -> Plan:
    """The next step. history: operations that ended before, oldest first."""
    view = View(spec, observed)
    if spec.deleting:
        return Plan(actions=tuple(upkeep.tear_down(view)))
    progress = Progress(view, operation)
    progress.advance()
    held = ""
    if progress.operation is None:
        begun, held = due(view, (*history, *progress.ended))
        progress.operation = begun
        progress.advance()
        if begun is not None and progress.operation is None:
            # One that ended where it began may not look as if nothing were wanted.
            _, held = due(view, (*history, *progress.ended))
    actions = list(progress.actions)
    now = progress.operation
    draining = now is not None and now.phase == "Drain"
    if not draining and not any(isinstance(one, ApplyRanks) for one in actions):
        actions += upkeep.replicas(view)
    actions += [*upkeep.labels(view), *upkeep.forgotten(view)]
    return Plan(actions=tuple(actions), operation=now, ended=tuple(progress.ended), held=held)
