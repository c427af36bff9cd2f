"""Every knob of an engine, each default once. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AlignerSource:
    """Where an aligner's model comes from: its name in the engine, and a local directory or hub id.

    Names are "NAME", "NAME@VERSION", or "NAME@VERSION/PART" for a further model of the same aligner. What is
    not `required` may fail to load: then the engine begins without the aligner.
    """

    name: str
    source: str
    required: bool = True

    @property
    def aligner(self) -> str:
        """The aligner that the model is a part of."""
        name, at, rest = self.name.partition("@")
        return f"{name}{at}{rest.partition('/')[0]}"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What to load and how much room to give it.

    `proposal` is a local directory or a hub id. `device` "auto" takes CUDA if there, else CPU; `dtype`
    "auto" takes the checkpoint's own on CUDA and float32 on CPU. `max_model_len` 0 takes the proposal's
    (and the aligners') own limit. `kv_memory_bytes` 0 takes 60 % of what is free after loading on CUDA,
    1 GiB on CPU. `max_batch` sequences run at once, and `max_queue` more may wait.

    At most `max_step_tokens` tokens enter a step (0: 8192 on CUDA, 512 on CPU). Beside sequences that are
    being written, at most `max_chunk_tokens` of them are of prompts (0: 2048 on CUDA, 64 on CPU), so that a
    long prompt delays nobody's next token by much.

    `attention` is computed by "triton", "torch", "flash_attn" or "flashinfer"; "auto" takes Triton's kernels
    on CUDA and PyTorch elsewhere.

    `compile` turns layers into compiled code at load, in models that have a forward of their own. It takes up
    to some minutes, once, and on CPU a C++ compiler.

    `quantization` stores the proposal's weights as int8, int4 or fp8 while it loads them (none: as they are).
    `tensor_parallel` processes, begun by torchrun, share the proposal's layers, a device each.

    With `aligner_bank`, aligners of one architecture share a module, and one forward serves any mix of them;
    LoRA adapters of one base always do. Such a module has room for `aligner_slots` aligners, or if there are
    more for those: another can be loaded into a slot to spare while it serves.

    All aligners together may hold `aligner_memory_bytes` (0: what they hold at start, and half of what is
    free on the device then).

    With `prefix_cache`, requests begin behind the longest prefix that an earlier one of their tenant left in
    KV memory. `is_overlapping` plans a step while the one before runs (None: on CUDA); `has_static_shapes`
    pads steps that only draw, so that few different shapes occur. `cuda_graphs` captures such steps before
    serving (None: on CUDA); on CPU they are run anew on the memory that a graph would have, which is slower.
    """

    proposal: str
    aligners: tuple[AlignerSource, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int = 0
    kv_memory_bytes: int = 0
    page_size: int = 16
    max_batch: int = 32
    max_step_tokens: int = 0
    max_chunk_tokens: int = 0
    max_queue: int = 256
    prefix_cache: bool = True
    aligner_bank: bool = True
    aligner_slots: int = 0
    aligner_memory_bytes: int = 0
    is_overlapping: bool | None = None
    has_static_shapes: bool = False
    cuda_graphs: bool | None = None
    attention: str = "auto"
    compile: bool = False
    trust_remote_code: bool = False
    quantization: str = "none"
    tensor_parallel: int = 1
