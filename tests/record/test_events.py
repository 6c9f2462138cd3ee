"""Reading event files back: whole, torn and altered ones, and the buffer that fills them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import instrument
from instrument import RunError, measure
from instrument.capture.names import Site
from instrument.config import KINDS
from instrument.diagnose.report import Report
from instrument.record.buffer import Buffer
from instrument.record.events import Damage, check_file, scan
from instrument.record.reading import read_scalars
from instrument.record.runs import event_files
from instrument.record.tags import Tag, parse_tag, tag_of

from ..training import mlp, read_back, train


def make_run(logdir: Path, steps: int = 6) -> Path:
    model = mlp()
    with instrument.watch(model, interval=2, scalar_interval=1, logdir=logdir, strict=True) as watcher:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps)
        watcher.writer.add_scalar("loss", 1.0, 0)
        watcher.writer.add_text("note", "ours", 0)
    (path,) = event_files(logdir)
    return path


def test_what_we_read_is_what_tensorboard_reads(tmp_path: Path) -> None:
    """Our reader and TensorBoard's give the same scalars; tags that are not ours are passed over."""
    make_run(tmp_path)
    theirs = read_back(tmp_path)[1]
    ours = read_scalars(tmp_path)
    assert len(ours) == len(theirs) - 1
    for tag, values in ours.items():
        assert tag.statistic is not None
        assert values == theirs[tag_of(Site(tag.kind, tag.name), tag.statistic)]


def test_a_report_of_the_files_equals_the_live_one(tmp_path: Path) -> None:
    """A report read from the event files has the rows of the live report, to float32."""
    model = mlp()
    watcher = instrument.watch(model, kinds=KINDS, interval=1, logdir=tmp_path, strict=True)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    live = watcher.report()
    watcher.close()
    stored = Report.of_run(tmp_path)
    assert [(row.kind, row.name, row.step) for row in live.rows] == [
        (row.kind, row.name, row.step) for row in stored.rows
    ]
    for one, other in zip(live.rows, stored.rows, strict=True):
        for statistic, value in other.values.items():
            assert value == pytest.approx(one.values[statistic], rel=1e-6, abs=1e-30)


def test_damage_is_found_where_it_is(tmp_path: Path) -> None:
    """A cut tail, a flipped bit in data and one in a length are each found at the right byte."""
    path = make_run(tmp_path)
    whole = path.read_bytes()
    offsets, offset = [], 0
    for data in scan(path):
        assert isinstance(data, bytes)
        offsets.append(offset)
        offset += len(data) + 16
    assert offset == len(whole)
    assert check_file(path).damage is None
    assert check_file(path).records == len(offsets)

    path.write_bytes(whole[:-5])
    size = len(whole) - 16 - offsets[-1]
    assert check_file(path).damage == Damage(offsets[-1], f"the last record is cut after {size - 1} of {size} bytes")
    path.write_bytes(whole[: offsets[-1] + 7])
    assert check_file(path).damage == Damage(offsets[-1], "the last record is cut within its header (7 bytes)")
    flipped = bytearray(whole)
    flipped[offsets[3] + 20] ^= 1
    path.write_bytes(flipped)
    assert check_file(path).damage == Damage(offsets[3], "the data of a record does not agree with its checksum")
    flipped = bytearray(whole)
    flipped[offsets[2] + 1] ^= 64
    path.write_bytes(flipped)
    found = check_file(path)
    assert found.damage == Damage(offsets[2], "the length of a record does not agree with its checksum")
    assert found.records == 2


def test_a_torn_file_is_read_up_to_the_tear(tmp_path: Path) -> None:
    """Of a torn file everything before the tear is read."""
    path = make_run(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    values = read_scalars(tmp_path)[Tag("parameters", "rms", "0.weight")]
    assert 0 < len(values) < 6


def test_files_without_anything_of_ours_are_told(tmp_path: Path) -> None:
    """A run of another writer is told for what it is."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
    with pytest.raises(RunError, match="nothing that a watch wrote"):
        read_scalars(tmp_path)


@pytest.mark.parametrize(
    ("tag", "parsed"),
    [
        ("Gradients/a.b", Tag("gradients", None, "a.b")),
        ("ActivationGradients.log10/a/b", Tag("activation_gradients", "log10", "a/b")),
        ("loss/train", None),
        ("Gradients", None),
        ("Gradients/", None),
        ("gradients/a", None),
    ],
)
def test_tags_are_taken_apart(tag: str, parsed: Tag | None) -> None:
    """A tag of ours is taken apart, and others are known for what they are."""
    assert parse_tag(tag) == parsed
    if parsed is not None:
        assert tag_of(Site(parsed.kind, parsed.name), parsed.statistic) == tag


def test_the_buffer_merges_what_belongs_together() -> None:
    """Many sketches of one site become one; a step closed twice keeps the first and adds what is new."""
    buffer = Buffer(history=2)
    a, b = Site("activations", "a"), Site("gradients", "b")
    buffer.open(0)
    for number in range(30):
        buffer.add(a, measure(torch.full((2,), float(number))))
    record = buffer.close()
    assert record is not None
    assert (record.step, record["Activations/a"].count, record["Activations/a"].mean) == (0, 60, 14.5)
    buffer.open(0)
    buffer.add(a, measure(torch.ones(1)))
    buffer.add(b, measure(torch.ones(1)))
    late = buffer.close()
    assert late is not None
    assert list(late) == ["Gradients/b"]
    assert list(buffer.history[-1]) == ["Activations/a", "Gradients/b"]
    assert buffer.history[-1]["Activations/a"].count == 60
    assert buffer.close() is None
    for step in (1, 2):
        buffer.open(step)
        buffer.add(a, measure(torch.ones(1)))
        buffer.close()
    assert [record.step for record in buffer.history] == [1, 2]
