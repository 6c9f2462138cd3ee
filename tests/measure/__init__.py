"""Tests of measuring: a tensor becomes a sketch."""
