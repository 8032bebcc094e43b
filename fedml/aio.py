# SPDX-License-Identifier: Apache-2.0
"""`Run`, `Device` and `Cluster` for asyncio: the same names, awaited.

    run = await aio.Run.submit("job.yaml")
    async for text in run.logs(follow=True):
        print(text, end="")
    await run.wait(check=True)

There is one implementation, the blocking one; here each call of it has a thread of its own. Whoever
is cancelled while he waits leaves no thread behind: its connection is cut, and it ends.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedml import clusters, devices, runs
from fedml.client import At, Client, Severed, Told, silent
from fedml.client import at as _at

__all__ = ["Cluster", "Device", "Run"]

T = TypeVar("T")

_END: Any = object()


async def _threaded(call: Callable[[Client], T], client: Client) -> T:
    """What a blocking call gives, which gets a client of its own; cancelled, that one is cut."""
    line = client.severable()
    return await _awaited(lambda: call(line), line)


async def _iterated(
    call: Callable[[Client], Generator[T, None, None]], client: Client
) -> AsyncGenerator[T, None]:
    """The items of a blocking generator, each brought when it is asked for."""
    line = client.severable()
    items = call(line)
    try:
        while (item := await _awaited(lambda: next(items, _END), line)) is not _END:
            yield item
    finally:
        line.sever()
        with contextlib.suppress(ValueError):  # its thread is on its way out of it
            items.close()


async def _awaited(call: Callable[[], T], line: Client) -> T:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(how: Callable[[Any], None], what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has gone, and who waited with it
            loop.call_soon_threadsafe(lambda: None if done.done() else how(what))

    def work() -> None:
        try:
            result = call()
        except Severed:
            return  # nobody waits
        except BaseException as error:  # raised again where it is awaited
            tell(done.set_exception, error)
        else:
            tell(done.set_result, result)

    threading.Thread(target=work, name="fedml.aio", daemon=True).start()
    try:
        return await done
    except asyncio.CancelledError:
        line.sever()
        raise


class Run(runs.RunFacts):
    """One run of one broker, as it was when it was last looked at; `refresh` looks again."""

    @classmethod
    async def submit(
        cls,
        file: Path | str,
        *,
        cluster: str = "",
        any_resource: bool = False,
        package: str = "",
        at: At = None,
    ) -> Run:
        """As `fedml.Run.submit`."""

        def call(client: Client) -> runs.Run:
            return runs.Run.submit(
                file, cluster=cluster, any_resource=any_resource, package=package, at=client
            )

        return await cls._made(call, at)

    @classmethod
    async def find(cls, run: str, *, at: At = None) -> Run:
        """As `fedml.Run.find`."""
        return await cls._made(lambda client: runs.Run.find(run, at=client), at)

    @classmethod
    async def current(cls, *, at: At = None) -> Run:
        """As `fedml.Run.current`."""
        return await cls._made(lambda client: runs.Run.current(at=client), at)

    @classmethod
    async def list(cls, *, limit: int = 50, at: At = None) -> builtins.list[Run]:
        """As `fedml.Run.list`."""
        client = await _client(at)
        found = await _threaded(lambda line: runs.Run.list(limit=limit, at=line), client)
        return [cls(client, one.details) for one in found]

    async def refresh(self) -> Run:
        """Look again; itself. `metrics` and its kin are as of now."""
        await self._do(runs.Run.refresh)
        return self

    def follow(self) -> AsyncGenerator[dict[str, Any], None]:
        """As `fedml.Run.follow`."""
        return _iterated(lambda line: self._on(line).follow(), self._client)

    def logs(self, *, follow: bool = False) -> AsyncGenerator[str, None]:
        """As `fedml.Run.logs`."""
        return _iterated(lambda line: self._on(line).logs(follow=follow), self._client)

    async def log_lines(self, search: str = "", **query: Any) -> dict[str, Any]:
        """As `fedml.Run.log_lines`."""
        return await self._do(lambda run: run.log_lines(search, **query))

    async def series(
        self, name: str | None = None, *, points: int = 1000
    ) -> builtins.list[dict[str, Any]]:
        """As `fedml.Run.series`."""
        return await self._do(lambda run: run.series(name, points=points))

    async def params(self) -> dict[str, str]:
        """As `fedml.Run.params`."""
        return await self._do(runs.Run.params)

    async def artifacts(self) -> builtins.list[dict[str, Any]]:
        """As `fedml.Run.artifacts`."""
        return await self._do(runs.Run.artifacts)

    async def files(self) -> builtins.list[dict[str, Any]]:
        """As `fedml.Run.files`."""
        return await self._do(runs.Run.files)

    async def download_artifact(
        self, artifact: Mapping[str, Any], into: Path | str, *, told: Told = silent
    ) -> Path:
        """As `fedml.Run.download_artifact`; `told` is called in another thread."""
        return await self._do(lambda run: run.download_artifact(artifact, into, told=told))

    async def stop(self) -> None:
        """As `fedml.Run.stop`."""
        await self._do(runs.Run.stop)

    async def wait(self, *, check: bool = False) -> Run:
        """As `fedml.Run.wait`. To be cancelled while one waits does not stop the run."""
        await self._do(lambda run: run.wait(check=check))
        return self

    async def download(
        self,
        into: Path | str,
        *,
        of_round: int | None = None,
        told: Told = silent,
    ) -> int:
        """As `fedml.Run.download`; `told` is called in another thread."""
        return await self._do(lambda run: run.download(into, of_round=of_round, told=told))

    @classmethod
    async def _made(cls, call: Callable[[Client], runs.Run], at: At) -> Run:
        client = await _client(at)
        return cls(client, (await _threaded(call, client)).details)

    def _on(self, line: Client) -> runs.Run:
        return runs.Run(line, self.details)

    async def _do(self, call: Callable[[runs.Run], T]) -> T:
        """What the blocking run gives; what it learned of the broker is known here too."""

        def work(line: Client) -> tuple[T, dict[str, Any]]:
            run = self._on(line)
            return call(run), run.details

        result, self.details = await _threaded(work, self._client)
        return result


class Device:
    """Machines. What is found is a `fedml.Device`, which asks nothing by itself."""

    @staticmethod
    async def list(*, at: At = None) -> builtins.list[devices.Device]:
        """As `fedml.Device.list`."""
        return await _threaded(lambda line: devices.Device.list(at=line), await _client(at))

    @staticmethod
    async def find(device: str, *, at: At = None) -> devices.Device:
        """As `fedml.Device.find`."""
        return await _threaded(lambda line: devices.Device.find(device, at=line), await _client(at))


class Cluster(clusters.ClusterFacts):
    """One cluster of one broker, as it was when it was last looked at; `refresh` looks again."""

    @classmethod
    async def list(cls, *, at: At = None) -> builtins.list[Cluster]:
        """As `fedml.Cluster.list`."""
        client = await _client(at)
        found = await _threaded(lambda line: clusters.Cluster.list(at=line), client)
        return [cls(client, one.details) for one in found]

    @classmethod
    async def find(cls, name: str, *, at: At = None) -> Cluster:
        """As `fedml.Cluster.find`."""
        return await cls._made(lambda line: clusters.Cluster.find(name, at=line), at)

    @classmethod
    async def create(
        cls,
        name: str,
        devices: Sequence[str] = (),
        *,
        count: int = 0,
        labels: Mapping[str, str] | None = None,
        autostop_minutes: float | None = None,
        at: At = None,
        **needs: Any,
    ) -> Cluster:
        """As `fedml.Cluster.create`."""

        def call(client: Client) -> clusters.Cluster:
            return clusters.Cluster.create(
                name,
                devices,
                count=count,
                labels=labels,
                autostop_minutes=autostop_minutes,
                at=client,
                **needs,
            )

        return await cls._made(call, at)

    async def refresh(self) -> Cluster:
        """As `fedml.Cluster.refresh`."""
        return await self._changed(clusters.Cluster.refresh)

    async def start(self) -> Cluster:
        """As `fedml.Cluster.start`."""
        return await self._changed(clusters.Cluster.start)

    async def stop(self) -> Cluster:
        """As `fedml.Cluster.stop`."""
        return await self._changed(clusters.Cluster.stop)

    async def autostop(self, minutes: float | None) -> Cluster:
        """As `fedml.Cluster.autostop`."""
        return await self._changed(lambda cluster: cluster.autostop(minutes))

    async def kill(self) -> builtins.list[str]:
        """As `fedml.Cluster.kill`."""
        return await _threaded(lambda line: self._on(line).kill(), self._client)

    @classmethod
    async def _made(cls, call: Callable[[Client], clusters.Cluster], at: At) -> Cluster:
        client = await _client(at)
        return cls(client, (await _threaded(call, client)).details)

    def _on(self, line: Client) -> clusters.Cluster:
        return clusters.Cluster(line, self.details)

    async def _changed(self, call: Callable[[clusters.Cluster], clusters.Cluster]) -> Cluster:
        found = await _threaded(lambda line: call(self._on(line)), self._client)
        self.details = found.details
        return self


async def _client(at: At) -> Client:
    """Of a home: its file is read, and in a job the broker is asked who it is."""
    return at if isinstance(at, Client) else await asyncio.to_thread(_at, at)
