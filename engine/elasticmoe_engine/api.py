"""The launcher's two HTTP sides: orders on `launcher.sock`, probes on TCP."""

from __future__ import annotations

from elasticmoe_engine import preflight
from elasticmoe_engine.facts import Facts
from elasticmoe_engine.launch import LaunchSpec, SpecError
from elasticmoe_engine.local_http import Answer, BadRequestError, Request
from elasticmoe_engine.supervisor import ConflictError, Supervisor

SOCKET = "launcher.sock"


class Api:
    """Answers from any thread. probe_port: set once it is known."""

    def __init__(self, supervisor: Supervisor, facts: Facts) -> None:
        self._supervisor, self._facts = supervisor, facts
        self.probe_port = 0

    def control(self, request: Request) -> Answer:
        """The sidecar's calls."""
        match request.method, request.path:
            case "GET", ("state",):
                return Answer(200, self._state())
            case "PUT", ("engine",):
                return self._start(request)
            case "DELETE", ("engine",):
                return self._stop(request)
            case "PUT", ("ready",):
                return self._set_ready(request)
            case "POST", ("preflight",):
                return self._preflight(request)
        return _nothing(request)

    def probe(self, request: Request) -> Answer:
        """What anybody may ask who reaches the probe port."""
        supervisor = self._supervisor
        match request.method, request.path:
            case "GET" | "HEAD", ("livez",):
                return Answer(200, "alive\n")
            case "GET" | "HEAD", ("readyz",):
                ready = supervisor.probe_ready
                return Answer(200, "ready\n") if ready else Answer(503, "not ready\n")
            case "GET", ("state",):
                engine, ready = supervisor.engine_state(), supervisor.ready
                return Answer(200, {"boot": supervisor.boot, "engine": engine, "ready": ready})
        return _nothing(request)

    def _state(self) -> dict[str, object]:
        supervisor = self._supervisor
        warmth, listener = supervisor.warmth, supervisor.listener
        return {
            "boot": supervisor.boot,
            "mode": "cold" if supervisor.cold else "warm",
            "warm": supervisor.warm,
            "import_s": warmth.seconds if warmth is not None else None,
            "engine": supervisor.engine_state(),
            "ready": supervisor.ready,
            "serving": {"host": listener.host, "port": listener.port},
            "probe_port": self.probe_port,
            "facts": self._facts.as_json(),
            "error": self._facts.problem or supervisor.cold,
        }

    def _start(self, request: Request) -> Answer:
        if refusal := self._facts.refusal:
            return Answer(409, {"error": refusal})
        try:
            spec = LaunchSpec.from_json(request.body)
            new = self._supervisor.start(spec)
        except SpecError as error:
            raise BadRequestError(str(error)) from None
        except ConflictError as error:
            return Answer(409, {"error": str(error)})
        return Answer(202 if new else 200, self._supervisor.engine_state())

    def _stop(self, request: Request) -> Answer:
        name = request.query.get("launch", "")
        try:
            grace_s = float(request.query.get("grace", "10"))
        except ValueError:
            raise BadRequestError("grace: give seconds") from None
        try:
            self._supervisor.stop(name, grace_s)
        except ConflictError as error:
            return Answer(409, {"error": str(error)})
        return Answer(202, self._supervisor.engine_state())

    def _set_ready(self, request: Request) -> Answer:
        ready = request.body.get("ready") if isinstance(request.body, dict) else None
        if not isinstance(ready, bool):
            raise BadRequestError('send {"ready": true or false}')
        self._supervisor.ready = ready
        return Answer(200, {"ready": ready})

    def _preflight(self, request: Request) -> Answer:
        supervisor = self._supervisor
        try:
            group = preflight.Group.from_json(request.body)
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        instance = self._facts.instance(
            warm=supervisor.warm, warm_error=supervisor.cold, idle=supervisor.idle
        )
        reason = preflight.run(instance, group, preflight.reach, preflight.free_gpu_bytes)
        check = str(request.body.get("check", ""))
        return Answer(200, {"check": check, "ok": not reason, "reason": reason})


def _nothing(request: Request) -> Answer:
    return Answer(404, {"error": f"no {request.method} /{'/'.join(request.path)} here"})
