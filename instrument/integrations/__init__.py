"""Callbacks for trainers, each in a module that needs its trainer: `lightning` and `transformers`.

`instrument.watch(model)` before the training works in each of them. A callback writes to the trainer's own TensorBoard
logger besides, at the numbers of steps that the trainer itself uses there.
"""
