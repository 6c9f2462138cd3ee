"""Tests of keeping and writing sketches."""
