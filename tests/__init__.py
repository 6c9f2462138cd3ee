"""Tests of `instrument`; each opens with the sentence that it proves."""
