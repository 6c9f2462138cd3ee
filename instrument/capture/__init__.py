"""Which tensors are watched, and when: names, outputs, steps and hooks; no statistic is known here."""
