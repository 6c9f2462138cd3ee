"""Sketches are kept, step by step, and written: tags, history, run directories, event files, writers."""
