"""Several processes on gloo: what is measured, merged and written by which."""
