"""What each child object of an ElasticMoEDeployment should be."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from elasticmoe_cli.main import app
from elasticmoe_engine import command as engine_command
from elasticmoe_engine import launcher
from elasticmoe_operator import names
from elasticmoe_operator.builders import (
    accounts,
    command,
    coordinator,
    disruption,
    network,
    rank,
    secret,
    services,
    statefulset,
)
from elasticmoe_operator.builders.common import Platform
from elasticmoe_operator.core.spec import Spec, SpecError
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operator_world import spec

PLATFORM = Platform(image="elasticmoe:1", pull_secrets=("registry",), namespace="operators")
RESTRICTED_USER = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
RICH: dict[str, Any] = {
    "metadata": {
        "labels": {"team": "ml", names.COMPONENT: "mine"},
        "annotations": {"note": "x", names.LAUNCHER_OPTIONS: "--engine sim:main --preload sim"},
    },
    "spec": {
        "serviceAccountName": "models",
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "securityContext": {"runAsUser": 1000, "fsGroup": 1000},
        "imagePullSecrets": [{"name": "hub"}],
        "terminationGracePeriodSeconds": 30,
        "initContainers": [{"name": "weights", "image": "copy:1"}],
        "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "containers": [
            {"name": "exporter", "image": "exporter:1"},
            {
                "name": "engine",
                "image": "vllm:1",
                "args": ["some/model", "--port", "9000"],
                "env": [
                    {"name": "PYTHONPATH", "value": "/mine"},
                    {"name": "HF_HOME", "value": "/models"},
                ],
                "ports": [
                    {"name": "http", "containerPort": 9000},
                    {"name": "extra", "containerPort": 9100},
                ],
                "volumeMounts": [{"name": "models", "mountPath": "/models"}],
                "resources": {"limits": {"nvidia.com/gpu": 1}},
                "livenessProbe": {"httpGet": {"path": "/health", "port": 9000}},
                "readinessProbe": {"httpGet": {"path": "/health", "port": 9000}},
                "startupProbe": {"httpGet": {"path": "/health", "port": 9000}},
                "lifecycle": {
                    "postStart": {"exec": {"command": ["true"]}},
                    "preStop": {"exec": {"command": ["sleep", "5"]}},
                },
            },
        ],
    },
}


def pod(of: Spec | None = None, **changes: Any) -> dict[str, Any]:
    """The pod's spec."""
    found: dict[str, Any] = rank.build(of or spec(**changes), PLATFORM, image="ours:1")["spec"]
    return found


def named(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(one for one in items if one["name"] == name)


def engine(found: dict[str, Any]) -> dict[str, Any]:
    return named(found["containers"], "engine")


def sidecar(found: dict[str, Any]) -> dict[str, Any]:
    return named(found["initContainers"], names.SIDECAR_CONTAINER)


def coordinator_of(one: Spec, **changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"image": "ours:1", "max_replicas": 6, "pod_revision": "r"}
    return coordinator.build(one, PLATFORM, **{**known, **changes})


def every(one: Spec) -> list[dict[str, Any]]:
    """All child objects."""
    return [
        *accounts.build(one),
        *services.build(one),
        *network.build(one, PLATFORM),
        disruption.build(one, size=3),
        command.build(one),
        coordinator_of(one),
        secret.build(one, {"token": "t"}),
        statefulset.build(one, PLATFORM, image="ours:1", replicas=3),
    ]


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, RICH], ids=["small", "rich"])
def test_every_object_belongs_to_its_deployment(template: Any):
    one = spec(template=template) if template else spec()
    for found in every(one):
        metadata = found["metadata"]
        (owner,) = metadata["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == (names.KIND, "moe", "cr")
        assert owner["controller"] is True
        assert metadata["namespace"] == "ns"
        assert metadata["labels"][names.DEPLOYMENT] == "moe"
        assert found["apiVersion"]


def test_no_two_objects_have_one_name():
    found = [(one["kind"], one["metadata"]["name"]) for one in every(spec())]
    assert len(found) == len(set(found))


def test_the_same_input_makes_the_same_objects_and_is_not_changed():
    one = spec(template=RICH)
    before = copy.deepcopy(one)
    assert json.dumps(every(one)) == json.dumps(every(spec(template=RICH)))
    assert one == before


def test_another_platform_image_makes_no_other_revision():
    for image in ("elasticmoe:1", "elasticmoe:2"):
        platform = Platform(image=image)
        found = statefulset.build(spec(), platform, image="ours:1", replicas=3)
        same = statefulset.build(spec(), Platform(image="x"), image="ours:1", replicas=3)
        assert found == same
        assert found["metadata"]["annotations"][names.REVISION] == spec().revision
        assert image not in json.dumps(found)


def test_selectors_fit_the_pods_that_they_mean():
    one = spec(template=RICH)
    ranks = rank.build(one, PLATFORM, image="i")["metadata"]["labels"]
    leader = coordinator_of(one)["spec"]["template"]["metadata"]["labels"]
    for found in every(one):
        selector = (
            found["spec"].get("selector") or found["spec"].get("podSelector")
            if "spec" in found
            else None
        )
        if selector is None:
            continue
        wanted = dict(selector.get("matchLabels", selector))
        wanted.pop(names.ACTIVE, None)
        meant = leader if found["metadata"]["name"].endswith("-coordinator") else ranks
        assert wanted.items() <= meant.items(), found["metadata"]["name"]
        assert not wanted.items() <= (ranks if meant is leader else leader).items()


# --- the rank's pod ------------------------------------------------------------------------------


def test_what_the_user_wrote_is_kept():
    found = pod(template=RICH)
    mine = engine(found)
    assert found["nodeSelector"] == {"gpu": "h100"}
    assert found["serviceAccountName"] == "models"
    assert found["securityContext"] == {"runAsUser": 1000, "fsGroup": 1000}
    assert RICH["spec"]["tolerations"][0] in found["tolerations"]
    assert RICH["spec"]["volumes"][0] in found["volumes"]
    assert named(found["containers"], "exporter") == {"name": "exporter", "image": "exporter:1"}
    assert named(found["initContainers"], "weights") == {"name": "weights", "image": "copy:1"}
    assert mine["resources"] == {"limits": {"nvidia.com/gpu": 1}}
    assert {"name": "models", "mountPath": "/models"} in mine["volumeMounts"]
    assert {"name": "HF_HOME", "value": "/models"} in mine["env"]
    assert {"name": "extra", "containerPort": 9100} in mine["ports"]
    assert mine["lifecycle"]["postStart"] == {"exec": {"command": ["true"]}}
    assert found["imagePullSecrets"] == [{"name": "hub"}, {"name": "registry"}]


def test_the_engine_is_the_first_container():
    assert [one["name"] for one in pod(template=RICH)["containers"]] == ["engine", "exporter"]


def test_the_launcher_comes_before_init_containers_of_the_user_and_the_sidecar_after_them():
    """The sidecar is a native one: it runs on, and its port and keys are no concern of others."""
    found = pod(template=RICH)["initContainers"]
    assert [one["name"] for one in found] == [
        names.INJECT_CONTAINER,
        "weights",
        names.SIDECAR_CONTAINER,
    ]
    assert found[-1]["restartPolicy"] == "Always"
    assert "restartPolicy" not in found[0]


def test_the_injected_folder_comes_first_in_pythonpath_and_the_users_is_kept():
    env = engine(pod(template=RICH))["env"]
    paths = [one["value"] for one in env if one["name"] == "PYTHONPATH"]
    assert paths == [f"{names.ENGINE_DIR}:/mine"]


def test_no_name_occurs_twice_in_the_environment():
    taken = copy.deepcopy(RICH)
    taken["spec"]["containers"][1]["env"] += [{"name": "POD_IP", "value": "1.2.3.4"}]
    env = [one["name"] for one in engine(pod(template=taken))["env"]]
    assert len(env) == len(set(env))


def test_the_pods_ip_is_known_before_it_is_used():
    """Kubernetes fills in $(POD_IP) only where the variable is defined."""
    for one in (engine(pod()), sidecar(pod())):
        words = json.dumps([one.get("command"), one.get("args")])
        known = {each["name"] for each in one["env"]}
        used = {word.partition(")")[0] for word in words.split("$(")[1:]}
        assert used
        assert used <= known


def test_probes_are_the_launchers_and_the_startup_probe_is_gone():
    mine = engine(pod(template=RICH))
    assert mine["livenessProbe"]["httpGet"] == {
        "port": names.PROBE_PORT,
        "path": "/livez",
        "scheme": "HTTP",
    }
    assert mine["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert "startupProbe" not in mine
    assert spec(template=RICH).replaced_probes == [
        "livenessProbe",
        "readinessProbe",
        "startupProbe",
    ]


def test_the_pre_stop_hook_asks_to_leave_and_is_over_before_the_grace_is():
    found = pod(template=RICH, scaling={"drainTimeoutSeconds": 100})
    words = engine(found)["lifecycle"]["preStop"]["exec"]["command"]
    assert words[:3] == ["python3", "-m", "elasticmoe_engine.leave"]
    assert 100 < float(words[words.index("--timeout") + 1]) < found["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("wanted", "drain", "least"), [(30, 300, 330), (5000, 300, 5000)])
def test_the_grace_is_as_long_as_drain_and_restart_may_take(wanted: int, drain: int, least: int):
    template = copy.deepcopy(RICH)
    template["spec"]["terminationGracePeriodSeconds"] = wanted
    found = pod(template=template, scaling={"drainTimeoutSeconds": drain})
    assert found["terminationGracePeriodSeconds"] >= least


def test_service_links_are_off():
    """A Service named `vllm` would set VLLM_PORT."""
    assert pod(template=RICH)["enableServiceLinks"] is False
    assert coordinator_of(spec())["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_without_a_service_account_of_the_user_one_without_rights_is_used():
    found = pod()
    assert found["serviceAccountName"] == "moe-ranks"
    assert found["automountServiceAccountToken"] is False
    assert all(one["automountServiceAccountToken"] is False for one in accounts.build(spec()))


def test_shared_files_can_be_read_by_the_engines_user():
    assert pod()["securityContext"]["fsGroup"] == names.USER
    assert pod(template=RICH)["securityContext"]["fsGroup"] == 1000


def test_pods_leave_a_vanished_node_soon_unless_the_user_says_when():
    keys = {one.get("key"): one.get("tolerationSeconds") for one in pod()["tolerations"]}
    assert keys == {
        "node.kubernetes.io/not-ready": 30,
        "node.kubernetes.io/unreachable": 30,
    }
    template = copy.deepcopy(RICH)
    mine = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 9}
    template["spec"]["tolerations"] = [mine]
    found = pod(template=template)["tolerations"]
    assert [one for one in found if one["key"] == mine["key"]] == [mine]


def test_labels_of_the_user_are_kept_and_ours_win():
    labels = rank.build(spec(template=RICH), PLATFORM, image="i")["metadata"]["labels"]
    assert (labels["team"], labels[names.COMPONENT]) == ("ml", names.RANK)
    assert names.ACTIVE not in labels


def test_keys_are_mounted_in_the_sidecar_only():
    found = pod(template=RICH)
    volume = named(found["volumes"], "elasticmoe-keys")
    assert [one["key"] for one in volume["secret"]["items"]] == ["sidecar.json"]
    holders = [
        one["name"]
        for one in (*found["containers"], *found["initContainers"])
        if any(mount["name"] == "elasticmoe-keys" for mount in one.get("volumeMounts", ()))
    ]
    assert holders == [names.SIDECAR_CONTAINER]
    assert names.keys_secret("moe") not in json.dumps(found["containers"])


def test_every_mount_has_its_volume():
    for found in (pod(template=RICH), coordinator_of(spec())["spec"]["template"]["spec"]):
        volumes = [one["name"] for one in found["volumes"]]
        assert len(volumes) == len(set(volumes))
        for one in (*found["containers"], *found.get("initContainers", ())):
            assert {mount["name"] for mount in one.get("volumeMounts", ())} <= set(volumes)


def test_images_of_ours_are_those_of_the_revision():
    found = pod()
    assert [one["image"] for one in found["initContainers"]] == ["ours:1"] * 2
    other = pod(sidecar={"image": "mine:1"})
    assert [one["image"] for one in other["initContainers"]] == ["mine:1"] * 2


# --- command lines -------------------------------------------------------------------------------


def template(**engine: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "engine", "image": "v", **engine}]}}


@pytest.mark.parametrize(
    "given",
    [
        {"args": ["some/model", "--seed=1"]},
        {"command": ["vllm", "serve"], "args": ["some/model", "--seed=1"]},
        {"command": ["vllm", "serve", "some/model", "--seed=1"]},
        {"command": ["vllm"], "args": ["serve", "some/model", "--seed=1"]},
    ],
    ids=str,
)
def test_each_way_to_write_the_command_comes_to_the_same(given: dict[str, Any]):
    one = spec(template=template(**given))
    assert one.engine_words == ["vllm", "serve", "some/model", "--seed=1"]
    assert one.revision == spec(template=template(args=["some/model", "--seed=1"])).revision
    content = json.loads(command.build(one)["data"][names.COMMAND_FILE])
    assert content == {"revision": one.revision, "command": one.engine_words}
    assert engine_command.parse(content["command"])


@pytest.mark.parametrize("given", [["sh", "-c", "vllm serve x"], ["python3"], ["vllm", "bench"]])
def test_another_command_is_refused_with_advice(given: list[str]):
    with pytest.raises(SpecError, match="has to be `vllm serve`"):
        spec(template=template(command=given))


def test_a_template_without_an_engine_is_refused_with_advice():
    with pytest.raises(SpecError, match="has none named 'engine': add it"):
        spec(template={"spec": {"containers": [{"name": "x"}]}})


@pytest.mark.parametrize("extra", [RICH, None], ids=["options", "none"])
def test_the_launcher_understands_its_command_line(extra: Any):
    words = engine(pod(template=extra) if extra else pod())["command"]
    assert words[:3] == ["python3", "-m", "elasticmoe_engine.launcher"]
    parsed = launcher._parser().parse_args(words[3:])
    assert parsed.probe_port == names.PROBE_PORT
    assert str(parsed.command_file) == f"{names.COMMAND_DIR}/{names.COMMAND_FILE}"
    if extra:
        assert (parsed.engine, parsed.preload) == ("sim:main", ["sim"])


def test_the_container_has_no_arguments_beside_the_launchers():
    assert "args" not in engine(pod(template=RICH))


def understood(words: list[str]) -> dict[str, Any]:
    """What the command line's own parser makes of them."""
    root = typer.main.get_command(app)
    found = root.commands[words[0]]  # type: ignore[attr-defined]
    context = found.make_context(words[0], list(words[1:]))
    options: dict[str, Any] = context.params
    return options


def test_the_coordinator_understands_its_arguments():
    one = spec(
        scaling={"drainPolicy": "Abort", "drainTimeoutSeconds": 77, "lameDuckSeconds": 9},
        recovery={"policy": "None", "stallSeconds": 33},
    )
    (container,) = coordinator_of(one, max_replicas=5)["spec"]["template"]["spec"]["containers"]
    found = understood(container["args"])
    assert (found["deployment"], found["min_size"], found["max_size"]) == ("moe", 2, 5)
    assert (found["drain_policy"].value, found["drain_timeout"]) == ("abort", 77)
    assert (found["lame_duck"], found["stall"]) == (9, 33)
    assert (found["loss_policy"].value, found["policy"].value) == ("none", "declared")
    assert found["size"] is None
    assert found["http_port"] == names.COORDINATOR_HTTP_PORT


def test_the_sidecar_understands_its_arguments():
    words = [word.replace("$(POD_INDEX)", "3") for word in sidecar(pod())["args"]]
    found = understood(words)
    assert (found["ordinal"], found["deployment"]) == (3, "moe")
    assert found["coordinator"] == "tcp://moe-coordinator.ns.svc:7410"
    assert found["policy"].value == "declared"
    assert found["leave_grace"] >= pod()["terminationGracePeriodSeconds"]


def test_the_command_line_knows_how_to_inject():
    words = named(pod()["initContainers"], names.INJECT_CONTAINER)["args"]
    assert str(understood(words)["folder"]) == names.ENGINE_DIR


# --- Pod Security: restricted --------------------------------------------------------------------

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def violations(found: dict[str, Any]) -> Iterator[str]:
    """Of the Kubernetes Pod Security Standards, level restricted."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if found.get(key):
            yield key
    for volume in found.get("volumes", ()):
        kinds = set(volume) - {"name"}
        if not kinds <= VOLUMES:
            yield f"volume {volume['name']}"
    whole = found.get("securityContext") or {}
    for one in (*found["containers"], *found.get("initContainers", ())):
        own = one.get("securityContext") or {}
        both = {**whole, **own}
        checks = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "drop ALL": "ALL" in (own.get("capabilities") or {}).get("drop", ()),
            "add": set((own.get("capabilities") or {}).get("add", ())) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": both.get("runAsNonRoot") is True,
            "runAsUser": both.get("runAsUser") != 0,
            "seccomp": (both.get("seccompProfile") or {}).get("type")
            in ("RuntimeDefault", "Localhost"),
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in one.get("ports", ())),
        }
        yield from (f"{one['name']}: {name}" for name, good in checks.items() if not good)


def test_the_check_finds_what_is_not_restricted():
    assert list(violations(pod()))


def test_the_coordinators_pod_is_restricted():
    assert not list(violations(coordinator_of(spec())["spec"]["template"]["spec"]))


def test_our_containers_in_the_ranks_pod_are_restricted_and_cannot_write():
    found = pod(template=RICH)
    ours = [one for one in found["initContainers"] if one["name"].startswith("elasticmoe")]
    assert len(ours) == 2
    assert not list(violations({"volumes": found["volumes"], "containers": ours}))
    for one in ours:
        assert one["securityContext"]["readOnlyRootFilesystem"] is True


def test_with_a_restricted_engine_the_whole_pod_is_restricted():
    one = spec(template=template(args=["m"], securityContext=RESTRICTED_USER))
    assert not list(violations(pod(one)))


# --- the other objects ---------------------------------------------------------------------------


def test_the_stateful_set_replaces_pods_only_when_it_is_told():
    found = statefulset.build(spec(), PLATFORM, image="ours:1", replicas=4)["spec"]
    assert found["updateStrategy"] == {"type": "OnDelete"}
    assert found["podManagementPolicy"] == "Parallel"
    assert (found["replicas"], found["serviceName"]) == (4, "moe-ranks")


def test_there_is_never_more_than_one_coordinator():
    found = coordinator_of(spec())["spec"]
    assert (found["replicas"], found["strategy"]) == (1, {"type": "Recreate"})


def test_new_pods_have_a_new_coordinator_and_a_new_size_has_not():
    assert coordinator_of(spec(2)) == coordinator_of(spec(5))
    assert coordinator_of(spec(), pod_revision="a") != coordinator_of(spec(), pod_revision="b")


def test_clients_reach_ready_ranks_and_the_group_reaches_all():
    serving, ranks, leader = services.build(
        spec(template=RICH, service={"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}})
    )
    assert serving["spec"]["type"] == "LoadBalancer"
    assert serving["metadata"]["annotations"] == {"a": "b"}
    assert "publishNotReadyAddresses" not in serving["spec"]
    (port,) = serving["spec"]["ports"]
    named_port = named(engine(pod(template=RICH))["ports"], port["targetPort"])
    assert (port["port"], named_port["containerPort"]) == (80, 9000)
    assert ranks["spec"]["clusterIP"] == "None"
    assert ranks["spec"]["publishNotReadyAddresses"] is True
    assert leader["spec"]["publishNotReadyAddresses"] is True


def test_ports_are_those_that_the_policies_let_through():
    ranks, leader = network.build(spec(template=RICH), PLATFORM)
    among, coordinators, everybody = ranks["spec"]["ingress"]
    assert "ports" not in among
    assert [one["port"] for one in coordinators["ports"]] == [names.PROBE_PORT]
    assert [one["port"] for one in everybody["ports"]] == [9000, names.SIDECAR_PORT]
    sidecars, operator = leader["spec"]["ingress"]
    assert [one["port"] for one in sidecars["ports"]] == [names.COORDINATOR_PORT]
    assert [one["port"] for one in operator["ports"]] == [names.COORDINATOR_HTTP_PORT]
    (peer,) = operator["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "operators"}


@pytest.mark.parametrize(("size", "least"), [(0, 1), (1, 1), (2, 1), (5, 4)])
def test_the_budget_counts_active_ranks_and_lets_one_go(size: int, least: int):
    found = disruption.build(spec(), size=size)["spec"]
    assert found["minAvailable"] == least
    assert found["selector"]["matchLabels"][names.ACTIVE] == "true"
    assert found["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["token", "a.json", "b"]), st.text()))
def test_files_come_back_out_of_the_secret(files: dict[str, str]):
    found = secret.build(spec(), files, rotated="1")
    assert secret.files(found) == files
    assert all(base64.b64decode(one) is not None for one in found["data"].values())
    assert secret.files({}) == {}


# --- revisions -----------------------------------------------------------------------------------


def test_what_costs_new_pods_and_what_a_restart_in_place():
    base = spec(template=template(args=["m", "--port=1"]))
    arguments = spec(template=template(args=["m", "--port=1", "--seed=2"]))
    assert base.revision != arguments.revision
    assert base.pod_revision == arguments.pod_revision
    for other in (
        spec(template=template(args=["m2", "--port=1"])),
        spec(template=template(args=["m", "--port=2"])),
        spec(template=template(args=["m", "--port=1"], image="w")),
        spec(template=template(args=["m", "--port=1"]), maxReplicas=5),
        spec(template=template(args=["m", "--port=1"]), sidecar={"image": "s"}),
    ):
        assert other.pod_revision != base.pod_revision


def test_what_costs_no_restart():
    for more in (
        {"scaling": {"drainTimeoutSeconds": 9}},
        {"recovery": {"stallSeconds": 9}},
        {"coordinator": {"image": "c"}},
        {"service": {"port": 80}},
        {"paused": True},
    ):
        assert spec(5, **more).revision == spec(3).revision


word = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=6)
env = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["A", "B", "PYTHONPATH", "POD_IP"]), "value": word}
    ),
    unique_by=lambda one: one["name"],
)
ports = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["http", "a", "b"]),
            "containerPort": st.sampled_from([8000, 7412, 9, 10]),
        }
    ),
    unique_by=(lambda one: one["name"], lambda one: one["containerPort"]),
)


@settings(deadline=None)
@given(
    engine_env=env,
    engine_ports=ports,
    args=st.lists(word, min_size=1),
    labels=st.dictionaries(word, word),
)
def test_any_template_makes_a_pod_without_duplicates(
    engine_env: Any, engine_ports: Any, args: list[str], labels: dict[str, str]
):
    given = template(args=args, env=engine_env, ports=engine_ports)
    given["metadata"] = {"labels": labels}
    one = spec(template=given)
    found = rank.build(one, PLATFORM, image="i")
    mine = engine(found["spec"])
    for key, by in (("env", "name"), ("ports", "name"), ("ports", "containerPort")):
        values = [each[by] for each in mine[key]]
        assert len(values) == len(set(values))
    kept = {each["name"] for each in engine_env} | {"PYTHONPATH", "POD_IP"}
    assert {each["name"] for each in mine["env"]} == kept
    assert labels.items() <= found["metadata"]["labels"].items()
    assert json.loads(json.dumps(found)) == found


def test_the_revision_is_the_one_that_running_groups_have_on_them():
    """Computed in another way, it would restart every group when the operator is upgraded."""
    found = spec()
    assert (found.revision, found.pod_revision) == ("bfb965e768", "e2b8c57ea5")
