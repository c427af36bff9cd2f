"""Aligners as an admin sees them: from the service's views to the wire."""

from __future__ import annotations

import dataclasses
import math
import time

from ram_core.aligners.manifest import Manifest
from ram_core.aligners.states import VersionStatus
from server.aligners.known import Origin
from server.aligners.service import AlignerService, AlignerView
from server.figures import figures_of
from server.metrics import Metrics
from server.openai.admin_schema import AlignerInfo, AlignerList, Measured, VersionInfo


def list_of(service: AlignerService, metrics: Metrics) -> AlignerList:
    """All aligners, and their memory."""
    return AlignerList(
        memory_bytes=service.memory_bytes,
        held_bytes=service.held_bytes,
        data=[info_of(view, metrics) for view in service.status()],
    )


def info_of(view: AlignerView, metrics: Metrics) -> AlignerInfo:
    """One aligner."""
    status = view.status
    return AlignerInfo(
        name=status.name,
        shares=dict(status.shares),
        next_shares=None if status.next_shares is None else dict(status.next_shares),
        earlier_shares=[dict(shares) for shares in status.earlier_shares],
        defaults=_defaults_of(view),
        versions=[
            _version_of(each, view.manifests[each.key.version], view.origins[each.key.version], metrics)
            for each in status.versions
        ],
    )


def _defaults_of(view: AlignerView) -> dict[str, float | str | None]:
    own = view.defaults
    given: dict[str, float | str | None] = {}
    if own.strength is not None:
        given["strength"] = own.strength
    if own.resampling is not None:
        given["resampling"] = own.resampling.value
    if own.kl_threshold is not None:
        given["kl_threshold"] = own.kl_threshold if math.isfinite(own.kl_threshold) else None
    if own.num_candidates is not None:
        given["candidates"] = own.num_candidates
    return given


def _version_of(status: VersionStatus, manifest: Manifest, origin: Origin, metrics: Metrics) -> VersionInfo:
    # The registry's clock is the monotonic one.
    idle_s = time.monotonic() - status.last_used_s
    return VersionInfo(
        version=status.key.version,
        state=status.state.value,
        reason=status.reason,
        waits_for=status.waits_for,
        progress=status.progress,
        bytes=status.num_bytes,
        device=status.device,
        references=status.num_references,
        last_used=round(time.time() - idle_s, 3) if status.last_used_s else None,
        pinned=status.is_pinned,
        preset=status.is_preset,
        origin=origin.value,
        source=status.source,
        terms={term.model: term.weight for term in manifest.terms},
        strength=manifest.strength,
        resampling=manifest.resampling.value,
        kl_threshold=manifest.kl_threshold,
        candidates=manifest.candidates,
        measured=Measured(**dataclasses.asdict(figures_of(metrics, *status.key))),
    )
