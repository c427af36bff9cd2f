"""What all requests share: the engine once it is loaded, and what is said while it is not."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ram_core.engine.client import EngineClient
from ram_core.errors import EngineUnavailable
from server.aligners.checking import Checker
from server.aligners.service import AlignerService, ServiceOptions
from server.aligners.start import Inventory
from server.metrics import Metrics
from server.openai.convert import ModelNames
from server.settings import Settings, SettingsError
from server.tenants.access import Doors
from server.tenants.tenants import Tenants
from server.tenants.usage import UsageLog, UsageLogError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine, the tokenizer whose ids it speaks, and the aligners that were found."""

    engine: EngineClient
    tokenizer: PreTrainedTokenizerBase
    checker: Checker
    inventory: Inventory


class Serving:
    """One deployment, from its start to its end."""

    def __init__(self, settings: Settings) -> None:
        """Raises `SettingsError` for a tenants' file or a usage log that cannot be used."""
        self.settings = settings
        self.metrics = Metrics(settings.model_name)
        self.tenants = Tenants(settings)
        self.doors = Doors(settings.admin_port, settings.vllm_lora_api)
        self.usage_log = self._open_usage_log()
        self.created_s = int(time.time())
        self.is_draining = False
        self.is_leaving = False
        self._loaded: Loaded | None = None
        self._aligners: AlignerService | None = None
        self._names = ModelNames(settings.model_name)

    def open(self, loaded: Loaded) -> None:
        """Answer requests from now on; call it in the event loop that answers them."""
        settings = self.settings
        options = ServiceOptions(settings.aligner_wait_s, settings.max_aligner_loads, settings.model_name)
        self._aligners = AlignerService(
            loaded.engine, loaded.checker, loaded.inventory, options, watcher=self.metrics
        )
        self._aligners.begin()
        self.metrics.open(loaded.engine, self._aligners.figures)
        self._loaded = loaded

    def _open_usage_log(self) -> UsageLog | None:
        path = self.settings.usage_log
        try:
            return UsageLog(path, self.metrics.usage_log_errors.inc) if path else None
        except UsageLogError as error:
            raise SettingsError(str(error)) from None

    def reload(self) -> None:
        """Read the tenants' file again, and write usage to the file that has the log's name now."""
        if self.tenants.file is not None:
            self.tenants.reload()
        if self.usage_log is not None:
            self.usage_log.reopen()

    async def close(self) -> None:
        """End the engine, if there is one; what still runs fails with `EngineUnavailable`."""
        if self._aligners is not None:
            await self._aligners.end()
        if self._loaded is not None:
            await self._loaded.engine.close()

    @property
    def loaded(self) -> Loaded:
        """The engine and its tokenizer; raises `EngineUnavailable` for what comes too early, or too late."""
        if self.is_leaving:
            raise EngineUnavailable("The server is shutting down.")
        if self._loaded is None:
            raise EngineUnavailable("The model is still being loaded.")
        return self._loaded

    @property
    def aligners(self) -> AlignerService:
        """The aligners; raises `EngineUnavailable` as `loaded` does."""
        _ = self.loaded
        assert self._aligners is not None, "it is there since there is an engine"
        return self._aligners

    @property
    def names(self) -> ModelNames:
        """What requests may call by name; the proposal alone while loading. The same until it changes."""
        if self._aligners is not None and self._aligners.names is not self._names.aligners:
            settings = self.settings
            self._names = ModelNames(settings.model_name, self._aligners.names, settings.default_aligner)
        return self._names

    def why_not_alive(self) -> str | None:
        """Why this process should be ended and begun anew; None if there is no reason."""
        if self._loaded is None or self._loaded.engine.trouble is not None:
            # What loads, or is begun anew by its supervisor, needs time and no help.
            return None
        silent_s = time.monotonic() - self._loaded.engine.stats.last_progress_s
        if silent_s > self.settings.stall_s:
            return f"the engine made no progress for {silent_s:.0f} s"
        return None

    def why_not_ready(self) -> str | None:
        """Why no request should come here now; None if all is well."""
        if self._loaded is None:
            return "loading"
        if self.is_draining:
            return "draining"
        return self._loaded.engine.trouble or self.why_not_alive()
