# SPDX-License-Identifier: Apache-2.0
"""What a step of a workflow can be: a table of kinds.

Another kind is another class here, its line in `kinds`, and its field in `StepBody`; what its run
leaves is told by `outputs.py`, and files that ask for it are read by `fedml/workflowfile.py`.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec

from fedml_broker import inputs, packages
from fedml_broker.accounts import User
from fedml_broker.blobs import Blobs
from fedml_broker.federate import FederateRequest, Federation
from fedml_broker.inputs import Left
from fedml_broker.launch import Launcher, LaunchRequest
from fedml_broker.packages import PackageRef, Uploaded
from fedml_broker.problems import Problem
from fedml_broker.steps import Step
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.package import Package
from fedml_protocol.workflow import BadGraph, Graph, Node, When, check

MAX_STEPS = 200
_DEPLOY = "write `deploy` in place of `job`: that step has finished when the service answers"
_A_SERVICE = "write `service` into its job file; what ends by itself is a step `job`"
_STEP_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
T = TypeVar("T")


class StepBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step; one of the kinds (`job`, `federate`, `deploy`) says what it is.

    Attributes:
        needs: The steps that must be over before it runs.
        when: It runs when these have `finished`, when one of them has `failed`, or `always`.
        inputs: Path in its workspace -> a step that it needs, or STEP/FILE of such a step.
    """

    name: str
    job: LaunchRequest | None = None
    federate: FederateRequest | None = None
    deploy: LaunchRequest | None = None
    needs: list[str] = []
    when: When = When.FINISHED
    inputs: dict[str, str] = {}


class Kind(Protocol):
    """One kind of step."""

    async def check(self, user: User, body: StepBody) -> Uploaded | None:
        """Whether it could run at this moment; its package, claimed for the user.

        Raises:
            Problem: It could not.
        """

    async def submit(self, user: User, run: str, name: str, body: StepBody, left: Left) -> None:
        """Submit its run, with what the steps before it have left; again is harmless."""


class JobStep:
    """A launched job; `deploy` says the same of one that stays up."""

    def __init__(self, launcher: Launcher, blobs: Blobs) -> None:
        self._launcher = launcher
        self._blobs = blobs

    async def check(self, user: User, body: StepBody) -> Uploaded | None:
        """See `Kind`."""
        if body.job is not None and body.job.service is not None:
            raise Problem(422, f"{body.name} would never end", "it is a service", _DEPLOY)
        return await self._launcher.check(user, _launched(body))

    async def submit(self, user: User, run: str, name: str, body: StepBody, left: Left) -> None:
        """See `Kind`. All values that it may use are in its FEDML_INPUTS, as JSON."""
        job = _launched(body)
        env = {variable: inputs.fill(text, left) for variable, text in job.env.items()}
        if values := {step: dict(its.values) for step, its in left.items() if its.values}:
            env.setdefault("FEDML_INPUTS", msgspec.json.encode(values).decode())
        package = await _with_files(self._blobs, user, job.package, body.inputs, left)
        request = msgspec.structs.replace(job, run=run, name=name, env=env, package=package)
        await self._launcher.submit(user, request)


class DeployStep(JobStep):
    """A service: the step has finished when it answers. It stays up."""

    async def check(self, user: User, body: StepBody) -> Uploaded | None:
        """See `Kind`."""
        if _launched(body).service is None:
            raise Problem(
                422, f"{body.name} is no service", "what is deployed stays up", _A_SERVICE
            )
        return await super().check(user, body)


class FederateStep:
    """A federated run."""

    def __init__(self, federation: Federation, blobs: Blobs) -> None:
        self._federation = federation
        self._blobs = blobs

    async def check(self, user: User, body: StepBody) -> Uploaded | None:
        """See `Kind`."""
        return await self._federation.check(user, _required(body.federate))

    async def submit(self, user: User, run: str, name: str, body: StepBody, left: Left) -> None:
        """See `Kind`."""
        federated = _required(body.federate)
        package = await _with_files(self._blobs, user, federated.package, body.inputs, left)
        request = msgspec.structs.replace(
            federated,
            run=run,
            name=name,
            config=inputs.fill_json(federated.config, left),
            package=_required(package),
        )
        await self._federation.submit(user, request)


def kinds(launcher: Launcher, federation: Federation, blobs: Blobs) -> dict[str, Kind]:
    """The kinds of steps, as fields of `StepBody` are called."""
    launched = JobStep(launcher, blobs)
    return {
        "job": launched,
        "federate": FederateStep(federation, blobs),
        "deploy": DeployStep(launcher, blobs),
    }


async def _with_files(
    blobs: Blobs, user: User, package: PackageRef | None, wanted: Mapping[str, str], left: Left
) -> PackageRef | None:
    """A package with the files of other steps in it."""
    if not wanted:
        return package
    base = Package()
    if package is not None:
        base = await asyncio.to_thread(packages.read, blobs, package.sha256)
    manifest = inputs.with_files(base, wanted, left).manifest()
    blob = await blobs.add(manifest, owner=f"u/{user.name}")
    return PackageRef(sha256=blob.sha256, size=blob.size)


def _required(value: T | None) -> T:
    assert value is not None
    return value


# ---------------------------------------------------------------------- what is stored of them


def graph_of(bodies: Sequence[StepBody]) -> Graph:
    """The steps as a graph.

    Raises:
        Problem: 422 it is none.
    """
    if not 0 < len(bodies) <= MAX_STEPS:
        raise Problem(422, "not a workflow", f"it has 1 to {MAX_STEPS} steps, not {len(bodies)}")
    graph: dict[str, Node] = {}
    for body in bodies:
        if _STEP_NAME.fullmatch(body.name) is None or body.name in graph:
            wrong = "is there twice" if body.name in graph else "is none"
            detail = f"{body.name[:80]!r} {wrong}; names are of a-z, A-Z, 0-9, _ and -"
            raise Problem(422, "not the name of a step", detail)
        if [body.job, body.federate, body.deploy].count(None) != 2:
            what = "a job, a federated run or a service"
            raise Problem(422, "not a step", f"{body.name} is {what}: one of them")
        graph[body.name] = Node(tuple(body.needs), body.when)
    try:
        check(graph)
        for body in bodies:
            _check_inputs(body)
    except BadGraph as error:
        raise Problem(422, "not a workflow", str(error), error.hint) from error
    except MalformedMessage as error:
        raise Problem(422, "not a workflow", str(error)) from error
    return graph


def _check_inputs(body: StepBody) -> None:
    """Whether a step gets things only from steps that it needs.

    Raises:
        BadGraph: It does not.
    """
    texts = _texts(body)
    sources = inputs.used(texts) | {s.partition("/")[0]: s for s in body.inputs.values()}
    for source, where in sources.items():
        if source not in body.needs:
            text = f"the step {body.name} gets {where} and does not need {source}"
            raise BadGraph(body.name, text, f"needs: [{source}]")


def _texts(body: StepBody) -> Iterator[str]:
    """Where values of other steps may stand."""
    if body.federate is None:
        yield from _launched(body).env.values()
    if body.federate is not None:
        try:
            yield from inputs.texts_in(body.federate.config)
        except ValueError as error:
            raise MalformedMessage(f"the config of {body.name} is not JSON: {error}") from error


def body_of(step: Step) -> StepBody:
    """What was asked for, of what is stored."""
    return msgspec.convert(step.definition, StepBody)


def kind_of(body: StepBody) -> str:
    """The name of its kind."""
    if body.deploy is not None:
        return "deploy"
    return "job" if body.job is not None else "federate"


def _launched(body: StepBody) -> LaunchRequest:
    return _required(body.job or body.deploy)
