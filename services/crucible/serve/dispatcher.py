"""`crucible serve dispatcher`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from crucible.dispatcher.app import make_dispatcher_app
from crucible.dispatcher.kubernetes.dispatcher import KubernetesDispatcher
from crucible.kubernetes.api import ApiError, KubernetesApi, KubernetesConfigError
from crucible.serve.service import Service
from crucible.watching.watching import Watching

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from crucible.dispatcher.app import MakesSandboxes
    from crucible.settings import Settings


class DispatcherService(Service):
    """The only creator of sandboxes, on this node or, as one of several replicas, in a cluster."""

    name: ClassVar[str] = "dispatcher"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, settings.dispatcher.host, settings.dispatcher.port)

    async def _start(self, stack: AsyncExitStack) -> None:
        token = self.token()
        # Stopped last: whoever waits for a sandbox that is being ended learns so, where a closed connection would say nothing.
        stack.push_async_callback(self._server.aclose)
        if self.settings.dispatcher.runtime == "kubernetes":
            dispatcher: MakesSandboxes = await self._in_cluster(stack)
        else:
            dispatcher = await self._on_this_node(stack)
        await self._server.start(self.tracing.wrap_app(make_dispatcher_app(dispatcher, token, self.health)))

    async def _on_this_node(self, stack: AsyncExitStack) -> MakesSandboxes:
        # It measures the machine (psutil), which the image for a cluster has no need to do.
        from crucible.dispatcher.dispatcher import Dispatcher  # noqa: PLC0415 - see above

        storage = await self.storage_client()
        settings = self.settings
        dispatcher = Dispatcher(
            settings.dispatcher, settings.limits, storage, instance=self.instance, tracing=self.tracing
        )
        await dispatcher.start()
        stack.push_async_callback(dispatcher.aclose)
        return dispatcher

    async def _in_cluster(self, stack: AsyncExitStack) -> MakesSandboxes:
        settings = self.settings
        try:
            api = KubernetesApi.from_settings(settings.kubernetes, "crucible-dispatcher")
        except KubernetesConfigError as error:
            raise RuntimeError(str(error)) from error
        stack.push_async_callback(api.aclose)
        dispatcher = KubernetesDispatcher(
            settings.dispatcher, settings.kubernetes, settings.limits, api, tracing=self.tracing
        )
        await dispatcher.start()
        stack.push_async_callback(dispatcher.aclose)
        if not settings.dispatcher.use_monitoring_service:
            watching = Watching(settings, await self.storage_client(), api, self.instance)
            try:
                await watching.start()
            except ApiError as error:
                raise RuntimeError(f"the API server refuses the watching: {error}") from error
            stack.push_async_callback(watching.aclose)
            watching.watch(self.health)
        return dispatcher
