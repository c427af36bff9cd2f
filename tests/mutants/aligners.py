"""Breaks of the aligners' registry, their manifests, their verification and the watched directory."""

from __future__ import annotations

from tests.mutants import mutants

_REGISTRY = "tests/unit/test_aligner_registry.py"
_PROPERTIES = "tests/unit/test_aligner_registry_properties.py"
_MANIFEST = "tests/unit/test_aligner_manifest.py"
_VERIFICATION = "tests/unit/test_aligner_verification.py"

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
        ("if not version.num_references and version.key not in wanted:", "if version.key not in wanted:"),
        ("if not version.num_references and version.key not in wanted:", "if not version.num_references:"),
        ("if num_jobs >= self._max_jobs:", "if num_jobs > self._max_jobs:"),
        ("                num_jobs += 1\n", "                pass\n"),
        (
            "version.is_started, version.held_bytes = True, version.need_bytes",
            "version.is_started, version.held_bytes = True, 0",
        ),
        ("if demand.deadline_s is not None and self._clock() >= demand.deadline_s:", "if False:"),
        ("if version.state is State.FAILED or (version.is_freeing and version.reason):", "if False:"),
        ("if need and need + kept > self._memory_bytes:", "if False:"),
        ("(version.is_withdrawn and not (version.is_loaded or version.is_started))", "False"),
        (
            "if version.is_busy or version.is_loaded:\n                    continue",
            "if version.is_loaded:\n                    continue",
        ),
        ("if error is None and not all(", "if error is None and not any("),
        ("self._catalogue.version(key).num_references += 1", "pass"),
        (
            "        version.is_leaving = False\n        if version.is_loaded:",
            "        if version.is_loaded:",
        ),
        ("            leave(entry.versions[left])", "            pass"),
        (
            "if version.is_queued and version.key not in wanted:\n                version.rest()",
            "if False:\n                version.rest()",
        ),
        ("self._catalogue.version(key).last_used_s = now_s", "pass"),
        ("protected |= demand.keys", "protected = set(demand.keys)"),
    ),
    *mutants(
        "ram_core/aligners/registry.py",
        _REGISTRY,
        ("version.num_references -= 1", "pass"),
        ("if num_waiting >= self.limits.max_waiting:", "if num_waiting > self.limits.max_waiting:"),
        ("version.last_used_s = self._clock()\n        return", "pass\n        return"),
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
        ("if exponent)", "if True)"),
        ("if term.model in path:", "if False:"),
        ("self.exponents.get((key, part), 0.0) + exponent", "exponent"),
        ("if key.version in entry.shares:", "if False:"),
        ("            version.rest()\n", "            pass\n"),
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
        ("found.get(path) != record.sha256", "False"),
        (
            "if reason := unsupported_reason(config):\n            raise CheckpointError(reason)",
            "if reason := unsupported_reason(config):\n            pass",
        ),
        ("            check_weights(str(part.directory), self.configs[name])", "            pass"),
        ("            check_lora(part.adapter", "            (part.adapter"),
        ("            read_header(part.directory / WEIGHTS_FILE)", "            pass"),
        ("if self.fingerprint and manifest.tokenizer not in", "if False and manifest.tokenizer not in"),
        ('if manifest.tokenizer not in ("", fingerprint(proposal)):', "if False:"),
        (
            "                check_same_vocabulary(proposal",
            "                _ = (lambda *a, **k: None)(proposal",
        ),
        ("            shared_vocabulary_size(proposal, num_rows or", "            (proposal, num_rows or"),
        ("num_rows or vocabulary_size(proposal)", "vocabulary_size(proposal)"),
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
