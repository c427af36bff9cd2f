"""The `ram` command: what can be typed. What it does is in `server.commands`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ram_core import __version__
from ram_core.errors import RamError
from server.commands.aligner import aligner_app
from server.commands.bench import DEFAULT_URL, bench_app
from server.commands.calibrate import calibrate
from server.commands.coverage import coverage
from server.commands.evaluate import evaluate
from server.commands.failing import fail
from server.commands.stress import stress
from server.commands.tenant import tenant_app

app = typer.Typer(
    name="ram",
    help="Serve one frozen language model with many small, swappable aligners.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
demo_app = typer.Typer(help="The embedded demo: rebuild it, measure it.", no_args_is_help=True)
app.add_typer(demo_app, name="demo")
app.add_typer(bench_app, name="bench")
app.add_typer(aligner_app, name="aligner")
app.add_typer(tenant_app, name="tenant")
app.command()(calibrate)
app.command()(coverage)
app.command("eval")(evaluate)
app.command()(stress)

AlignerFlags = Annotated[
    list[str] | None, typer.Option("--aligner", metavar="NAME=PATH", help="An aligner; may be repeated.")
]


def main() -> None:
    """The console script."""
    app()


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"ram {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve one frozen language model with many small, swappable aligners."""


@app.command()
def version() -> None:
    """Show the version."""
    _print_version(True)


@app.command()
def serve(
    proposal: Annotated[str | None, typer.Argument(help="Directory or hub id of the frozen model.")] = None,
    aligner: AlignerFlags = None,
    aligners_dir: Annotated[Path | None, typer.Option(help="Watched; NAME/ or NAME/VERSION/ inside.")] = None,
    preload: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of these, load at once; or all. May be repeated."),
    ] = None,
    aligner_memory: Annotated[str | None, typer.Option(help="Room for all aligners, such as 8GiB.")] = None,
    aligner_wait_s: Annotated[
        float | None, typer.Option(help="How long requests wait for an aligner that is being loaded.")
    ] = None,
    max_aligner_loads: Annotated[int | None, typer.Option(help="Verified or loaded at once.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Serve the embedded demo.")] = False,
    config: Annotated[Path | None, typer.Option(help="Settings file; otherwise ./ram.toml.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The proposal's name in the API.")] = None,
    default_aligner: Annotated[str | None, typer.Option(help="Answers where no model is named.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, …")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, …")] = None,
    quantization: Annotated[str | None, typer.Option(help="Weights as none, int8, int4, fp8.")] = None,
    attention: Annotated[str | None, typer.Option(help="auto, triton, torch or an extra's name.")] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile layers at start.")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="GPUs that share the proposal.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="Room for keys and values, such as 2GiB.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences that run at once.")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Tokens that enter a step.")] = None,
    max_chunk_tokens: Annotated[int | None, typer.Option(help="Of these, prompts beside streams.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Sequences that may wait.")] = None,
    prefix_cache: Annotated[
        bool | None, typer.Option("--prefix-cache/--no-prefix-cache", help="Keep known prefixes of prompts.")
    ] = None,
    cuda_graphs: Annotated[
        bool | None, typer.Option("--cuda-graphs/--no-cuda-graphs", help="Capture steps on CUDA.")
    ] = None,
    admin_host: Annotated[str | None, typer.Option(help="Where the admin's own port is bound.")] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="A port for the admin API alone; 0 takes a free one.")
    ] = None,
    vllm_lora_api: Annotated[
        bool, typer.Option("--vllm-lora-api", help="vLLM's paths that load and unload adapters, too.")
    ] = False,
    tenants_file: Annotated[Path | None, typer.Option(help="Who may call; see `ram tenant`.")] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Without keys, serve others than this machine, too.")
    ] = False,
    usage_log: Annotated[Path | None, typer.Option(help="A line of JSON for each request.")] = None,
    engine: Annotated[str | None, typer.Option(help="process, or thread: in the server's own.")] = None,
    max_body_bytes: Annotated[str | None, typer.Option(help="Largest request, such as 4MiB.")] = None,
    drain_s: Annotated[float | None, typer.Option(help="Unready, but open, so long after SIGTERM.")] = None,
    shutdown_grace_s: Annotated[float | None, typer.Option(help="Time for running answers to end.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run models' code.")] = False,
) -> None:
    """Serve a proposal and its aligners; without a proposal, the embedded demo."""
    from server.commands.serve import run
    from server.settings import load_settings

    try:
        settings = load_settings(
            config,
            proposal=proposal,
            aligners=aligner,
            aligners_dir=aligners_dir,
            preload=preload,
            aligner_memory=aligner_memory,
            aligner_wait_s=aligner_wait_s,
            max_aligner_loads=max_aligner_loads,
            demo=demo or None,
            served_model_name=served_model_name,
            default_aligner=default_aligner,
            host=host,
            port=port,
            admin_host=admin_host,
            admin_port=admin_port,
            vllm_lora_api=vllm_lora_api or None,
            tenants_file=tenants_file,
            allow_anonymous=allow_anonymous or None,
            usage_log=usage_log,
            device=device,
            dtype=dtype,
            quantization=quantization,
            attention=attention,
            compile=compile_,
            tensor_parallel=tensor_parallel,
            max_model_len=max_model_len,
            kv_memory=kv_memory,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            max_chunk_tokens=max_chunk_tokens,
            max_queue=max_queue,
            prefix_cache=prefix_cache,
            cuda_graphs=cuda_graphs,
            engine=engine,
            max_body_bytes=max_body_bytes,
            drain_s=drain_s,
            shutdown_grace_s=shutdown_grace_s,
            log_level=log_level,
            trust_remote_code=trust_remote_code or None,
        )
        run(settings)
    except RamError as error:
        fail(error)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Where the server is.")] = DEFAULT_URL,
    aligner: Annotated[str, typer.Option(help="Name of the aligner to begin with.")] = "",
    system: Annotated[str, typer.Option(help="A system message.")] = "",
) -> None:
    """Talk to a server in the terminal; /help lists what else can be typed."""
    from server.commands.chat import Conversation, converse

    try:
        converse(Conversation(url, aligner=aligner, system=system))
    except RamError as error:
        fail(error)


@app.command()
def check(
    proposal: Annotated[str, typer.Argument(help="Directory or hub id of the frozen model.")],
    aligner: AlignerFlags = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, …")] = "auto",
    max_model_len: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")] = 0,
) -> None:
    """Tell, without reading any weights, whether a proposal and its aligners can be served."""
    from server.commands.check import check_pair
    from server.settings import aligner_table

    try:
        aligners = aligner_table(aligner or [])
        is_fine = check_pair(proposal, aligners, device=device, dtype=dtype, max_model_len=max_model_len)
    except (RamError, ValueError) as error:
        fail(error)
    raise typer.Exit(0 if is_fine else 1)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="A TOML file; flags and --set go over it.")] = None,
    proposal: Annotated[str | None, typer.Option(help="Directory or hub id of the frozen model.")] = None,
    model: Annotated[str | None, typer.Option(help="The small model that becomes the aligner.")] = None,
    data: Annotated[str | None, typer.Option(help="A JSONL file, or hf:NAME[:CONFIG].")] = None,
    output: Annotated[str | None, typer.Option(help="The run's directory.")] = None,
    name: Annotated[str | None, typer.Option(help="The aligner's name; default: the directory's.")] = None,
    objective: Annotated[str | None, typer.Option(help="ram, ram-dpo, ram-token or sft.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Any field; may be repeated."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Only this: warmup, synthesize, fit or package; may be repeated."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew: these stages, or all whose inputs have changed.")
    ] = False,
    install: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also put it into a server's --aligners-dir.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Train an aligner for a proposal: its own answers, the fit, and a package that a server takes."""
    from server.commands.train import run

    flags = {
        "proposal": proposal,
        "fit.model": model,
        "data.train": data,
        "output": output,
        "package.name": name,
        "fit.objective": objective,
    }
    try:
        run(config, flags, settings or [], stage or [], restart=restart, install=install, is_json=is_json)
    except (RamError, OSError) as error:
        fail(error)


@demo_app.command("build")
def demo_build(
    out: Annotated[
        Path | None, typer.Option(help="Where to put the bundle; default: the embedded one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed builds the same bundle.")] = 0,
    work: Annotated[
        Path | None, typer.Option(help="Keep the training runs here, and go on with those that are here.")
    ] = None,
) -> None:
    """Train the demo's proposal and aligners from scratch, with the stages of `ram train`."""
    from server.commands.demo import build

    try:
        build(out, seed, work)
    except (RamError, OSError) as error:
        fail(error)


@demo_app.command("data")
def demo_data(
    out: Annotated[Path, typer.Argument(help="Directory to write to.")],
    num_prompts: Annotated[int, typer.Option(min=1, help="Training records of each aligner.")] = 4000,
    max_held_out: Annotated[int, typer.Option(min=10, help="Records to judge each aligner by.")] = 400,
    seed: Annotated[int, typer.Option(help="The same seed draws the same data.")] = 0,
) -> None:
    """Write what a first `ram train` needs: data, a proposal, and a small model to begin with."""
    from server.commands.demo import data

    try:
        data(out, num_prompts, max_held_out, seed)
    except OSError as error:
        fail(error)


@demo_app.command("eval")
def demo_eval(
    bundle: Annotated[
        Path | None, typer.Option(help="The bundle to measure; default: the embedded one.")
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the demo on prompts that it was not trained on; exit code 1 if a bar is missed."""
    from server.commands.demo import evaluate

    try:
        is_fine = evaluate(bundle, is_json=is_json)
    except (RamError, OSError) as error:
        fail(error)
    raise typer.Exit(0 if is_fine else 1)
