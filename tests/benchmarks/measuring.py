"""One tensor: nanoseconds an element of `measure`, beside `sum()` and `SummaryWriter.add_histogram`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.table import Table

from .harness import interleaved, machine

SIZES = ((1_000, 300), (100_000, 20), (10_000_000, 1))


def run(console: Console, rounds: int = 15) -> None:
    """Print the table, on one thread."""
    import torch

    from instrument import measure

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table(title=f"Measuring one tensor, median of {rounds} ({machine()})")
    for heading in (
        "type",
        "elements",
        "sum() ns/el",
        "measure ns/el",
        "us a call",
        "add_histogram ns/el",
        "add_histogram : measure",
    ):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as directory:
        writer = torch.utils.tensorboard.SummaryWriter(directory)
        for dtype in (torch.float32, torch.bfloat16):
            for size, calls in SIZES:
                values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)

                def add(values: torch.Tensor = values) -> None:
                    writer.add_histogram("x", values, 0)
                    writer.flush()  # its thread would slow down whatever is timed next

                contestants: dict[str, Callable[[], object]] = {
                    "sum": values.sum,
                    "measure": partial(measure, values),
                    "add": add,
                }
                taken = interleaved(contestants, rounds, calls)
                per_element = {name: 1e9 * timing.median / size for name, timing in taken.items()}
                table.add_row(
                    str(dtype).removeprefix("torch."),
                    f"{size:,}",
                    f"{per_element['sum']:.2f}",
                    f"{per_element['measure']:.2f}",
                    f"{1e6 * taken['measure'].median:,.0f}",
                    f"{per_element['add']:.1f}",
                    f"{per_element['add'] / per_element['measure']:.1f}",
                )
        writer.close()
    torch.set_num_threads(threads)
    console.print(table)
