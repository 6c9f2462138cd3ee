"""What TensorBoard is given of a step: one event with all scalars and histograms.

The histograms of all tensors are worked out together, since the arrays of one are shorter than the calls of NumPy:
a thousand take about as long as fifty would one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

from instrument.measure.histogram import Histograms, Knots, histograms, log10_histograms
from instrument.measure.sketch import Sketch
from instrument.record.buffer import StepRecord
from instrument.record.tags import COUNTS, LOG10, LOG10_KINDS, STATISTICS, parse_tag

__all__ = ["record_values"]


def record_values(record: StepRecord, scalars: bool, with_histograms: bool, counted: set[str]) -> list[Summary.Value]:
    """What TensorBoard is given of a step record.

    NaN and Inf reach no edge and no bucket: one such step would blank the card for every step.

    Args:
        record: The sketches of a step.
        scalars: Whether statistics are given.
        with_histograms: Whether histograms are given.
        counted: Tags of counts of NaN and Inf that were above zero before; added to here.

    Returns:
        Scalars and histograms, in the order of the record.
    """
    values: list[Summary.Value] = []
    if scalars:
        for tag, sketch in record.items():
            values += _scalar_values(tag, sketch, counted)
    if with_histograms:
        measured = [(tag, sketch) for tag, sketch in record.items() if sketch.count]
        spread = [(tag, sketch) for tag, sketch in measured if _is_spread(tag, sketch)]
        even = [(tag, sketch) for tag, sketch in measured if not _is_spread(tag, sketch)]
        values += _histogram_values(even, with_log10=False)
        values += _histogram_values(spread, with_log10=True)
    return values


def _scalar_values(tag: str, sketch: Sketch, counted: set[str]) -> Iterator[Summary.Value]:
    section, _, name = tag.partition("/")
    if sketch.count:
        for statistic, compute in STATISTICS.items():
            yield Summary.Value(tag=f"{section}.{statistic}/{name}", simple_value=compute(sketch))
    for statistic, count in COUNTS.items():
        number, scalar_tag = count(sketch), f"{section}.{statistic}/{name}"
        if number or scalar_tag in counted:
            counted.add(scalar_tag)
            yield Summary.Value(tag=scalar_tag, simple_value=number)


def _is_spread(tag: str, sketch: Sketch) -> bool:
    """Whether a sketch has a histogram of log10 of its magnitudes too."""
    parsed = parse_tag(tag)
    return parsed is not None and parsed.kind in LOG10_KINDS and sketch.count > sketch.zero_count


def _histogram_values(measured: list[tuple[str, Sketch]], with_log10: bool) -> Iterator[Summary.Value]:
    if not measured:
        return
    knots = Knots([sketch.finite() for _, sketch in measured])
    for (tag, sketch), proto in zip(measured, _protos(histograms(knots)), strict=True):
        proto.sum, proto.sum_squares = sketch.total, sketch.total_squares
        yield Summary.Value(tag=tag, histo=proto)
    if with_log10:
        for (tag, _), proto in zip(measured, _protos(log10_histograms(knots)), strict=True):
            section, _, name = tag.partition("/")
            yield Summary.Value(tag=f"{section}.{LOG10}/{name}", histo=proto)


def _protos(found: Histograms) -> Iterator[HistogramProto]:
    counts, limits, first = found.counts.tolist(), found.limits.tolist(), found.first.tolist()
    start = 0
    for index, end in enumerate(found.ends.tolist()):
        buckets = counts[start:end]
        yield HistogramProto(
            min=first[index],
            max=limits[end - 1],
            num=sum(buckets),
            bucket_limit=limits[start:end],
            bucket=buckets,
        )
        start = end
