"""Tests of capturing: which tensors, and when."""
