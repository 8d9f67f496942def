"""What a deployment is like now, as questions that the plan asks. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from elasticmoe_operator.core.observed import Group, Instance, Observed, Pod
from elasticmoe_operator.core.spec import Spec


@dataclass(frozen=True)
class View:
    """The wanted and the observed side by side."""

    spec: Spec
    observed: Observed

    @property
    def now(self) -> float:
        """Unix seconds."""
        return self.observed.now

    @cached_property
    def group(self) -> Group | None:
        """The group, None while its coordinator does not answer or learns who is there."""
        found = self.observed.group
        return found if found is not None and found.known else None

    # --- pods and engines ------------------------------------------------------------------------

    def instance(self, pod: Pod) -> Instance | None:
        """The pod as the coordinator knows it, if it is this one and not an earlier one."""
        found = self.group.instance(pod.name) if self.group is not None else None
        return found if found is not None and found.uid in (pod.uid, "") else None

    def silent(self, pod: Pod) -> bool:
        """The coordinator does not hear this pod's sidecar."""
        instance = self.instance(pod)
        return instance is None or not instance.registered

    def old_pods(self) -> bool:
        """There are pods of another template: a StatefulSet was deleted without its pods."""
        wanted = ("", self.spec.pod_revision)
        return any(one.revision not in wanted and not one.deleting for one in self.observed.pods)

    def old_engines(self) -> bool:
        """Engines run with another command: it was changed again while they restarted."""
        wanted = ("", self.spec.revision)
        every = self.group.instances if self.group is not None else ()
        return any(one.active and one.command not in wanted for one in every)

    def in_place(self) -> bool:
        """Whether the newest revision can be had with the pods that are there."""
        ranks, group = self.observed.ranks, self.group
        return (
            ranks is not None
            and ranks.pod_revision == self.spec.pod_revision
            and not self.old_pods()
            and group is not None
            and group.state == "Serving"
            and group.size == group.desired
        )

    def serves_unseen(self) -> bool:
        """Ranks serve, or did when last heard of; no coordinator could have them leave in order.

        One that is learning who is there will know in seconds.
        """
        if self.group is not None:
            return False
        learning = self.observed.group is not None
        return learning or any(one.ready or one.active for one in self.observed.pods)

    def all_ready(self) -> bool:
        """Whether the pods of all active ranks are Ready."""
        group = self.group
        if group is None:
            return False
        names = {one.name for one in group.instances if one.active}
        ready = {one.name for one in self.observed.pods if one.ready}
        return len(names) >= group.size > 0 and names <= ready

    def gave_up(self) -> bool:
        """The coordinator does not try a failed resize again before somebody asks."""
        return self.group is not None and self.group.reason == "ResizeFailed"

    def exhausted(self) -> bool:
        """The coordinator starts nothing any more before somebody asks."""
        return self.group is not None and self.group.reason == "RestartsExhausted"

    # --- joiners ---------------------------------------------------------------------------------

    def joiners(self, size: int) -> list[Pod]:
        """Pods that could be ranks of this size now."""
        found = []
        for pod in self.observed.pods:
            instance = self.instance(pod)
            if pod.deleting or instance is None or not instance.registered or instance.leaving:
                continue
            if instance.active or (instance.warm and not instance.reason):
                found.append(pod)
        return found[:size]

    def joiners_ready(self, size: int) -> bool:
        """Whether there are enough of them."""
        return len(self.joiners(size)) >= size

    def missing(self, size: int) -> str:
        """Why there are not enough joiners, one line."""
        there = {one.name for one in self.joiners(size)}
        lines = []
        for pod in self.observed.pods:
            if pod.name in there or pod.deleting:
                continue
            instance = self.instance(pod)
            if pod.problem is not None:
                lines.append(pod.problem.message)
            elif instance is None:
                lines.append(f"{pod.name}: its sidecar has not registered yet")
            elif instance.reason:
                lines.append(f"{pod.name}: {instance.reason}")
            else:
                lines.append(f"{pod.name}: it is not warm yet")
        head = f"{len(there)} of {size} pods can serve"
        return "; ".join([head, *lines[:3]])

    # --- how many pods ---------------------------------------------------------------------------

    def wanted_replicas(self) -> int:
        """As many pods as the size needs; no pod is taken whose rank is not safe to delete."""
        ranks = self.observed.ranks
        replicas = ranks.replicas if ranks else 0
        wanted = self.spec.size + self.spec.scaling.warm_standby
        if self.group is None:
            return max(wanted, replicas)
        return max(wanted, min(self._floor(self.group), replicas))

    def new_replicas(self) -> int:
        """Of a StatefulSet that is made anew: it takes no pod which is there."""
        floor = max((one.ordinal + 1 for one in self.observed.pods), default=0)
        return max(self.spec.size + self.spec.scaling.warm_standby, floor)

    def _floor(self, group: Group) -> int:
        needed = [one.ordinal for one in group.instances if not one.safe_to_delete]
        # A coordinator that could not learn of a rank doesn't know what it does.
        needed += [
            one.ordinal for one in self.observed.pods if one.ready and self.instance(one) is None
        ]
        # Of a size that was asked for, joiners may be on their way, now or at its next attempt.
        busy = group.operation.to_size if group.operation is not None else 0
        return max([-1, *needed, busy - 1, group.size - 1, group.desired - 1]) + 1
