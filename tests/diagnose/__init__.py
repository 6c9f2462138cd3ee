"""Tests of reports, pictures and comparisons."""
