"""Breaks of what runs the models: packing, attention over pages, KV memory, the check at load."""

from __future__ import annotations

from tests.mutants import mutants

_PACKING = "tests/unit/test_packing.py"
_CONFORMANCE = "tests/exactness/test_conformance.py"
_ENGINE = "tests/exactness/test_engine.py"
_BROKEN = "tests/exactness/test_broken_numbers.py"
_COMPILED = "tests/exactness/test_compiled_attention.py"
_TRITON = "tests/exactness/test_triton_attention.py"
_LLAMA = f"{_ENGINE}::test_every_way_of_batching_gives_the_plain_forwards_greedy_tokens[llama]"
_GEMMA = f"{_ENGINE}::test_every_way_of_batching_gives_the_plain_forwards_greedy_tokens[gemma3]"
_MISTRAL = f"{_ENGINE}::test_every_way_of_batching_gives_the_plain_forwards_greedy_tokens[mistral]"
_BAD = f"{_ENGINE}::test_a_request_with_bad_logits_fails_alone"

MODEL_MUTANTS = [
    *mutants(
        "ram_core/models/packing.py",
        _PACKING,
        (" + starts[row_of_token]", ""),
        (" * page_size + positions % page_size", " * page_size"),
        ("ends[[row.wants_logits for row in rows]] - 1", "ends[[row.wants_logits for row in rows]]"),
        ("ends[[row.wants_logits for row in rows]] - 1", "ends - 1"),
        ("[-(-length // page_size) for length in context_lens]",
         "[length // page_size + 1 for length in context_lens]"),
        ("num_pages)), TRASH_PAGE, dtype", "num_pages)), 1, dtype"),
        ("tuple(row.start + n for", "tuple(n for"),
        ("if length != 1), len(rows))", "if length != 1), 0)"),
    ),
    *mutants(
        "ram_core/models/attention.py",
        _LLAMA,
        ("is_seen = key_at <= query_at", "is_seen = key_at < query_at + 2"),
        ("query.reshape(keys.shape[0], -1, *query.shape[1:]).transpose(0, 1)",
         "query.reshape(-1, keys.shape[0], *query.shape[1:])"),
        ("out.permute(2, 1, 0, 3)", "out.permute(2, 0, 1, 3)"),
        ("query[:, start:end], options", "query[:, -(end - start) :], options"),
    ),
    *mutants(
        "ram_core/models/attention.py",
        _MISTRAL,
        ("key_at > query_at - window", "key_at >= query_at - window"),
        ("key_at > query_at - window", "key_at > query_at - window + 1"),
        ("mask = self._prefill_mask(row, options.window)", "mask = self._prefill_mask(row, None)"),
    ),
    *mutants(
        "ram_core/models/attention.py",
        _COMPILED,
        ("is_seen = position < context", "is_seen = position <= context"),
        ("query.transpose(0, 1).reshape(num_rows, keys.shape[1], -1, dim)",
         "query.transpose(0, 1).reshape(num_rows, -1, keys.shape[1], dim).transpose(1, 2)"),
        ("position >= context - window", "position > context - window"),
        ("position >= context - window", "position >= context - window - 1"),
        ("first = (context - window).clamp(min=0) // size", "first = first + 0"),
        ("-(-window // size) + 1)", "-(-window // size))"),
        ("attn_mask=mask, scale=scale)", "attn_mask=mask)"),
        ("slots = self.batch.slots[first:]", "slots = self.batch.positions[first:]"),
        ("            self._write(layer, key, value, start)\n", ""),
    ),
    *mutants(
        "ram_core/models/compiled_attention.py",
        _COMPILED,
        ("first = max(context - window, 0)", "first = 0"),
        ("first = max(context - window, 0)", "first = max(context - window - 1, 0)"),
        ("dim**-0.5 if scaling is None else scaling", "dim**-0.5"),
        ("longest = batch.page_table.shape[1] * batch.page_size", "longest = max(batch.host_context_lens)"),
        ("new[i] if np.isfinite(new[i]) else np.float32(0)", "new[i]"),
        ("_dot(layer.query[row, at], key", "_dot(layer.query[row, head], key"),
        ("page_size, context - start)", "page_size, context - start + 1)"),
        ("        scores[i] /= total", "        pass"),
        ("        layer.out[row, at] = 0\n", ""),
        ("i += 4", "i += 3"),
        ("range(first, len(layer.query) * num_runs, stride)", "range(first, len(layer.query), stride)"),
        ("_remember(layer.value[row, head]", "_remember(layer.key[row, head]"),
    ),
    *mutants(
        "ram_core/models/attention.py",
        _GEMMA,
        ("if window not in self._views:", "if not self._views:"),
        ("        return self._views[window]", "        return next(iter(self._views.values()))"),
        ("        return self._masks[row, window]",
         "        return next(seen for (of, _), seen in self._masks.items() if of == row)"),
    ),
    *mutants(
        "ram_core/models/attention.py",
        _CONFORMANCE,
        ("sliding_window, softcap, s_aux)", "sliding_window, None, s_aux)"),
        ("sliding_window, softcap, s_aux)", "sliding_window, softcap, None)"),
        (".tanh_().mul_(options.softcap)", ".tanh_()"),
        ("scores.masked_fill_(~mask, -torch.inf)", "pass"),
        ("        scores += mask", "        pass"),
        ("sinks.view(-1, groups).T[:, :, None, None]", "sinks.view(groups, -1)[:, :, None, None]"),
        ("options.sinks.view(keys.shape[1], -1, 1)", "options.sinks.view(-1, keys.shape[1]).T[:, :, None]"),
    ),
    *mutants(
        "ram_core/models/attention_kernels.py",
        _TRITON,
        ("at[None, :] > position[:, None] - window", "at[None, :] >= position[:, None] - window"),
        ("at[None, :] <= position[:, None]", "at[None, :] < end"),
        ("tl.maximum(start + first - window + 1, 0)", "tl.maximum(start + first - window + 17, 0)"),
        ("        begin = tl.maximum(", "        _ = tl.maximum("),
        ("is_query & (split == 0)", "is_query & (split >= 0)"),
        ("summed * shrink[:, None] + found", "summed + found"),
        ('tl.where(new_top == float("-inf"), 0.0, new_top)', "new_top"),
        ("tl.load(context_lens + row)", "tl.load(context_lens + first_row)"),
        ("nth % tiles_per_row * tile_tokens", "nth % tiles_per_row"),
        ("(split + 1) * each, num_blocks)", "(split + 1) * each, num_blocks - 1)"),
        ("tl.sigmoid(scores * (2.0 / softcap))", "tl.sigmoid(scores / softcap)"),
        ("weights / tl.sum(weights, 0)", "weights"),
        ("lane // key_dim * key_head_stride", "0"),
        ('key_head_stride + lane % key_dim\n    new = tl.load(source, mask=is_lane)\n'
         '    new = tl.where(tl.abs(new.to(tl.float32)) < float("inf"), new, 0.0)',
         "key_head_stride + lane % key_dim\n    new = tl.load(source, mask=is_lane)"),
    ),
    *mutants(
        "ram_core/models/triton_attention.py",
        _TRITON,
        ("width = itemsize if itemsize < 4 else 2 * itemsize", "width = itemsize"),
        ("rows.num_rows * -(-longest // blocks.tile_tokens)", "rows.num_rows"),
        ("            first_token=rows.first_token,", "            first_token=0,"),
        ("            first_row=rows.first_row,", "            first_row=0,"),
        ("row, token = row + len(lens), token + sum(lens)", "row, token = row + len(lens), token"),
    ),
    *mutants(
        "ram_core/models/experts.py",
        "tests/exactness/test_experts.py",
        ("top_k_index.numel() <= num_experts", "top_k_index.numel() < num_experts"),
        ("top_k_index.numel() <= num_experts", "len(top_k_index) <= num_experts"),
        ('model.device.type == "cuda" and ', ""),
    ),
    *mutants(
        "ram_core/models/flashinfer_attention.py",
        "tests/unit/test_backends.py",
        ("num_pages = -(-contexts // batch.page_size)", "num_pages = contexts // batch.page_size + 1"),
        ("(num_pages - 1) * batch.page_size", "num_pages * batch.page_size"),
        ("torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)", "lengths.cumsum(0)"),
    ),
    *mutants(
        "ram_core/models/backends.py",
        "tests/unit/test_backends.py",
        ('return "triton" if device.type == "cuda" and', 'return "triton" if'),
        ("if page_size % least_page_size(name):", "if False:"),
        ("if not _is_installed(name):", "if False:"),
        ('if device.type != "cuda":', "if False:"),
    ),
    *mutants(
        "ram_core/models/kv_watch.py",
        _BROKEN,
        ("for each in (key, value)]", "for each in (key,)]"),
        ("for each in (key, value)]", "for each in (value,)]"),
        ("isfinite().all(0)", "isfinite().any(0)"),
        ("~torch.stack(self._sums).isfinite().all(0)", "torch.stack(self._sums).isnan().any(0)"),
        ("self._sums += [", "self._sums = ["),
        (".sum((0, 2)", "[..., :1].sum((0, 2)"),
    ),
    *mutants(
        "ram_core/models/attention.py",
        _BROKEN,
        ("        watch.look(key, value)\n", "        watch.look(key[:1], value[:1])\n"),
    ),
    *mutants(
        "ram_core/models/packing.py",
        _BROKEN,
        ("return self.num_logits < self.num_tokens", "return self.num_decode < self.num_rows"),
        ("return self.num_logits < self.num_tokens", "return self.num_logits < self.num_rows"),
    ),
    *mutants(
        "ram_core/models/kv.py",
        _BAD,
        ("key.nan_to_num(0.0, 0.0, 0.0)", "key"),
        ("value.nan_to_num(0.0, 0.0, 0.0)", "value"),
    ),
    *mutants(
        "ram_core/models/conformance.py",
        _CONFORMANCE,
        ("else 3e-4", "else 3e2"),
        ("else 3e-4", "else 1e-12"),
        ("of_places.max()", "of_places.median()"),
        ("quantile(0.75).item(), 0.1", "quantile(0.75).item(), 1e-3"),
        ("quantile(0.75)", "quantile(0.0)"),
        ("quantile(0.75)", "quantile(1.0)"),
        ("    if difference <= limit:", "    if not difference > limit:"),
        ("paged.model.set_attn_implementation(ATTENTION_NAME)", "pass"),
    ),
]  # fmt: skip
