"""Benchmarks: ratios against rivals in the same run, interleaved; none is part of the test suite."""
