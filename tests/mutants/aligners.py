"""Breaks of the aligners' registry, their manifests, their verification and the watched directory."""

from __future__ import annotations

from tests.mutants import mutants

_REGISTRY = "tests/unit/test_aligner_registry.py"
_PROPERTIES = "tests/unit/test_aligner_registry_properties.py"
_MANIFEST = "tests/unit/test_aligner_manifest.py"
_VERIFICATION = "tests/unit/test_aligner_verification.py"
_INVENTORY = "tests/unit/test_aligner_inventory.py"
_HOT_SWAP = "tests/http/test_aligner_hot_swap.py"
_MIXING = "tests/http/test_aligner_mixing.py"
_AFTER_DEATH = "tests/faults/test_aligners_after_death.py"

ALIGNER_MUTANTS = [
    *mutants(
        "ram_core/aligners/memory.py",
        _REGISTRY,
        ("key=lambda version: (version.last_used_s, version.key)", "key=lambda version: version.key"),
        ("version.num_references or version.is_pinned", "version.is_pinned"),
        ("version.num_references or version.is_pinned", "version.num_references"),
        ("and version.key not in protected", "and True"),
        ("self._free_bytes -= at_once", "pass"),
        ("self._coming_bytes -= need_bytes - at_once", "pass"),
        ("return at_once == need_bytes, victims", "return True, victims"),
        (
            "        if shortage > 0:\n            return False, []",
            "        if shortage > 0:\n            return False, victims",
        ),
    ),
    *mutants(
        "ram_core/aligners/demands.py",
        (_REGISTRY, _PROPERTIES),
        ("if not version.num_references and not is_wanted:", "if not is_wanted:"),
        ("if not version.num_references and not is_wanted:", "if not version.num_references:"),
        ("if num_jobs >= self._max_jobs:", "if num_jobs > self._max_jobs:"),
        ("                num_jobs += 1\n", "                pass\n"),
        (
            "version.is_started, version.held_bytes = True, version.need_bytes",
            "version.is_started, version.held_bytes = True, 0",
        ),
        ("if demand.deadline_s is not None and self._clock() >= demand.deadline_s:", "if False:"),
        ("if version.state is State.FAILED or (version.is_freeing and version.reason):", "if False:"),
        ("if need and need + kept > self.memory_bytes:", "if False:"),
        ("(version.is_withdrawn and not (version.is_loaded or version.is_started))", "False"),
        (
            "if not version.is_startable:\n                    continue",
            "if version.is_loaded:\n                    continue",
        ),
        ("if not all(version is not None and", "if not any(version is not None and"),
        ("version.num_references += 1", "pass"),
        (
            "        version.is_leaving = False\n        if version.is_loaded:",
            "        if version.is_loaded:",
        ),
        ("            self.leave(left)", "            pass"),
        (
            "elif version.is_queued and not is_wanted:\n            version.rest()",
            "elif False:\n            version.rest()",
        ),
        ("            version.last_used_s = now_s\n", "            pass\n"),
        ("            self._catalogue.restless.add(version.key)", "            pass"),
        ("                        self.is_short = True", "                        pass"),
        ("self._start() if self._pending and self.is_open", "self._start() if self._pending"),
        ('f"Aligner {named}: {self.words}."', "self.detail"),
        ("protected |= demand.keys", "protected = set(demand.keys)"),
    ),
    *mutants(
        "ram_core/aligners/registry.py",
        _REGISTRY,
        ("version.num_references -= 1", "pass"),
        ("if num_waiting >= self.limits.max_waiting:", "if num_waiting > self.limits.max_waiting:"),
        ("version.last_used_s = self._clock()\n            # Only", "pass\n            # Only"),
        ("version.is_leaving or self._demands.is_short", "version.is_leaving"),
        ("version.is_leaving or self._demands.is_short", "self._demands.is_short"),
        (
            "            if key not in wanted:\n                self._demands.leave(version)",
            "            pass",
        ),
        ("        self._catalogue.restless.add(key)", "        pass"),
        ("if excess > 0 and self.held_bytes > self.limits.memory_bytes:", "if False:"),
        ("< self.limits.retry_failed_s:", "< 0:"),
        (
            "was_there = (version.is_loaded and not version.is_leaving) or version.is_pinned",
            "was_there = version.is_pinned",
        ),
        ("key=lambda each: -each.last_used_s", "key=lambda each: each.last_used_s"),
        ("            version.num_references = 0\n", "            pass\n"),
        ("self._demands.leases.clear()", "pass"),
        (
            "            if version.state is State.FAILED:\n                version.rest()\n        keys",
            "            pass\n        keys",
        ),
    ),
    *mutants(
        "ram_core/aligners/catalogue.py",
        _REGISTRY,
        ("self.earlier.pop()", "pass"),
        ("elif self.shares:\n            self.earlier", "elif False:\n            self.earlier"),
        ("strength * term.weight", "term.weight"),
        ("rest = rest or _newest(entry)", "pass"),
        ("asked.scale * (", "1.0 * ("),
        ("if not each.is_withdrawn}", "}"),
        ("if term.model in path:", "if False:"),
        ("self.exponents.get((key, part), 0.0) + exponent", "exponent"),
        ("if key.version in entry.shares:", "if False:"),
        ("            version.rest()\n", "            pass\n"),
    ),
    *mutants(
        "server/aligners/executor.py",
        _HOT_SWAP,
        ("await asyncio.to_thread(self._checker.require_unchanged, self._versions[key])", "pass"),
        ("self.do(self._registry.tick())", "pass"),
        ("answer.set_exception(error)", "answer.set_result(None)"),
    ),
    *mutants(
        "server/aligners/executor.py",
        _AFTER_DEATH,
        ("                self._loading.clear()\n", "                pass\n"),
        ("self._registry_says(self._registry.lost())", "pass"),
    ),
    *mutants(
        "server/aligners/service.py",
        (_HOT_SWAP, _MIXING),
        ("        except BaseException:\n            self.release(request_id)", "        except KeyError:"),
        ("if len(aligners) > 1:", "if len(aligners) > 9:"),
        ("missing = [each.name for each in asked if each.name not in self.names]", "missing = [str(asked)]"),
        ("self.registry.tune(name, strength)", "pass"),
    ),
    *mutants(
        "server/generation.py",
        _HOT_SWAP,
        ("            self._on_left()", "            pass"),
    ),
    *mutants(
        "server/routes/shared.py",
        _HOT_SWAP,
        ('return f"{tenant}\\0{ask.user}" if ask.user else tenant', "return tenant"),
        ("_sticky_key(caller, ask) or renderer.id", "_sticky_key(caller, ask)"),
    ),
    *mutants(
        "server/aligners/start.py",
        _INVENTORY,
        ("key=_newest_last, reverse=True", "key=_newest_last"),
        ("if known.key not in taken", "if True"),
        ("if known.origin is Origin.SETTINGS:\n                raise", "if False:\n                raise"),
    ),
    *mutants(
        "server/metrics.py",
        _INVENTORY,
        ("                _add_up(child", "                (lambda *_: None)(child"),
        ("                metric.remove(*labels)", "                pass"),
    ),
    *mutants(
        "ram_core/aligners/shares.py",
        _REGISTRY,
        ('"\\0".join(words)', '"\\0".join(words[1:])'),
        ("weights[version] / _exponential", "_exponential"),
        (
            "weights[version] / _exponential(salt, version, key)",
            "weights[version] * _exponential(salt, version, key)",
        ),
    ),
    *mutants(
        "ram_core/aligners/files.py",
        _VERIFICATION,
        ("if not target.is_relative_to(limit):", "if False:"),
        (
            '            raise CheckpointError(f"{name} is a link to something else than a file")',
            "            pass",
        ),
        ("for each in (path, target):", "for each in (path,):"),
        ("each.suffix.lower()", "each.suffix"),
        ("[*names, *folders]", "names"),
        ("on_progress(num_done, num_total)", "on_progress(num_bytes, num_total)"),
    ),
    *mutants(
        "ram_core/aligners/files.py",
        _MANIFEST,
        ("stat.st_ctime_ns", "0"),
        ('pure.is_absolute() or ".." in pure.parts', "pure.is_absolute()"),
        ('str(pure) == relative.removeprefix("./") and', "True and"),
    ),
    *mutants(
        "ram_core/aligners/manifest.py",
        _MANIFEST,
        ('order="deterministic"', "order=None"),
        ("Path(name).unlink(missing_ok=True)", "pass"),
        ("if len(table) != len(pairs):", "if False:"),
        ("if len(text) > _MAX_BYTES:", "if False:"),
    ),
    *mutants(
        "ram_core/aligners/directory.py",
        _MANIFEST,
        ("if path not in found and (path in held_back or path.parent in held_back):", "if False:"),
        ("if self._clock() - seen.since_s < settle_s:", "if False:"),
        ("if seen is None or seen.snapshot != snapshot:", "if seen is None:"),
        ("            _require_sizes(manifest, snapshot)", "            pass"),
        ("            read_header(path / name)", "            pass"),
        ("            read_checkpoint_headers((path / name).parent)", "            pass"),
        ("                self._require_below(folder)\n", "                pass\n"),
        ("and not is_passed_over(each.name)", "and True"),
        ("                require_name(folder.name)", "                pass"),
    ),
    *mutants(
        "ram_core/aligners/verification.py",
        _VERIFICATION,
        ("if self._is_outside(self.directory):", "if False:"),
        ("if base.exists() and self._is_outside(base):", "if False:"),
        ("_require_listed(manifest, present)", "pass"),
        ("    if unlisted:", "    if False:"),
        ("found.get(path, {}).get(kind) != digests[kind]", "False"),
        ("    if one_is_enough:", "    if True:"),
        (
            "if reason := unsupported_reason(config):\n            raise CheckpointError(reason)",
            "if reason := unsupported_reason(config):\n            pass",
        ),
        ("            check_weights(str(part.directory), self.configs[name])", "            pass"),
        ("            check_lora(part.adapter", "            (part.adapter"),
        ("            read_header(part.directory / WEIGHTS_FILE)", "            pass"),
        ("if self.fingerprint and manifest.tokenizer not in", "if False and manifest.tokenizer not in"),
        ('if manifest.tokenizer not in ("", proposal.fingerprint):', "if False:"),
        (
            "                check_same_vocabulary(proposal",
            "                _ = (lambda *a, **k: None)(proposal",
        ),
        ("            shared_vocabulary_size(proposal", "            (proposal"),
        ("proposal.num_rows or vocabulary_size", "vocabulary_size"),
    ),
    *mutants(
        "ram_core/aligners/pack.py",
        _VERIFICATION,
        ("if wishes.version is None and not is_same:", "if wishes.version is None:"),
        ("if wishes.version is None and not is_same:", "if False:"),
        ('{**said.get("provenance", {}), **(wishes.provenance or {})}', "dict(wishes.provenance or {})"),
        ("                source = read_lora_config(source).tokenizer_source", "                pass"),
    ),
    *mutants(
        "ram_core/aligners/report.py",
        _VERIFICATION,
        ('if check.name == "vocabulary"', "if False"),
    ),
]
