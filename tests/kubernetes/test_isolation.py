"""Every attack from inside a real evaluation, under gVisor and Calico: all are denied. Each has its control, where the same attack works.

The controls are Pods that lack the defence in question: `open` is an evaluation in all but its namespace, to which no network policy
applies; `privileged` has the node's own kernel, root and every privilege. Many attacks run in one sandbox, so that the suite stays fast.
What an evaluation can do by design, and what is not covered, is in docs/threat-model.md.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import inspect
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import yaml

from crucible import names
from crucible.frames import Frame, Kind, LineDecoder
from crucible.kubernetes.api import CONFIG_MAPS, NODES, PODS, KubernetesApi, from_kubeconfig
from crucible.limits import Limits
from crucible.quantity import MIB
from crucible.settings import KubernetesSettings
from tests.kubernetes.attacks import (
    early,
    exhaustion,
    filesystem,
    forging,
    listening,
    network,
    node,
    privileges,
    starting,
    trying,
)
from tests.support.bundle import bundle
from tests.support.isolation import (
    Evaluations,
    Place,
    Ran,
    gather_named,
    job_evaluations,
    log_of,
    place_of,
    platform_evaluations,
    run,
    until_log,
)
from tests.support.platform import connect
from tests.support.policies import allow_image, apply_policies, make_objects, pod_of, run_script
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from types import ModuleType

    from tests.cluster import Cluster
    from tests.support.deployed import DeployedPlatform

pytestmark = [pytest.mark.cluster, pytest.mark.network_isolation, pytest.mark.asyncio(loop_scope="module")]

CONTROL = "isolation-control"
TARGETS = Path(__file__).parent / "attacks" / "targets.yaml"
PROGRAM = "program"
# Of TEST-NET-2 (RFC 5737): no machine has it, so nothing can leave the cluster by mistake. The control plane's node answers for it.
OUTSIDE = "198.51.100.1"
HOST_PORT, HOST_UDP_PORT = 9999, 9998
NEIGHBOUR_PORT = 7777
SERVICE_PORTS = {"redis": 6379, "rabbitmq": 5671, "postgres": 5432, "api": 8080}
KEY = "crucible-isolation"
RACERS = 4
CONTROL_WORD = "word-control"
# What a runner reports of code that ended well, and the line of a container's log that says so.
FORGED = b'{"status":"exited","exit_code":0,"stdout_bytes":0,"stderr_bytes":0,"processes_killed":0}'
FORGED_LINE = base64.b64encode(Frame(Kind.REPORT, 1, FORGED).encode()).decode()
TAKE_MEMORY = f"from {exhaustion.__name__} import more_memory\nprint(more_memory({{}}))"
SPIN = f"from {exhaustion.__name__} import spin\nspin()"
SANDBOX_USER = 65532


def attacks_of(*modules: ModuleType) -> list[str]:
    """The names of the attacks that these modules hold."""
    own = {module.__name__ for module in modules}
    return [name for name, function in trying.ATTACKS.items() if function.__module__ in own]


NETWORK = attacks_of(network)
# Attacks that try each node, the own one among them: all must be reached where that is allowed, and none from an evaluation.
EVERY_NODE = [
    "kubelets",
    "node_ports",
    "ports_of_nodes",
    "ports_of_nodes_over_udp",
    "ping_of_nodes",
    "dns_exfiltration_to_a_node",
]
LOCAL = attacks_of(filesystem, privileges)
# An evaluation does not outlive the last of these.
DEADLY = "more_memory"
EXHAUSTION = [name for name in attacks_of(exhaustion) if name != DEADLY]


def trying_program(*modules: ModuleType) -> str:
    """A program that tries the attacks of these modules."""
    return bundle(trying, *modules, run=f"from {trying.__name__} import main\nmain()")


def program(*modules: ModuleType) -> str:
    """A program that runs the last of these modules."""
    return bundle(*modules, run=f"from {modules[-1].__name__} import main\nmain()")


@dataclass
class Scene:
    """What every attack came to, by where it ran."""

    evaluation: dict[str, trying.Result] = field(default_factory=dict)
    control: dict[str, trying.Result] = field(default_factory=dict)
    intrusion: dict[str, trying.Result] = field(default_factory=dict)
    heard_by_neighbour: str = ""
    heard_by_others: str = ""
    heard_by_control: str = ""
    # What the racers sent: by the word that each of them said.
    raced: dict[str, dict[str, Any]] = field(default_factory=dict)
    forged: Ran | None = None
    gluttonous: Ran | None = None
    spun: Ran | None = None
    nodes: list[str] = field(default_factory=list)


def results_of(lines: list[dict[str, Any]]) -> dict[str, trying.Result]:
    return {line["attack"]: trying.Result(**line) for line in lines}


class Stage:
    """The cluster, what there is to attack in it, and the ways to run a program there."""

    def __init__(self, api: KubernetesApi, cluster: Cluster, image: str, evaluations: Evaluations) -> None:
        self.api = api
        self.cluster = cluster
        self.image = image
        self.evaluations = evaluations

    async def kubectl(self, *arguments: str, **options: Any) -> str:
        return await asyncio.to_thread(self.cluster.kubectl, *arguments, **options)

    async def give(self, name: str, text: str, stdin: object) -> None:
        """Put a program and its input where a Pod mounts them."""
        data = {"start.py": inspect.getsource(starting), "main.py": text, "input": json.dumps(stdin)}
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": CONTROL}, "data": data}
        await self.api.create(CONFIG_MAPS, body, CONTROL)

    def documents(self, *wanted: str) -> list[dict[str, Any]]:
        """The targets of these kinds, or of these names, with the image filled in."""
        found = []
        for document in yaml.safe_load_all(TARGETS.read_text(encoding="utf-8")):
            if document["kind"] in wanted or document["metadata"]["name"] in wanted:
                spec = document.get("spec", {})
                for container in spec.get("template", {}).get("spec", spec).get("containers", []):
                    container["image"] = self.image
                found.append(document)
        return found

    async def apply(self, *wanted: str) -> None:
        await self.kubectl(
            "apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": self.documents(*wanted)})
        )

    async def pod(self, name: str) -> Place:
        """Wait for a Pod of the controls to have an address."""

        async def placed() -> Place | None:
            return place_of(await self.api.get(PODS, name, CONTROL))

        place: Place | None = await wait_until_async(
            placed, timeout=60, poll=0.25, describe=f"{name} to have an address"
        )
        assert place is not None
        return place

    async def ended(self, name: str, container: str = PROGRAM) -> str:
        """Wait for the end of a Pod of the controls, and return what it said."""

        async def over() -> bool:
            return (await self.api.get(PODS, name, CONTROL))["status"]["phase"] in ("Succeeded", "Failed")

        await wait_until_async(over, timeout=90, poll=0.25, describe=f"{name} to end")
        return await log_of(self.api, CONTROL, name, container)

    async def create_open(self, name: str, text: str, stdin: object) -> None:
        """Make an evaluation in all but its namespace and its runner, which would hide from the log what the program says."""
        pod = pod_of(make_objects(image=self.image).job)
        await self.give(name, text, stdin)
        pod["metadata"] = {"name": name, "namespace": CONTROL}
        spec = copy.deepcopy(pod["spec"])
        (like,) = self.documents("privileged")
        ours = like["spec"]["containers"][0]
        del spec["containers"][0]["args"]
        spec["containers"][0]["command"] = ours["command"]
        spec["containers"][0]["volumeMounts"] = [
            mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] != "code"
        ] + [{"name": "program", "mountPath": "/program", "readOnly": True}]
        spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] != "code"] + [
            {"name": "program", "configMap": {"name": name}}
        ]
        del spec["serviceAccountName"], spec["dnsConfig"], spec["priorityClassName"]
        spec["dnsPolicy"] = "ClusterFirst"
        await self.api.create(PODS, {**pod, "spec": spec}, CONTROL)

    async def build(self) -> None:
        """Make what there is to attack, and wait until it can be."""
        await self.apply("Namespace", "Secret")
        nodes, _ = await self.api.list(NODES)
        be_attacked = {
            "outside": OUTSIDE,
            "gateway": address_of(control_plane_of(nodes)),
            "host_port": HOST_PORT,
            "host_udp_port": HOST_UDP_PORT,
            "key": KEY,
            "users": [0, SANDBOX_USER],
        }
        serve = {"hosts": ["0.0.0.0"], "tcp": list(SERVICE_PORTS.values()), "udp": [HOST_UDP_PORT]}
        await asyncio.gather(
            self.give("node", program(listening, node), be_attacked), self.give("services", program(listening), serve)
        )
        await self.apply("Service", "DaemonSet", "services")
        await self.kubectl("-n", CONTROL, "rollout", "status", "daemonset/node", "--timeout=60s")
        await until_log(self.api, CONTROL, "services", PROGRAM, "listening")
        for pod in await self.node_pods():
            await until_log(self.api, CONTROL, pod, PROGRAM, "listening")

    async def node_pods(self) -> list[str]:
        pods, _ = await self.api.list(PODS, CONTROL, labels="app=node")
        return [pod["metadata"]["name"] for pod in pods]

    async def heard(self) -> str:
        """What the programs on the nodes, and the services' Pod, were told by anyone."""
        pods = [*await self.node_pods(), "services"]
        return "".join([await log_of(self.api, CONTROL, pod, PROGRAM) for pod in pods])

    async def facts(self) -> dict[str, Any]:
        """What an attacker who has studied the cluster knows."""
        nodes, _ = await self.api.list(NODES)
        services = json.loads(await self.kubectl("get", "services", "--all-namespaces", "-o", "json"))["items"]
        by_name = {(one["metadata"]["namespace"], one["metadata"]["name"]): one["spec"] for one in services}
        dns, _ = await self.api.list(PODS, "kube-system", labels="k8s-app=kube-dns")
        (node_port,) = by_name[CONTROL, "api"]["ports"]
        return {
            "nodes": [address_of(one) for one in nodes],
            "services": {
                name: {
                    "ip": by_name[CONTROL, name]["clusterIP"],
                    "port": port,
                    "name": f"{name}.{CONTROL}.svc.cluster.local",
                }
                for name, port in SERVICE_PORTS.items()
            },
            "service_pod": (await self.pod("services")).address,
            "udp_port": HOST_UDP_PORT,
            "node_port": node_port["nodePort"],
            "dns": {"service": by_name["kube-system", "kube-dns"]["clusterIP"], "pod": dns[0]["status"]["podIP"]},
            "outside": OUTSIDE,
            "api_server": {
                "service": [by_name["default", "kubernetes"]["clusterIP"], 443],
                "node": [address_of(control_plane_of(nodes)), 6443],
            },
            "host_port": HOST_PORT,
            "host_udp_port": HOST_UDP_PORT,
            "neighbour_port": NEIGHBOUR_PORT,
            "node_kernel": nodes[0]["status"]["nodeInfo"]["kernelVersion"],
            "tmp_bytes": Limits().tmp_bytes,
            "key": KEY,
        }


def address_of(node: dict[str, Any]) -> str:
    (address,) = [one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP"][:1]
    return str(address)


def control_plane_of(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [one for one in nodes if "node-role.kubernetes.io/control-plane" in one["metadata"]["labels"]][:1]
    return found


# --- what is run ------------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(
    cluster: Cluster, runner_image: str, enforced_policies: None, real_gvisor: None, request: pytest.FixtureRequest
) -> AsyncIterator[Stage]:
    """A cluster with the policies in force, and everything that there is to attack.

    Evaluations are the Jobs that the dispatcher makes, made here; with CRUCIBLE_PLATFORM_REUSE=1 they are submitted to the platform that is
    deployed there.
    """
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(KubernetesApi(from_kubeconfig(cluster.kubeconfig)))
        evaluations: Evaluations
        if os.environ.get("CRUCIBLE_PLATFORM_REUSE"):
            platform: DeployedPlatform = request.getfixturevalue("platform")
            client = await stack.enter_async_context(connect(platform.url, platform.api_key))
            evaluations = await stack.enter_async_context(platform_evaluations(client, api))
        else:
            await asyncio.to_thread(prepare, cluster, runner_image)
            settings = KubernetesSettings(images={"python": runner_image})
            evaluations = await stack.enter_async_context(job_evaluations(api, settings))
        made = Stage(api, cluster, runner_image, evaluations)
        stack.push_async_callback(made.kubectl, "delete", "namespace", CONTROL, "--ignore-not-found", "--wait=false")
        await made.build()
        yield made


def prepare(cluster: Cluster, image: str) -> None:
    """Put the policies in force."""
    apply_policies(cluster)
    status, said = run_script(cluster, "apply")
    assert status == 0, said
    allow_image(cluster, "python", image)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(stage: Stage) -> Scene:
    """Every attack tried, wherever it is to be tried, all at once."""
    facts = await stage.facts()
    listener = program(listening)
    listen = {"hosts": ["0.0.0.0", "::"], "tcp": [NEIGHBOUR_PORT], "udp": [NEIGHBOUR_PORT]}
    neighbour = await stage.evaluations.begin(listener, stdin=json.dumps(listen), seconds=120)
    await stage.create_open("neighbour", listener, listen)
    inside, outside = await asyncio.gather(stage.evaluations.place(neighbour), stage.pod("neighbour"))
    await until_log(stage.api, CONTROL, "neighbour", names.CONTAINER, "listening")

    async def attack(modules: list[ModuleType], memory: int = 256 * MIB, **more: object) -> dict[str, trying.Result]:
        wanted = [name for name in attacks_of(*modules) if name != DEADLY]
        asked = {"facts": facts | more, "attacks": wanted}
        ran = await run(
            stage.evaluations, trying_program(*modules), stdin=json.dumps(asked), seconds=100, memory=memory
        )
        found = results_of(ran.lines())
        for name in wanted:
            said = f"the evaluation ended before it was tried: {ran.end} {ran.stderr[-500:]!r}"
            found.setdefault(name, trying.Result(name, trying.tried(name), "broken", said))
        return found

    async def control_open(name: str, attacks: list[str], **more: object) -> dict[str, trying.Result]:
        await stage.create_open(name, trying_program(network), {"facts": facts | more, "attacks": attacks})
        return results_of(lines_of(await stage.ended(name, names.CONTAINER)))

    async def control_privileged() -> dict[str, trying.Result]:
        asked = {"facts": facts | {"victim": "bystander", "cover": True}, "attacks": [*LOCAL, *EXHAUSTION, DEADLY]}
        await stage.give("privileged", trying_program(filesystem, privileges, exhaustion), asked)
        await stage.apply("privileged")
        return results_of(lines_of(await stage.ended("privileged")))

    spinner = await stage.evaluations.begin(bundle(trying, exhaustion, run=SPIN), seconds=60)
    ran = await gather_named(
        network=attack([network], neighbour=inside.address),
        local=attack([filesystem, privileges]),
        # With less, so many processes would end by their memory and not by their number.
        exhaustion=attack([exhaustion], memory=512 * MIB),
        open=control_open("open", NETWORK, neighbour=outside.address),
        intruder=control_open("intruder", ["neighbour", "neighbour_by_udp"], neighbour=inside.address),
        privileged=control_privileged(),
        racers=race(stage, facts),
        forged=forge(stage),
        gluttonous=run(stage.evaluations, bundle(trying, exhaustion, run=TAKE_MEMORY), memory=64 * MIB),
    )
    spun = await stage.evaluations.end(spinner)
    return Scene(
        evaluation={**ran["network"], **ran["local"], **ran["exhaustion"]},
        control={**ran["open"], **ran["privileged"]},
        intrusion=ran["intruder"],
        heard_by_neighbour=(await stage.evaluations.output(neighbour)).decode(),
        heard_by_control=await log_of(stage.api, CONTROL, "neighbour", names.CONTAINER),
        heard_by_others=await stage.heard(),
        raced=ran["racers"],
        forged=ran["forged"],
        gluttonous=ran["gluttonous"],
        spun=spun,
        nodes=facts["nodes"],
    )


async def forge(stage: Stage) -> Ran:
    """Have code say in every way that it ended with 0, and end with 3."""
    return await run(
        stage.evaluations, program(forging), stdin=json.dumps({"report": FORGED.decode(), "frame": FORGED_LINE})
    )


def lines_of(text: str) -> list[dict[str, Any]]:
    """Read the lines of a log that are JSON; others are an interpreter's last words, which a failing test shows."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert found, text
    return found


async def race(stage: Stage, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Have code send from its first instruction on, in evaluations and in a Pod without policies; return what each says it tried."""
    asked = {"hosts": [*facts["nodes"], facts["service_pod"]], "port": HOST_UDP_PORT}
    words = [f"word-evaluation-{number}" for number in range(RACERS)]
    await stage.create_open("racer", program(early), {**asked, "word": CONTROL_WORD})
    runs = [run(stage.evaluations, program(early), stdin=json.dumps({**asked, "word": word})) for word in words]
    *ran, control = await asyncio.gather(*runs, stage.ended("racer", names.CONTAINER))
    (said,) = lines_of(control)
    return {CONTROL_WORD: said, **{word: one.lines()[0] for word, one in zip(words, ran, strict=True)}}


# --- what must hold ---------------------------------------------------------------------------------------------------------


def assert_denied(scene: Scene, name: str) -> None:
    control = scene.control[name]
    assert control.outcome == "worked", f"the attack does not work where it is allowed, so it shows nothing: {control}"
    assert scene.evaluation[name].outcome == "denied", scene.evaluation[name]


@pytest.mark.parametrize("name", NETWORK)
async def test_nothing_is_reached_over_the_network(scene: Scene, name: str) -> None:
    assert_denied(scene, name)


@pytest.mark.parametrize("name", EVERY_NODE)
async def test_the_control_reaches_the_own_node_and_every_other(scene: Scene, name: str) -> None:
    assert sorted(scene.control[name].how.removeprefix("reached ").split(", ")) == sorted(scene.nodes)


@pytest.mark.parametrize("name", attacks_of(filesystem))
async def test_no_file_is_read_or_written_that_is_not_the_evaluations_own(scene: Scene, name: str) -> None:
    assert_denied(scene, name)


@pytest.mark.parametrize("name", attacks_of(privileges))
async def test_no_privilege_is_gained(scene: Scene, name: str) -> None:
    assert_denied(scene, name)


@pytest.mark.parametrize("name", EXHAUSTION)
async def test_nothing_is_used_up_that_others_need(scene: Scene, name: str) -> None:
    assert_denied(scene, name)


# --- what is not one attack alone -------------------------------------------------------------------------------------------------


async def test_an_evaluation_is_reached_by_nobody(scene: Scene) -> None:
    assert {name: result.outcome for name, result in scene.intrusion.items()} == {
        "neighbour": "denied",
        "neighbour_by_udp": "denied",
    }
    assert scene.heard_by_neighbour.split() == ["listening"]
    # The same listener, where no policy keeps anyone out.
    assert "reached over TCP" in scene.heard_by_control
    assert "reached over UDP" in scene.heard_by_control


async def test_nothing_gets_out_between_the_first_instruction_and_the_policy(scene: Scene) -> None:
    assert len(scene.raced) == 1 + RACERS
    assert all(said["tried"] > 20 for said in scene.raced.values()), scene.raced
    heard = {line.removeprefix("heard ") for line in scene.heard_by_others.splitlines() if line.startswith("heard ")}
    assert heard == {CONTROL_WORD}


async def test_a_forged_report_is_not_believed(scene: Scene) -> None:
    # It would be, if it could be written to where the runner writes.
    (frame,) = LineDecoder().feed(FORGED_LINE.encode() + b"\n")
    assert (frame.kind, frame.payload) == (Kind.REPORT, FORGED)

    assert scene.forged is not None
    assert scene.forged.end["exit_code"] == 3
    assert FORGED_LINE.encode() in scene.forged.stdout


async def test_memory_beyond_the_limit_ends_the_evaluation_and_nothing_else(scene: Scene) -> None:
    assert scene.gluttonous is not None
    assert scene.gluttonous.end.get("reason") == "oom_killed", scene.gluttonous
    assert scene.gluttonous.stdout == b""
    assert scene.control[DEADLY].outcome == "worked"
    # All the others went on to their ends.
    assert {*scene.evaluation, DEADLY} == set(trying.ATTACKS)


async def test_others_run_while_one_uses_all_the_processor_time_that_it_can(scene: Scene) -> None:
    assert scene.spun is not None
    assert scene.spun.stdout.split() == [b"spinning", b"done"]
    assert all(said["tried"] > 20 for said in scene.raced.values()), scene.raced
