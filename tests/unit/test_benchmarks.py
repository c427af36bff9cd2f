"""The benchmarks' arithmetic: costs on paper, slopes, claims, tables; and one command from end to end."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import benchmarks
from benchmarks import overhead, report
from benchmarks.__main__ import NAMES
from benchmarks.__main__ import main as run_several
from benchmarks.aligners import spread
from benchmarks.common import Options, Pair, percentile, random_prompts
from benchmarks.decode import slope_ms
from benchmarks.engine_way import EngineWay, Job
from benchmarks.limits import Cost, Speed, step_cost
from benchmarks.shapes import PAIRS, Shape, llama_config, save_checkpoint
from benchmarks.tables import Claim, Outcome, Table, claims_table, document, markdown, show
from benchmarks.workers import peak_resident_mib, tree_peak_mib, worker

TINY = PAIRS["tiny"]


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_shape_counts_its_parameters_as_the_model_has_them(is_tied):
    shape = Shape(64, 3, 4, 2, 96, 512, is_tied=is_tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config(shape))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    assert shape.num_parameters - shape.num_read == (0 if is_tied else embeddings)


def test_a_step_reads_its_weights_once_and_the_keys_and_values_of_every_row():
    proposal, aligner = TINY
    one, two = (step_cost(proposal, [aligner], batch, 100, "float32") for batch in (1, 2))
    kept = 4 * 100 * (2 * 2 * 2 * 16 + 2 * 2 * 1 * 16)
    assert one.num_bytes == 4 * (proposal.num_read + aligner.num_read) + kept
    assert two.num_bytes == one.num_bytes + kept
    assert two.flops == 2 * one.flops
    assert step_cost(proposal, [aligner], 1, 100, "bfloat16").num_bytes * 2 == one.num_bytes


def test_more_aligners_in_a_batch_are_more_to_read_but_no_more_to_compute():
    proposal, aligner = TINY
    one, four = (step_cost(proposal, [aligner] * count, 8, 10, "float32") for count in (1, 4))
    assert four.num_bytes - one.num_bytes == 3 * 4 * aligner.num_read
    assert four.flops == one.flops


def test_a_token_behind_others_costs_two_operations_a_weight_and_four_a_kept_number_of_each_head():
    shape = Shape(hidden=8, layers=1, heads=2, kv_heads=1, intermediate=16, vocab_size=32, is_tied=True)
    matrices = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 8 * 32
    assert shape.token_flops(0) == 2 * matrices
    assert shape.token_flops(10) - shape.token_flops(0) == 4 * 8 * 10


def test_the_limit_is_the_larger_of_reading_and_computing():
    speed = Speed(copy=10.0, read=20.0, flops=100.0)
    reading, computing = Cost(num_bytes=40.0, flops=100.0), Cost(num_bytes=10.0, flops=300.0)
    assert (speed.limit_ms(reading), speed.kind(reading)) == (2000.0, "bandwidth")
    assert (speed.limit_ms(computing), speed.kind(computing)) == (3000.0, "arithmetic")


def test_a_slope_leaves_out_what_both_lengths_take():
    assert slope_ms([1.5, 1.1], [2.0, 1.6, 1.9], 10) == pytest.approx(50.0)


def test_a_percentile_is_one_of_the_values():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)] == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert percentile([float(n) for n in range(1, 201)], 0.99) == 198.0


def test_rows_are_spread_evenly_over_aligners():
    assert spread(5, 2) == [0, 1, 0, 1, 0]
    assert spread(3, 0) == [-1, -1, -1]


def test_a_claim_holds_at_its_bar_and_not_beyond():
    claim = Claim("ratio", 1.0, at_least=0.95, at_most=1.25)
    assert [claim.holds(value) for value in (0.94, 0.95, 1.25, 1.26, math.nan)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert claim.bar == "≥ 0.95, ≤ 1.25"


def test_claims_stand_beside_what_was_measured():
    claims = [Claim("a", 1.0, at_least=0.5), Claim("b", 2.0), Claim("c", 3.0, at_most=1.0), Claim("d", None)]
    rows = claims_table(claims, {"a": 0.4, "b": 2.5}).rows
    assert rows == [
        ["a", "≥ 0.50", 1.0, 0.4, "no"],
        ["b", "–", 2.0, 2.5, "–"],
        ["c", "≤ 1.00", 3.0, None, "not measured"],
        ["d", "–", None, None, "not measured"],
    ]


def test_a_figure_without_a_claim_is_an_error():
    with pytest.raises(KeyError, match="unknown"):
        claims_table([Claim("typo", 1.0)], {"unknown": 1.0})


def test_cells_have_three_digits_and_counts_are_whole():
    shown = [show(value) for value in (0.9449, 12.345, 1234.5, 8, "way", None, math.nan)]
    assert shown == ["0.94", "12.3", "1234", "8", "way", "–", "–"]


def test_a_table_is_markdown_with_numbers_to_the_right():
    table = Table("Title", ["way", "ms"], [["ours", 1.0], ["theirs", None]])
    assert table.markdown() == ("**Title**\n\n| way | ms |\n|---|---:|\n| ours | 1.00 |\n| theirs | – |")


def test_a_run_survives_json_and_reads_the_same(tmp_path):
    found = Outcome([Table("T", ["n"], [[1.25]])], {"a": 1.0}, ["a note"])
    run = document("x", {"cores": "2"}, {"json": Path("here")}, [Claim("a", 1.0)], found)
    again = json.loads(json.dumps(run))
    assert markdown(again) == markdown(run)
    assert markdown(run).splitlines()[0] == "cores 2"
    assert markdown(run).endswith("- a note")


def test_results_fill_their_places_again_and_again(tmp_path):
    run = document("x", {"cores": "2"}, {}, [], Outcome([Table("T", ["n"], [[1.25]])], {}))
    (tmp_path / "x-cpu.json").write_text(json.dumps(run))
    text = (
        "before\n<!-- results x-cpu -->\nstale\n<!-- end -->\nbetween\n<!-- results y-cpu -->\n<!-- end -->\n"
    )
    filled = report.fill(text, tmp_path)
    assert "stale" not in filled
    assert "| 1.25 |" in filled
    assert filled.count("Not measured yet.") == 1
    assert report.fill(filled, tmp_path) == filled


def test_the_readme_shows_what_the_results_say():
    home = Path(benchmarks.__file__).parent
    text = (home / "README.md").read_text(encoding="utf-8")
    assert report.fill(text, home / "results") == text, "run `python -m benchmarks report`"


def test_quick_settings_are_smaller_and_flags_win_over_them():
    options = Options("…")
    options.add("--rounds", 5, "turns", quick=1)
    options.add("--batches", [1, 8], "sequences", quick=[1])
    plain, quick, both = (
        options.read(arguments) for arguments in ([], ["--quick"], ["--quick", "--rounds", "3"])
    )
    assert (quick.rounds, quick.batches) == (1, [1])
    assert (both.rounds, both.batches) == (3, [1])
    assert (plain.rounds, plain.batches) == (5, [1, 8])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [[], ["--quick"]])
def test_every_command_says_beforehand_what_it_expects(name, size):
    benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    options = Options(benchmark.description)
    benchmark.add_options(options)
    claims = benchmark.claims(options.read(size))
    assert benchmark.name == name
    assert claims
    assert len({claim.name for claim in claims}) == len(claims)
    if not size:
        assert all(claim.expected is not None for claim in claims)


def test_a_command_that_does_not_exist_is_refused_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_several(["decode", "unheard_of", "--results", str(tmp_path / "results")])
    assert "unheard_of" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


class Stubborn:
    def __init__(self, greeting: str) -> None:
        self._greeting = greeting

    def greet(self, name: str) -> str:
        return f"{self._greeting}, {name}"

    def refuse(self) -> None:
        raise ValueError("I will not")


def test_a_worker_answers_tells_its_own_memory_and_passes_on_what_failed():
    ballast = bytearray(b"x" * (512 << 20))
    with worker(Stubborn, "Hello") as there:
        assert there.ask("greet", "you") == "Hello, you"
        assert 10 < there.peak_mib < peak_resident_mib() - 100
        with pytest.raises(RuntimeError, match="I will not"):
            there.ask("refuse")
    assert len(ballast) == 512 << 20


def test_the_memory_of_a_tree_is_that_of_all_its_processes():
    alone = tree_peak_mib(os.getpid())
    with worker(Stubborn, "Hello") as there:
        there.ask("greet", "you")
        assert tree_peak_mib(os.getpid()) > alone + 0.9 * there.peak_mib


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    for name, shape in zip(("proposal", "aligner"), TINY, strict=True):
        save_checkpoint(shape, root / name, "float32", "cpu", seed=0)
    return Pair(str(root / "proposal"), (str(root / "aligner"),), TINY)


def test_the_room_that_a_pair_asks_for_is_enough_and_not_much_more(pair):
    options = Options("…").read(["--pair", "tiny"])
    room = pair.kv_bytes(3, 48, "float32")
    way = EngineWay(Job(pair.proposal, pair.aligners, "cpu", "float32", 3, room))
    way.hold(random_prompts(options, 3, 40, seed=0))
    stretch = way.steps(7)
    assert len(stretch.steps_s) == 7
    assert len(stretch.gaps_s) == 21
    assert way.engine.limits.num_pages <= 3 * 5 + 1
    way.release()
    assert not way.engine.has_work


def test_a_newcomer_does_not_stop_the_streams_that_run(pair):
    options = Options("…").read(["--pair", "tiny"])
    room = pair.kv_bytes(3, 400, "float32")
    way = EngineWay(Job(pair.proposal, pair.aligners, "cpu", "float32", 3, room))
    way.hold(random_prompts(options, 2, 8, seed=0))
    way.steps(1)
    [prompt] = random_prompts(options, 1, 300, seed=1)
    first_s, stretch = way.first_token(prompt)
    assert len(stretch.steps_s) > 1, "the prompt was not read in chunks"
    assert len(stretch.gaps_s) == 2 * len(stretch.steps_s)
    assert first_s >= sum(stretch.steps_s)


def test_streams_begin_together_however_long_their_prompts_are(pair):
    options = Options("…").read(["--pair", "tiny"])
    room = pair.kv_bytes(4, 1600 + 200, "float32")
    way = EngineWay(Job(pair.proposal, pair.aligners, "cpu", "float32", 4, room))
    way.hold(random_prompts(options, 4, 1600, seed=0))
    assert way.engine.stats.num_running == 4
    assert way.engine.stats.num_pages_used <= 4 * (1600 + 16) // 16


def test_streams_that_do_not_fit_are_an_error_and_no_measurement(pair):
    options = Options("…").read(["--pair", "tiny"])
    way = EngineWay(Job(pair.proposal, pair.aligners, "cpu", "float32", 2, pair.kv_bytes(2, 64, "float32")))
    with pytest.raises(RuntimeError, match="no room for 3 streams"):
        way.hold(random_prompts(options, 3, 16, seed=0))


def test_a_command_runs_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "overhead.json"
    overhead.BENCHMARK.main(["--pair", "tiny", "--quick", "--json", str(path)])
    printed = capsys.readouterr().out
    run = json.loads(path.read_text(encoding="utf-8"))
    assert markdown(run) in printed
    assert {"commit", "CPU", "torch", "seconds"} <= set(run["environment"])
    steps, claims = run["tables"]
    assert [row[:2] for row in steps["rows"]] == [
        [1, "aligned"],
        [1, "identity"],
        [4, "aligned"],
        [4, "identity"],
    ]
    assert all(0 < cell < 1000 for row in steps["rows"] for cell in row[2:5])
    assert claims["rows"][0][4] == "–"
    assert claims["rows"][1][4] in {"yes", "no"}
