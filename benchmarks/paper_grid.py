"""v2 against PyTorch's attentions on cells of the FlashAttention papers' grid, on one GPU.

    python benchmarks/paper_grid.py run OUT.json [--quick]   # measure (a CUDA GPU)
    python benchmarks/paper_grid.py readme                   # rewrite the README's tables

16384 tokens, hidden size 2048, bf16. All contestants in one process, in interleaved rounds long
enough for the power limit to act on all alike; the median of the rounds counts. TFLOP/s are
4 * batch * nheads * seqlen^2 * headdim, half of that when causal, 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "paper_grid_v2.json"
TOKENS, HIDDEN = 16384, 2048
SEQLENS = (1024, 4096, 16384)
ROUNDS, ROUND_MS = 8, 120.0
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NAMES = {
    "triflash_v2": "triflash v2",
    "flex": "FlexAttention, compiled",
    "sdpa_flash": "SDPA flash (FA2)",
    "sdpa_cudnn": "SDPA cuDNN",
}


def _milliseconds(call: Callable[[], Any], times: int) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Milliseconds a call, by contestant and round."""
    times = {}
    for name, call in calls.items():
        _milliseconds(call, 2)
        times[name] = max(3, round(ROUND_MS / _milliseconds(call, 5)))
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(ROUNDS):
        for name in order:
            rounds[name].append(_milliseconds(calls[name], times[name]))
        order = order[1:] + order[:1]  # the power limit punishes whoever follows a hot one
    return rounds


def _contestants(q, k, v, causal):  # type: ignore[no-untyped-def]
    """name -> (call, inputs); torch's take heads first, as views of the same memory."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    import triflash

    torch._dynamo.reset()
    flex = torch.compile(flex_attention, dynamic=False)
    heads_first = [t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    seqlen = q.shape[1]
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seqlen, seqlen)

    def sdpa(backend: SDPBackend) -> Callable[[], Any]:
        def call() -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    *heads_first, is_causal=causal
                )

        return call

    return {
        "triflash_v2": (
            lambda: triflash.attention(q, k, v, causal=causal, implementation="v2"),
            (q, k, v),
        ),
        "flex": (lambda: flex(*heads_first, block_mask=mask), heads_first),
        "sdpa_flash": (sdpa(SDPBackend.FLASH_ATTENTION), heads_first),
        "sdpa_cudnn": (sdpa(SDPBackend.CUDNN_ATTENTION), heads_first),
    }


def run(output: Path, quick: bool, commit: str | None) -> None:
    import torch
    import torch._functorch.config
    import triton

    torch._functorch.config.donated_buffer = False  # flex's backward is timed more than once
    gpu = torch.cuda.get_device_properties(0)
    if commit is None:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {
        "gpu": gpu.name,
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }
    records = []
    for head_dim in (64, 128):
        for causal in (False, True):
            for seqlen in SEQLENS[1:2] if quick else SEQLENS:
                batch, nheads = TOKENS // seqlen, HIDDEN // head_dim
                q, k, v, dout = (
                    torch.randn(batch, seqlen, nheads, head_dim, device="cuda").bfloat16()
                    for _ in range(4)
                )
                for t in (q, k, v):
                    t.requires_grad_()
                flops = 4 * batch * nheads * seqlen**2 * head_dim * (0.5 if causal else 1.0)
                contestants = _contestants(q, k, v, causal)
                forward, backward, outputs = {}, {}, {}
                for name, (call, inputs) in contestants.items():
                    out = call()
                    grad = dout if name == "triflash_v2" else dout.transpose(1, 2)
                    outputs[name] = out.detach() if out.shape == q.shape else out.transpose(1, 2)
                    forward[name] = torch.no_grad()(call)
                    backward[name] = lambda o=out, i=inputs, g=grad: torch.autograd.grad(
                        o, i, g, retain_graph=True
                    )
                for name, out in outputs.items():
                    error = (out - outputs["triflash_v2"]).abs().max().item()
                    assert error < 0.05, f"{name} disagrees with triflash by {error}"
                for direction, calls, factor in (("fwd", forward, 1.0), ("bwd", backward, 2.5)):
                    for name, times in interleaved(calls).items():
                        low, median, high = statistics.quantiles(times, n=4)
                        records.append(
                            {
                                "preset": "paper",
                                "contestant": name,
                                "direction": direction,
                                "dtype": "bfloat16",
                                "batch": batch,
                                "seqlen_q": seqlen,
                                "seqlen_k": seqlen,
                                "nheads": nheads,
                                "nheads_k": nheads,
                                "head_dim": head_dim,
                                "causal": causal,
                                "ms_median": round(median, 4),
                                "ms_iqr": round(high - low, 4),
                                "rounds": ROUNDS,
                                "tflops": round(flops * factor / median / 1e9, 1),
                                "reason": None,
                                **about,
                            }
                        )
                    cell = records[-len(calls) :]
                    ours = cell[0]["tflops"]
                    print(
                        f"{direction} d{head_dim} {'causal' if causal else 'full  '} {seqlen:5d}: "
                        + "  ".join(
                            f"{r['contestant']} {r['tflops']:.0f} ({ours / r['tflops']:.2f})"
                            for r in cell
                        ),
                        flush=True,
                    )
                output.write_text(json.dumps(records, indent=1) + "\n")


def tables(records: list[dict[str, Any]]) -> str:
    """Markdown: one table a direction; each cell TFLOP/s, and v2's ratio to that contestant."""
    first = records[0]
    lines = [
        f"TFLOP/s on one {first['gpu']}, {first['dtype']}, {TOKENS} tokens, hidden size {HIDDEN} "
        f"(torch {first['torch']}, triton {first['triton']}, commit {first['commit']}, "
        f"{first['date']}); in brackets how many times as fast v2 is.",
    ]
    for direction, title in (("fwd", "Forward"), ("bwd", "Backward")):
        lines += ["", f"**{title}**", ""]
        lines.append("| head dim | mask | seqlen | " + " | ".join(NAMES.values()) + " |")
        lines.append("|---|---|---|" + "---|" * len(NAMES))
        cells: dict[tuple[Any, ...], dict[str, float]] = {}
        for r in records:
            if r["direction"] == direction:
                cell = (r["head_dim"], r["causal"], r["seqlen_q"])
                cells.setdefault(cell, {})[r["contestant"]] = r["tflops"]
        for (head_dim, causal, seqlen), row in sorted(cells.items()):
            ours = row["triflash_v2"]
            values = [f"**{ours:.0f}**"]
            values += [f"{row[n]:.0f} ({ours / row[n]:.2f}x)" for n in list(NAMES)[1:]]
            mask = "causal" if causal else "full"
            lines.append(f"| {head_dim} | {mask} | {seqlen} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def readme() -> None:
    """Put the tables made from the committed JSON between the README's markers."""
    path = ROOT / "README.md"
    text = path.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    table = tables(json.loads(RESULT.read_text()))
    path.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="measure on the GPU here")
    runner.add_argument("output", type=Path)
    runner.add_argument("--quick", action="store_true", help="sequence length 4096 only")
    runner.add_argument("--commit", help="what is measured, where there is no repository")
    commands.add_parser("readme", help="rewrite the README's tables from the committed JSON")
    args = parser.parse_args()
    if args.command == "readme":
        readme()
    else:
        run(args.output, args.quick, args.commit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
