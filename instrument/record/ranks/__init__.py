"""Several processes: where this one stands among them, and how their sketches become one.

* `group`: this process's rank, and a process group of our own over which values are combined
* `merging`: the sketches of a step record, summed over the ranks
"""
