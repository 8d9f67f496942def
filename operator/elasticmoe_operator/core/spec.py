"""What a user wants: an ElasticMoEDeployment's spec, read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from elasticmoe_operator.names import ENGINE_CONTAINER, LAUNCHER_OPTIONS, ROTATE

Object = Mapping[str, Any]


PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


class SpecError(ValueError):
    """A spec that nothing can be built from; one line that says what to change.

    The CRD's validation refuses nearly all of them; objects that are older than a rule come here.
    """


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Limits of a resize, in seconds. warm_standby: pods kept warm beyond the ranks."""

    drain_timeout: int = 300
    drain_policy: Literal["Postpone", "Abort"] = "Postpone"
    lame_duck: int = 6
    joiner_timeout: int = 600
    prepare_timeout: int = 240
    commit_timeout: int = 120
    warm_standby: int = 0


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What follows an unplanned loss; times in seconds."""

    policy: Literal["Restart", "None"] = "Restart"
    stall: int = 20
    replacement: int = 60
    max_restarts: int = 5
    window: int = 1800


@dataclass(frozen=True, kw_only=True)
class Part:
    """A container of ours. image: "" for the operator's own."""

    image: str = ""
    resources: Object = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """The Service that clients use."""

    type: str = "ClusterIP"
    port: int = 8000
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One ElasticMoEDeployment. replicas: as asked; `size` is what it is clamped to.

    metadata: name, namespace, uid, generation of the object; deleting: it has been deleted.
    """

    name: str
    namespace: str
    uid: str
    generation: int
    replicas: int
    min_replicas: int
    max_replicas: int
    template: Object
    scaling: Scaling = Scaling()
    recovery: Recovery = Recovery()
    coordinator: Part = Part()
    sidecar: Part = Part()
    service: ServiceSpec = ServiceSpec()
    paused: bool = False
    deleting: bool = False
    rotate_keys: str = ""

    @property
    def size(self) -> int:
        """The DP size that the group should have."""
        return min(max(self.replicas, self.min_replicas), self.max_replicas)

    @property
    def size_limited(self) -> str:
        """Why `size` is not `replicas`, "" when it is."""
        if self.replicas == self.size:
            return ""
        limit = "minReplicas" if self.replicas < self.size else "maxReplicas"
        return f"replicas is {self.replicas}, {limit} is {self.size}: the group has {self.size}"

    @property
    def engine(self) -> Object:
        """The container that runs the engine. Raises SpecError."""
        containers = self.template.get("spec", {}).get("containers") or []
        for container in containers:
            if container.get("name") == ENGINE_CONTAINER:
                return dict(container)
        raise SpecError(f"template.spec.containers has none named {ENGINE_CONTAINER!r}: add it")

    @property
    def replaced_probes(self) -> list[str]:
        """Probes of the engine container that the launcher's own take the place of."""
        return [one for one in PROBES if one in self.engine]

    @property
    def engine_words(self) -> list[str]:
        """The engine's command line, `vllm serve …`. Raises SpecError."""
        command = list(self.engine.get("command") or [])
        words = [*command, *(self.engine.get("args") or [])]
        if not command:
            words = ["vllm", "serve", *words]
        if words[:2] != ["vllm", "serve"]:
            raise SpecError(
                "the engine container's command has to be `vllm serve`: leave `command` out and "
                "put the model and its flags into `args`"
            )
        return words

    @property
    def serving_port(self) -> int:
        """Where the engine's API server listens: --port, or vLLM's own 8000."""
        port = _value(self.engine_words, "--port") or "8000"
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise SpecError(f"--port {port} of the engine: give a number from 1 to 65535")
        return int(port)

    @property
    def launcher_options(self) -> list[str]:
        """Options for the launcher, from the template's annotation."""
        annotations = self.template.get("metadata", {}).get("annotations") or {}
        return str(annotations.get(LAUNCHER_OPTIONS, "")).split()

    @cached_property
    def revision(self) -> str:
        """A short hash of what running engines depend on: to change it is to restart the group.

        Of what the user wrote, not of what is built from it: another version of the operator
        makes no other revision.
        """
        return _hash([self.pod_revision, self.engine_words])

    @cached_property
    def pod_revision(self) -> str:
        """The same of all that takes new pods to change: everything but the engine's arguments.

        Of those the model and the address stay: other expert slots, another port of the pod.
        """
        containers = [
            {key: value for key, value in one.items() if key not in ("command", "args")}
            if one.get("name") == ENGINE_CONTAINER
            else one
            for one in self.template["spec"]["containers"]
        ]
        words = self.engine_words
        fixed = [words[2:3], self.serving_port, _value(words, "--host"), _value(words, "--model")]
        return _hash(
            [
                {**self.template, "spec": {**self.template["spec"], "containers": containers}},
                fixed,
                self.max_replicas,
                [self.sidecar.image, self.sidecar.resources],
            ]
        )


def read(body: Object) -> Spec:
    """Read an ElasticMoEDeployment. Raises SpecError."""
    metadata, spec = body["metadata"], body.get("spec") or {}
    scaling, recovery = spec.get("scaling") or {}, spec.get("recovery") or {}
    service = spec.get("service") or {}
    template = spec.get("template")
    if not isinstance(template, Mapping):
        raise SpecError("spec.template is missing: give a pod template with a container `engine`")
    found = Spec(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=int(metadata.get("generation", 0)),
        replicas=int(spec.get("replicas", 2)),
        min_replicas=int(spec.get("minReplicas", 2)),
        max_replicas=int(spec.get("maxReplicas", 8)),
        template=_plain(template),
        scaling=Scaling(
            drain_timeout=int(scaling.get("drainTimeoutSeconds", Scaling.drain_timeout)),
            drain_policy=scaling.get("drainPolicy", Scaling.drain_policy),
            lame_duck=int(scaling.get("lameDuckSeconds", Scaling.lame_duck)),
            joiner_timeout=int(scaling.get("joinerTimeoutSeconds", Scaling.joiner_timeout)),
            prepare_timeout=int(scaling.get("prepareTimeoutSeconds", Scaling.prepare_timeout)),
            commit_timeout=int(scaling.get("commitTimeoutSeconds", Scaling.commit_timeout)),
            warm_standby=int(scaling.get("warmStandby", Scaling.warm_standby)),
        ),
        recovery=Recovery(
            policy=recovery.get("policy", Recovery.policy),
            stall=int(recovery.get("stallSeconds", Recovery.stall)),
            replacement=int(recovery.get("replacementSeconds", Recovery.replacement)),
            max_restarts=int(recovery.get("maxRestarts", Recovery.max_restarts)),
            window=int(recovery.get("windowSeconds", Recovery.window)),
        ),
        coordinator=_part(spec.get("coordinator") or {}),
        sidecar=_part(spec.get("sidecar") or {}),
        service=ServiceSpec(
            type=service.get("type", ServiceSpec.type),
            port=int(service.get("port", ServiceSpec.port)),
            annotations=_plain(service.get("annotations") or {}),
        ),
        paused=bool(spec.get("paused", False)),
        deleting=bool(metadata.get("deletionTimestamp")),
        rotate_keys=str((metadata.get("annotations") or {}).get(ROTATE, "")),
    )
    if not 2 <= found.min_replicas <= found.max_replicas:
        raise SpecError(
            f"minReplicas {found.min_replicas} and maxReplicas {found.max_replicas}: "
            "2 <= minReplicas <= maxReplicas is needed"
        )
    _ = found.serving_port
    return found


def _part(given: Object) -> Part:
    return Part(image=given.get("image") or "", resources=_plain(given.get("resources") or {}))


def _value(words: Sequence[str], flag: str) -> str:
    """The last value of a flag of the engine, "" for none."""
    found = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _hash(given: object) -> str:
    text = json.dumps(given, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _plain(given: Any) -> Any:
    """A copy of plain dicts and lists: kopf's own views don't serialise."""
    return json.loads(json.dumps(given, default=dict))
