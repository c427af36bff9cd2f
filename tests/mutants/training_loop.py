"""Breaks of the training loop: objectives, batches, saves, and what is watched."""

from __future__ import annotations

from tests.mutants import mutants

_OBJECTIVES = "tests/unit/test_training_objectives.py"
_LOOP = "tests/unit/test_training_loop.py"
_FIT = "tests/unit/test_training_fit.py"
_LOG_PROBS = "tests/unit/test_training_log_probs.py"
_PADDING = f"{_LOOP}::test_padding_changes_nothing"
_PARTS = f"{_LOOP}::test_an_update_in_small_parts_is_the_same_update"
_SHARES = f"{_LOOP}::test_processes_and_parts_share_out_an_update"
_RESUMED = f"{_LOOP}::test_a_resumed_run_ends_where_an_uninterrupted_one_does"
_KILLED = f"{_LOOP}::test_a_run_that_is_killed_goes_on_from_its_last_whole_save"
_OTHERS = f"{_LOOP}::test_what_another_run_has_left_is_not_gone_on_with"
_RUNAWAY = f"{_LOOP}::test_a_runaway_ascent_is_stopped_with_advice"
_NAN = f"{_LOOP}::test_a_loss_that_is_no_number_leaves_the_last_good_save"
_WEIGHTS = f"{_LOOP}::test_weights_that_are_no_numbers_are_never_saved"
_MUON = f"{_LOOP}::test_muon_beside_adamw_is_each_of_them_alone"
_RATE = f"{_LOOP}::test_the_rate_rises_and_then_falls_to_its_floor"

TRAINING_LOOP_MUTANTS = [
    *mutants(
        "ram_core/training/objectives.py",
        _OBJECTIVES,
        ("ascent_weight * log_q_proposed - log_q_wanted", "-ascent_weight * log_q_proposed - log_q_wanted"),
        ("beta * (log_q_wanted - log_q_proposed)", "(log_q_wanted - log_q_proposed)"),
        ("masked_fill(has_target, 0.0)", "masked_fill(~has_target, 0.0)"),
        (" - (~has_target).long()", ""),
        ("log_p + strength * logits", "log_p + logits"),
    ),
    *mutants(
        "ram_core/training/examples.py",
        _PADDING,
        ("len(example.prompt) - 1)\n", "len(example.prompt))\n"),
        ("firsts.append(row * width", "firsts.append(row * (width + 1)"),
    ),
    *mutants(
        "ram_core/training/batches.py",
        _SHARES,
        ("step[self.process :: self.num_processes]", "step[self.process :]"),
        ("indices or (step[0],)", "indices"),
        ("math.ceil(most / size)", "most // size"),
    ),
    *mutants(
        "ram_core/training/loop.py",
        _PARTS,
        ("        if not share.is_counted:\n            return 0.0\n", ""),
        ("share.num_wanted_tokens if is_per_token", "share.num_pairs if is_per_token"),
        (' * inputs["scale"]', ""),
    ),
    *mutants(
        "ram_core/training/loop.py",
        _FIT,
        ("        model.config.use_cache = self._uses_cache\n", ""),
        ("        self._head.remove()\n", ""),
    ),
    *mutants(
        "ram_core/training/optimizers.py",
        _MUON,
        (
            "        super().load_state_dict(state_dict)\n        self._share()",
            "        super().load_state_dict(state_dict)",
        ),
        ("betas=_ADAM_BETAS, weight_decay=0.0", "weight_decay=0.0"),
    ),
    *mutants(
        "ram_core/training/optimizers.py",
        _RATE,
        ("(step + 1) / rise", "step / rise"),
        ("floor + (1 - floor)", "(1 - floor)"),
    ),
    *mutants(
        "ram_core/training/saves.py",
        _KILLED,
        ("return found if found.sizes == _sizes(path) else None", "return found"),
        ("whole[-keep:]", "whole[-1:]"),
        ("for path, step in reversed(_paths(directory))", "for path, step in _paths(directory)"),
    ),
    *mutants("ram_core/training/saves.py", _OTHERS, ("    if found != fingerprint:", "    if False:")),
    *mutants("ram_core/training/metrics.py", _RESUMED, ('if line["step"] <= first_step', 'if line["step"]')),
    *mutants(
        "ram_core/training/monitor.py",
        _RESUMED,
        ("        seconds = self._earlier.seconds + time", "        seconds = time"),
    ),
    *mutants(
        "ram_core/training/monitor.py",
        _RUNAWAY,
        ("if update.proposed_a_token > job.max_ascent_nats", "if False"),
    ),
    *mutants(
        "ram_core/training/monitor.py",
        _NAN,
        ("if not (math.isfinite(update.loss) and math.isfinite(update.gradient_norm))", "if False"),
    ),
    *mutants("ram_core/training/monitor.py", _WEIGHTS, ("        if num_bad:", "        if False:")),
    *mutants(
        "ram_core/training/log_probs.py",
        _LOG_PROBS,
        ("            if not is_done[number]:", "            if True:"),
        ("                is_done[number] = 1\n", ""),
    ),
    *mutants(
        "ram_core/training/flops.py",
        _FIT,
        ("4.0 + 2.0 * parameter.requires_grad", "4.0"),
        ("if id(each) not in ends", ""),
    ),
    *mutants(
        "ram_core/training/checkpoints.py",
        _FIT,
        ("model = model.to(starting.dtype)", "pass"),
        ("        model = model.merge_and_unload()\n", "        pass\n"),
    ),
]
